"""Text to ids and back for a bridge: sources in the encoder's vocabulary, prompts and targets in the LLM's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from enc2gen.errors import ConfigError, DataError, ModelError
from enc2gen.tokenization.examples import IGNORED_LABEL, EncodedExample
from enc2gen.tokenization.tokenizer import cut_text, encode_pieces, protect_special_tokens

TEXT, SOURCE = "{text}", "{source}"
"""What a source template and a prompt may hold; other braces are text."""


class BridgeCodec:
    """Turns text into a bridge's inputs and back.

    The encoder reads `source_template` around the text, with the special tokens that its tokenizer puts around
    any text. The LLM starts from `start_id`, whose position holds the learned end vector of the soft prefix,
    reads the prompt, if there is one, and writes target and `eos_id`. The end of a target is a real label even
    where the LLM pads with the same id. Neither vocabulary reads text as special tokens.

    Args:
        encoder_tokenizer: a fast tokenizer; set up to read text that spells a special token as plain text.
        llm_tokenizer: likewise.
        source_template: text around each source, for example "query: {text}".
        prompt: text that the LLM reads between the prefix and its answer, the same for all sources. With
            `{source}` it hands the source to the LLM too: MindMerger's augmentation (arXiv 2405.17386).
        prompt_with_source: allows `{source}` in prompts. Off by default: trained on English alone, an LLM that sees
            the source ignores the encoder (arXiv 2502.11405, Table 6: 5.3 instead of 45.7 in low-resource languages).
        max_source_length: most ids of a source, special tokens included; also of the source within a prompt.
        max_target_length: most ids of a target, `eos_id` included; the prompt is not counted.
        start_id: the LLM's first decoder id; by default its BOS, else its padding token.
        eos_id: by default the LLM tokenizer's.
        encoder_pad_id: by default the encoder tokenizer's.
        llm_pad_id: by default the LLM tokenizer's, or `eos_id` if it has none.

    Attributes:
        truncated: number of sources and targets that were cut at their limit; a source that both the encoder and the
            LLM read cut counts once.

    Raises:
        ModelError: a tokenizer is slow, or lacks a token that is needed.
        ConfigError: a limit leaves no room for text, or a template is not one.
    """

    def __init__(
        self,
        encoder_tokenizer: PreTrainedTokenizerBase,
        llm_tokenizer: PreTrainedTokenizerBase,
        *,
        source_template: str = TEXT,
        prompt: str = "",
        prompt_with_source: bool = False,
        max_source_length: int,
        max_target_length: int,
        start_id: int | None = None,
        eos_id: int | None = None,
        encoder_pad_id: int | None = None,
        llm_pad_id: int | None = None,
    ) -> None:
        self._encoder, self._llm = protect_special_tokens(encoder_tokenizer), protect_special_tokens(llm_tokenizer)
        self.encoder_tokenizer, self.llm_tokenizer = encoder_tokenizer, llm_tokenizer
        self.source_template, self.prompt_with_source = _checked_template(source_template), prompt_with_source
        self.max_source_length, self.max_target_length = max_source_length, max_target_length
        self.eos_id = _token(llm_tokenizer, eos_id, "eos")
        self.llm_pad_id = _token(llm_tokenizer, llm_pad_id, "pad", otherwise=self.eos_id)
        self.start_id = _token(llm_tokenizer, start_id, "bos", otherwise=self.llm_pad_id)
        self.encoder_pad_id = _token(encoder_tokenizer, encoder_pad_id, "pad")
        self.prompt = self._checked_prompt(prompt)
        self.truncated = 0
        self._dropped = {*llm_tokenizer.all_special_ids, self.start_id, self.eos_id, self.llm_pad_id}
        least = sum(map(len, self._around())) + 1
        for name, limit, fewest in (("source", max_source_length, least), ("target", max_target_length, 2)):
            if limit < fewest:
                raise ConfigError(f"{limit} is too short", where=f"max_{name}_length", remedy=f"use {fewest} or more")

    def encode_sources(self, texts: Sequence[str], numbers: Sequence[int] | None = None) -> list[list[int]]:
        """Encoder ids of each text in its template, special tokens included; longer ones are cut at the end.

        Args:
            numbers: of the texts, by which an error names one; 1, 2, ... by default.

        Raises:
            DataError: a text is not valid Unicode, or gives no token at all.
        """
        head, tail = self._around()
        room = self.max_source_length - len(head) - len(tail)
        sources = [[*head, *self._cut(ids, room), *tail] for ids in self._source_pieces(texts)]
        for number, source in zip(numbers or range(1, len(sources) + 1), sources, strict=True):
            if not source:
                raise DataError("a source is empty: the encoder's tokenizer gives it no token", where=f"text {number}")
        return sources

    def encode_targets(self, texts: Sequence[str]) -> list[list[int]]:
        """LLM ids of each text, with `eos_id` at the end; `DataError` if one is not valid Unicode."""
        room = self.max_target_length - 1
        return [[*self._cut(ids, room), self.eos_id] for ids in encode_pieces(self._llm, texts)]

    def encode_prompts(self, sources: Sequence[str], prompt: str | None = None) -> list[list[int]]:
        """`[start_id, prompt...]` for each source: what the LLM has read when it begins to write.

        Args:
            sources: texts, not in their template; only a prompt with `{source}` uses them.
            prompt: instead of the codec's own.

        Raises:
            ConfigError: the prompt asks for the source and `prompt_with_source` is off.
            DataError: a text is not valid Unicode.
        """
        prompt = self.prompt if prompt is None else self._checked_prompt(prompt)
        if SOURCE not in prompt:
            return [[self.start_id, *ids] for ids in encode_pieces(self._llm, [prompt]) for _ in sources]
        texts = [prompt.replace(SOURCE, self._shortened(source)) for source in sources]
        return [[self.start_id, *ids] for ids in encode_pieces(self._llm, texts)]

    def encode_pairs(
        self, sources: Sequence[str], targets: Sequence[str], prompt: str | None = None
    ) -> list[EncodedExample]:
        """Examples to learn from; the labels of the prompt are ignored. Raises as the three methods above."""
        rows = zip(
            self.encode_sources(sources),
            self.encode_prompts(sources, prompt),
            self.encode_targets(targets),
            strict=True,
        )
        return [
            EncodedExample(tuple(source), (*read, *target[:-1]), (*[IGNORED_LABEL] * (len(read) - 1), *target))
            for source, read, target in rows
        ]

    def encode_pair(self, source: str, target: str, prompt: str | None = None) -> EncodedExample:
        """:meth:`encode_pairs` of one pair."""
        return self.encode_pairs([source], [target], prompt)[0]

    def decode(self, ids: Sequence[int]) -> str:
        """Text up to the first `eos_id` behind the start; special and ignored ids are left out.

        Padding on the left and `start_id` behind it are taken off first, also where start, padding and end are the
        same token. Ids without a start, such as labels or what was written after a prompt, are taken as they are.
        """
        return self.decode_batch([ids])[0]

    def decode_batch(self, batch: Iterable[Sequence[int]]) -> list[str]:
        """:meth:`decode` of each sequence; spaces stay as the LLM tokenizer's own decoder sets them."""
        kept = []
        for sequence in batch:
            ids = self._behind_start([int(i) for i in sequence])
            ids = ids[: ids.index(self.eos_id)] if self.eos_id in ids else ids
            kept.append([i for i in ids if i >= 0 and i not in self._dropped])
        return self._llm.decode_batch(kept, skip_special_tokens=True)

    def _behind_start(self, ids: list[int]) -> list[int]:
        first = next((place for place, i in enumerate(ids) if i != self.llm_pad_id), len(ids))
        if self.start_id == self.llm_pad_id:  # the last of the padding, if there is any, is the start
            return ids[first:]
        return ids[first + 1 :] if ids[first : first + 1] == [self.start_id] else ids

    def _around(self) -> tuple[list[int], list[int]]:
        """Ids that the encoder's tokenizer puts before and after a text; NLLB's depend on its `src_lang`."""
        return _surrounding_ids(self._encoder)

    def _cut(self, ids: list[int], room: int) -> list[int]:
        if len(ids) <= room:
            return ids
        self.truncated += 1
        return ids[:room]

    def _shortened(self, source: str) -> str:
        """The source up to its `max_source_length`-th LLM token."""
        shortened, cut = cut_text(self._llm, source, self.max_source_length)
        if cut:  # a source that the encoder reads cut, too, is counted there
            room = self.max_source_length - sum(map(len, self._around()))
            self.truncated += len(self._source_pieces([source])[0]) <= room
        return shortened

    def _source_pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """Encoder ids of each text in its template, without special tokens and without a limit."""
        before, after = self.source_template.split(TEXT)
        return encode_pieces(self._encoder, [before + text + after for text in texts])

    def _checked_prompt(self, prompt: str) -> str:
        if SOURCE in prompt and not self.prompt_with_source:
            raise ConfigError(
                "the prompt would show the LLM the source text",
                where="prompt",
                remedy="leave {source} out: with English-only training the LLM learns to ignore the encoder "
                "(arXiv 2502.11405, Table 6); if that is wanted, set prompt_with_source",
            )
        return prompt


def _checked_template(template: str) -> str:
    if template.count(TEXT) != 1:
        raise ConfigError(
            f"{template!r} does not hold {TEXT} exactly once", where="source_template", remedy='"query: {text}", say'
        )
    return template


def _token(tokenizer: PreTrainedTokenizerBase, given: int | None, role: str, otherwise: int | None = None) -> int:
    for value in (given, getattr(tokenizer, f"{role}_token_id"), otherwise):
        if value is not None:
            return int(value)
    raise ModelError(
        f"the tokenizer has no {role} token",
        where=tokenizer.name_or_path or None,
        remedy=f"set tokenizer.{role}_token to the token that the model was trained with in this role",
    )


def _surrounding_ids(backend: Tokenizer) -> tuple[list[int], list[int]]:
    """What the tokenizer's post-processor adds before and after any text."""
    encoding = backend.encode("a", add_special_tokens=True)
    added = encoding.special_tokens_mask
    first = added.index(0) if 0 in added else len(added)
    last = len(added) - added[::-1].index(0) if 0 in added else len(added)
    return encoding.ids[:first], encoding.ids[last:]
