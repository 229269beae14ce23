"""Language identification with any fastText classifier: a file of one's own, or GlotLID.

GlotLID (arXiv 2310.16248) labels about 2,000 languages by ISO 639-3 code and script, "__label__bod_Tibt". lid.176 and
NLLB's model, with labels "__label__bo" and "__label__bod_Tibt", work as well.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import langcodes
from langcodes.tag_parser import LanguageTagError

from enc2gen.corpora.language_id import (
    SECOND_CONFIDENCE,
    WIKIPEDIA_CODES,
    LanguageGuess,
    classifiable,
    may_have_second,
    same_language,
)
from enc2gen.corpora.languages import default_script, dominant_script, normalise_language, script_matches
from enc2gen.errors import DataError

GLOTLID_REPOSITORY = "cis-lmu/glotlid"
_LABEL = "__label__"
_LABELS_ASKED = 50  # our choice: enough to find one in the text's script; all 2,000 would be slow


class _Label(NamedTuple):
    language: str
    script: str


def glotlid_path() -> Path:
    """Return the path of GlotLID's `model.bin` (1.7 GB), downloaded from the Hugging Face Hub on first use.

    Raises:
        DataError: it is not in the cache, and the Hub cannot be reached.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(GLOTLID_REPOSITORY, "model.bin"))
    except (OSError, ValueError) as error:  # the Hub's errors derive from these
        raise DataError(
            "GlotLID is not in the cache and cannot be downloaded",
            where="language identifier glotlid",
            remedy=f"check the network and that HF_HUB_OFFLINE is not set; or download model.bin from "
            f"https://huggingface.co/{GLOTLID_REPOSITORY} and name it with fasttext:PATH; or use fasttext-lid176",
        ) from error


class FastTextModelIdentifier:
    """A fastText classifier whose labels are language tags.

    Args:
        path: a .bin or .ftz file.

    Raises:
        DataError: there is no such file, it is no fastText classifier, or its labels are no languages.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        if not path.is_file():
            raise DataError(
                "no such fastText model", where=str(path), remedy="give the path of a .bin or .ftz file: fasttext:PATH"
            )
        if not self._labels:
            raise DataError(
                "the labels of the fastText model are no languages",
                where=str(path),
                remedy="use a language identification model, with labels such as __label__bo or __label__bod_Tibt",
            )

    def __reduce__(self) -> tuple[type[FastTextModelIdentifier], tuple[Path]]:
        """Send the path to other processes, not the model."""
        return type(self), (self._path,)

    def identify(self, texts: Sequence[str]) -> list[LanguageGuess]:
        """Return one guess per text, in order: the likeliest language written in the text's script."""
        return [self._identify(text) for text in texts]

    def supports(self, language: str) -> bool:
        """Whether a label stands for `language`, in the script that the tag implies.

        Raises:
            LanguageError: an unknown tag.
        """
        tag = normalise_language(language)
        script = default_script(tag)
        return any(
            same_language(tag, label.language) and _scripts_agree(label.script, script)
            for label in self._labels.values()
        )

    @cached_property
    def _model(self) -> Any:
        import fasttext

        try:
            return fasttext.load_model(os.fspath(self._path))
        except (ValueError, RuntimeError, MemoryError) as error:
            raise DataError(
                f"not a readable fastText model: {error}",
                where=str(self._path),
                remedy="download the file again; it must be a .bin or .ftz of fastText",
            ) from error

    @cached_property
    def _labels(self) -> dict[str, _Label]:
        """The model's labels that name a language."""
        names, _ = self._model.predict("a", k=-1, threshold=-1.0)
        return {name: label for name in names if (label := _parsed(name)) is not None}

    def _identify(self, text: str) -> LanguageGuess:
        text = classifiable(text)
        letters, script = sum(map(str.isalpha, text)), dominant_script(text)
        if script is None:
            return LanguageGuess("und", 0.0, None, letters)
        names, scores = self._model.predict(text, k=_LABELS_ASKED)
        fitting = [
            (label.language, min(float(score), 1.0))
            for name, score in zip(names, scores, strict=True)
            if (label := self._labels.get(name)) is not None and script_matches(script, label.script)
        ]
        if not fitting:
            return LanguageGuess("und", 0.0, script, letters)
        language, confidence = fitting[0]
        also = tuple(other for other, score in fitting[1:2] if score >= SECOND_CONFIDENCE)
        return LanguageGuess(language, confidence, script, letters, also if may_have_second(confidence) else ())


def _parsed(name: str) -> _Label | None:
    """ "__label__bod_Tibt" -> ("bo", "Tibt"), "__label__kk" -> ("kk", "Cyrl"); None for what is no language."""
    tag = name.removeprefix(_LABEL).replace("_", "-")
    tag = WIKIPEDIA_CODES.get(tag, tag)  # without a script it is lid.176's "als"; "als_Latn" is ISO 639-3
    try:
        standard = langcodes.standardize_tag(tag, macro=True)
    except LanguageTagError:
        return None
    language = langcodes.Language.get(standard)
    if language.language is None or not language.is_valid():
        return None
    script = langcodes.Language.get(tag).script or default_script(standard)
    return _Label(language.language, script)


def _scripts_agree(known: str, wanted: str) -> bool:
    """Hans, Hant and the Unicode script Hani are one for a classifier."""
    han = {"Hans", "Hant", "Hani"}
    return known == wanted or {known, wanted} <= han
