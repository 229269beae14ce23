"""Carry out a recipe: prepare -> adapt -> build -> pretrain -> finetune -> evaluate -> report, each stage cached."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from enc2gen import __version__
from enc2gen.errors import ConfigError, Interrupted
from enc2gen.evaluation.metrics import METRICS
from enc2gen.experiments import encoders, systems
from enc2gen.experiments.comparisons import paired_comparisons
from enc2gen.experiments.evaluate import check_limit, evaluate_floors, evaluate_system
from enc2gen.experiments.model_card import write_card
from enc2gen.experiments.prepare import check_counts, check_files, data_files, fingerprint, model_content, prepare
from enc2gen.experiments.provenance import code, machine, versions
from enc2gen.experiments.recipe import Recipe, digest
from enc2gen.experiments.report import print_results, write_report
from enc2gen.experiments.store import Store
from enc2gen.experiments.workspace import Workspace, replace_folder
from enc2gen.generation.engine.engine import chosen_precision, compiles
from enc2gen.locking import locked_folder
from enc2gen.models.baselines import FOREIGN_OPTIONS

STAGES = ("prepare", "adapt", "build", "pretrain", "finetune", "evaluate", "report")


class Run:
    """One run of a recipe in its folder.

    Args:
        recipe: what to do.
        console: where progress goes.
        overwrite: replace training that was done with other settings.
        store: folder of prepared data and vocabularies that runs share; each run makes its own by default.
    """

    def __init__(self, recipe: Recipe, console: Console, *, overwrite: bool = False, store: Path | None = None) -> None:
        self.recipe, self.console = recipe, console
        self.store = Store(store) if store is not None else None
        transformers.logging.disable_progress_bar()  # ours is the only progress shown
        transformers.logging.set_verbosity_error()
        datasets.disable_progress_bars()
        self.workspace = Workspace(recipe, overwrite=overwrite)
        if not self.workspace.processes.is_main_process:
            self.console = Console(quiet=True)
        self.keys: dict[str, str] = {}
        self._only_checks = False

    def run(self, stages: Sequence[str] = STAGES) -> Path:
        """Run `stages` and whatever they need; returns the folder.

        Raises:
            Interrupted: saved, and to be continued by running again.
        """
        last = max(STAGES.index(stage) for stage in stages)
        if last >= STAGES.index("evaluate"):
            self._check_decoding()
        main = self.workspace.processes.is_main_process
        with locked_folder(self.workspace.root) if main else nullcontext():
            if main:
                self._check_stages()
            self.workspace.record_recipe()
            for stage in STAGES[: last + 1]:
                getattr(self, f"_{stage}")()
        return self.workspace.root

    def _check_stages(self) -> None:
        """Refuse other training and missing corpora before anything is written, not when their turn comes.

        The recipe that is kept in the folder is thereby the one of the training in it.
        """
        self._only_checks = True
        try:
            for stage in STAGES[: STAGES.index("evaluate")]:
                getattr(self, f"_{stage}")()
        finally:
            self._only_checks = False
            self.keys.clear()

    def _check_decoding(self) -> None:
        """Refuse settings of decoding before anything is trained, not after."""
        decoding = self.recipe.evaluate.decoding
        others = [name for name in self.recipe.systems if self.recipe.systems[name].preset in FOREIGN_OPTIONS]
        if others and (names := decoding.native_only()):
            raise ConfigError(
                f"{others[0]} is decoded by transformers, which has no {', '.join(names)}",
                where="evaluate.decoding",
                remedy="leave it out, or leave that system out",
            )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        chosen_precision(decoding, device)
        compiles(decoding, device)

    def _stage(
        self,
        stage: str,
        depends_on: dict[str, Any],
        work: Callable[[], Any],
        folder: Path | None = None,
        *,
        everywhere: bool = False,
        shared_as: str | None = None,
    ) -> None:
        """Run a stage unless it is done; one that is `shared_as` something may take its folder from the store."""
        key = self.keys[stage] = digest({"stage": stage, **depends_on})
        if self._only_checks:
            if folder is not None:
                self.workspace.check_training(stage, key, folder)
            return
        if self.workspace.done(stage, key):
            self.log(f"{stage}: done before, kept")
            return
        self.console.rule(f"[bold]{stage}", align="left")
        if self.store is not None and shared_as is not None and folder is not None:
            work = partial(self.store.obtain, digest({"stage": shared_as, **depends_on}), folder, work)
        self.workspace.run_stage(stage, key, work, folder=folder, everywhere=everywhere)

    def log(self, message: str) -> None:
        """One line for the user."""
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def _prepare(self) -> None:
        recipe = self.recipe
        if self._only_checks:
            check_files(recipe)
        depends = {
            "version": __version__,
            "data": recipe.data.identity(),
            "files": fingerprint(*data_files(recipe)),
            "languages": recipe.languages,
            "encoders": [recipe.encoder.name, *(config.name for config in recipe.variants.values())],
        }
        self._stage(
            "prepare",
            depends,
            lambda: prepare(recipe, self.workspace, self.log),
            self.workspace.data,
            shared_as="prepare",
        )
        if self._only_checks:
            return
        check_counts(recipe, self.workspace)
        check_limit(recipe, self.workspace)

    def _adapt(self) -> None:
        made: dict[str, encoders.Vocabulary] = {}
        for name, config in self.recipe.variants.items():
            vocabulary = {
                "prepare": self.keys["prepare"],
                "encoder": config.model_dump(mode="json", exclude={"adapt", "dropout"}),
                "adapts": config.adapt is not None,
                "files": fingerprint(config.name),
                "seed": self.recipe.seed,
            }
            self._stage(
                f"vocabulary-{name}",
                vocabulary,
                partial(encoders.make_vocabulary, self.recipe, self.workspace, name, self.log, made),
                self.workspace.encoder(name),
                shared_as="vocabulary",
            )
            if config.adapt is not None:
                self._stage(
                    f"adapt-{name}",
                    {
                        "vocabulary": self.keys[f"vocabulary-{name}"],
                        "adapt": encoders.adaptation_identity(config.adapt),
                    },
                    partial(self._adapt_one, name),
                    self.workspace.encoder(name, "adaptation"),
                    everywhere=True,
                )

    def _adapt_one(self, name: str) -> None:
        if encoders.adapt(self.recipe, self.workspace, name, self.log):
            raise Interrupted("interrupted; everything is saved", where=str(self.workspace.encoder(name, "adaptation")))

    def _encoder_key(self, name: str) -> str:
        if not self.recipe.grows(name):
            return self.keys["prepare"]
        variant = self.recipe.variant(name)
        return self.keys.get(f"adapt-{variant}") or self.keys[f"vocabulary-{variant}"]

    def _build(self) -> None:
        for name, system in self.recipe.systems.items():
            local = system.start is not None and Path(system.start).is_dir()
            depends = {
                "prepare": self._encoder_key(name),
                "system": [system.preset, system.options, None if local else system.start],
                "start": model_content(model) if (model := system.whole_model) else [],
                "dropout": self.recipe.encoder_of(name).dropout,
                "seed": self.recipe.seed,
            }
            self._stage(
                f"build-{name}",
                depends,
                partial(systems.build, self.recipe, self.workspace, name, self.log),
                self.workspace.system(name, "initial"),
            )

    def _train(self, stage: systems.StageName) -> None:
        section = getattr(self.recipe, stage)
        if section is None:
            return
        for name in self.recipe.systems:
            training = self.recipe.training(name, stage)
            assert training is not None
            depends = {
                "before": self.keys.get(f"pretrain-{name}", self.keys[f"build-{name}"]),
                "section": section.identity(),
                "training": training.identity(),
            }
            if (trainer := self.recipe.systems[name].trainer) != "enc2gen":
                depends["trainer"] = trainer
            self._stage(
                f"{stage}-{name}",
                depends,
                partial(systems.train, self.recipe, self.workspace, name, stage, self.log),
                self.workspace.system(name, stage),
                everywhere=True,
            )

    def _pretrain(self) -> None:
        self._train("pretrain")

    def _finetune(self) -> None:
        self._train("finetune")

    def _trained_key(self, name: str) -> str:
        return self.keys.get(f"finetune-{name}") or self.keys[f"pretrain-{name}"]

    def _evaluate(self) -> None:
        settings = self.recipe.evaluate.identity()
        for name in self.recipe.systems:
            self._stage(
                f"evaluate-{name}",
                {"model": self._trained_key(name), "evaluate": settings, "seed": self.recipe.seed},
                partial(self._evaluate_one, name),
            )
        self._stage(
            "evaluate-floors",
            {"data": self.keys["prepare"], "evaluate": settings, "seed": self.recipe.seed},
            lambda: self.workspace.write_json(
                self.workspace.root / "floors.json", evaluate_floors(self.recipe, self.workspace)
            ),
        )

    def _evaluate_one(self, name: str) -> None:
        columns = (TextColumn(f"{name}: {{task.description}}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            tasks: dict[str, Any] = {}

            def on_batch(language: str, finished: int, total: int) -> None:
                if language not in tasks:
                    tasks[language] = progress.add_task(f"writing {language}", total=total)
                progress.update(tasks[language], completed=finished)

            evaluate_system(self.recipe, self.workspace, name, on_batch)
        self.log(f"{name}: outputs in {self.workspace.system(name, 'hypotheses.jsonl')}")

    def _report(self) -> None:
        if not self.workspace.processes.is_main_process:
            return
        metrics = self.collect()
        self.workspace.write_json(self.workspace.root / "metrics.json", metrics)
        self._publish(metrics)
        write_report(self.recipe, self.workspace, metrics)
        self.console.rule("[bold]results", align="left")
        print_results(self.recipe, self.workspace, metrics, self.console)

    def _publish(self, metrics: dict[str, Any]) -> None:
        """Copy the main system's model to `model/`, with its model card."""
        source = systems.final_folder(self.recipe, self.workspace, self.recipe.main_system)

        def fill(folder: Path) -> None:
            shutil.copytree(source, folder)
            write_card(self.recipe, self.workspace, metrics, folder)

        replace_folder(self.workspace.root / "model", fill)

    def _encoder_record(self, variant: str) -> dict[str, Any]:
        """What became of an encoder: sizes, unknown rates and, where it was adapted, its masked-LM losses."""
        record = self.workspace.read_json(self.workspace.encoder(variant, "vocabulary.json"))
        del record["kept_ids"]
        adapted = self.workspace.encoder(variant, "adaptation.json")
        return record | {"adapted": self.workspace.read_json(adapted) if adapted.exists() else None}

    def collect(self) -> dict[str, Any]:
        """Everything measured: what `metrics.json` holds."""
        floors = self.workspace.read_json(self.workspace.root / "floors.json")
        measured = {
            name: self.workspace.read_json(self.workspace.system(name, "scores.json")) for name in self.recipe.systems
        }
        training = {
            f"{name}/{stage}": self.workspace.read_json(self.workspace.system(name, stage, "result.json"))
            for name in self.recipe.systems
            for stage in ("pretrain", "finetune")
            if getattr(self.recipe, stage) is not None
        }
        return {
            "recipe": self.recipe.name,
            "recipe_hash": digest(self.recipe.model_dump(mode="json")),
            "seed": self.recipe.seed,
            "enc2gen": __version__,
            "code": code(),
            "versions": versions(),
            "machine": machine(),
            "higher_is_better": {name: METRICS.get(name).higher_is_better for name in self.recipe.evaluate.metrics},
            "systems": {name: entry["scores"] for name, entry in measured.items()} | floors,
            "source_use": {name: entry["source_use"] for name, entry in measured.items()},
            "denoising": {name: entry["denoising"] for name, entry in measured.items() if "denoising" in entry},
            "split": self.recipe.evaluate.split,
            "paired": paired_comparisons(self.recipe, self.workspace),
            "encoders": {name: self._encoder_record(name) for name in self.recipe.variants},
            "training": training,
            "seconds": self.workspace.seconds(),
        }
