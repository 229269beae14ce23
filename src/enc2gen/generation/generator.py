"""Text in, text out: tokenisation, length-sorted batches, decoding, original order restored."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel, PreTrainedTokenizerBase

import enc2gen.models.swcm  # noqa: F401  registers the model with transformers
from enc2gen.corpora.languages import normalise_language
from enc2gen.encoders.donor import donor_for
from enc2gen.encoders.loading import load_tokenizer
from enc2gen.encoders.safe_weights import refuse_pickles
from enc2gen.errors import CheckpointError, ConfigError, Enc2genError, LanguageError, ModelError
from enc2gen.generation.decoding import DecodingConfig
from enc2gen.generation.engine.beam import Hypothesis
from enc2gen.generation.engine.engine import unsupported
from enc2gen.generation.glossary import Glossary, Terms
from enc2gen.generation.mbr import rank_by_utility
from enc2gen.generation.native import NativeWriter, Source
from enc2gen.generation.outputs import Output
from enc2gen.generation.shortlist import Shortlist
from enc2gen.tokenization.layout import TextLayout
from enc2gen.tokenization.tokenizer import TextCodec


@dataclass(frozen=True)
class Request:
    """What is to be written, whatever the texts are; attributes as the arguments of :meth:`Generator.generate_n_best`.

    Attributes:
        target, source: languages.
        scored: whether scores are wanted, which the native engine alone has.
    """

    target: str | None
    source: str | None
    config: DecodingConfig
    seed: int | None
    glossary: Glossary | None
    n: int = 1
    scored: bool = False
    first_line: int = 0

    def check(self) -> None:
        """`ConfigError` where there cannot be so many outputs, or no such seed."""
        config = self.config
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ConfigError(f"the seed is {self.seed}", where="seed", remedy="give one from 0 to 2^63 - 1")
        drawn = config.do_sample and not config.mbr_samples
        most = config.mbr_samples or config.num_beams
        if self.n < 1 or (self.n > most and not drawn):
            kind, name = ("samples", "mbr_samples") if config.mbr_samples else ("beams", "num_beams")
            raise ConfigError(
                f"{self.n} outputs of {most} {kind}", where="n", remedy=f"give a {name} of {max(self.n, 1)} or more"
            )

    def native_only(self) -> list[str]:
        """What is asked for that only the native engine has."""
        asked = {"glossary": self.glossary is not None, "scores": self.scored}
        return [name for name, wanted in asked.items() if wanted]

    def score(self, hypothesis: Hypothesis) -> float:
        """The score of an output: greedy search's is divided by its length as those of beams are."""
        if self.config.samples or self.config.num_beams > 1:
            return hypothesis.score
        return hypothesis.score / (len(hypothesis.tokens) + hypothesis.ended) ** self.config.length_penalty

    def terms(self, text: str) -> Terms:
        """What the glossary says about `text`."""
        return Terms() if self.glossary is None else self.glossary.terms(text)


