"""Bridge recipes (`kind: bridge`): encoder, LLM, bridges to compare, stages to train and what to measure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from enc2gen.data.batching import BatchingConfig
from enc2gen.errors import ConfigError
from enc2gen.evaluation.llm_alone import INSTRUCTION
from enc2gen.experiments.bridge.fields import Instruction, Names, Rates, Seeds
from enc2gen.experiments.recipe import problems, read_content, validated
from enc2gen.experiments.recipe_fields import (
    RUN_NAME,
    SPLIT,
    Languages,
    Metrics,
    Section,
    check_task,
    field_errors,
    whole_builtin,
)
from enc2gen.generation.decoding import DecodingConfig
from enc2gen.models.bridge.aligner import AlignerConfig
from enc2gen.models.bridge.fusion import build_fusion
from enc2gen.models.bridge.hidden_states import HiddenStatesConfig
from enc2gen.models.bridge.mapper import build_mapper
from enc2gen.training.bridging import TuningConfig
from enc2gen.training.config import TrainingConfig

Control = Literal["majority", "probe", "llm_alone"]
CONTROLS: tuple[Control, ...] = ("majority", "probe", "llm_alone")
"""What every bridge is measured against: the most frequent class, a linear probe on the encoder, the LLM on its own."""

NAME = r"[A-Za-z0-9_-]+"


class EncoderSection(Section):
    """The multilingual encoder that reads."""

    name: str = Field(description="Hub name, folder or embedded:multilingual-e5-small")
    template: str = Field(default="{text}", description="how a text is given to the encoder; e5 wants 'query: {text}'")
    hidden_states: HiddenStatesConfig = Field(default_factory=HiddenStatesConfig, description="layers the bridge reads")
    max_length: int = Field(default=256, ge=4, le=8192, description="tokens; longer sources are cut")

    @field_validator("template")
    @classmethod
    def _holds_the_text(cls, template: str) -> str:
        if template.count("{text}") != 1:
            raise ValueError("must contain {text} once")
        return template


class LlmSection(Section):
    """The frozen LLM that writes."""

    name: str = Field(description="Hub name, folder or embedded:smollm2-135m-instruct")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        default=None, description="of its weights; none: as the checkpoint has them"
    )


class BridgeSection(Section):
    """One bridge: fusion of the layers, mapper into the LLM, and settings of its own."""

    fusion: str = Field(default="last", description="last, mean, layer_index, global or transformer")
    fusion_options: dict[str, Any] = Field(default_factory=dict, description="of the fusion: see its options below")
    mapper: str = Field(default="linear", description="linear, mlp or slots")
    mapper_options: dict[str, Any] = Field(default_factory=dict, description="of the mapper: see its options below")
    aligner: AlignerConfig | None = Field(default=None, description="layer-wise aligner (LayAlign, arXiv 2502.11405)")
    end_vector: Literal["zeros", "random"] = Field(default="zeros", description="start of the learned end vector")
    hidden_states: HiddenStatesConfig | None = Field(default=None, description="instead of the encoder section's")
    tuning: TuningConfig | None = Field(default=None, description="what learns, in all stages, instead of the stages'")
    training: dict[str, Any] = Field(default_factory=dict, description="training settings of its own, in all stages")
    stages: list[str] | None = Field(default=None, description="names of the stages it trains in; none: all of them")
    learning_rates: Rates | None = Field(default=None, min_length=1, description="to search, instead of the recipe's")
    prompt: str | None = Field(
        default=None, description="text for the LLM after the prefix in the last stage, instead of the stage's"
    )
    seeds: Seeds | None = Field(default=None, min_length=1, description="instead of the recipe's (ablations)")

    @model_validator(mode="after")
    def _parts_can_be_built(self) -> BridgeSection:
        # Sizes are unknown before the encoder is loaded: these are large enough for every layer index.
        with field_errors():
            build_fusion(self.fusion, num_layers=128, hidden_size=8, **self.fusion_options)
            build_mapper(self.mapper, encoder_size=8, llm_size=8, **self.mapper_options)
        return self


class TaskSection(Section):
    """The classification task, trained in one language and tested in all."""

    name: str = Field(default="sib200", description="sib200, xnli, ..., name-kinds (built in) or tsv (your own files)")
    path: str | None = Field(
        default=None,
        description="folder with LANGUAGE/{train,dev,test}.*, one file, file name with {language} and {split}, or Hub "
        "name; none: the task's own data set on the Hub",
    )
    dev_percent: int = Field(default=10, ge=1, le=49, description="held out for development where it has no file")
    test_percent: int = Field(default=10, ge=1, le=49, description="held out for testing where it has no file")
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="what differs from the named task: template, labels, label_fields, ...; see below",
    )
    train_languages: Names = Field(default=["eng_Latn"], min_length=1, description="languages trained on")
    languages: list[str] | None = Field(default=None, description="languages tested; none: all that the data have")
    limit: int | None = Field(
        default=None, ge=2, description="train on so many texts per language, equally many per label"
    )


class PairsSection(Section):
    """Parallel or other text pairs: what the encoder reads, and what the LLM writes."""

    source: Literal["pairs"] = Field(description="pairs")
    path: str = Field(description="file, folder, hub:owner/name or builtin:localisation")
    task: str = Field(default="translation", description="translation, text-to-text, reading-comprehension, ...")
    fields: dict[str, Any] = Field(default_factory=dict, description="the task's mapping of fields and languages")
    split: str = Field(default="train", description=SPLIT)
    languages: Languages | None = Field(
        default=None, description="train on sources in these languages only; []: on none, the pairs are for testing"
    )
    test_languages: Languages | None = Field(default=None, description="test on sources in these languages only")
    dev_percent: int = Field(default=5, ge=1, le=50, description="share held out for development, by hash")
    test_percent: int = Field(default=5, ge=0, le=98, description="share held out for testing, by hash")
    limit: int | None = Field(default=None, ge=2, description="train on at most so many pairs per source language")

    @model_validator(mode="before")
    @classmethod
    def _whole_builtin(cls, content: Any) -> Any:
        return whole_builtin(content)

    @model_validator(mode="after")
    def _task_mapping_is_valid(self) -> PairsSection:
        if self.dev_percent + self.test_percent > 99:
            raise ValueError("dev_percent and test_percent leave nothing to train on")
        check_task(self.task, self.fields)
        return self


class CodeSwitchedSection(Section):
    """English texts with words replaced from a lexicon, to be written in English again (arXiv 2412.12499)."""

    source: Literal["code-switched"] = Field(description="code-switched")
    path: str = Field(description="file, folder or hub:owner/name with English texts; task: the task's own texts")
    field: str = Field(default="text", description="field with the text")
    split: str = Field(default="train", description="split to read, for Hub data sets")
    languages: list[str] = Field(min_length=1, description="languages of the replaced words (BCP 47)")
    lexicon: str = Field(default="builtin", description="builtin, or a word list with {language} in its name")
    rate: float = Field(default=0.5, gt=0, le=1, description="share of the known words that are replaced (our choice)")
    dev_percent: int = Field(default=5, ge=1, le=50, description="share held out for development, by hash")
    limit: int | None = Field(default=None, ge=2, description="at most so many texts")


class TaskTextsSection(Section):
    """The recipe's classification task: a text to its label."""

    source: Literal["task"] = Field(description="task")


