"""The one place where text becomes ids and ids become text.

Language tokens (`<kk>`) are special tokens of the tokenizer; a user's text never is, even if it spells one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from enc2gen.errors import ConfigError, DataError, LanguageError, ModelError, first_line
from enc2gen.tokenization.examples import IGNORED_LABEL
from enc2gen.tokenization.layout import TextLayout, filled

_TAG = re.compile(r"[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*")  # shape of a BCP 47 tag


class _Moved:
    """Hands a backend over to `PreTrainedTokenizerFast`, which deep-copies it otherwise (slow)."""

    def __init__(self, backend: Tokenizer) -> None:
        self.backend = backend

    def __deepcopy__(self, memo: dict[int, Any]) -> Tokenizer:
        return self.backend


def adopt_backend(
    backend: Tokenizer, *, special_tokens: Mapping[str, Any], name_or_path: str, **options: Any
) -> PreTrainedTokenizerFast:
    """Wrap `backend`, without copying it, as a tokenizer that never reads text as special tokens.

    Args:
        backend: built pipeline; owned by the result afterwards.
        special_tokens: `bos_token`, `pad_token`, ... and `extra_special_tokens`.
        name_or_path: recorded in the tokenizer.
        options: further arguments of `PreTrainedTokenizerFast`.
    """
    settings: dict[str, Any] = {"padding_side": "right", "clean_up_tokenization_spaces": False, **options}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_Moved(backend), split_special_tokens=True, **special_tokens, **settings
    )
    tokenizer.name_or_path = name_or_path
    return tokenizer


def fast_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The `tokenizers` pipeline under `tokenizer`; `ModelError` if it has none."""
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{type(tokenizer).__name__} is a slow one; this needs a fast tokenizer",
            where=getattr(tokenizer, "name_or_path", None) or None,
            remedy="load it with AutoTokenizer and a tokenizer.json, or convert it with transformers first",
        )
    return tokenizer.backend_tokenizer


def special_token_guard(tokens: Iterable[str]) -> pre_tokenizers.Split:
    """A pre-tokenizer that splits text after the first character of anything that spells one of `tokens`.

    Unigram models look control tokens up like any other piece, so the text "<s>" would become `<s>`; split
    into "<" and "s>" it cannot.
    """
    rests: dict[str, list[str]] = {}
    for token in sorted(set(tokens)):
        if len(token) > 1:
            rests.setdefault(token[0], []).append(re.escape(token[1:]))
    pattern = "|".join(f"{re.escape(first)}(?={'|'.join(rest)})" for first, rest in sorted(rests.items()))
    return pre_tokenizers.Split(Regex(pattern), "merged_with_previous")


