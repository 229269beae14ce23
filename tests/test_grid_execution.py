"""Carrying runs out: real processes, what a failure and Ctrl-C leave behind, what is shared and what is repeated."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from enc2gen.errors import ConfigError, Interrupted, OutputError
from enc2gen.experiments.grid.definition import load_experiment
from enc2gen.experiments.grid.engines import RUNNERS, Command, LocalRunner, Outcome, RayRunner, Runner, task_cores
from enc2gen.experiments.grid.execution import Execution, tail
from enc2gen.experiments.grid.plan import GridRun
from enc2gen.experiments.grid.planning import Planner
from enc2gen.experiments.grid.records import RunRecord
from enc2gen.experiments.grid.run import ExperimentRun
from enc2gen.experiments.recipe import load_recipe
from enc2gen.experiments.store import Store, link_file
from enc2gen.locking import locked_folder
from grid_toys import InProcess, definition, stage, write_definition, write_pairs

BUSY = "import time\nend = time.process_time() + 0.4\nwhile time.process_time() < end: pass"
SAVES = """
import signal, sys, time
def save(*_):
    print("saved"); sys.exit(130)
signal.signal(signal.SIGINT, save)
print("ready", flush=True)
time.sleep(60)
"""


def python(folder: Path, name: str, code: str) -> Command:
    return Command(("-c", code), folder / f"{name}.txt", {"GIVEN": "yes"})


def wait_for(runner: Runner, count: int) -> dict[str, Outcome]:
    ended: dict[str, Outcome] = {}
    limit = time.monotonic() + 30
    while len(ended) < count and time.monotonic() < limit:
        ended.update(runner.ended())
        time.sleep(0.02)
    return ended


def test_processes_are_timed_and_their_ends_told_apart(tmp_path: Path) -> None:
    with LocalRunner(3, tmp_path) as runner:
        runner.start("busy", python(tmp_path, "busy", BUSY))
        runner.start("wrong", python(tmp_path, "wrong", "import os, sys; print(os.environ['GIVEN']); sys.exit(3)"))
        runner.start("killed", python(tmp_path, "killed", "import os; os.kill(os.getpid(), 9)"))
        ended = wait_for(runner, 3)
    assert {name: outcome.status for name, outcome in ended.items()} == {"busy": 0, "wrong": 3, "killed": -9}
    assert 0.4 <= ended["busy"].core_seconds < 2 and ended["busy"].wall_seconds >= ended["busy"].core_seconds * 0.9
    assert ended["wrong"].core_seconds < 0.4
    assert (tmp_path / "wrong.txt").read_text() == "yes\n"


def test_interrupted_processes_save_and_abandoned_ones_end(tmp_path: Path) -> None:
    with LocalRunner(2, tmp_path) as runner:
        runner.start("a", python(tmp_path, "a", SAVES))
        while "ready" not in (tmp_path / "a.txt").read_text():
            time.sleep(0.02)
        runner.interrupt()
        assert wait_for(runner, 1)["a"].status == 130
        runner.start("b", python(tmp_path, "b", "import os; print(os.getpid(), flush=True)\n" + SAVES))
        while "ready" not in (tmp_path / "b.txt").read_text():
            time.sleep(0.02)
    assert (tmp_path / "a.txt").read_text() == "ready\nsaved\n"
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "b.txt").read_text().split()[0]), 0)


def test_a_cluster_carries_out_and_interrupts_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with RayRunner(2, tmp_path) as runner:
        runner.start("wrong", python(Path(), "wrong", "import os, sys; print(os.environ['GIVEN']); sys.exit(3)"))
        runner.start("saves", python(Path(), "saves", SAVES))
        ended = wait_for(runner, 1)
        assert ended["wrong"].status == 3, (tmp_path / "wrong.txt").read_text()
        limit = time.monotonic() + 60
        while not (tmp_path / "saves.txt").exists() or "ready" not in (tmp_path / "saves.txt").read_text():
            assert time.monotonic() < limit
            time.sleep(0.05)
        runner.interrupt()
        ended |= wait_for(runner, 1)
    assert {name: outcome.status for name, outcome in ended.items()} == {"wrong": 3, "saves": 130}
    assert ended["wrong"].core_seconds > 0
    assert (tmp_path / "wrong.txt").read_text() == "yes\n" and (tmp_path / "saves.txt").read_text() == "ready\nsaved\n"
    assert not (tmp_path / "stop").exists()


def test_a_cluster_leaves_no_process_behind_and_says_why_one_could_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with RayRunner(2, tmp_path) as runner:
        runner.start("nowhere", Command(("-c", ""), Path("missing/log.txt"), {}))
        outcome = wait_for(runner, 1)["nowhere"]
        assert outcome.status == 1 and "missing/log.txt" in outcome.reason and "nodes need enc2gen" in outcome.reason
        runner.start("left", python(Path(), "left", "import os; print(os.getpid(), flush=True)\n" + SAVES))
        limit = time.monotonic() + 60
        while not (tmp_path / "left.txt").exists() or "ready" not in (tmp_path / "left.txt").read_text():
            assert time.monotonic() < limit
            time.sleep(0.05)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "left.txt").read_text().split()[0]), 0)


@pytest.mark.parametrize(
    ("nodes", "slots", "cores"),
    [
        ([{"CPU": 8}], 3, 2),
        ([{"CPU": 8}], 16, 1),
        ([{"CPU": 8}, {"CPU": 8}], 1, 8),  # an equal share would be 16, which no node has
        ([{"CPU": 4}, {"CPU": 64}], 2, 4),
        ([{"CPU": 0}, {"CPU": 8}], 1, 8),  # a head without cores
        ([{"CPU": 64}, {"CPU": 16, "GPU": 4}], 4, 4),  # only the second node has what a task needs
        ([{"CPU": 64}, {"CPU": 16, "GPU": 4}], 8, 2),  # half a GPU each
        ([{"CPU": 2, "GPU": 4}], 4, 1),
    ],
)
def test_a_task_asks_for_no_more_cores_than_a_node_has(nodes: list[dict[str, float]], slots: int, cores: int) -> None:
    assert task_cores(nodes, slots) == cores


def test_a_cluster_without_cores_is_refused() -> None:
    with pytest.raises(ConfigError, match="no node of the Ray cluster has both cores and a GPU"):
        task_cores([{"CPU": 8}, {"CPU": 0, "GPU": 1}], 1)


def test_cores_and_gpus_are_divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setattr("enc2gen.experiments.grid.engines.available_cores", lambda: 8)
    shown = "import os; print(os.environ['OMP_NUM_THREADS'], os.environ['CUDA_VISIBLE_DEVICES'])"
    with LocalRunner(None, tmp_path) as runner:
        assert runner.slots == 2
        for name in ("a", "b"):
            runner.start(name, python(tmp_path, name, shown))
        wait_for(runner, 2)
    assert {(tmp_path / f"{name}.txt").read_text() for name in ("a", "b")} == {"4 4\n", "4 7\n"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert LocalRunner(None, tmp_path).slots == 8


class Pretend(InProcess):
    """Finishes runs without doing anything."""

    slots = 2

    def start(self, name: str, command: Command) -> None:
        assert (command.log.parent / "recipe.yaml").exists()
        self.started.append(name)
        status = 1 if any(part in name for part in self.broken) else 0
        with command.log.open("a") as log:
            log.write("" if status == 0 else "Loading\nerror: no such corpus\n  remedy: name another\n")
        self._ended.append((name, Outcome(status, 1.5, 2.0)))


def planned(tmp_path: Path, **changes: Any) -> Planner:
    write_pairs(tmp_path / "pairs.tsv")
    path = write_definition(tmp_path / "toy.yaml", definition(Path("encoder"), **changes))
    return Planner(load_experiment(str(path))[0], tmp_path / "out", tmp_path)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("enc2gen.experiments.grid.execution.POLL_SECONDS", 0.01)


def execution(runner: InProcess, tmp_path: Path) -> Execution:
    return Execution(runner, tmp_path / "store", lambda line: None)


def test_a_failure_takes_along_only_what_starts_from_it_and_is_repeated_alone(tmp_path: Path) -> None:
    runs = planned(tmp_path).runs({})
    first = Pretend(broken=("random-pretraining",))
    failed = execution(first, tmp_path).carry_out(runs)
    assert [(f.run.variant, f.run.kind, f.status) for f in failed] == [
        ("random", "pretrain", 1),
        ("random", "task", None),
    ]
    assert failed[0].tail == "Loading\nerror: no such corpus\n  remedy: name another"
    assert len(first.started) == 3
    again = Pretend()
    assert execution(again, tmp_path).carry_out(runs) == []
    assert again.started == [runs[2].name, runs[3].name]
    assert RunRecord(runs[2]).core_seconds == 3.0  # two attempts
    third = Pretend()
    assert execution(third, tmp_path).carry_out(runs) == [] and third.started == []


@pytest.mark.parametrize("broken", ["make_ready", "tidy"])
def test_a_full_disk_fails_the_run_that_met_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    from enc2gen.experiments.grid import execution as module

    real = getattr(module, broken)

    def full(run: GridRun) -> None:
        if run.variant == "random":
            raise OSError(28, "No space left on device", str(run.folder))
        real(run)

    monkeypatch.setattr(module, broken, full)
    runs = planned(tmp_path).runs({})
    failed = execution(Pretend(), tmp_path).carry_out(runs)
    assert [(f.run.variant, f.run.kind) for f in failed] == [("random", "pretrain"), ("random", "task")]
    assert "No space left on device" in failed[0].reason
    assert [RunRecord(run).finished for run in runs] == [True, True, False, False]
    monkeypatch.setattr(module, broken, real)
    assert execution(Pretend(), tmp_path).carry_out(runs) == []


def test_changed_data_is_worked_on_again(tmp_path: Path) -> None:
    runs = planned(tmp_path).runs({})
    execution(Pretend(), tmp_path).carry_out(runs)
    write_pairs(tmp_path / "pairs.tsv", 161)
    again = Pretend()
    execution(again, tmp_path).carry_out(runs)
    assert len(again.started) == 4


def test_a_run_whose_start_is_not_carried_out_fails_instead_of_waiting(tmp_path: Path) -> None:
    class Impatient(Pretend):
        looks = 0

        def ended(self) -> Iterator[tuple[str, Outcome]]:
            self.looks += 1
            assert self.looks < 100, "waits for ever"
            return super().ended()

    task = planned(tmp_path).runs({})[1]
    (failed,) = execution(Impatient(), tmp_path).carry_out([task])
    assert failed.run is task and "is not among the runs" in failed.reason


def test_variants_that_share_training_may_choose_other_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wide beam is best with the first rate, the narrow one with the second."""

    class Searched(Pretend):
        def start(self, name: str, command: Command) -> None:
            assert len(self.started) < 20
            super().start(name, command)
            recipe = load_recipe(command.log.parent / "recipe.yaml")
            folder = command.log.parent / "systems" / recipe.main_system
            folder.mkdir(parents=True, exist_ok=True)
            (command.log.parent / "stages").mkdir(exist_ok=True)
            rate = recipe.finetune.training.learning_rate if recipe.finetune is not None else 0.0
            wide = recipe.evaluate.decoding.num_beams > 1
            scores = {"kk": {"chrf++": {"value": -rate if wide else rate}}}
            (folder / "scores.json").write_text(json.dumps({"scores": scores}))

        def ended(self) -> Iterator[tuple[str, Outcome]]:
            self.looks = getattr(self, "looks", 0) + 1
            assert self.looks < 500, "waits for ever"
            return super().ended()

    runner = Searched()
    monkeypatch.setitem(RUNNERS._entries, "pretend", lambda jobs, folder: runner)
    beam = {"recipe": {"evaluate": {"decoding": {"num_beams": 3}}}}
    search = {"finetune.training.learning_rate": [1e-3, 2e-3]}
    plan = planned(tmp_path, seeds=2, variants={"shared": {}, "beam": beam}, search=search)
    experiment = ExperimentRun(plan, None, "", tmp_path / "store", lambda line: None)
    experiment.run(engine="pretend")
    assert experiment.failed == []
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [list(results["search"][name]["chosen"].values()) for name in ("shared", "beam")] == [[2e-3], [1e-3]]
    assert sum(name.startswith(("shared-seed", "beam-seed")) for name in runner.started) == 8


