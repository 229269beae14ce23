"""Bridges of a recipe: built around halves that are loaded once, trained stage by stage, and saved."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from enc2gen.data.batching import EncodedExample, evaluation_batches
from enc2gen.encoders.loading import load_tokenizer
from enc2gen.encoders.reading import encoder_facts, load_reading_encoder
from enc2gen.errors import ConfigError, Interrupted, TrainingError
from enc2gen.experiments.bridge.prepare import PreparedBridgeData
from enc2gen.experiments.bridge.recipe import BridgeRecipe, StageSection
from enc2gen.experiments.workspace import Workspace, replace_folder
from enc2gen.llms.loading import load_llm, load_llm_tokenizer
from enc2gen.models.bridge.modeling import BridgeForConditionalGeneration
from enc2gen.models.bridge.processor import BridgeProcessor
from enc2gen.models.bridge.state_cache import FrozenStateCache
from enc2gen.tokenization.bridge_codec import BridgeCodec
from enc2gen.training.bridging import TuningConfig, train_bridge
from enc2gen.training.checkpoint import load_weights, save_weights, writing

DEV_EXAMPLES = 500
"""Most development examples per set that validation looks at (our choice: validation stays cheap)."""
FIT_SOURCES = 1000
"""Most training sources that the means and deviations of `standardise` are measured on (our choice)."""


@dataclass(frozen=True)
class Step:
    """One stage of training of one bridge with one seed.

    Attributes:
        rate: learning rate of a search; none: as the recipe says.
        before: the step that this one goes on from.
    """

    bridge: str
    stage: StageSection
    seed: int
    rate: float | None
    before: Step | None

    @property
    def name(self) -> str:
        """Name of the stage in the run's folder."""
        return "-".join(["train", self.bridge, f"seed{self.seed}", self._label])

    @property
    def _label(self) -> str:
        return self.stage.name if self.rate is None else f"{self.stage.name}-lr{self.rate:g}"

    def folder(self, workspace: Workspace) -> Path:
        """Where the step trains and leaves its weights."""
        return workspace.root / "bridges" / self.bridge / f"seed{self.seed}" / self._label

    @property
    def chain(self) -> list[Step]:
        """This step and all before it, in order."""
        return [*(self.before.chain if self.before else []), self]


def steps(recipe: BridgeRecipe, bridge: str, seed: int, rate: float | None) -> list[Step]:
    """The stages of a bridge with one seed; a searched rate marks its stage and those after it."""
    searched = recipe.searched(bridge)
    found: list[Step] = []
    marked = False
    for stage in recipe.stages_of(bridge):
        marked = marked or (searched is not None and stage.name == searched[0])
        found.append(Step(bridge, stage, seed, rate if marked else None, found[-1] if found else None))
    return found


