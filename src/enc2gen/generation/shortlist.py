"""Output shortlists: the tokens that texts of a language are made of, so that no others need be scored.

The output layer is most of the work of decoding with a vocabulary of many languages; a shortlist leaves out rows of it.
Probabilities are then over the shortlist.
"""

from __future__ import annotations

import json
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from enc2gen.errors import DataError, LanguageError, ModelError, OutputError
from enc2gen.tokenization.tokenizer import TextCodec

_KIND = "enc2gen shortlist"
_BATCH = 1000


class Shortlist:
    """Tokens to be written, by language.

    Args:
        vocabulary: tokens of the model that the ids belong to.
        languages: tag -> token ids.

    Raises:
        ModelError: an id is outside the vocabulary, or there is none.
    """

    def __init__(self, vocabulary: int, languages: Mapping[str, Iterable[int]]) -> None:
        self.vocabulary = vocabulary
        self.languages = {tag: tuple(sorted(set(ids))) for tag, ids in languages.items()}
        for tag, ids in self.languages.items():
            if not ids or ids[0] < 0 or ids[-1] >= vocabulary:
                what = f"token {ids[0] if ids[0] < 0 else ids[-1]} is outside the vocabulary" if ids else "no token"
                raise ModelError(
                    f"{what} (it has {vocabulary} tokens)",
                    where=f"shortlist of {tag}",
                    remedy="build the shortlist with the model it is used with: enc2gen shortlist",
                )

    @classmethod
    def from_texts(cls, codec: TextCodec, texts: Mapping[str, Iterable[str]], *, least: int = 1) -> Shortlist:
        """Tokens that occur in texts, and what any text may need: special and language tokens, digits, punctuation.

        Args:
            codec: of the model.
            texts: language -> texts in it, such as the targets of training.
            least: occurrences from which a token is taken.
        """
        tokenizer = codec.tokenizer
        always = {*tokenizer.all_special_ids, *codec.languages.values(), codec.end_id}
        always |= {index for piece, index in tokenizer.get_vocab().items() if _is_sign(piece.lstrip("▁Ġ#"))}
        found = {}
        for language, lines in texts.items():
            codec.language_id(language)
            counts: Counter[int] = Counter()
            batch: list[str] = []
            for line in lines:
                batch.append(line)
                if len(batch) == _BATCH:
                    counts.update(token for ids in codec.encode_texts(batch) for token in ids)
                    batch = []
            counts.update(token for ids in codec.encode_texts(batch) for token in ids)
            found[language] = always | {token for token, count in counts.items() if count >= least}
        return cls(len(tokenizer), found)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Shortlist:
        """Read what :meth:`save` wrote; `DataError` if it is something else."""
        where = os.fspath(path)
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise DataError("there is no such file", where=where, remedy="enc2gen shortlist writes one") from error
        except (OSError, ValueError) as error:
            raise DataError(f"not a shortlist ({error})", where=where, remedy="enc2gen shortlist writes one") from error
        content = content if isinstance(content, dict) and content.get("kind") == _KIND else {}
        vocabulary: Any = content.get("vocabulary")
        languages: Any = content.get("languages")
        lists = list(languages.values()) if isinstance(languages, dict) else []
        if not isinstance(vocabulary, int) or not lists or not all(map(_is_ids, lists)):
            raise DataError("not a shortlist", where=where, remedy="enc2gen shortlist writes one")
        return cls(vocabulary, languages)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON; `OutputError` if that cannot be."""
        content = {"kind": _KIND, "vocabulary": self.vocabulary, "languages": self.languages}
        temporary = Path(f"{os.fspath(path)}.part")
        try:
            temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            raise OutputError(f"cannot write: {error.strerror}", where=os.fspath(path)) from error

    def of(self, language: str) -> tuple[int, ...]:
        """Token ids of `language`, rising; `LanguageError` if it has none."""
        if language not in self.languages:
            raise LanguageError(
                f"the shortlist has no tokens for {language!r}",
                where="shortlist",
                remedy=f"build one for it, or write one of: {', '.join(sorted(self.languages))}",
            )
        return self.languages[language]

    def check(self, vocabulary: int) -> None:
        """`ModelError` if the shortlist was built for a model with another number of tokens."""
        if vocabulary != self.vocabulary:
            raise ModelError(
                f"it is for a vocabulary of {self.vocabulary} tokens, and the model has {vocabulary}",
                where="shortlist",
                remedy="build the shortlist with the model it is used with: enc2gen shortlist",
            )


def _is_sign(piece: str) -> bool:
    """Whether a piece is digits or punctuation: of ASCII, or one character of any script; nothing counts too."""
    signs = all(unicodedata.category(char)[0] in "NPSZ" for char in piece)
    return signs and (piece.isascii() or len(piece) == 1)


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, int) for one in value)