class Scored(Pretend):
    """Leaves development scores that are the rate; those of the run that was started first are damaged."""

    def start(self, name: str, command: Command) -> None:
        super().start(name, command)
        recipe = load_recipe(command.log.parent / "recipe.yaml")
        rate = recipe.finetune.training.learning_rate if recipe.finetune is not None else 0.0
        folder = command.log.parent / "systems" / recipe.main_system
        folder.mkdir(parents=True, exist_ok=True)
        (command.log.parent / "stages").mkdir(exist_ok=True)
        scores = {"scores": {"kk": {"chrf++": {"value": -rate}}}}
        (folder / "scores.json").write_text(json.dumps(scores) if rate != 1e-3 else '{"scores": {"kk')


@pytest.mark.parametrize("first", [(), ("beam",)])
def test_a_variant_alone_is_part_of_the_whole_experiment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: tuple[str, ...]
) -> None:
    """Whatever is finished stays so, whether the variant that shares a training is done before, after or alone."""
    runner = Scored()
    monkeypatch.setitem(RUNNERS._entries, "scored", lambda jobs, folder: runner)
    search = {"finetune.training.learning_rate": [2e-3, 3e-3]}
    beam = {"recipe": {"evaluate": {"decoding": {"num_beams": 3}}}}
    variants = {"shared": {}, "other": {"system": {"preset": "no-sharing"}}, "beam": beam}
    whole = planned(tmp_path, seeds=2, variants=variants, search=search)

    for only in (first, (), ("beam",), ("shared",), ("other", "beam"), ()):
        experiment = ExperimentRun(replace(whole, only=only), None, "", tmp_path / "store", lambda line: None)
        experiment.run(engine="scored")
        assert experiment.failed == []
    folders = [folder.name for folder in (tmp_path / "out" / "runs").iterdir()]
    assert len(folders) == 16 and sorted(runner.started) == sorted(folders), "each run once"


