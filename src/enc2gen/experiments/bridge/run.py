"""Carry out a bridge recipe: prepare -> search -> train -> evaluate -> analyse -> report, every piece cached.

Several processes may be started on one recipe: they share its folder, and each takes the next piece of work.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import transformers
from rich.console import Console

from enc2gen.data.held_out import DRAWN
from enc2gen.errors import ConfigError, OutputError, TrainingError
from enc2gen.experiments.bridge import systems
from enc2gen.experiments.bridge.analysis import (
    analyse_bridge,
    analyse_encoder,
    analyse_tokens,
    wants_alignment,
    wants_tokens,
    wants_weights,
)
from enc2gen.experiments.bridge.evaluate import evaluate_bridge, evaluate_control
from enc2gen.experiments.bridge.prepare import (
    PreparedBridgeData,
    check_languages,
    check_prepared,
    data_key,
    language_written,
    prepare,
    training_digest,
)
from enc2gen.experiments.bridge.recipe import BridgeRecipe
from enc2gen.experiments.bridge.report import print_results, write_report
from enc2gen.experiments.bridge.results import collect
from enc2gen.experiments.bridge.sharing import Unit, carry_out
from enc2gen.experiments.bridge.systems import Parts, Step
from enc2gen.experiments.prepare import fingerprint
from enc2gen.experiments.recipe import digest
from enc2gen.experiments.workspace import Workspace
from enc2gen.training.checkpoint import writing

_INSTRUCTIONS = ("instruction", "translation_instruction")  # only the LLM alone is given them


class BridgeRun:
    """One run of a bridge recipe in its folder.

    Args:
        recipe: what to do.
        console: where progress goes.
        overwrite: replace training that was done with other settings.
        only: train and test these bridges alone, each as NAME or NAME:SEED, and write no report; what other processes
            do of the same recipe is waited for where it is needed.

    Raises:
        ConfigError: `only` names something that the recipe does not have.
        OutputError: the folder is not a run, or cannot be written.
    """

    def __init__(
        self, recipe: BridgeRecipe, console: Console, *, overwrite: bool = False, only: Sequence[str] = ()
    ) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError(
                "a bridge recipe is not launched by accelerate or torchrun",
                remedy="start the plain command several times: the processes share the work",
            )
        self.recipe, self.console = recipe, console
        transformers.logging.disable_progress_bar()
        transformers.logging.set_verbosity_error()
        self.chosen = _chosen(recipe, only)
        self.partial = bool(only)
        self.workspace = _open(recipe, overwrite)
        self.parts = Parts(recipe)

    def run(self) -> Path:
        """Do everything that is not done; returns the folder.

        Raises:
            Interrupted: saved, and to be continued by running again.
        """
        if self.recipe.task is not None:
            check_languages(self.recipe.task)
        self._carry_out(lambda: [Unit("prepare", self._prepare_key, self._prepare, folder=self.workspace.data)])
        check_prepared(self.recipe, self.workspace)
        self._check_training()
        self.workspace.record_recipe()
        self._carry_out(self._units)
        if not self.partial:
            self._forget_lost_report()
            self._carry_out(lambda: [Unit("report", self._report_key, self._report)])
            self.console.rule("[bold]results", align="left")
            print_results(self.workspace.read_json(self.workspace.root / "results.json"), self.console)
        return self.workspace.root

    def _check_training(self) -> None:
        """Refuse to replace other training while `recipe.json` still tells how that was done."""
        for name, seeds in self.chosen.items():
            given = (step for seed in seeds for step in systems.steps(self.recipe, name, seed, None))
            for step in given if self.recipe.searched(name) is None else self._search_steps(name):
                self.workspace.check_training(step.name, self._step_key(step), step.folder(self.workspace))

    def _forget_lost_report(self) -> None:
        """Have the report written again if a file of it was removed."""
        root = self.workspace.root
        if not all((root / name).is_file() for name in ("results.json", "results.md", "report.html")):
            with writing(root):
                (root / "stages" / "report.json").unlink(missing_ok=True)

    def log(self, message: str) -> None:
        """One line for the user."""
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def _carry_out(self, units: Callable[[], list[Unit]]) -> None:
        carry_out(units, self.workspace, self.log, lambda name: self.console.rule(f"[bold]{name}", align="left"))

    def _units(self) -> list[Unit]:
        """Everything between `prepare` and `report` that is known by now, in the order in which it is best done."""
        found = [self._train_unit(step) for name in self.chosen for step in self._search_steps(name)]
        for name, seeds in self.chosen.items():
            if self._searched(name):
                found += [unit for seed in seeds for unit in self._bridge_units(name, seed)]
        if not self.partial:
            found += self._other_units()
        return list({unit.name: unit for unit in found}.values())

    # Keys

    def _prepare_key(self) -> str:
        return digest({"stage": "prepare", **data_key(self.recipe)})

    @cached_property
    def _data(self) -> str:
        return training_digest(self.recipe, self.workspace)

    @cached_property
    def _models(self) -> dict[str, Any]:
        recipe = self.recipe
        return {
            "encoder": recipe.encoder.model_dump(mode="json", exclude={"hidden_states"}),
            "llm": recipe.llm.model_dump(mode="json"),
            "files": fingerprint(recipe.encoder.name, recipe.llm.name),
        }

    def _step_key(self, step: Step) -> str:
        recipe, stage = self.recipe, step.stage
        parts = {"fusion", "fusion_options", "mapper", "mapper_options", "aligner", "end_vector", "prompt"}
        return digest(
            {
                "stage": step.name,
                "models": self._models,
                "bridge": recipe.bridges[step.bridge].model_dump(mode="json", include=parts),
                "hidden_states": recipe.hidden_states(step.bridge).model_dump(mode="json"),
                "tuning": recipe.tuning(step.bridge, stage).model_dump(mode="json"),
                "section": stage.model_dump(mode="json", exclude={"training", "data", "tuning"}),
                "uses": [data.source for data in stage.data],
                "training": recipe.training(step.bridge, stage, step.seed, step.rate).identity(),
                "max_target_length": recipe.max_target_length,
                "data": self._data,
                "before": self._step_key(step.before) if step.before else None,
            }
        )

    def _test_key(self, *unused: str) -> dict[str, Any]:
        """All settings of measuring but the `unused` ones and those that change no score."""
        without = {"controls", "reference", "batch_size", *unused}
        return {
            "prepare": self._prepare_key(),
            "evaluate": self.recipe.evaluate.model_dump(mode="json", exclude=without),
            "max_target_length": self.recipe.max_target_length,
            **({"drawn": DRAWN} if self.recipe.evaluate.limit is not None else {}),
            **({"languages": self._long_tags} if self._long_tags else {}),
        }

    @cached_property
    def _long_tags(self) -> list[str]:
        """Languages of tested pairs whose tags hold a hyphen: they were once scored as if only its end were the tag."""
        counts = PreparedBridgeData(self.workspace).summary["counts"]
        groups = {group for stage in self.recipe.stages for group in counts[stage.name]["test"]}
        return sorted({tag for tag in map(language_written, groups) if "-" in tag})

    def _bridge_test_key(self) -> dict[str, Any]:
        return self._test_key(*_INSTRUCTIONS)

    def _control_key(self, control: str) -> dict[str, Any]:
        unused = () if control == "llm_alone" else _INSTRUCTIONS
        return {"models": self._models, **self._test_key("methods", *unused)}

    def _report_key(self) -> str:
        stages = sorted(path for path in (self.workspace.root / "stages").glob("*.json") if path.stem != "report")
        done = {path.stem: self.workspace.key(path.stem) for path in stages}
        return digest({"recipe": self.recipe.model_dump(mode="json", exclude={"output"}), "stages": done})

    # Search

    def rate(self, bridge: str) -> float | None:
        """The chosen learning rate; none where there was nothing to choose.

        Raises:
            CheckpointError: the search is not finished.
            TrainingError: no rate can be chosen, because training diverged at all of them.
        """
        searched = self.recipe.searched(bridge)
        if searched is None:
            return None
        losses = {rate: loss for rate in searched[1] if (loss := self._search_loss(bridge, rate)) is not None}
        if not losses:
            raise TrainingError(
                f"training {bridge} diverged at every learning rate of the search: "
                + ", ".join(f"{rate:g}" for rate in searched[1]),
                where=str(self.workspace.root / "bridges" / bridge),
                remedy=f"search lower rates (search.learning_rates, or bridges.{bridge}.learning_rates), or lengthen "
                "training.warmup",
            )
        return min(losses, key=lambda rate: (losses[rate], rate))

    def _search_loss(self, bridge: str, rate: float) -> float | None:
        """Development loss with a searched rate; None if training diverged."""
        last = systems.steps(self.recipe, bridge, self.recipe.seeds_of(bridge)[0], rate)[-1]
        loss = self.workspace.read_json(last.folder(self.workspace) / "result.json")["best_loss"]
        return None if loss is None else float(loss)

    def _search_steps(self, bridge: str) -> Iterator[Step]:
        searched = self.recipe.searched(bridge)
        for rate in searched[1] if searched else ():
            yield from systems.steps(self.recipe, bridge, self.recipe.seeds_of(bridge)[0], rate)

    def _searched(self, bridge: str) -> bool:
        return all(self._step_done(step) for step in self._search_steps(bridge))

    # Units of one bridge

    def _step_done(self, step: Step) -> bool:
        return self.workspace.done(step.name, self._step_key(step))

    def _train_unit(self, step: Step) -> Unit:
        searching = step.rate is not None and step.seed == self.recipe.seeds_of(step.bridge)[0]
        return Unit(
            step.name,
            partial(self._step_key, step),
            partial(
                systems.try_rate if searching else systems.train_step,
                self.recipe,
                self.workspace,
                self.parts,
                step,
                self.log,
            ),
            ready=lambda: step.before is None or self._step_done(step.before),
            folder=step.folder(self.workspace),
        )

    def _last(self, bridge: str, seed: int) -> Step:
        return systems.steps(self.recipe, bridge, seed, self.rate(bridge))[-1]

    def _bridge_units(self, bridge: str, seed: int) -> list[Unit]:
        """Training at the chosen rate, testing, and for the first seed analysis and publication."""
        found = [self._train_unit(step) for step in systems.steps(self.recipe, bridge, seed, self.rate(bridge))]
        found.append(self._after(f"evaluate-{bridge}-seed{seed}", bridge, seed, self._evaluate, self._bridge_test_key))
        if seed == self.recipe.seeds_of(bridge)[0]:
            found.append(self._after(f"publish-{bridge}", bridge, seed, self._publish, self._label_key))
            if wants_weights(self.recipe, bridge):
                found.append(self._after(f"weights-{bridge}", bridge, seed, self._weights, self._analysis_key))
                if wants_tokens(self.recipe, bridge):
                    found.append(self._after(f"tokens-{bridge}", bridge, seed, self._tokens, self._analysis_key))
        return found

    def _after(self, name: str, bridge: str, seed: int, work: Any, settings: Any) -> Unit:
        """Something to do with a trained bridge."""
        return Unit(
            name,
            lambda: digest({"stage": name, "model": self._step_key(self._last(bridge, seed)), **settings()}),
            lambda: work(self._last(bridge, seed)),
            ready=lambda: self._step_done(self._last(bridge, seed)),
        )

    def _evaluate(self, step: Step) -> None:
        evaluate_bridge(self.recipe, self.workspace, self.parts, step, self.log)

    def _publish(self, step: Step) -> None:
        systems.publish(self.recipe, self.workspace, self.parts, step)

    def _weights(self, step: Step) -> None:
        analyse_bridge(self.recipe, self.workspace, self.parts, step)

    def _tokens(self, step: Step) -> None:
        analyse_tokens(self.recipe, self.workspace, self.parts, step)

    # The rest

    def _analysis_key(self) -> dict[str, Any]:
        return {
            "prepare": self._prepare_key(),
            "analysis": self.recipe.analysis.model_dump(mode="json"),
            "limit": self.recipe.evaluate.limit,  # the texts looked at are those tested
        }

    def _label_key(self) -> dict[str, Any]:
        return {"labels": PreparedBridgeData(self.workspace).summary["labels"]}

    def _prepare(self) -> None:
        prepare(self.recipe, self.workspace, self.log)

    def _other_units(self) -> list[Unit]:
        """Controls and what is known before training."""
        recipe = self.recipe
        found = [
            Unit(
                f"control-{control}",
                partial(self._key_of, f"control-{control}", self._control_key(control)),
                partial(evaluate_control, recipe, self.workspace, self.parts, control, self.log),
            )
            for control in recipe.evaluate.controls
        ]
        if wants_alignment(recipe):
            found.append(
                Unit(
                    "alignment",
                    partial(self._key_of, "alignment", {"models": self._models, **self._analysis_key()}),
                    partial(analyse_encoder, recipe, self.workspace, self.parts, self.log),
                )
            )
        return found

    @staticmethod
    def _key_of(stage: str, settings: dict[str, Any]) -> str:
        return digest({"stage": stage, **settings})

    def _report(self) -> None:
        last = {
            bridge: [(seed, self._last(bridge, seed)) for seed in self.recipe.seeds_of(bridge)]
            for bridge in self.recipe.bridges
        }
        search = {
            bridge: {f"{rate:g}": self._search_loss(bridge, rate) for rate in found[1]}
            for bridge in self.recipe.bridges
            if (found := self.recipe.searched(bridge)) is not None
        }
        results = collect(self.recipe, self.workspace, last, search)
        self.workspace.write_json(self.workspace.root / "results.json", results)
        write_report(self.recipe, self.workspace, results)


def _open(recipe: BridgeRecipe, overwrite: bool) -> Workspace:
    """The run's folder; a process that has just made it may not have marked it as a run yet."""
    try:
        return Workspace(cast(Any, recipe), overwrite=overwrite)
    except OutputError:
        time.sleep(1.0)
        return Workspace(cast(Any, recipe), overwrite=overwrite)


def _chosen(recipe: BridgeRecipe, only: Sequence[str]) -> dict[str, list[int]]:
    """Bridge -> seeds that this process sees to."""
    if not only:
        return {name: recipe.seeds_of(name) for name in recipe.bridges}
    found: dict[str, list[int]] = {}
    for entry in only:
        name, colon, seed = entry.partition(":")
        if name not in recipe.bridges:
            raise ConfigError(f"no bridge {name!r}", where="--only", remedy=f"bridges: {', '.join(recipe.bridges)}")
        seeds = recipe.seeds_of(name)
        if colon and seed not in map(str, seeds):
            raise ConfigError(
                f"no seed {seed!r} of {name}", where="--only", remedy=f"seeds: {', '.join(map(str, seeds))}"
            )
        found[name] = sorted({*found.get(name, []), *([int(seed)] if colon else seeds)})
    return found
