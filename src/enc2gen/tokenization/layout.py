"""Where the special tokens of a model stand around texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class TextLayout:
    """Token ids around sources and before targets; None stands for the language's token.

    Attributes:
        before, after: of a source; where its language is not given, the place is left out.
        start: what the decoder starts from; all but the last are its past, the last is what it writes after.
        tokens: language -> its token, where that is not `<language>`.
    """

    before: tuple[int | None, ...]
    after: tuple[int | None, ...]
    start: tuple[int | None, ...]
    tokens: Mapping[str, str]

    @classmethod
    def standard(cls, start_id: int, end_id: int) -> TextLayout:
        """`<s> <language> text </s>` to `<language> text </s>`: of all models that grow from encoders."""
        return cls((start_id, None), (end_id,), (None,), {})

    @classmethod
    def of(cls, config: Any) -> TextLayout | None:
        """The layout in a model's configuration; None where it has the standard one."""
        saved = getattr(config, "text_layout", None)
        if saved is None:
            return None
        return cls(tuple(saved["before"]), tuple(saved["after"]), tuple(saved["start"]), dict(saved["tokens"]))

    def saved(self) -> dict[str, Any]:
        """What :meth:`of` reads, JSON-able."""
        return {name: dict(value) if name == "tokens" else list(value) for name, value in asdict(self).items()}

    def token(self, language: str) -> str:
        """The token of a language, as text."""
        return self.tokens.get(language, f"<{language}>")


def filled(places: Sequence[int | None], language_id: int | None) -> list[int]:
    """`places` with the language's token; without a language, the other tokens."""
    ids = [language_id if place is None else place for place in places]
    return [index for index in ids if index is not None]