def test_a_search_run_with_damaged_scores_costs_its_value_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RUNNERS._entries, "scored", lambda jobs, folder: Scored())
    setting = "finetune.training.learning_rate"
    plan = planned(tmp_path, variants={"shared": {}}, search={setting: [1e-3, 2e-3, 3e-3]})
    told: list[str] = []
    experiment = ExperimentRun(plan, None, "", tmp_path / "store", told.append)
    experiment.run(engine="scored")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["search"]["shared"] == {
        setting: {"0.001": None, "0.002": -2e-3, "0.003": -3e-3},
        "chosen": {setting: 2e-3},
    }
    (failure,) = experiment.failed
    assert failure.run.settings == ((setting, 1e-3),) and "damaged" in failure.reason
    assert failure.run.name in [entry["run"] for entry in results["failed"]]
    assert any(line.startswith(f"{failure.run.name}: FAILED") for line in told)
    again = ExperimentRun(plan, None, "", tmp_path / "store", told.append)
    assert again.report().exists() and [found.run.name for found in again.failed] == [failure.run.name]


def test_a_command_on_a_folder_in_use_leaves_its_definition(tmp_path: Path) -> None:
    first, later = (planned(tmp_path, question=question) for question in ("The first?", "Another?"))
    marker = tmp_path / "out" / "experiment.yaml"
    ExperimentRun(first, None, "", tmp_path / "store", print).report()
    before = marker.read_text()
    assert "The first?" in before
    with locked_folder(tmp_path / "out"), pytest.raises(OutputError, match="in use"):
        ExperimentRun(later, None, "", tmp_path / "store", print).report()
    assert marker.read_text() == before
    ExperimentRun(later, None, "", tmp_path / "store", print).report()
    assert "Another?" in marker.read_text()


