"""Recipes: one YAML file that says everything a run needs. Validated whole, with every error at once."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from enc2gen.data.batching import BatchingConfig
from enc2gen.data.held_out import DRAWN
from enc2gen.data.mixture import MixtureConfig
from enc2gen.data.noising import NoiseConfig
from enc2gen.data.span_corruption import SpanCorruptionConfig, TranslationSpanCorruptionConfig, UL2Config
from enc2gen.errors import ConfigError, Enc2genError
from enc2gen.experiments.data_config import STAGE_NAMES, DataConfig, StageName
from enc2gen.experiments.encoder_config import EncoderConfig
from enc2gen.experiments.objectives import OBJECTIVES
from enc2gen.experiments.recipe_fields import RUN_NAME, Languages, Metrics, Section, check_training
from enc2gen.generation.decoding import DecodingConfig
from enc2gen.models.baselines import PRESETS, check_options
from enc2gen.training.config import TrainingConfig

FLOORS = ("copy_source", "best_constant")
"""Systems without a model, which every run scores beside its own."""


class StageConfig(Section):
    """One training stage."""

    training: TrainingConfig = Field(description="optimiser, schedule, checkpoints")
    batching: BatchingConfig = Field(default_factory=lambda: BatchingConfig(max_tokens=4096), description="batches")
    mixture: MixtureConfig = Field(default_factory=MixtureConfig, description="mixing of languages and objectives")

    def identity(self) -> dict[str, Any]:
        """What the stage depends on beside its training settings."""
        return self.model_dump(mode="json", exclude={"training"})


class PretrainConfig(StageConfig):
    """Denoising and translation, mixed (arXiv 2502.10852, section 3.2), or other objectives."""

    objectives: tuple[str, ...] = Field(
        default=("denoising",),
        description="what is learnt beside the tasks of the data sets: denoising, span-corruption, ul2 (of plain "
        "text), translation-span-corruption (of translation pairs); mixture.objective_weights weighs all of them",
    )
    noise: NoiseConfig = Field(default_factory=NoiseConfig, description="of the objective denoising")
    span_corruption: SpanCorruptionConfig = Field(
        default_factory=SpanCorruptionConfig, description="of the objective span-corruption"
    )
    ul2: UL2Config = Field(default_factory=UL2Config, description="of the objective ul2")
    translation_span_corruption: TranslationSpanCorruptionConfig = Field(
        default_factory=TranslationSpanCorruptionConfig, description="of the objective translation-span-corruption"
    )

    @field_validator("objectives")
    @classmethod
    def _known(cls, objectives: tuple[str, ...]) -> tuple[str, ...]:
        for name in objectives:
            if name not in OBJECTIVES:
                raise ValueError(str(OBJECTIVES.unknown(name)))
        if len(set(objectives)) < len(objectives):
            raise ValueError("an objective is named twice")
        return objectives

    def identity(self) -> dict[str, Any]:
        """What the stage depends on beside its training settings: of objectives that it does not have, nothing."""
        content = super().identity()
        for name in set(OBJECTIVES) - set(self.objectives):
            del content[OBJECTIVES.get(name).settings]
        if self.objectives == ("denoising",):
            del content["objectives"]
        return content


class SystemConfig(Section):
    """One system to build, train and measure."""

    preset: str = Field(default="swcm", description="swcm, random-decoder, base-a, ... (enc2gen doctor lists them)")
    options: dict[str, Any] = Field(
        default_factory=dict, description="arguments of from_encoder that replace the preset's"
    )
    start: str | None = Field(
        default=None, description="trained model (folder or Hub name) to go on from, instead of growing a new one"
    )
    encoder: dict[str, Any] = Field(
        default_factory=dict, description="settings of `encoder` that are different for this system, nested alike"
    )
    trainer: Literal["enc2gen", "transformers"] = Field(
        default="enc2gen",
        description="transformers: train with its Seq2SeqTrainer on the same batches with the same settings, to check "
        "our trainer; settings that only ours has are refused, and an interrupted stage starts anew",
    )
    pretrain: dict[str, Any] = Field(default_factory=dict, description="training settings of its own, for pretraining")
    finetune: dict[str, Any] = Field(default_factory=dict, description="training settings of its own, for fine-tuning")

    @field_validator("preset")
    @classmethod
    def _known(cls, preset: str) -> str:
        if preset not in PRESETS:
            raise ValueError(str(PRESETS.unknown(preset)))
        return preset

    @model_validator(mode="after")
    def _options_exist(self) -> SystemConfig:
        try:
            check_options(self.preset, self.options)
        except Enc2genError as error:
            raise ValueError(error.what) from error
        if self.preset == "pretrained" and self.encoder:
            raise ValueError("the preset 'pretrained' is a whole model: leave out encoder")
        return self

    @property
    def whole_model(self) -> str | None:
        """Name of the model that this system goes on from; None if it grows from an encoder."""
        return self.start or (self.options["name"] if self.preset == "pretrained" else None)


class EvaluationConfig(Section):
    """How systems are measured."""

    metrics: Metrics = Field(default=["chrf++", "bleu", "exact-match", "off-target"], description="metrics to compute")
    decoding: DecodingConfig = Field(default_factory=DecodingConfig, description="search")
    resamples: int = Field(default=1000, ge=100, description="bootstrap resamples of the 95 % intervals")
    split: Literal["test", "dev"] = Field(
        default="test", description="examples that outputs are written for and scored on; dev to choose settings"
    )
    limit: int | None = Field(default=None, ge=2, description="score so many examples per language, drawn by a hash")
    samples: int = Field(default=10, ge=0, description="sample outputs shown per run")
    denoising: bool = Field(
        default=False,
        description="measure the denoising perplexity of held-out text: of data.monolingual with test_percent and, "
        "with data.denoise_targets, of the targets of `split`",
    )
    noise: NoiseConfig = Field(
        default_factory=NoiseConfig, description="of `denoising`; the same for each text in all systems and seeds"
    )

    def identity(self) -> dict[str, Any]:
        """What scores depend on; settings at a default that changes nothing are left out."""
        content = self.model_dump(mode="json")
        if self.split == "test":
            del content["split"]
        if not self.denoising:
            del content["denoising"], content["noise"]
        if not self.decoding.compile:
            del content["decoding"]["compile"]
        if self.limit is not None:
            content["drawn"] = DRAWN
        return content


class Recipe(Section):
    """Everything one run needs: data, encoder, systems, training, evaluation."""

    name: str = Field(pattern=RUN_NAME, description="of the run")
    description: str = Field(default="", description="what the run is for")
    output: str | None = Field(default=None, description="folder of the run; runs/NAME by default")
    seed: int = Field(default=0, ge=0, lt=2**31, description="of everything random")
    languages: Languages = Field(min_length=1, description="languages to write (BCP 47)")
    encoder: EncoderConfig = Field(description="the encoder")
    data: DataConfig = Field(description="the corpora")
    systems: dict[str, SystemConfig] = Field(
        min_length=1, description="systems by name; the first is published as model/"
    )
    pretrain: PretrainConfig | None = Field(default=None, description="pretraining; none by default")
    finetune: StageConfig | None = Field(default=None, description="fine-tuning; none by default")
    evaluate: EvaluationConfig = Field(default_factory=EvaluationConfig, description="measuring")

    @model_validator(mode="after")
    def _trains_something(self) -> Recipe:
        if self.pretrain is None and self.finetune is None:
            raise ValueError("the recipe trains nothing: give pretrain, finetune or both")
        held_out = self.data.denoise_targets or any(corpus.test_percent for corpus in self.data.monolingual)
        if self.evaluate.denoising and not held_out:
            raise ValueError(
                "evaluate.denoising needs held-out text: set test_percent of data.monolingual, or data.denoise_targets"
            )
        longest = self.data.max_source_length + self.data.max_target_length
        for stage in STAGE_NAMES:
            section: StageConfig | None = getattr(self, stage)
            if section is None:
                continue
            if section.batching.max_tokens is not None and section.batching.max_tokens < longest:
                raise ValueError(
                    f"{stage}.batching.max_tokens is {section.batching.max_tokens}, but one example can take {longest} "
                    "tokens (max_source_length + max_target_length)"
                )
            if "seed" in section.training.model_fields_set:
                raise ValueError(f"{stage}.training.seed: the recipe's own seed is used; set that")
        for name, system in self.systems.items():
            if not re.fullmatch(r"[A-Za-z0-9._-]*[A-Za-z0-9_-][A-Za-z0-9._-]*", name) or name in FLOORS:
                raise ValueError(
                    f"systems.{name}: use letters, digits, '-', '_' and '.', and not {' or '.join(FLOORS)}"
                )
            encoder = self.encoder_of(name)
            if system.start and (encoder.trim_vocabulary or encoder.changes_weights):
                raise ValueError(
                    f"systems.{name}.start goes with its own vocabulary and encoder: set encoder.trim_vocabulary to "
                    "false, and neither encoder.extend_vocabulary nor encoder.adapt"
                )
            for stage in STAGE_NAMES:
                training = self.training(name, stage, system)
                objectives = self.pretrain.objectives if self.pretrain is not None and stage == "pretrain" else ()
                if training is not None:
                    check_training(training, system.trainer, objectives, where=f"systems.{name}.{stage}")
        return self

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return Path(self.output or f"runs/{self.name}")

    @property
    def main_system(self) -> str:
        """The system that is published as `model/`."""
        return next(iter(self.systems))

    def encoder_of(self, name: str) -> EncoderConfig:
        """The encoder of a system: the recipe's, with the system's own settings on top."""
        own = self.systems[name].encoder
        try:
            return EncoderConfig(**merge(self.encoder.model_dump(), own)) if own else self.encoder
        except ValidationError as error:
            raise ValueError(
                "; ".join(f"systems.{name}.encoder.{line}" for line in problems(error, EncoderConfig))
            ) from error

    def variant(self, name: str) -> str:
        """Which prepared encoder a system takes: the name of the first system with equal encoder settings."""
        wanted = self.encoder_of(name)
        return next(other for other in self.systems if self.grows(other) and self.encoder_of(other) == wanted)

    @property
    def variants(self) -> dict[str, EncoderConfig]:
        """The different encoders that the recipe's systems grow from, by the name of their first system."""
        grown = filter(self.grows, self.systems)
        return {name: self.encoder_of(name) for name in dict.fromkeys(map(self.variant, grown))}

    def grows(self, name: str) -> bool:
        """Whether a system grows from an encoder, rather than being a trained or pretrained model."""
        return self.systems[name].whole_model is None

    def training(self, name: str, stage: StageName, system: SystemConfig | None = None) -> TrainingConfig | None:
        """Training settings of a system in a stage: the stage's, the system's own on top, the recipe's seed."""
        section: StageConfig | None = getattr(self, stage)
        own = getattr(system or self.systems[name], stage)
        if section is None:
            if own:
                raise ValueError(f"systems.{name}.{stage} is set, but the recipe has no {stage} section")
            return None
        try:
            return TrainingConfig(**{**section.training.model_dump(), "seed": self.seed, **own})
        except ValidationError as error:
            raise ValueError(
                "; ".join(f"systems.{name}.{stage}.{line}" for line in problems(error, TrainingConfig))
            ) from error


