"""Stages `build`, `pretrain` and `finetune`: one system of a recipe from encoder to trained model."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForSeq2SeqLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

import enc2gen.models.swcm  # noqa: F401  registers the model with transformers
from enc2gen.data.batching import Batch, evaluation_batches
from enc2gen.encoders.loading import load_tokenizer
from enc2gen.errors import ConfigError, Interrupted, ModelError
from enc2gen.experiments.data_config import StageName
from enc2gen.experiments.encoders import prepared_encoder
from enc2gen.experiments.encoding import encode_pair, target_limit, training_stream
from enc2gen.experiments.prepare import PreparedData
from enc2gen.experiments.recipe import Recipe
from enc2gen.experiments.workspace import Workspace, replace_folder
from enc2gen.generation.generator import Generator
from enc2gen.models.baselines import build_system
from enc2gen.models.swcm.report import REPORT_FILE
from enc2gen.tokenization.layout import TextLayout
from enc2gen.tokenization.tokenizer import TextCodec, add_language_tokens
from enc2gen.training.checkpoint import writing
from enc2gen.training.trainer import Trainer

Log = Callable[[str], None]
DEV_EXAMPLES = 1000
"""Most development examples per language that validation looks at (our choice: validation stays cheap)."""


FOLDERS: dict[StageName, str] = {"pretrain": "pretrained", "finetune": "finetuned"}
"""Where the model of a finished stage lies, within its system's folder."""


def build(recipe: Recipe, workspace: Workspace, name: str, log: Log) -> None:
    """Build a system and save it untrained, with its tokenizer and init report."""
    system = recipe.systems[name]
    summary = workspace.read_json(workspace.data / "summary.json")
    if system.start is not None:
        _go_on(system.start, workspace, name, recipe, log, summary["languages"])
        return
    config = recipe.encoder_of(name)
    grown = recipe.grows(name)
    encoder, tokenizer, layers = prepared_encoder(recipe, workspace, name) if grown else (None, None, None)
    options = dict(system.options)
    for key, value in (("encoder_layers", layers), ("dropout", config.dropout)):
        if value is not None:
            options.setdefault(key, value)
    if layers is None and config.layers is not None and options.get("donor_layers") is not None:
        options["donor_layers"] = _renumbered(options["donor_layers"], config.layers)
    model = build_system(
        system.preset,
        encoder,
        tokenizer=tokenizer,
        languages=summary["languages"],
        seed=recipe.seed,
        options=options,
    )
    sources = PreparedData(workspace.data).trained().unique("source_language")
    model.config.default_source_language = sources[0] if len(sources) == 1 else None
    own: Any = getattr(model, "tokenizer", None)
    if own is None:
        own = tokenizer
        add_language_tokens(own, list(model.config.languages))
    _save(model, workspace, name, recipe, log, own)


def _renumbered(donors: Sequence[int], kept: Sequence[int]) -> list[int]:
    """Donor layers, given in the encoder's own numbering, as indices into the layers that were kept."""
    if foreign := [layer for layer in donors if layer not in kept]:
        raise ConfigError(
            f"donor layers {foreign} are not among the encoder's layers {list(kept)}",
            where="systems.options.donor_layers",
            remedy="use layers that encoder.layers keeps",
        )
    return [kept.index(layer) for layer in donors]


def _go_on(start: str, workspace: Workspace, name: str, recipe: Recipe, log: Log, languages: Sequence[str]) -> None:
    """Take a trained model as it is; `ModelError` if it lacks one of the data's languages."""
    generator = Generator.from_pretrained(start, device="cpu")
    if missing := [tag for tag in languages if tag not in generator.languages]:
        raise ModelError(
            f"the model has no language {', '.join(missing)}; it has {', '.join(sorted(generator.languages))}",
            where=start,
            remedy="start from a model that was built with the data's languages",
        )
    _save(generator.model, workspace, name, recipe, log, generator.tokenizer)
    # A later stage treats parameters that began at random alike, whether it is part of the same run or of another.
    reports = (Path(start) / REPORT_FILE, Path(start).parent / "initial" / REPORT_FILE)
    if (report := next((path for path in reports if path.is_file()), None)) is not None:
        with writing(workspace.system(name, "initial")):
            shutil.copyfile(report, workspace.system(name, "initial", REPORT_FILE))