def test_data_that_changes_while_a_run_reads_it_is_worked_on_again(tmp_path: Path) -> None:
    class Changing(Pretend):
        def start(self, name: str, command: Command) -> None:
            super().start(name, command)
            if len(self.started) == 1:
                write_pairs(tmp_path / "pairs.tsv", 161)

    runs = planned(tmp_path, variants={"shared": {}}).runs({})
    assert execution(Changing(), tmp_path).carry_out(runs) == []
    assert [RunRecord(run).finished for run in runs] == [False, False]  # the task, because of what it started from
    again = Pretend()
    execution(again, tmp_path).carry_out(runs)
    assert len(again.started) == 2 and all(RunRecord(run).finished for run in runs)
    shutil.rmtree(runs[0].folder)
    assert RunRecord(runs[1]).finished  # the model that it started from may be removed


@pytest.mark.parametrize("given", [{"start": "{model}"}, {"preset": "pretrained", "options": {"name": "{model}"}}])
def test_another_model_in_the_folder_to_start_from_is_other_input(tmp_path: Path, given: dict[str, Any]) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_text("one")
    system = json.loads(json.dumps(given).replace("{model}", str(model)))
    recipe = definition(Path("encoder"))["recipe"] | {"encoder": {"name": "encoder"}}
    for pretraining in (None, {"pretrain": stage()}):
        changes = {"pretraining": pretraining, "recipe": recipe, "variants": {"shared": {"system": system}}}
        runs = planned(tmp_path, **changes).runs({})
        execution(Pretend(), tmp_path).carry_out(runs)
        assert all(RunRecord(run).finished for run in runs)
        (model / "model.safetensors").write_text(f"two{pretraining}")
        assert not any(RunRecord(run).finished for run in runs)


