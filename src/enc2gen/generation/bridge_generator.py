"""Serving a bridge: text in any language the encoder reads goes in, what the LLM writes about it comes out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from enc2gen.errors import LanguageError, ModelError
from enc2gen.generation.generator import Generator, pad_rows
from enc2gen.models.bridge.modeling import BridgeForConditionalGeneration
from enc2gen.models.bridge.processor import BridgeProcessor
from enc2gen.tokenization.bridge_codec import BridgeCodec


class BridgeGenerator(Generator):
    """A bridge, ready to write. It has no language tokens: the LLM writes the language it was trained to write.

    Args:
        model: a bridge.
        codec: instead of the model's own, `model.processor.codec`; its prompt is read before the answer.

    Raises:
        ModelError: the model has no tokenizers.
    """

    model: BridgeForConditionalGeneration
    codec: BridgeCodec

    def __init__(self, model: BridgeForConditionalGeneration, codec: BridgeCodec | None = None) -> None:
        if codec is None and model.processor is None:
            raise ModelError(
                "the bridge has no tokenizers",
                where=str(model.config.name_or_path or type(model).__name__),
                remedy="set model.processor, or load a folder that save_pretrained wrote completely",
            )
        self.model, self.languages = model.eval(), {}
        self.codec = codec or cast(BridgeProcessor, model.processor).codec
        self.tokenizer = self.codec.llm_tokenizer

    def source_language(self, given: str | None) -> str | None:
        """None: the encoder needs no language; `LanguageError` if one is given."""
        self._refuse(given, "source_language")
        return None

    def target_language(self, given: str | None) -> str | None:
        """None: the LLM knows what to write; `LanguageError` if a language is given."""
        self._refuse(given, "target_language")
        return None

    def _refuse(self, given: str | None, where: str) -> None:
        if given is not None:
            raise LanguageError(
                f"a bridge takes no language, and {given!r} was given",
                where=where,
                remedy="leave it out: the encoder reads all its languages, and the LLM writes what it was trained to",
            )

    def _encode(self, texts: Sequence[str], source_language: str | None, first_line: int = 0) -> list[Any]:
        """`(encoder ids, decoder ids that are read before the answer)` of each text."""
        present = [text for text in texts if text.strip()]  # some tokenizers give an empty text no token at all
        numbers = [number for number, text in enumerate(texts, first_line + 1) if text.strip()]
        encoded = zip(self.codec.encode_sources(present, numbers), self.codec.encode_prompts(present), strict=True)
        return [next(encoded) if text.strip() else ([], []) for text in texts]

    def _length(self, encoded: Any) -> int:
        return len(encoded[0])

    def _decode(self, sources: Sequence[Any], target: str | None, arguments: dict[str, Any]) -> list[list[int]]:
        device = self.model.device
        ids, mask = pad_rows([source for source, _ in sources], self.codec.encoder_pad_id, device)
        heads, head_mask = pad_rows([head for _, head in sources], self.codec.llm_pad_id, device, left=True)
        if self.model.generation_config.max_new_tokens is None:  # transformers would stop after 20
            arguments = {"max_new_tokens": self.codec.max_target_length, **arguments}
        output: Any = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            decoder_input_ids=heads,
            decoder_attention_mask=head_mask,
            **arguments,
        )
        return output[:, heads.shape[1] :].tolist()
