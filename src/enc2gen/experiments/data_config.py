"""Section `data` of recipes: which corpora are read, how they are split, and what trains on them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from enc2gen.data.held_out import how_split
from enc2gen.experiments.recipe_fields import SPLIT, Section, check_task, whole_builtin

StageName = Literal["pretrain", "finetune"]
STAGE_NAMES: tuple[StageName, ...] = ("pretrain", "finetune")


class DatasetConfig(Section):
    """One corpus with a task's mapping from fields to (source, target)."""

    path: str = Field(
        description="file, folder, hub:owner/name, builtin:localisation, or parallel texts FIRST|SECOND; {languages}: "
        "the recipe's languages"
    )
    task: str = Field(
        default="translation",
        description="translation, summarisation, reading-comprehension, continuation, text-to-text",
    )
    fields: dict[str, Any] = Field(default_factory=dict, description="the task's mapping of fields and languages")
    split: str = Field(default="train", description=SPLIT)
    dev: str | None = Field(default=None, description="development file; without it, dev_percent of `path`")
    test: str | None = Field(default=None, description="test file; without it, test_percent of `path`")
    dev_split: str = Field(default="validation", description="split of a Hub data set in `dev`")
    test_split: str = Field(default="test", description="split of a Hub data set in `test`")
    dev_percent: int = Field(default=5, ge=0, le=50, description="share of sources held out for development, by hash")
    test_percent: int = Field(default=5, ge=0, le=50, description="share of sources held out for testing, by hash")
    stages: tuple[StageName, ...] = Field(
        default=("pretrain", "finetune"),
        description="stages that train on it; []: its training texts are read for the encoder's vocabulary (and its "
        "adaptation) and for the list of languages only, and what is held out of it is left out",
    )
    limit: int | None = Field(default=None, ge=1, description="read at most so many records")
    train_limit: int | None = Field(
        default=None,
        ge=1,
        description="train on at most so many examples per source and target language, chosen by a hash of the source, "
        "so that a smaller number chooses a part of what a larger one does; development and test stay whole",
    )
    dev_limit: int | None = Field(
        default=None, ge=1, description="keep at most so many development examples, chosen like train_limit's"
    )
    licence: str = Field(default="", description="licence or terms of use, for the model card")

    @property
    def own_files(self) -> bool:
        """Whether dev or test has a file of its own."""
        return self.dev is not None or self.test is not None

    @model_validator(mode="before")
    @classmethod
    def _whole_builtin(cls, content: Any) -> Any:
        held_out = isinstance(content, dict) and (content.get("dev") or content.get("test"))
        return content if held_out else whole_builtin(content)

    @model_validator(mode="after")
    def _task_mapping_is_valid(self) -> DatasetConfig:
        check_task(self.task, self.fields)
        return self


class MonolingualConfig(Section):
    """Plain text for denoising."""

    path: str = Field(description="file, folder or hub:owner/name; {languages} stands for the recipe's languages")
    field: str = Field(default="text", description="field with the text")
    language: str | None = Field(default=None, description="language of all texts")
    language_field: str | None = Field(default=None, description="field with the text's language")
    split: str = Field(default="train", description="split to read, for Hub data sets")
    limit: int | None = Field(default=None, ge=1, description="read at most so many texts")
    test_percent: int = Field(
        default=0, ge=0, le=50, description="share of the texts held out by hash, for evaluate.denoising"
    )
    licence: str = Field(default="", description="licence or terms of use, for the model card")

    @model_validator(mode="after")
    def _one_language(self) -> MonolingualConfig:
        if (self.language is None) == (self.language_field is None):
            raise ValueError("give exactly one of language and language_field")
        return self


class DataConfig(Section):
    """What is read."""

    datasets: list[DatasetConfig] = Field(min_length=1, description="corpora of (source, target) pairs")
    monolingual: list[MonolingualConfig] = Field(default_factory=list, description="plain text for denoising")
    denoise_targets: bool = Field(
        default=False, description="use the training targets of the pretraining data as plain text, too"
    )
    max_source_length: int = Field(
        default=256, ge=4, le=8192, description="tokens; longer sources are cut (256: arXiv 2502.10852, section 4.1)"
    )
    max_target_length: int = Field(default=256, ge=2, le=8192, description="tokens; longer targets are cut")

    def identity(self) -> dict[str, Any]:
        """What prepared data depend on: all settings but the licences, limits only where they are set."""
        content = self.model_dump(mode="json")
        drop_licences(content)
        for dataset, config in zip(content["datasets"], self.datasets, strict=True):
            dataset |= how_split(config.task, config.fields, own_files=config.own_files)
            for name in ("train_limit", "dev_limit", "dev_split", "test_split"):
                if dataset[name] == DatasetConfig.model_fields[name].default:
                    del dataset[name]
        for corpus in content["monolingual"]:
            if not corpus["test_percent"]:
                del corpus["test_percent"]
        return content


def drop_licences(data: dict[str, Any]) -> None:
    """Remove the licences from a dumped `DataConfig`: they decide nothing of what is trained."""
    for corpus in (*data["datasets"], *data.get("monolingual", ())):
        corpus.pop("licence", None)
