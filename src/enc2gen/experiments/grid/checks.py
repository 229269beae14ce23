"""What a task's run needs of the pretraining run that it starts from: texts kept from it, and texts read by it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from urllib.parse import parse_qsl

from enc2gen.corpora.languages import normalise_languages
from enc2gen.corpora.readers import source_names
from enc2gen.errors import ConfigError
from enc2gen.experiments.data_config import DatasetConfig, MonolingualConfig
from enc2gen.experiments.grid.plan import GridRun
from enc2gen.experiments.recipe import Recipe

PLACE = "data.datasets"


@dataclass(frozen=True)
class Corpus:
    """The texts that a path stands for.

    Attributes:
        names: of its files, or the name of a corpus without files; equal names are equal texts.
        languages: of a built-in corpus, which is one corpus per language; None for others.
    """

    names: frozenset[str]
    languages: frozenset[str] | None = None

    @classmethod
    def of(cls, path: str, split: str, recipe: Recipe) -> Corpus:
        """The corpus that `path` in the data of `recipe` is, however it is written; the splits of a Hub data set are
        different texts."""
        path = path.replace("{languages}", ",".join(recipe.languages))
        if path.startswith("builtin:"):
            name, _, query = path.partition("?")
            tags = [tag for tag in dict(parse_qsl(query)).get("languages", "").split(",") if tag.strip()]
            return cls(frozenset([name]), frozenset(normalise_languages(tags, where=path)))
        return cls(source_names(path, split))

    def overlaps(self, other: Corpus) -> bool:
        """Whether some texts belong to both."""
        if not self.names & other.names:
            return False
        return self.languages is None or other.languages is None or bool(self.languages & other.languages)

    def within(self, others: Iterable[Corpus]) -> bool:
        """Whether all its texts belong to one of the others."""
        same = [other for other in others if other.names & self.names]
        if self.languages is None:
            return self.names <= frozenset[str]().union(*(other.names for other in same))
        return self.languages <= frozenset[str]().union(*(other.languages or () for other in same))


def check_start(start: GridRun, recipe: Recipe, where: str) -> None:
    """Refuse a task whose held-out texts were trained on before, or whose texts had no say in its vocabulary.

    Args:
        start: the pretraining run.
        recipe: of the task's run.
        where: names the task in errors.

    Raises:
        ConfigError: with the two places that do not fit.
    """
    if start.stage == "pretrain":
        for number, own in enumerate(recipe.data.datasets):
            if own.stages:
                _check_held_out(own, f"{PLACE}[{number}]", recipe, start.recipe, where)
    name = start.recipe.main_system
    encoder = start.recipe.encoder_of(name)
    if start.recipe.grows(name) and (encoder.trim_vocabulary or encoder.extend_vocabulary is not None):
        _check_read(recipe, start.recipe, where)


def _check_held_out(own: DatasetConfig, place: str, recipe: Recipe, before: Recipe, where: str) -> None:
    """What is held out depends on a text's hash alone: the test share comes first, then the development share."""
    corpus = Corpus.of(own.path, own.split, recipe)
    named = {"test": (own.test, own.test_split), "dev": (own.dev, own.dev_split)}
    files = {name: Corpus.of(path, split, recipe) for name, (path, split) in named.items() if path}
    test, dev = _shares(own)
    for number, text in enumerate(before.data.monolingual):
        denoised = Corpus.of(text.path, text.split, before)
        held_out = [*files.values(), *([corpus] if test or dev else [])]
        if any(denoised.overlaps(one) for one in held_out):
            raise ConfigError(
                f"pretraining trains on the texts of {text.path} (pretraining: data.monolingual[{number}]), some of "
                f"which the task holds out ({place})",
                where=where,
                remedy="leave it out there; `denoise_targets: true` denoises the training texts alone",
            )
    for number, other in enumerate(before.data.datasets):
        if "pretrain" not in other.stages:
            continue
        there = f"pretraining: {PLACE}[{number}]"
        trained = Corpus.of(other.path, other.split, before)
        for name, file in files.items():
            if trained.overlaps(file):
                raise ConfigError(
                    f"pretraining trains on {other.path} ({there}), the {name} file of the task ({place})",
                    where=where,
                    remedy=f"leave it out there, or list it with `stages: []`, or give the task another {name} file",
                )
        kept_test, kept_dev = _shares(other)
        leaks = test > kept_test or (dev > 0 and test + dev > kept_test + kept_dev)
        if leaks and trained.overlaps(corpus):
            raise ConfigError(
                f"pretraining trains on texts of {own.path} that the task holds out: {there} holds out {kept_test} % "
                f"for testing and {kept_dev} % for development, {place} of the task {test} % and {dev} %",
                where=where,
                remedy="give both the same test_percent and dev_percent (or more in pretraining), and a dev or test "
                "file to neither or both",
            )


def _shares(dataset: DatasetConfig) -> tuple[int, int]:
    """Percentages of `path` that are held out for testing and for development."""
    return 0 if dataset.test else dataset.test_percent, 0 if dataset.dev else dataset.dev_percent


def _check_read(recipe: Recipe, before: Recipe, where: str) -> None:
    read = [Corpus.of(corpus.path, corpus.split, before) for corpus in _corpora(before)]
    for number, own in enumerate(recipe.data.datasets):
        if not Corpus.of(own.path, own.split, recipe).within(read):
            raise ConfigError(
                f"the pretraining run makes the vocabulary of its texts alone, and {own.path} ({PLACE}[{number}] of "
                f"the task) is not among them (pretraining: {PLACE})",
                where=where,
                remedy="list it there with `stages: []`",
            )


def _corpora(recipe: Recipe) -> Iterator[DatasetConfig | MonolingualConfig]:
    yield from recipe.data.datasets
    yield from recipe.data.monolingual