class Parts:
    """Encoder, LLM and tokenizers of a recipe, loaded once, and what the frozen encoder says of the sources.

    Halves that a bridge tunes are loaded for it alone.

    Args:
        recipe: of the run.
    """

    def __init__(self, recipe: BridgeRecipe) -> None:
        self.recipe = recipe
        self._caches: dict[str, FrozenStateCache] = {}

    @cached_property
    def encoder(self) -> PreTrainedModel:
        """The encoder as it was published."""
        return load_reading_encoder(self.recipe.encoder.name)

    @cached_property
    def llm(self) -> PreTrainedModel:
        """The LLM as it was published."""
        return load_llm(self.recipe.llm.name, dtype=self.recipe.llm.dtype)

    @cached_property
    def encoder_tokenizer(self) -> PreTrainedTokenizerBase:
        """The encoder's tokenizer."""
        return load_tokenizer(self.recipe.encoder.name)

    @cached_property
    def llm_tokenizer(self) -> PreTrainedTokenizerBase:
        """The LLM's tokenizer."""
        return load_llm_tokenizer(self.recipe.llm.name)

    def model(self, bridge: str, seed: int, tuned: list[TuningConfig]) -> BridgeForConditionalGeneration:
        """The untrained bridge; halves that one of `tuned` lets learn are loaded for this bridge alone."""
        recipe, section = self.recipe, self.recipe.bridges[bridge]
        learning = {name: any(getattr(config, name) != "frozen" for config in tuned) for name in ("encoder", "llm")}
        self._check_length()
        prompt, with_source = recipe.prompt(bridge)
        return BridgeForConditionalGeneration.from_parts(
            load_reading_encoder(recipe.encoder.name) if learning["encoder"] else self.encoder,
            load_llm(recipe.llm.name, dtype=recipe.llm.dtype) if learning["llm"] else self.llm,
            fusion=section.fusion,
            fusion_options=section.fusion_options,
            mapper=section.mapper,
            mapper_options=section.mapper_options,
            hidden_states=recipe.hidden_states(bridge).model_dump(),
            aligner=None if section.aligner is None else section.aligner.model_dump(),
            end_vector=section.end_vector,
            source_template=recipe.encoder.template,
            prompt=prompt,
            prompt_with_source=with_source,
            max_source_length=recipe.encoder.max_length,
            encoder_tokenizer=self.encoder_tokenizer,
            llm_tokenizer=self.llm_tokenizer,
            freeze_encoder=not learning["encoder"],
            freeze_llm=not learning["llm"],
            seed=seed,
        )

    def codec(self, model: BridgeForConditionalGeneration, prompt: str) -> BridgeCodec:
        """Text to ids and back, with a stage's prompt."""
        processor = cast(BridgeProcessor, model.processor)
        return processor.make_codec(self.recipe.max_target_length, prompt, prompt_with_source="{source}" in prompt)

    def cache(self, model: BridgeForConditionalGeneration, bridge: str) -> FrozenStateCache | None:
        """States of the frozen encoder, shared by all bridges of this process that read the same ones."""
        if self.recipe.cache_gigabytes == 0 or model.aligner is not None:
            return None
        if any(parameter.requires_grad for parameter in model.encoder.parameters()):
            return None
        states = self.recipe.hidden_states(bridge)
        section = self.recipe.bridges[bridge]
        fused = "" if model.fusion.trainable else f"{section.fusion} {section.fusion_options}"
        if states.normalise == "standardise":
            fused += f" {self.recipe.stages_of(bridge)[0].name}"  # measured on that stage's sources
        return self._caches.setdefault(
            f"{states} {fused}",
            FrozenStateCache(
                cast(Any, model), self.recipe.cache_gigabytes, pad_token_id=model.config.encoder_pad_token_id
            ),
        )

    def _check_length(self) -> None:
        positions = encoder_facts(self.encoder).max_positions
        if positions is not None and self.recipe.encoder.max_length > positions:
            raise ConfigError(
                f"{self.recipe.encoder.max_length} tokens, but the encoder has positions for {positions}",
                where="encoder.max_length",
                remedy=f"set it to {positions} or less",
            )


def load_bridge(recipe: BridgeRecipe, workspace: Workspace, parts: Parts, step: Step) -> BridgeForConditionalGeneration:
    """The bridge as `step` has left it."""
    model = _started(recipe, workspace, parts, step)
    _load(model, recipe, workspace, step)
    return model.eval()


def _started(recipe: BridgeRecipe, workspace: Workspace, parts: Parts, step: Step) -> BridgeForConditionalGeneration:
    tuned = [recipe.tuning(step.bridge, earlier.stage) for earlier in step.chain]
    model = parts.model(step.bridge, step.seed, tuned)
    cast(Any, model).to(device())  # halves that are shared may be there already, and all has to be in one place
    if recipe.hidden_states(step.bridge).normalise == "standardise":
        codec = parts.codec(model, step.chain[0].stage.prompt)
        examples, _ = stage_examples(recipe, PreparedBridgeData(workspace), codec, step.chain[0].stage)
        _fit(model, [example.input_ids for example in examples[:FIT_SOURCES]])
    return model


def _fit(model: BridgeForConditionalGeneration, sources: list[tuple[int, ...]]) -> None:
    """Measure what `standardise` needs on sources of the training language."""
    pad = cast(int, model.config.encoder_pad_token_id)
    batches = evaluation_batches([EncodedExample(ids, (0,), (0,)) for ids in sources], pad)
    model.fit_states((batch.input_ids, batch.attention_mask) for batch in batches)


def _load(model: BridgeForConditionalGeneration, recipe: BridgeRecipe, workspace: Workspace, step: Step) -> None:
    """Put the weights that `step` and those before it have learnt into `model`."""
    learnt = [recipe.tuning(step.bridge, earlier.stage) for earlier in step.chain]
    for half, name in ((model.encoder, "encoder"), (model.llm, "llm")):
        half.requires_grad_(any(getattr(config, name) != "frozen" for config in learnt))
    load_weights(model, step.folder(workspace) / "weights", trained_only=True)


def stage_examples(
    recipe: BridgeRecipe, data: PreparedBridgeData, codec: BridgeCodec, stage: StageSection
) -> tuple[list[EncodedExample], dict[str, list[EncodedExample]]]:
    """Training examples of a stage, and development sets by name: the task's and one for each group of pairs."""
    rows: dict[str, list[tuple[str, str, str]]] = {"train": [], "dev": []}
    for split in rows:
        if any(entry.source == "task" for entry in stage.data):
            rows[split] += [("task", text.text, text.label) for text in data.texts(split)]
        rows[split] += [(pair.group, pair.source, pair.target) for pair in data.pairs(stage.name, split)]
    dev: dict[str, list[tuple[str, str]]] = {}
    for group, source, target in rows["dev"]:
        dev.setdefault(group, []).append((source, target))
    train = codec.encode_pairs([row[1] for row in rows["train"]], [row[2] for row in rows["train"]])
    return train, {
        group: codec.encode_pairs([s for s, _ in chosen], [t for _, t in chosen])
        for group, chosen in ((group, pairs[:DEV_EXAMPLES]) for group, pairs in dev.items())
    }


