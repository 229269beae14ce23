"""What a tokenizer cannot write, whether it says so by an unknown token or drops the characters without a word."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from enc2gen.tokenization.tokenizer import protect_special_tokens

_WORD_START = "▁"  # stands for a space; texts are not counted by their spaces


class UnknownText:
    """Finds the parts of texts that `tokenizer` cannot write.

    Args:
        tokenizer: a fast tokenizer; no longer reads text as special tokens afterwards.

    Attributes:
        unknown_id: id of the unknown token: of the one that the tokenizer names, or else of its model's own. None if
            there is neither.

    Raises:
        ModelError: the tokenizer is slow.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._backend = protect_special_tokens(tokenizer)
        named: int | None = tokenizer.unk_token_id
        self.unknown_id = _own_unknown_id(self._backend) if named is None else named
        # Models of the other kinds refuse text where they lack an unknown token.
        model = self._backend.model
        self._may_drop = type(model).__name__ == "BPE" and model.unk_token is None
        self._dropped: dict[str, bool] = {}

    def stretches(self, text: str, encoding: Any) -> list[str]:
        """Parts of `text` that `encoding` (that of `text`, without special tokens) holds as the unknown token only.

        Of what a BPE model without an unknown token drops: the characters one by one, as the normalizer writes them.
        """
        found = []
        if self.unknown_id is not None and self.unknown_id in encoding.ids:
            spans = zip(encoding.ids, encoding.offsets, strict=True)
            found = [text[start:end] for i, (start, end) in spans if i == self.unknown_id]
        return [*found, *self._lost(text, encoding)] if self._may_drop else found

    def is_unknown(self, character: str, encoding: Any) -> bool:
        """Whether `character`, of which `encoding` is the encoding, is unknown on its own."""
        return self.unknown_id in encoding.ids or (self._may_drop and self._is_dropped(character))

    def _lost(self, text: str, encoding: Any) -> list[str]:
        # Offsets do not tell: a lone space mark claims the character behind it, and of two characters that the
        # normalizer joins, one has no token though nothing is lost.
        normaliser = self._backend.normalizer
        normal = normaliser.normalize_str(text) if normaliser else text
        dropped = [character for character in set(normal) if self._is_dropped(character)]
        if not dropped:
            return []
        # Added tokens may hold characters that the model lacks.
        left = Counter(normal) - Counter("".join(encoding.tokens))
        lost = [character for character in sorted(dropped) for _ in range(left[character])]
        # The normalizer may write one character as many.
        return lost[: sum(not character.isspace() for character in text)]

    def _is_dropped(self, character: str) -> bool:
        if character not in self._dropped:
            self._dropped[character] = not self._is_written(character)
        return self._dropped[character]

    def _is_written(self, character: str) -> bool:
        if character.isspace() or character == _WORD_START:
            return True
        splitter = self._backend.pre_tokenizer
        words = [word for word, _ in splitter.pre_tokenize_str(character)] if splitter else [character]
        pieces = [token.value for word in words for token in self._backend.model.tokenize(word)]
        wanted = Counter("".join(words))
        wanted.pop(_WORD_START, None)
        if self._backend.model.byte_fallback and any(piece.startswith("<0x") for piece in pieces):
            return True
        return not wanted - Counter("".join(pieces))


def _own_unknown_id(backend: Tokenizer) -> int | None:
    """Id of the model's unknown token, whatever the tokenizer around it names; None if it has none."""
    model = backend.model
    if type(model).__name__ == "Unigram":  # which does not tell otherwise
        found: int | None = json.loads(backend.to_str())["model"]["unk_id"]
        return found
    return None if model.unk_token is None else backend.token_to_id(model.unk_token)