def test_ctrl_c_lets_runs_save_starts_no_more_and_the_next_call_goes_on(tmp_path: Path) -> None:
    class Slow(Pretend):
        slots = 1

        def ended(self) -> Iterator[tuple[str, Outcome]]:
            if not self.interrupted:
                return
            for name, outcome in super().ended():
                yield name, Outcome(130, outcome.core_seconds, outcome.wall_seconds)

    runs, runner = planned(tmp_path).runs({}), Slow()
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(Interrupted):
        execution(runner, tmp_path).carry_out(runs)
    assert runner.interrupted and runner.started == [runs[0].name]
    again = Pretend()
    assert execution(again, tmp_path).carry_out(runs) == [] and len(again.started) == 4


def test_the_end_of_a_log_is_that_of_the_last_attempt(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("$ enc2gen run a\nold\n$ enc2gen run a\n" + "".join(f"line {n}\n\n" for n in range(20)))
    assert tail(log).split("\n") == [f"line {n}" for n in range(8, 20)]
    assert tail(tmp_path / "missing.txt") == ""


def test_the_store_makes_an_entry_once_even_if_two_ask_at_once(tmp_path: Path) -> None:
    made: list[str] = []

    def ask(name: str) -> None:
        target = tmp_path / name

        def work() -> None:
            time.sleep(0.3)
            (target / "cache").mkdir(parents=True)
            (target / "made.txt").write_text(name)
            made.append(name)

        Store(tmp_path / "store").obtain("key", target, work)

    both = [threading.Thread(target=ask, args=(name,)) for name in ("a", "b")]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    (maker,) = made
    other = "b" if maker == "a" else "a"
    assert (tmp_path / other / "made.txt").samefile(tmp_path / maker / "made.txt")
    assert not (tmp_path / other / "cache").exists()


def test_work_that_fails_leaves_no_entry(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")

    def broken() -> None:
        (tmp_path / "a").mkdir()
        raise OutputError("no space")

    with pytest.raises(OutputError):
        store.obtain("key", tmp_path / "a", broken)
    store.obtain("key", tmp_path / "b", lambda: (tmp_path / "b").mkdir())
    assert (tmp_path / "b").is_dir()


def test_files_are_copied_where_links_are_not_possible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "a").write_text("text")
    link_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "text" and not (tmp_path / "a").samefile(tmp_path / "b")


def test_a_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("mine")
    with pytest.raises(OutputError, match="not an experiment"):
        ExperimentRun(planned(tmp_path), None, "", tmp_path / "store", print).report()


def test_a_finished_run_with_a_damaged_file_counts_as_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RUNNERS._entries, "pretend", lambda jobs, folder: Pretend())
    plan = planned(tmp_path, variants={"shared": {}})
    experiment = ExperimentRun(plan, None, "", tmp_path / "store", print)
    experiment.run(engine="pretend")
    assert experiment.failed == []
    (run,) = [found for found in plan.runs({}) if found.kind == "task"]
    system = run.folder / "systems" / run.recipe.main_system
    system.mkdir(parents=True, exist_ok=True)
    (run.folder / "metrics.json").write_text('{"systems"')
    (system / "hypotheses.jsonl").write_text("")
    again = ExperimentRun(plan, None, "", tmp_path / "store", print)
    assert again.report().exists()
    (failure,) = again.failed  # for which the command ends with status 1
    assert failure.run.name == run.name and "damaged" in failure.reason