def train_step(
    recipe: BridgeRecipe, workspace: Workspace, parts: Parts, step: Step, log: Callable[[str], None]
) -> None:
    """Train a bridge in one stage, from the start or from the stage before, and leave weights and `result.json`.

    Raises:
        Interrupted: by Ctrl-C or SIGTERM, after saving.
    """
    model = _started(recipe, workspace, parts, step)
    if step.before is not None:
        _load(model, recipe, workspace, step.before)
    own = recipe.bridges[step.bridge].prompt
    last = step.stage.name == recipe.stages_of(step.bridge)[-1].name
    codec = parts.codec(model, own if own is not None and last else step.stage.prompt)
    train, dev = stage_examples(recipe, PreparedBridgeData(workspace), codec, step.stage)
    tuning = recipe.tuning(step.bridge, step.stage)
    cache = parts.cache(model, step.bridge) if tuning.encoder == "frozen" else None
    if cache is not None and not cache.add(
        example.input_ids for examples in (train, *dev.values()) for example in examples
    ):
        cache = None
    config, folder = recipe.training(step.bridge, step.stage, step.seed, step.rate), step.folder(workspace)
    log(
        f"{step.bridge}, seed {step.seed}, {step.stage.name}: {config.max_steps:,} steps, learning rate "
        f"{config.learning_rate:g}, {len(train):,} examples"
    )
    result = train_bridge(model, train, dev, config, step.stage.batching, folder, tuning=tuning, cache=cache, log=log)
    cast(Any, model).to(device())  # where it was before: the trainer chooses its own device
    if result.interrupted:
        raise Interrupted(
            f"interrupted after {result.steps} of {config.max_steps} steps; everything is saved", where=str(folder)
        )
    if codec.truncated:
        log(f"{step.bridge}: texts were cut to the length limits {codec.truncated:,} times")
    with writing(folder):
        save_weights(model, folder / "weights", trained_only=True)
    shutil.rmtree(folder / "checkpoints")  # of use to an interrupted step only;
    (folder / "checkpoints").mkdir()  # but the folder says that training would be lost if it were replaced
    names = ("steps", "best_step", "best_loss", "losses", "tokens", "seconds", "tokens_per_second", "stopped_early")
    summary = {name: getattr(result, name) for name in (*names, "parameters")}
    workspace.write_json(folder / "result.json", {**summary, "learning_rate": config.learning_rate})
    log(f"{step.bridge}: {result.seconds:.0f} s; best validation loss {result.best_loss} at step {result.best_step}")


def try_rate(recipe: BridgeRecipe, workspace: Workspace, parts: Parts, step: Step, log: Callable[[str], None]) -> None:
    """As :func:`train_step`; a rate of a search that diverges is left out of the choice, and the search goes on.

    Its `result.json` has no loss and says why under `diverged`; steps behind it are not trained.
    """
    reason = None if step.before is None else _diverged(workspace, step.before)
    if reason is None:
        try:
            return train_step(recipe, workspace, parts, step, log)
        except TrainingError as error:
            reason = error.what
    folder = step.folder(workspace)
    with writing(folder):
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # there is nothing to go on from, or to be kept
    workspace.write_json(folder / "result.json", {"best_loss": None, "learning_rate": step.rate, "diverged": reason})
    log(f"{step.bridge}: diverged with learning rate {step.rate:g}, which is not chosen: {reason}")


def _diverged(workspace: Workspace, step: Step) -> str | None:
    """Why a finished step of a search was given up; None if it was not."""
    found: str | None = workspace.read_json(step.folder(workspace) / "result.json").get("diverged")
    return found


def publish(recipe: BridgeRecipe, workspace: Workspace, parts: Parts, step: Step) -> Path:
    """Save the bridge as a model folder: what it has learnt, the tokenizers, and the names of its halves."""
    target = workspace.root / "models" / step.bridge
    model = load_bridge(recipe, workspace, parts, step)
    model.config.labels = PreparedBridgeData(workspace).summary["labels"]  # `enc2gen classify` chooses from them
    model.generation_config.max_new_tokens = recipe.max_target_length
    replace_folder(target, lambda folder: model.save_pretrained(folder, parts="trained"))
    return target


def device() -> torch.device:
    """Where bridges are measured."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