class Generator:
    """A model and its tokenizer, ready to write.

    Args:
        model: with `config.languages` (tag -> id of its token).
        tokenizer: that knows the language tokens.
        max_source_length: longest source in tokens, special tokens included; longer ones are cut.
        shortlist: tokens to be written, by language; all by default.

    Raises:
        ModelError: model and tokenizer, or the shortlist, do not belong together.
    """

    codec: Any  # of this class a TextCodec; what it encodes, only the class that owns it looks into
    shortlist: Shortlist | None = None

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_source_length: int | None = None,
        shortlist: Shortlist | None = None,
    ) -> None:
        languages: Mapping[str, int] = getattr(model.config, "languages", None) or {}
        _check_pair(model, tokenizer, languages)
        self.model, self.tokenizer, self.languages = model.eval(), tokenizer, dict(languages)
        if shortlist is not None:
            shortlist.check(len(tokenizer))
        self.shortlist = shortlist
        limit = min(max_source_length or 512, tokenizer.model_max_length, _positions(model))
        layout = TextLayout.of(model.config)
        self.codec = TextCodec(
            tokenizer, self.languages, max_source_length=limit, max_target_length=limit, layout=layout
        )

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        shortlist: Shortlist | None = None,
    ) -> Generator:
        """Load a saved model and its tokenizer from a folder or the Hub; a bridge becomes a `BridgeGenerator`.

        Raises:
            CheckpointError: not a model of this kind, or truncated.
            ModelError: the shortlist is not for this model.
        """
        from enc2gen.generation.bridge_generator import BridgeGenerator  # a subclass of this one

        name = os.fspath(path)
        transformers.logging.disable_progress_bar()  # ours is the only progress shown
        if not Path(name).exists() and name.count("/") != 1:
            raise CheckpointError("there is no such model folder", where=name, remedy="check the path")
        refuse_pickles(name)
        try:
            model, info = AutoModelForSeq2SeqLM.from_pretrained(name, output_loading_info=True)
        except Enc2genError:
            raise
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CheckpointError(
                f"no generator can be loaded ({reason})",
                where=name,
                remedy="give a folder that `enc2gen run` or `save_pretrained` wrote completely",
            ) from error
        if info["missing_keys"]:
            raise CheckpointError(
                f"{len(info['missing_keys'])} tensors are missing, for example {sorted(info['missing_keys'])[0]}",
                where=name,
                remedy="save the model again; its weights are incomplete",
            )
        model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if model.config.model_type == "enc2gen-bridge":
            if shortlist is not None:
                raise ModelError("a bridge takes no shortlist", where=name, remedy="leave it out")
            return BridgeGenerator(model)
        return cls(model, load_tokenizer(name), shortlist=shortlist)

    def source_language(self, given: str | None) -> str | None:
        """The language of sources: as given, or the model's default."""
        if given is not None:
            return self._known(given, "source_language")
        return getattr(self.model.config, "default_source_language", None)

    def target_language(self, given: str | None) -> str | None:
        """The language to write: as given, or the model's default; None in a model without languages."""
        given = given or getattr(self.model.config, "default_target_language", None)
        if given is None:
            raise LanguageError(
                "no target language given",
                where="target_language",
                remedy=f"choose one of: {', '.join(sorted(self.languages))}",
            )
        return self._known(given, "target_language")

    def _known(self, tag: str, where: str) -> str:
        language = tag if tag in self.languages else normalise_language(tag, where=where)
        if language not in self.languages:
            raise LanguageError(
                f"this model does not know language {language!r}",
                where=where,
                remedy=f"it knows: {', '.join(sorted(self.languages))}",
            )
        return language

    def generate(
        self,
        texts: Sequence[str],
        *,
        target_language: str | None = None,
        source_language: str | None = None,
        config: DecodingConfig | None = None,
        seed: int | None = None,
        glossary: Glossary | None = None,
        first_line: int = 0,
        on_batch: Callable[[int], None] | None = None,
    ) -> list[str]:
        """Write one output per text, in the order of `texts`; an empty text gives an empty output.

        Args:
            target_language: language to write.
            source_language: language of the texts.
            seed: of sampling. None is seed 0 in the native engine; transformers goes on with torch's random numbers.
            glossary: terms that outputs must and must not contain.
            first_line: number of the first text in a longer input of which these are a part: samples of the native
                engine depend on it and the seed, and so in fp32 are the same however the input is divided.
            on_batch: called with the number of texts finished so far.

        Raises:
            LanguageError: a language the model does not know.
            ConfigError: the model is not decoded by the engine that this needs, or there is no such seed.
        """
        request = Request(
            target_language, source_language, config or DecodingConfig(), seed, glossary, first_line=first_line
        )
        return [outputs[0].text for outputs in self.write(texts, request, on_batch)]

    def generate_n_best(
        self,
        texts: Sequence[str],
        n: int = 1,
        *,
        target_language: str | None = None,
        source_language: str | None = None,
        config: DecodingConfig | None = None,
        seed: int | None = None,
        glossary: Glossary | None = None,
        first_line: int = 0,
        on_batch: Callable[[int], None] | None = None,
    ) -> list[list[Output]]:
        """Write up to `n` outputs per text, the best first, with their scores; arguments as in :meth:`generate`.

        They are the best of `num_beams` beams, n samples in the order of drawing, or the best of `mbr_samples` samples.
        Equal outputs of beam groups and of MBR count once, so that there may be fewer; an empty text has one, empty.

        Raises:
            ConfigError: n is more than there are beams, or the model is not decoded by the native engine.
        """
        config = config or DecodingConfig()
        request = Request(target_language, source_language, config, seed, glossary, n, True, first_line)
        return self.write(texts, request, on_batch)

    def check(self, texts: Iterable[str], request: Request) -> None:
        """Say what would stop :meth:`generate` at any of `texts`, which are read once: terms it cannot search for.

        Raises:
            ConfigError: the model is not decoded by the engine that this needs, or its search has no required terms.
            DataError: a required term cannot be spelled.
        """
        if request.glossary is not None and self._native(request):
            target = cast(str, self.target_language(request.target))
            self.writer.term_rules.check(map(request.terms, texts), target, request.config)

    @torch.inference_mode()
    def write(
        self, texts: Sequence[str], request: Request, on_batch: Callable[[int], None] | None = None
    ) -> list[list[Output]]:
        """What :meth:`generate` and :meth:`generate_n_best` are made of: outputs of each text, the best first."""
        config = request.config
        request.check()
        target, source = self.target_language(request.target), self.source_language(request.source)
        encoded = self._encode(list(texts), source, request.first_line)
        order = sorted((i for i, text in enumerate(texts) if text.strip()), key=lambda i: -self._length(encoded[i]))
        outputs = [[Output("")] for _ in texts]
        native = self._native(request)
        terms = {index: request.terms(texts[index]) for index in order}
        if native:
            self.writer.term_rules.check(terms.values(), cast(str, target), config)
        if request.seed is not None:
            torch.manual_seed(request.seed + request.first_line)
        for start in range(0, len(order), config.batch_size):
            chosen = order[start : start + config.batch_size]
            if native:
                sources = [
                    Source(encoded[index], (request.seed or 0, request.first_line + index), terms[index])
                    for index in chosen
                ]
                written = self._decode_native(sources, cast(str, target), request)
            else:
                ids = self._decode([encoded[index] for index in chosen], target, config.arguments())
                written = [[Output(self.codec.decode(row))] for row in ids]
            for index, found in zip(chosen, written, strict=True):
                outputs[index] = found
            if on_batch is not None:
                on_batch(start + len(chosen))
        return outputs

    def _native(self, request: Request) -> bool:
        """Whether this project's engine decodes; `ConfigError` where what is asked for needs it and it cannot."""
        config, reason = request.config, unsupported(self.model, request.config)
        needed = [*config.native_only(), *request.native_only()]
        if self.shortlist is not None:
            needed.append("shortlist")
        if config.engine == "transformers":
            reason = "transformers was asked for"
        if reason is not None and (config.engine == "native" or needed):
            raise ConfigError(
                f"the native engine cannot decode here: {reason}",
                where=needed[0] if needed else "engine",
                remedy=f"leave out {', '.join(map(_asked_for, needed))}" if needed else "use engine transformers",
            )
        return reason is None

    @cached_property
    def writer(self) -> NativeWriter:
        """The native engine's; it packs the weights as they are when they are first used."""
        return NativeWriter(self.model, self.tokenizer, self.shortlist)

    def _decode_native(self, sources: Sequence[Source], target: str, request: Request) -> list[list[Output]]:
        """Outputs of sources that fit into one batch, by this project's engine."""
        config, device = request.config, self.model.device
        found = self.writer.write(
            sources,
            pad_rows([source.ids for source in sources], int(cast(Any, self.model.config).pad_token_id), device),
            target,
            self.languages[target],
            config,
            samples=config.mbr_samples or request.n,
            scored=request.scored,
        )
        return [self._outputs(source, several, request) for source, several in zip(sources, found, strict=True)]

    def _outputs(self, source: Source, hypotheses: Sequence[Hypothesis], request: Request) -> list[Output]:
        kept = hypotheses if request.config.mbr_samples else hypotheses[: request.n]
        texts, unmet = self.codec.decode_batch([one.tokens for one in kept]), self.writer.term_rules.unmet
        outputs = [
            Output(text, request.score(one), one.ended, unmet(source.terms.required, one.tokens, text))
            for text, one in zip(texts, kept, strict=True)
        ]
        if request.config.mbr_samples:
            ranked = rank_by_utility(texts)[: request.n]
            return [replace(outputs[place], score=utility) for place, utility in ranked]
        return outputs

    def _encode(self, texts: Sequence[str], source_language: str | None, first_line: int = 0) -> list[Any]:
        """What the model reads of each text; errors count them from `first_line` + 1."""
        return self.codec.encode_sources(texts, source_language)

    def _length(self, encoded: Any) -> int:
        """Source tokens of an encoded text, by which batches are sorted."""
        return len(encoded)

    def _decode(self, sources: Sequence[Any], target: str | None, arguments: dict[str, Any]) -> list[list[int]]:
        """Output ids, without what the decoder was given to start from, for sources padded to one batch."""
        ids, mask = pad_rows(sources, int(self.model.config.pad_token_id), self.model.device)
        start: list[int] = self.codec.start(target)
        if len(start) > 1:
            arguments = {**arguments, "decoder_input_ids": ids.new_tensor([start] * len(ids))}
        output: Any = self.model.generate(
            input_ids=ids, attention_mask=mask, decoder_start_token_id=start[0], **arguments
        )
        return output[:, len(start) :].tolist()