StageData = Annotated[PairsSection | CodeSwitchedSection | TaskTextsSection, Field(discriminator="source")]


class StageSection(Section):
    """One training stage; stages follow each other as listed."""

    name: str = Field(pattern=f"^{NAME}$", description="of the stage")
    data: list[StageData] = Field(min_length=1, description="what is trained on, all mixed in equal passes")
    training: TrainingConfig = Field(description="optimiser, schedule, checkpoints")
    batching: BatchingConfig = Field(
        default_factory=lambda: BatchingConfig(max_tokens=None, max_examples=16), description="batches"
    )
    prompt: str = Field(default="", description="text for the LLM after the prefix; {source}: the source text")
    prompt_with_source: bool = Field(
        default=False,
        description="allow {source} in the prompt. In English-only training the LLM then ignores the encoder "
        "(LayAlign, arXiv 2502.11405, table 6: 45.7 without, 5.3 with it on low-resource languages)",
    )
    tuning: TuningConfig = Field(default_factory=TuningConfig, description="what learns; by default the bridge alone")

    @model_validator(mode="after")
    def _prompt_is_meant(self) -> StageSection:
        if "{source}" in self.prompt and not self.prompt_with_source:
            raise ValueError("the prompt holds {source}: set prompt_with_source to true if the LLM shall read the text")
        if self.prompt_with_source and "{source}" not in self.prompt:
            raise ValueError("prompt_with_source is true, but the prompt holds no {source}")
        return self