def _save(
    model: PreTrainedModel,
    workspace: Workspace,
    name: str,
    recipe: Recipe,
    log: Log,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Save with the output limit learnt from the training targets."""
    codec = _codec(recipe, tokenizer, model)
    data = PreparedData(workspace.data)
    limit = target_limit(codec, (data.trained() or data.examples("train"))["target"])
    model.generation_config.max_new_tokens = limit
    if len(recipe.languages) == 1:
        model.config.default_target_language = recipe.languages[0]
        # whatever transformers' own `generate` is to write without being told a language
        start = codec.start(recipe.languages[0])
        model.generation_config.decoder_start_token_id = start[0]
        model.generation_config.forced_bos_token_id = start[1] if len(start) > 1 else None
    folder = workspace.system(name, "initial")
    with writing(folder):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if (report := getattr(model, "init_report", None)) is not None:
            report.save(folder / REPORT_FILE)
    log(f"{name}: {model.num_parameters():,} parameters; outputs are limited to {limit} tokens, learnt from the data")


def codec_for(recipe: Recipe, folder: Path, model: PreTrainedModel) -> TextCodec:
    """The codec of a saved system."""
    return _codec(recipe, load_tokenizer(folder), model)


def _codec(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> TextCodec:
    return TextCodec(
        tokenizer,
        model.config.languages,
        max_source_length=recipe.data.max_source_length,
        max_target_length=recipe.data.max_target_length,
        layout=TextLayout.of(model.config),
    )


def load_system(folder: Path) -> PreTrainedModel:
    """A saved system, in training precision."""
    return AutoModelForSeq2SeqLM.from_pretrained(folder)


def validation_sets(data: PreparedData, codec: TextCodec, max_tokens: int | None) -> dict[str, list[Batch]]:
    """Development batches by target language; the first `DEV_EXAMPLES` of each."""
    rows: dict[str, list[Any]] = {}
    for row in data.examples("dev"):
        rows.setdefault(row["target_language"], []).append(row)
    return {
        tag: evaluation_batches(
            [encode_pair(codec, row) for row in chosen[:DEV_EXAMPLES]], codec.pad_id, max_tokens or 4096
        )
        for tag, chosen in sorted(rows.items())
    }


def train(recipe: Recipe, workspace: Workspace, name: str, stage: StageName, log: Log) -> None:
    """Train a system in one stage, from the initial model or from the stage before.

    Raises:
        Interrupted: by Ctrl-C or SIGTERM, after saving.
    """
    section, config = getattr(recipe, stage), recipe.training(name, stage)
    assert section is not None and config is not None
    before = workspace.system(
        name, "initial" if stage == "pretrain" or recipe.pretrain is None else FOLDERS["pretrain"]
    )
    model = load_system(before)
    codec = codec_for(recipe, before, model)
    data = PreparedData(workspace.data)
    stream = training_stream(stage, section, data.examples("train"), data.texts(), codec, seed=recipe.seed)
    folder = workspace.system(name, stage)
    what = model, stream, validation_sets(data, codec, section.batching.max_tokens), config, folder
    trainer: Any
    if recipe.systems[name].trainer == "transformers":
        from enc2gen.training.cross_check import TransformersTrainer  # slow to import

        trainer = TransformersTrainer(*what)
    else:
        fresh = _fresh_parameters(workspace.system(name, "initial"))
        trainer = Trainer(*what, new_parameters=fresh.__contains__)
    log(
        f"{name}: {stage}, {config.max_steps} steps, learning rate {config.learning_rate:g}, {trainer.precision}; "
        f"output in {folder}"
    )
    result = trainer.train()
    if result.interrupted:
        kept = "everything is saved" if result.last_checkpoint else "this stage starts anew, those before it are saved"
        raise Interrupted(f"interrupted after {result.steps} of {config.max_steps} steps; {kept}", where=str(folder))
    if workspace.processes.is_main_process:
        if codec.truncated:
            log(f"{name}: texts were cut to the length limits {codec.truncated:,} times")
        model.generation_config = GenerationConfig.from_pretrained(before)
        target = workspace.system(name, FOLDERS[stage])
        _replace(model, codec.tokenizer, target)
        workspace.write_json(folder / "result.json", _summary(result))
        log(
            f"{name}: {stage} took {result.seconds:.0f} s, {result.tokens_per_second:,.0f} tokens/s; "
            f"best validation loss {result.best_loss:.3f} at step {result.best_step}"
            if result.best_loss is not None
            else f"{name}: {stage} took {result.seconds:.0f} s, {result.tokens_per_second:,.0f} tokens/s"
        )
    del trainer, model
    gc.collect()


def _summary(result: Any) -> dict[str, Any]:
    names = (
        "steps",
        "best_step",
        "best_loss",
        "losses",
        "tokens",
        "seconds",
        "tokens_per_second",
        "stopped_early",
        "skipped",
    )
    return {name: getattr(result, name) for name in names}


def _fresh_parameters(initial: Path) -> set[str]:
    """Names of randomly initialised parameters, from the init report where there is one."""
    report = initial / REPORT_FILE
    if not report.exists():
        return set()
    tensors = json.loads(report.read_text(encoding="utf-8"))["tensors"]
    return {tensor["name"] for tensor in tensors if tensor["origin"] in ("random", "constant")}


def _replace(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, target: Path) -> None:
    """Write a model folder in the place of an older one."""

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    replace_folder(target, save)


def final_folder(recipe: Recipe, workspace: Workspace, name: str) -> Path:
    """Folder of a system's last trained model."""
    return workspace.system(name, FOLDERS["finetune" if recipe.finetune is not None else "pretrain"])
