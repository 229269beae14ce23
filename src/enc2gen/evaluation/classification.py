"""Classification by a bridge: the label that the LLM finds likeliest behind the soft prefix, or the one it writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal

from enc2gen.errors import ConfigError
from enc2gen.evaluation.accuracy import (
    accuracy,
    accuracy_by_script,
    correctness,
    macro_accuracy,
    macro_difference,
    paired_over_seeds,
)
from enc2gen.evaluation.label_scoring import Classification, ReadSource, TreeScorer
from enc2gen.generation.bridge_generator import BridgeGenerator
from enc2gen.generation.decoding import DecodingConfig
from enc2gen.generation.generator import pad_rows
from enc2gen.models.bridge.llm_inputs import read_mask
from enc2gen.models.bridge.modeling import BridgeForConditionalGeneration
from enc2gen.models.bridge.state_cache import FrozenStateCache
from enc2gen.tokenization.bridge_codec import BridgeCodec

__all__ = [
    "Classification",
    "LabelScorer",
    "Method",
    "accuracy",
    "accuracy_by_script",
    "classify",
    "correctness",
    "macro_accuracy",
    "macro_difference",
    "paired_over_seeds",
]

Method = Literal["likelihood", "generation"]
"""`likelihood`: the likeliest of the labels. `generation`: what greedy search writes (arXiv 2508.09091)."""


class LabelScorer(TreeScorer[tuple[list[int], list[int]]]):
    """How likely a bridge finds each label behind each text: :meth:`log_likelihoods`.

    A source is read once by encoder and LLM, whatever the number of labels.

    Args:
        model: a bridge; it is put into evaluation mode.
        codec: turns texts, labels and the prompt into ids.
        labels: as the bridge was trained to write them.
        cache: states of the model's frozen encoder; the texts' are added, so that the next bridge that reads the same
            ones finds them.

    Raises:
        ConfigError: no label, an empty one, one longer than the codec's targets, or two with the same tokens.
    """

    def __init__(
        self,
        model: BridgeForConditionalGeneration,
        codec: BridgeCodec,
        labels: Sequence[str],
        cache: FrozenStateCache | None = None,
    ) -> None:
        self.model, self.codec, self._cache = model.eval(), codec, cache
        super().__init__(model.llm, labels, _label_ids(codec, labels))

    def _encode(self, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        sources = self.codec.encode_sources(texts)
        if self._cache is not None:
            self._cache.add(sources)
        return list(zip(sources, self.codec.encode_prompts(texts), strict=True))

    def _length(self, source: tuple[list[int], list[int]]) -> int:
        return len(source[0]) + len(source[1])

    def _read(self, sources: Sequence[tuple[list[int], list[int]]]) -> ReadSource:
        model: Any = self.model
        ids, mask = pad_rows([source for source, _ in sources], self.codec.encoder_pad_id, model.device)
        # Padded on the left, all prompts end at the last position, where the label begins.
        heads, head_mask = pad_rows([head for _, head in sources], self.codec.llm_pad_id, model.device, left=True)
        known = {} if self._cache is None else self._cache.lookup([tuple(source) for source, _ in sources])
        states = {name: tensor.to(model.device) for name, tensor in known.items()}
        encoded = model.get_encoder()(input_ids=ids, attention_mask=mask, **states)
        output = model(
            attention_mask=mask,
            encoder_outputs=encoded,
            decoder_input_ids=heads,
            decoder_attention_mask=head_mask,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        cache = getattr(cache, "self_attention_cache", cache)
        has_bos = cache.get_seq_length() > encoded.prefix_mask.shape[1] + heads.shape[1]
        reading: Callable[[], AbstractContextManager[Any]] = nullcontext
        if model.aligner is not None:
            reading = partial(model.aligner.reading, self.llm, encoded.aligner_keys_values, encoded.source_mask)
        llm_mask = read_mask(encoded.prefix_mask.to(head_mask.dtype), head_mask, has_bos=has_bos)
        return ReadSource(cache, llm_mask, output.logits[:, -1], reading)


def _label_ids(codec: BridgeCodec, labels: Sequence[str]) -> list[list[int]]:
    if empty := [label for label in labels if not label.strip()]:
        raise ConfigError(f"a label is {empty[0]!r}", where="labels", remedy="give every label a name")
    before = codec.truncated
    ids = codec.encode_targets(list(labels))
    if codec.truncated > before:
        codec.truncated = before
        raise ConfigError(
            f"a label is longer than {codec.max_target_length} tokens",
            where="labels",
            remedy="raise max_target_length of the codec",
        )
    return ids


def classify(
    model: BridgeForConditionalGeneration,
    codec: BridgeCodec,
    texts: Sequence[str],
    labels: Sequence[str],
    *,
    method: Method = "likelihood",
    batch_size: int = 32,
    on_batch: Callable[[int], None] | None = None,
    cache: FrozenStateCache | None = None,
) -> Classification:
    """Label every text.

    Args:
        model: a bridge; it is put into evaluation mode.
        codec: of the bridge, with the task's prompt.
        labels: as the bridge was trained to write them.
        method: see `Method`. By generation, what is written is compared as it is: it need not be a label.
        batch_size: texts that are read at once, of like lengths.
        on_batch: called with the number of texts finished so far.
        cache: of `LabelScorer`; generation makes no use of it.

    Raises:
        ConfigError: unknown method, no label, two with the same tokens.
        DataError: a text that cannot be encoded.
    """
    if method == "likelihood":
        scorer = LabelScorer(model, codec, labels, cache)
        return Classification.likeliest(
            scorer.labels, scorer.log_likelihoods(texts, batch_size=batch_size, on_batch=on_batch)
        )
    if method != "generation":
        raise ConfigError(f"{method!r} is unknown", where="method", remedy='"likelihood" or "generation"')
    # One token more than the longest label: what is written longer than any label is none.
    longest = max(map(len, _label_ids(codec, labels)), default=0) + 1
    config = DecodingConfig(num_beams=1, max_new_tokens=longest, batch_size=batch_size)
    written = BridgeGenerator(model, codec).generate(texts, config=config, on_batch=on_batch)
    return Classification(tuple(text.strip() for text in written), tuple(labels))