class SearchSection(Section):
    """The learning-rate search: every bridge is trained once with each rate, on the first seed of the recipe."""

    learning_rates: Rates = Field(
        min_length=1, description="to try; the least development loss wins, and rates that diverge are left out"
    )
    stage: str | None = Field(default=None, description="stage whose rate is searched; none: the last")


class EvaluationSection(Section):
    """How bridges are measured."""

    methods: list[Literal["likelihood", "generation"]] = Field(
        default=["likelihood"], min_length=1, description="how a label is chosen; the first makes the tables"
    )
    controls: list[Control] = Field(default=list(CONTROLS), description="what bridges are compared with")
    metrics: Metrics = Field(default=["chrf++", "exact-match"], description="of written texts, where pairs are tested")
    decoding: DecodingConfig = Field(
        default_factory=lambda: DecodingConfig(num_beams=1), description="search; greedy as in arXiv 2508.09091"
    )
    instruction: Instruction = Field(default=INSTRUCTION, description="what the LLM alone is asked; {text}, {labels}")
    translation_instruction: Instruction = Field(
        default="Translate the text into English.\n\nText: {text}", description="likewise, where pairs are tested"
    )
    reference: str | None = Field(default=None, description="bridge that all are compared with; none: last if there")
    resamples: int = Field(default=1000, ge=100, description="bootstrap resamples of the 95 % intervals")
    limit: int | None = Field(default=None, ge=2, description="test at most so many texts per language")
    batch_size: int = Field(default=32, ge=1, description="texts scored at once")


class AnalysisSection(Section):
    """What is looked at besides accuracy."""

    mexa: bool = Field(default=True, description="alignment of each language with English per layer (arXiv 2410.05873)")
    layer_weights: bool = Field(default=True, description="learned layer weights per language, as table and heat map")
    sentences: int = Field(default=100, ge=10, description="texts per language that the analysis reads")


