"""Named, lazily imported choices, with suggestions for misspelt names."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar, cast

from enc2gen.errors import ConfigError

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps names to objects, or to `"module:object"` strings imported on first use.

    Args:
        kind: what is registered ("metric"), used in error messages.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T | str] = {}
        self._lazy: dict[str, str] = {}

    def add(self, name: str, entry: T | str) -> None:
        """Register `entry`, an object or a lazy `"module:object"`; a second, different object is a `ConfigError`."""
        present, lazy = self._entries.get(name), self._lazy.get(name)
        if entry == lazy:
            return
        if present is not None and present is not entry:
            raise ConfigError(f"{self.kind} {name!r} is registered twice: {present!r} and {entry!r}")
        self._entries[name] = entry
        if isinstance(entry, str):
            self._lazy[name] = entry

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator form of :meth:`add`."""

        def decorate(entry: T) -> T:
            self.add(name, entry)
            return entry

        return decorate

    def get(self, name: str, *, where: str | None = None) -> T:
        """Return the object named `name`; raise `ConfigError` with the closest names otherwise."""
        if name not in self._entries:
            raise self.unknown(name, where=where)
        entry = self._entries[name]
        if isinstance(entry, str):
            module, _, attribute = entry.partition(":")
            entry = cast(T, getattr(importlib.import_module(module), attribute))
            self._entries[name] = entry
        return entry

    def unknown(self, name: str, *, where: str | None = None) -> ConfigError:
        """The error for a name that is not registered."""
        close = difflib.get_close_matches(name, self._entries, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return ConfigError(
            f"unknown {self.kind} {name!r}", where=where, remedy=f"{hint}available: {', '.join(sorted(self._entries))}"
        )

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))