def pad_rows(
    rows: Sequence[Sequence[int]], pad: int, device: torch.device, *, left: bool = False
) -> tuple[Tensor, Tensor]:
    """Ids and mask of `rows`, both `[rows, longest]`, padded on the right or the left."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[index, place], mask[index, place] = torch.tensor(row, dtype=torch.long), 1
    return ids.to(device), mask.to(device)


def _asked_for(name: str) -> str:
    """What needs the native engine, with what asks for it where its name does not say so."""
    return "scores (--json, --n-best, generate_n_best)" if name == "scores" else name


def _positions(model: PreTrainedModel) -> int:
    """Longest source, in tokens, that the model's encoder has positions for."""
    config: Any = model.config
    encoder = getattr(config, "encoder_config", None) or getattr(config, "encoder", None)
    if encoder is None:
        return int(getattr(config, "max_position_embeddings", 512))
    return donor_for(encoder).max_positions


def _check_pair(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, languages: Mapping[str, int]) -> None:
    rows = cast(Tensor, model.get_input_embeddings().weight).shape[0]
    where = str(model.config.name_or_path or type(model).__name__)
    remedy = "use the tokenizer that was saved with the model"
    if len(tokenizer) > rows:
        raise ModelError(f"the tokenizer has {len(tokenizer)} tokens, the model {rows}", where=where, remedy=remedy)
    vocabulary, layout = tokenizer.get_vocab(), TextLayout.of(model.config)
    for tag, index in languages.items():
        token = f"<{tag}>" if layout is None else layout.token(tag)
        if vocabulary.get(token) != index:
            raise ModelError(
                f"the tokenizer does not know the language token {token} as {index}", where=where, remedy=remedy
            )