class BridgeRecipe(Section):
    """Everything a bridge experiment needs."""

    kind: Literal["bridge"] = Field(description="bridge")
    name: str = Field(pattern=RUN_NAME, description="of the run")
    description: str = Field(default="", description="what the run is for")
    output: str | None = Field(default=None, description="folder of the run; runs/NAME by default")
    seeds: Seeds = Field(default=[0], min_length=1, description="each bridge is trained once with each")
    encoder: EncoderSection = Field(description="the encoder")
    llm: LlmSection = Field(description="the LLM")
    bridges: dict[str, BridgeSection] = Field(min_length=1, description="bridges to compare, by name")
    task: TaskSection | None = Field(default=None, description="classification; none: pairs are tested only")
    stages: list[StageSection] = Field(min_length=1, description="training, in order")
    search: SearchSection | None = Field(default=None, description="learning-rate search; none: as the stages say")
    max_target_length: int = Field(default=64, ge=2, le=8192, description="tokens; longer targets are cut")
    cache_gigabytes: float = Field(default=4.0, ge=0, description="memory for states of the frozen encoder")
    evaluate: EvaluationSection = Field(default_factory=EvaluationSection, description="measuring")
    analysis: AnalysisSection = Field(default_factory=AnalysisSection, description="looking inside")

    @model_validator(mode="after")
    def _names_fit(self) -> BridgeRecipe:
        found = [*self._stage_problems(), *(line for name in self.bridges for line in self._bridge_problems(name))]
        reference = self.evaluate.reference
        if reference is not None and reference not in self.bridges:
            found.append(f"evaluate.reference is {reference!r}; bridges: {', '.join(self.bridges)}")
        if found:
            raise ValueError("; ".join(found))
        return self

    def _stage_problems(self) -> list[str]:
        names = self.stage_names
        found = ["two stages have the same name"] if len(set(names)) < len(names) else []
        if self.search is not None and self.search.stage is not None and self.search.stage not in names:
            found.append(f"search.stage is {self.search.stage!r}; stages: {', '.join(names)}")
        uses_task = [stage.name for stage in self.stages if any(_needs_task(data) for data in stage.data)]
        if uses_task and self.task is None:
            found.append(f"stage {uses_task[0]} trains on the task, but the recipe has no task section")
        if self.task is None and not self.tested_pairs:
            found.append("nothing is tested: give a task, or pairs with a test_percent above 0")
        for stage in self.stages:
            if "seed" in stage.training.model_fields_set:
                found.append(f"stages.{stage.name}.training.seed: the recipe's seeds are used; set those")
        return found

    def _bridge_problems(self, name: str) -> list[str]:
        bridge = self.bridges[name]
        if not re.fullmatch(NAME, name) or name in CONTROLS:
            return [f"bridges.{name}: use letters, digits, '-' and '_', and not {', '.join(CONTROLS)}"]
        unknown = [stage for stage in bridge.stages or [] if stage not in self.stage_names]
        if unknown or bridge.stages == []:
            return [f"bridges.{name}.stages: {unknown or 'none'}; stages: {', '.join(self.stage_names)}"]
        try:
            for stage in self.stages_of(name):
                self.training(name, stage, self.seeds_of(name)[0])
        except ValidationError as error:
            return [f"bridges.{name}.training.{line}" for line in problems(error, TrainingConfig)]
        if bridge.learning_rates is not None and self.searched(name) is None:
            instead = "leave training.learning_rate out" if self.search else "add search, or set training.learning_rate"
            return [f"bridges.{name}.learning_rates: nothing is searched; {instead}"]
        return [f"bridges.{name}.training.seed: use seeds"] if "seed" in bridge.training else []

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return Path(self.output or f"runs/{self.name}")

    @property
    def stage_names(self) -> list[str]:
        """Names of the stages, in order."""
        return [stage.name for stage in self.stages]

    @property
    def tested_pairs(self) -> list[PairsSection]:
        """Pairs whose held-out share is written by the bridges and scored."""
        data = [data for stage in self.stages for data in stage.data]
        return [entry for entry in data if isinstance(entry, PairsSection) and entry.test_percent > 0]

    @property
    def reference(self) -> str | None:
        """The bridge that all others are compared with."""
        return self.evaluate.reference or ("last" if "last" in self.bridges else None)

    def stages_of(self, bridge: str) -> list[StageSection]:
        """The stages a bridge trains in."""
        chosen = self.bridges[bridge].stages
        return [stage for stage in self.stages if chosen is None or stage.name in chosen]

    def seeds_of(self, bridge: str) -> list[int]:
        """The seeds a bridge is trained with."""
        return self.bridges[bridge].seeds or self.seeds

    def hidden_states(self, bridge: str) -> HiddenStatesConfig:
        """The hidden-state convention of a bridge."""
        return self.bridges[bridge].hidden_states or self.encoder.hidden_states

    def tuning(self, bridge: str, stage: StageSection) -> TuningConfig:
        """What learns in a stage of a bridge."""
        return self.bridges[bridge].tuning or stage.tuning

    def prompt(self, bridge: str) -> tuple[str, bool]:
        """What the LLM reads after the prefix in the bridge's last stage, and so in use; whether it holds {source}."""
        own, last = self.bridges[bridge].prompt, self.stages_of(bridge)[-1]
        prompt = last.prompt if own is None else own
        return prompt, "{source}" in prompt

    def searched(self, bridge: str) -> tuple[str, list[float]] | None:
        """The stage and the rates of a bridge's search; none where the rate is given."""
        own = self.bridges[bridge].learning_rates
        if self.search is None or "learning_rate" in self.bridges[bridge].training:
            return None
        names = [stage.name for stage in self.stages_of(bridge)]
        stage = self.search.stage if self.search.stage in names else names[-1]
        rates = own or self.search.learning_rates
        return (stage, rates) if stage is not None else None

    def training(
        self, bridge: str, stage: StageSection, seed: int, learning_rate: float | None = None
    ) -> TrainingConfig:
        """Training settings of a bridge in a stage; pydantic's `ValidationError` if its own do not fit."""
        own = {**stage.training.model_dump(), **self.bridges[bridge].training, "seed": seed}
        return TrainingConfig(**(own if learning_rate is None else {**own, "learning_rate": learning_rate}))


def _needs_task(data: StageData) -> bool:
    return isinstance(data, TaskTextsSection) or (isinstance(data, CodeSwitchedSection) and data.path == "task")


def load_bridge_recipe(
    path: str | Path, overrides: Sequence[str] = (), *, languages: Sequence[str] = ()
) -> BridgeRecipe:
    """Read and validate a bridge recipe.

    Args:
        path: YAML file.
        overrides: `section.key=value` settings that replace the file's.
        languages: replace the languages that the task is tested in.

    Raises:
        ConfigError: file missing or not YAML, or fields unknown, missing or invalid: all are listed.
    """
    content = read_content(path, overrides)
    if languages and not isinstance(content.get("task"), dict):
        raise ConfigError("the recipe has no task to test in languages", where="--languages", remedy="leave it out")
    if languages:
        content["task"]["languages"] = list(languages)
    return validated(BridgeRecipe, content, path)