def merge(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the entries of `own`, section by section."""
    merged = dict(base)
    for key, value in own.items():
        inner = merged.get(key)
        merged[key] = merge(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return merged


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, languages: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe.

    Args:
        path: YAML file.
        overrides: `section.key=value` settings that replace the file's; values are YAML.
        languages: replace the recipe's languages.

    Raises:
        ConfigError: file missing or not YAML, or fields unknown, missing or invalid: all are listed.
    """
    content = read_content(path, overrides)
    if content.get("kind") == "bridge":
        raise ConfigError(
            "this is a bridge recipe, which is carried out as a whole", where=str(path), remedy=f"enc2gen run {path}"
        )
    if languages:
        content["languages"] = list(languages)
    return validated(Recipe, content, path)


def read_content(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The YAML mapping in a file, with `section.key=value` settings on top; raises as :func:`load_recipe`."""
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError("there is no such recipe", where=str(path), remedy="see recipes/ for examples") from error
    except (UnicodeDecodeError, yaml.YAMLError, OSError) as error:
        raise ConfigError(
            f"the recipe is not readable YAML: {error}", where=str(path), remedy="repair the file"
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(
            "the recipe is not a mapping of fields", where=str(path), remedy="see recipes/quickstart.yaml"
        )
    for override in overrides:
        _override(content, override)
    return content


RecipeT = TypeVar("RecipeT", bound=BaseModel)


def validated(model: type[RecipeT], content: Mapping[str, Any], path: str | Path) -> RecipeT:
    """The recipe that `content`, read from `path`, describes; `ConfigError` with every problem if there are any."""
    try:
        return model.model_validate(dict(content))
    except ValidationError as error:
        lines = problems(error, model)
        listed = f"{len(lines)} problem{'s' if len(lines) > 1 else ''}\n  " + "\n  ".join(lines)
        raise ConfigError(listed, where=str(path), remedy="correct these fields and run again") from error


def _override(content: dict[str, Any], override: str) -> None:
    name, equals, value = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"{override!r} is not of the form section.key=value", where="--set")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of {name!r} is not YAML: {value!r}", where="--set") from error
    node: Any = content
    for number, key in enumerate(keys):
        place = int(key) if isinstance(node, list) and key.isdigit() and int(key) < len(node) else key
        if not isinstance(node, dict) and not isinstance(place, int):
            raise ConfigError(
                f"{name!r} names nothing in this recipe",
                where="--set",
                remedy="check the section names; entries of lists are counted from 0",
            )
        if number == len(keys) - 1:
            node[place] = parsed
        else:
            node = node[place] if isinstance(place, int) else node.setdefault(place, {})


def problems(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Each problem with its place in `model`, and the closest name for an unknown field."""
    lines = []
    for problem in error.errors():
        place = ".".join(str(part) for part in problem["loc"]) or model.__name__.lower()
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = "unknown field" + _suggestion(problem["loc"], model)
        elif problem["type"] == "invalid_key":
            message = f"the name {problem['input']} is no text (YAML reads no, on and 1 as values): remove or quote it"
        lines.append(f"{place}: {message}")
    return lines


def _suggestion(location: tuple[int | str, ...], model: type[BaseModel]) -> str:
    """`, did you mean ...?` from the fields of the section that `location` lies in."""
    section: Any = model
    for part in location[:-1]:
        section = _child(section, part)
        if section is None:
            return ""
    close = difflib.get_close_matches(str(location[-1]), section.model_fields, n=1)
    return f", did you mean {close[0]!r}?" if close else f"; fields here: {', '.join(section.model_fields)}"


def _child(section: type[BaseModel], part: int | str) -> type[BaseModel] | None:
    if isinstance(part, int) or part not in section.model_fields:
        return section  # an index into a list, or a key of a mapping: the item's model is the section already
    pending = [section.model_fields[part].annotation]
    while pending:
        kind = pending.pop()
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
        pending += typing.get_args(kind)
    return None


def as_yaml(recipe: BaseModel, *, allow_unicode: bool = True) -> str:
    """The recipe with all defaults filled in; without `allow_unicode` in ASCII, with YAML's own escapes."""
    return str(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=allow_unicode))


def digest(value: Mapping[str, Any] | Sequence[Any]) -> str:
    """sha256 of a JSON-able value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False, default=str).encode()).hexdigest()
