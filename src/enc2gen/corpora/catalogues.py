"""gettext catalogues (.po and .mo): which entries are real translations, and which text translates which."""

from __future__ import annotations

import gettext
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import polib

_COUNTS = (1, 5)
"""For which n the forms of singular and plural are taken (our choice, see `catalogue_entries`)."""


class CatalogueEntry(NamedTuple):
    """One translation: source text, target text, and the context that tells equal sources apart ("" if
    none)."""

    source: str
    target: str
    context: str


def catalogue_entries(
    catalogue: Iterable[polib.POEntry | polib.MOEntry], plural_forms: str = ""
) -> Iterator[CatalogueEntry]:
    """Yield the usable translations of a catalogue.

    Fuzzy, obsolete and untranslated entries are left out. An entry with plural forms gives two translations:
    the singular paired with the form for n = 1, the plural with the form for n = 5 (English has one plural
    form, so any n but 1 would do; 5 is the general plural also where 2-4 have their own form, as in Slavic
    languages).

    Args:
        plural_forms: the catalogue's Plural-Forms header; without a usable one, English rules are assumed.
    """
    form_for = _plural_rule(plural_forms)
    for entry in catalogue:
        if entry.obsolete or "fuzzy" in entry.flags:
            continue
        context = entry.msgctxt or ""
        if not entry.msgid_plural:
            if entry.msgstr:
                yield CatalogueEntry(entry.msgid, entry.msgstr, context)
            continue
        forms = {int(index): text for index, text in entry.msgstr_plural.items() if text}
        for source, count in zip((entry.msgid, entry.msgid_plural), _COUNTS, strict=True):
            target = forms.get(form_for(count))
            if target:
                yield CatalogueEntry(source, target, context)


def _plural_rule(header: str) -> Callable[[int], int]:
    """Return the function count -> index of the plural form that a Plural-Forms header declares."""
    match = re.search(r"plural\s*=\s*([^;]+)", header)
    if match:
        try:
            rule = gettext.c2py(match.group(1))
            for count in _COUNTS:
                rule(count)
            return rule
        except (ValueError, ZeroDivisionError):
            pass  # a header that cannot be parsed or computed says nothing; fall back as msgfmt's users do
    return lambda count: int(count != 1)