def protect_special_tokens(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Make `tokenizer` read text that spells a special token as plain text, also after saving; idempotent."""
    backend = fast_backend(tokenizer)
    tokenizer.split_special_tokens = True
    tokenizer.init_kwargs["split_special_tokens"] = True  # what is saved
    backend.encode_special_tokens = True
    specials = {token.content: i for i, token in backend.get_added_tokens_decoder().items() if token.special}
    unknown = [] if tokenizer.unk_token is None else [str(tokenizer.unk_token)]
    for token in unknown:
        specials.pop(token, None)  # any text may become unknown, whatever it spells
    backend.no_truncation()
    readable = [t for t, i in specials.items() if _is_read(backend, t, i)]
    if any(len(token) > 1 for token in readable):
        guard = special_token_guard([*readable, *unknown])
        present = backend.pre_tokenizer
        backend.pre_tokenizer = guard if present is None else pre_tokenizers.Sequence([present, guard])
    return backend


def _is_read(backend: Tokenizer, token: str, index: int) -> bool:
    """Whether text that spells `token` becomes this id."""
    try:
        return index in backend.encode(token, add_special_tokens=False).ids
    except Exception:  # tokenizers raises bare exceptions: the model has no unknown token and refuses such text
        return False


def language_token(tag: str) -> str:
    """The token of a language: "kk" -> "<kk>"; `LanguageError` if `tag` is not shaped like a BCP 47 tag."""
    if not _TAG.fullmatch(tag):
        raise LanguageError(f"{tag!r} is not a language tag", remedy='use BCP 47 tags: "kk", "zh-Hant"')
    return f"<{tag}>"


def add_language_tokens(tokenizer: PreTrainedTokenizerBase, languages: Sequence[str]) -> dict[str, int]:
    """Add the missing language tokens at the end of the vocabulary, as special tokens; return tag -> id.

    An ordinary added token of this spelling (Gemma's has `<tr>` and `<th>` for HTML) becomes a special one: text that
    spells it is plain text from then on.

    Raises:
        ModelError: the tokenizer is not a fast one.
        LanguageError: a tag is malformed, or its token has another role (`pad`, Paumarí, would be `<pad>`).
    """
    backend = fast_backend(tokenizer)
    named = tokenizer.special_tokens_map.items()
    roles = {str(token): role for role, token in named if isinstance(token, str)}
    tokens = {tag: language_token(tag) for tag in languages}
    for tag, token in tokens.items():
        if token in roles:
            raise LanguageError(
                f"the token {token} of language {tag!r} is already this tokenizer's {roles[token]}",
                remedy=f"name the script too, for example {tag}-Latn",
            )
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    missing = [token for token in dict.fromkeys(tokens.values()) if token not in special]
    if missing:
        added: list[Any] = [AddedToken(token, special=True, normalized=False) for token in missing]
        tokenizer.add_special_tokens({"extra_special_tokens": added}, replace_extra_special_tokens=False)
    vocabulary = tokenizer.get_added_vocab()
    return {tag: vocabulary[token] for tag, token in tokens.items()}


def encode_pieces(backend: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text, without special tokens and without a limit; raises as `encode_whole`."""
    backend.encode_special_tokens = True  # calls of the tokenizer that owns the pipeline may have changed it
    return [encoding.ids for encoding in encode_whole(backend, texts)]


def encode_whole(backend: Tokenizer, texts: Sequence[str], *, offsets: bool = False) -> list[Any]:
    """Encodings of texts, without special tokens, limit and padding.

    Args:
        offsets: with the places of the tokens in the text, which takes longer.

    Raises:
        DataError: a text is not valid Unicode, or no text.
        ModelError: a text holds what is unknown to the model, and the model has no unknown token to say so.
    """
    # Calls of the tokenizer that owns the pipeline may have changed these.
    backend.no_truncation()
    backend.no_padding()
    encode = backend.encode_batch if offsets else backend.encode_batch_fast
    try:
        return encode(list(texts), add_special_tokens=False)
    except (TypeError, UnicodeEncodeError) as error:
        raise DataError(
            f"a text cannot be encoded: {error}", remedy="texts must be str without lone surrogates"
        ) from error
    except Exception as error:  # tokenizers raises bare exceptions
        raise ModelError(
            f"the tokenizer cannot encode a text ({first_line(error)})",
            remedy="give its model an unknown token (unk_id or unk_token in tokenizer.json) that is in the vocabulary",
        ) from error


def cut_text(backend: Tokenizer, text: str, most: int) -> tuple[str, bool]:
    """The text up to the end of its `most`-th token, and whether anything was cut; raises as `encode_pieces`."""
    if len(encode_pieces(backend, [text])[0]) <= most:
        return text, False
    offsets = backend.encode(text, add_special_tokens=False).offsets
    return text[: offsets[most - 1][1]], True


class TextCodec:
    """Turns text into model inputs and back.

    Sources are `<s> <lang> pieces </s>`; targets start the decoder with `<lang>` and end in `</s>`. BERT-like
    tokenizers have [CLS] and [SEP] in the roles of `<s>` and `</s>`. Pretrained models may have another layout.

    Args:
        tokenizer: a fast tokenizer. It is set up to read text that spells a special token as plain text.
        languages: tag -> token id, from :func:`add_language_tokens`.
        max_source_length: most ids of a source, special tokens included.
        max_target_length: most ids of a target, the language token (or `</s>`) included.
        overflow: "truncate" cuts pieces at the end of longer texts and counts the texts in `truncated`;
            "error" raises `DataError`.
        layout: of the model; by default the one above.

    Raises:
        ModelError: the tokenizer is slow, or lacks a start, end or padding token.
        ConfigError: a limit leaves no room for text, or `overflow` is unknown.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        languages: Mapping[str, int],
        *,
        max_source_length: int,
        max_target_length: int,
        overflow: Literal["error", "truncate"] = "truncate",
        layout: TextLayout | None = None,
    ) -> None:
        self._backend = protect_special_tokens(tokenizer)
        self.tokenizer = tokenizer
        self.languages = dict(languages)
        for name, limit, least in (("source", max_source_length, 4), ("target", max_target_length, 2)):
            if limit < least:
                field = f"max_{name}_length"
                raise ConfigError(f"{limit} is too short", where=field, remedy=f"use {least} or more")
        if overflow not in ("error", "truncate"):
            raise ConfigError(f"{overflow!r} is unknown", where="overflow", remedy='"error" or "truncate"')
        self.max_source_length = max_source_length
        self.max_target_length = max_target_length
        self.overflow = overflow
        self.truncated = 0
        self.end_id = self._role("eos_token_id", "sep_token_id")
        if layout is None:  # others need no start token
            self.start_id = self._role("bos_token_id", "cls_token_id")
            layout = TextLayout.standard(self.start_id, self.end_id)
        self.layout = layout
        self.pad_id = self._role("pad_token_id")
        self._dropped = {*tokenizer.all_special_ids, *self.languages.values()}

    def _role(self, *names: str) -> int:
        for name in names:
            if (value := getattr(self.tokenizer, name)) is not None:
                return value
        wanted = " or ".join(name.removesuffix("_token_id") for name in names)
        raise ModelError(f"the tokenizer has no {wanted} token", where=self.tokenizer.name_or_path or None)

    def language_id(self, language: str) -> int:
        """Id of the language's token; `LanguageError` if this model does not have it."""
        if language not in self.languages:
            known = ", ".join(sorted(self.languages)) or "none"
            raise LanguageError(f"this model has no token for {language!r}", remedy=f"it knows: {known}")
        return self.languages[language]

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Pieces of each text, without special tokens and without a limit."""
        return encode_pieces(self._backend, texts)

    def encode_text(self, text: str) -> list[int]:
        """Pieces of `text`, without special tokens and without a limit."""
        return self.encode_texts([text])[0]

    def encode_sources(self, texts: Sequence[str], language: str | None) -> list[list[int]]:
        """`[<s> <lang> pieces </s>]` of each text; no `<lang>` if `language` is None.

        Raises:
            LanguageError: the language has no token.
            DataError: a text is too long and `overflow` is "error", or is not valid Unicode.
        """
        return [self.wrap_source(ids, language) for ids in self.encode_texts(texts)]

    def wrap_source(self, ids: Sequence[int], language: str | None) -> list[int]:
        """`[<s> <lang> ids </s>]` of encoded pieces (noised ones, say); raises as :meth:`encode_sources`."""
        token = None if language is None else self.language_id(language)
        before, after = filled(self.layout.before, token), filled(self.layout.after, token)
        room = self.max_source_length - len(before) - len(after)
        return [*before, *self._fit(list(ids), room, "source"), *after]

    def encode_targets(self, texts: Sequence[str], language: str) -> list[tuple[list[int], list[int]]]:
        """Of each text: decoder inputs `[<lang> pieces]` and labels `[pieces </s>]`, equally long.

        Raises:
            LanguageError, DataError: as for :meth:`encode_sources`.
        """
        self.language_id(language)
        return [self.wrap_target(ids, language) for ids in self.encode_texts(texts)]

    def wrap_target(self, ids: Sequence[int], language: str) -> tuple[list[int], list[int]]:
        """:meth:`encode_targets` of encoded pieces. Labels of what the decoder starts from but the last are -100."""
        start = self.start(language)
        fitted = self._fit(list(ids), self.max_target_length - len(start), "target")
        return [*start, *fitted], [*[IGNORED_LABEL] * (len(start) - 1), *fitted, self.end_id]

    def start(self, language: str) -> list[int]:
        """What the decoder starts from when it writes a language; raises as :meth:`language_id`."""
        return filled(self.layout.start, self.language_id(language))

    def encode_source(self, text: str, language: str | None) -> list[int]:
        """:meth:`encode_sources` of one text."""
        return self.encode_sources([text], language)[0]

    def encode_target(self, text: str, language: str) -> tuple[list[int], list[int]]:
        """:meth:`encode_targets` of one text."""
        return self.encode_targets([text], language)[0]

    def _fit(self, ids: list[int], room: int, side: str) -> list[int]:
        if len(ids) <= room:
            return ids
        if self.overflow == "error":
            limit = self.max_source_length if side == "source" else self.max_target_length
            raise DataError(
                f"the {side} needs {limit - room + len(ids)} tokens, the limit is {limit}",
                remedy=f'split the text, raise max_{side}_length, or set overflow to "truncate"',
            )
        self.truncated += 1
        return ids[:room]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` up to the first end token; special and negative (ignored) ids are left out."""
        return self.decode_batch([ids])[0]

    def decode_batch(self, batch: Iterable[Sequence[int]]) -> list[str]:
        """:meth:`decode` of each sequence; spaces stay as the tokenizer's own decoder sets them."""
        kept = []
        for sequence in batch:
            ids = [int(i) for i in sequence]
            ids = ids[: ids.index(self.end_id)] if self.end_id in ids else ids
            kept.append([i for i in ids if i >= 0 and i not in self._dropped])
        return self._backend.decode_batch(kept, skip_special_tokens=True)
