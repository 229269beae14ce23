"""`enc2gen experiment` as a whole, on a tiny encoder: definition, runs, results, report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from enc2gen.cli import main
from enc2gen.experiments.grid.engines import RUNNERS
from enc2gen.experiments.provenance import code
from grid_toys import InProcess, definition, stage, write_definition, write_pairs
from test_pretrained import KINDS


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> InProcess:
    """The engine `in-process`."""
    runner = InProcess()
    monkeypatch.setitem(RUNNERS._entries, "in-process", lambda jobs, folder: runner)
    return runner


def experiment(tmp_path: Path, *arguments: str) -> int:
    command = ["experiment", str(tmp_path / "toy.yaml"), "--data", str(tmp_path), "--engine", "in-process"]
    folder = [] if "-o" in arguments else ["-o", str(tmp_path / "out")]
    return int(main.app([*command, *folder, *arguments], standalone_mode=False) or 0)


def test_an_experiment_from_definition_to_report(
    tmp_path: Path, encoder_folder: Path, in_process: InProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    beam = {"recipe": {"evaluate": {"decoding": {"num_beams": 2}}}}
    variants = {"shared": {}, "beam": beam, "cold": {"pretraining": False}}
    write_pairs(tmp_path / "pairs.tsv")
    write_definition(tmp_path / "toy.yaml", definition(encoder_folder, variants=variants))
    in_process.broken = ("cold-seed0",)
    assert experiment(tmp_path) == 1
    out = tmp_path / "out"
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert set(results["cells"]) == {"shared", "beam"} and len(results["failed"]) == 1
    in_process.broken = ()
    in_process.started.clear()
    assert experiment(tmp_path) == 0
    assert len(in_process.started) == 1 and in_process.started[0].startswith("cold-seed0")
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert set(results["cells"]) == {"shared", "beam", "cold"} and results["failed"] == []
    assert (out / "report.html").exists() and (out / "report.md").exists()

    folders = {folder.name.rsplit("-", 1)[0]: folder for folder in (out / "runs").iterdir()}
    trained, untrained = folders["shared-pretraining-seed0"], folders["cold-untrained-seed0"]
    shared, wide, cold = folders["shared-seed0"], folders["beam-seed0"], folders["cold-seed0"]
    weights = "model.safetensors"
    # The tasks start from exactly the models that were made for them.
    model = {name: (folder / "systems").iterdir().__next__() for name, folder in folders.items()}
    start = model["shared-seed0"] / "initial" / weights
    assert start.read_bytes() == (trained / "systems" / "shared" / "pretrained" / weights).read_bytes()
    start = model["cold-seed0"] / "initial" / weights
    assert start.read_bytes() == (untrained / "systems" / "cold" / "initial" / weights).read_bytes()
    # Equal work was done once, and lies on the disk once.
    assert (shared / "data" / "train.parquet").samefile(cold / "data" / "train.parquet")
    assert (shared / "model" / weights).samefile(wide / "systems" / "shared" / "finetuned" / weights)
    started = trained / "systems" / "shared" / "pretrained" / weights
    assert started.samefile(model["shared-seed0"] / "initial" / weights), "what it began with is what it started from"
    assert not (wide / "stages" / "evaluate-shared.json").samefile(shared / "stages" / "evaluate-shared.json")
    assert not list(out.rglob("checkpoints/*"))

    # A report of fewer cells does not take the place of this one unnoticed.
    page = (out / "report.md").read_text(encoding="utf-8")
    assert experiment(tmp_path, "--only", "shared", "--only", "beam", "--report") == 0
    (kept,) = (out / "earlier").iterdir()
    assert json.loads((kept / "results.json").read_text(encoding="utf-8")) == results
    assert (kept / "report.md").read_text(encoding="utf-8") == page and (kept / "scores.svg").exists()
    fewer = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert list(fewer["experiment"]["variants"]) == ["shared", "beam"], "done again, it is what was done"
    assert fewer["code"] == {"report": code(), "runs": {code(): 2}}
    assert experiment(tmp_path, "--report") == 0, "a report of more cells holds what the one before held"
    assert list((out / "earlier").iterdir()) == [kept]

    # Any cell can be done again by one command, and nothing is left to do.
    capsys.readouterr()
    main.app(["run", str(wide / "recipe.yaml")], standalone_mode=False)
    stages = ("prepare", "build-shared", "finetune-shared", "evaluate-shared", "evaluate-floors")
    said = capsys.readouterr().out
    assert all(f"{stage}: done before, kept" in said for stage in stages)


def test_a_run_that_another_experiment_has_finished_is_taken_over(
    tmp_path: Path, encoder_folder: Path, in_process: InProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pairs(tmp_path / "pairs.tsv")
    content = definition(encoder_folder)
    write_definition(tmp_path / "toy.yaml", content)
    assert experiment(tmp_path, "-o", str(tmp_path / "all" / "first")) == 0
    assert len(in_process.started) == 4
    later = {
        "name": "later",
        "question": "Does a cold start do?",
        "variants": {
            "shared": {},
            "cold": {"pretraining": False},
            "beam": {"recipe": {"evaluate": {"decoding": {"num_beams": 2}}}},
        },
    }
    write_definition(tmp_path / "toy.yaml", content | later)
    in_process.started.clear()
    second = tmp_path / "all" / "second"
    assert experiment(tmp_path, "-o", str(second)) == 0
    assert [name.partition("-seed")[0] for name in in_process.started] == ["cold-untrained", "cold", "beam"]
    said = capsys.readouterr().out
    (task,) = (second / "runs").glob("shared-seed0-*")
    assert f"{task.name}: done before in first, taken over" in said and said.count("taken over") == 2
    results = {name: json.loads((tmp_path / "all" / name / "results.json").read_text()) for name in ("first", "second")}
    for part in ("cells", "costs"):
        assert results["first"][part]["shared"] == results["second"][part]["shared"]
    recipe = (task / "recipe.yaml").read_text()
    assert (second / "runs").as_posix() in recipe and "first" not in recipe
    # What starts from a run that was taken over trains nothing again.
    (wide,) = (second / "runs").glob("beam-seed0-*")
    weights = Path("systems", "shared", "finetuned", "model.safetensors")
    assert (wide / weights).samefile(task / weights)
    # What is written anew in one folder does not show in the other.
    (first,) = (tmp_path / "all" / "first" / "runs").glob("shared-seed0-*")
    outputs = Path("systems", "shared", "hypotheses.jsonl")
    before = (first / outputs).read_text(encoding="utf-8")
    (task / outputs).write_text("{}\n", encoding="utf-8")
    assert (first / outputs).read_text(encoding="utf-8") == before
    (task / outputs).write_text(before, encoding="utf-8")
    # The second experiment keeps what it took over, and can go on with it alone.
    shutil.rmtree(tmp_path / "all" / "first")
    in_process.started.clear()
    assert experiment(tmp_path, "-o", str(second)) == 0 and in_process.started == []
    # Other data make other runs, whatever their names.
    write_pairs(tmp_path / "pairs.tsv", 150)
    assert experiment(tmp_path, "-o", str(tmp_path / "all" / "third"), "--overwrite") == 0
    assert len(in_process.started) == 5


def test_pretraining_whose_weights_were_removed_is_named_and_not_taken_over(
    tmp_path: Path, encoder_folder: Path, in_process: InProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pairs(tmp_path / "pairs.tsv")
    content = definition(encoder_folder, variants={"shared": {}})
    write_definition(tmp_path / "toy.yaml", content)
    first, second = tmp_path / "all" / "first", tmp_path / "all" / "second"
    assert experiment(tmp_path, "-o", str(first)) == 0
    for weights in first.rglob("*.safetensors"):
        weights.unlink()
    in_process.started.clear()
    assert experiment(tmp_path, "-o", str(first)) == 0 and in_process.started == [], "nothing needs them"
    beam = {"recipe": {"evaluate": {"decoding": {"num_beams": 2}}, "finetune": {"training": {"max_steps": 3}}}}
    write_definition(tmp_path / "toy.yaml", content | {"variants": {"shared": {}, "beam": beam}})
    assert experiment(tmp_path, "-o", str(first)) == 1
    (trained,) = (first / "runs").glob("shared-pretraining-seed0-*")
    said = "".join(capsys.readouterr().out.split())
    assert f"haslostitsweights;remove{trained}" in said and in_process.started == []
    assert experiment(tmp_path, "-o", str(second)) == 0
    assert [name.partition("-seed")[0] for name in in_process.started] == ["shared-pretraining", "beam"]
    shutil.rmtree(trained)
    in_process.started.clear()
    assert experiment(tmp_path, "-o", str(first)) == 0
    assert in_process.started == [], "the second one has it all"


@pytest.mark.parametrize("tidied_before", [False, True])
def test_other_data_replace_finished_training_only_if_told_to_and_once(
    tmp_path: Path, encoder_folder: Path, in_process: InProcess, tidied_before: bool
) -> None:
    beam = {"recipe": {"evaluate": {"decoding": {"num_beams": 2}}}}
    write_pairs(tmp_path / "pairs.tsv")
    write_definition(tmp_path / "toy.yaml", definition(encoder_folder, variants={"shared": {}, "beam": beam}))
    assert experiment(tmp_path) == 0
    runs = tmp_path / "out" / "runs"
    (before,), (task,), (wide,) = (runs.glob(f"{name}-seed0-*") for name in ("shared-pretraining", "shared", "beam"))
    trained = before / "systems" / "shared" / "pretrained" / "model.safetensors"
    weights = Path("systems", "shared", "finetuned", "model.safetensors")
    old = trained.read_bytes()
    if tidied_before:  # by a version that left no trace of checkpoints
        for folder in list(runs.rglob("checkpoints")):
            folder.rmdir()
    write_pairs(tmp_path / "pairs.tsv", 150)
    assert experiment(tmp_path) == 1
    assert trained.read_bytes() == old and (task / weights).exists()
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert any("--overwrite" in entry["reason"] for entry in results["failed"])
    assert experiment(tmp_path, "--overwrite") == 0
    assert trained.read_bytes() != old
    assert (wide / weights).samefile(task / weights), "trained once, and taken over again"
    assert (wide / "data" / "train.parquet").samefile(task / "data" / "train.parquet")
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert set(results["cells"]) == {"shared", "beam"} and results["failed"] == []


def test_a_run_that_cannot_be_taken_over_is_carried_out(
    tmp_path: Path, encoder_folder: Path, in_process: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pairs(tmp_path / "pairs.tsv")
    write_definition(tmp_path / "toy.yaml", definition(encoder_folder, variants={"shared": {}}))
    assert experiment(tmp_path, "-o", str(tmp_path / "all" / "first")) == 0
    in_process.started.clear()
    (tmp_path / "all" / "second").mkdir()
    monkeypatch.chdir(tmp_path / "all" / "second")
    (tmp_path / "all" / "first" / "experiment.yaml").unlink()  # any other folder
    assert experiment(tmp_path, "-o", ".") == 0
    assert len(in_process.started) == 2


def test_another_reference_keeps_the_earlier_report(
    tmp_path: Path, encoder_folder: Path, in_process: InProcess
) -> None:
    write_pairs(tmp_path / "pairs.tsv")
    write_definition(tmp_path / "toy.yaml", definition(encoder_folder))
    assert experiment(tmp_path) == 0
    results = (tmp_path / "out" / "results.json").read_text(encoding="utf-8")
    assert experiment(tmp_path, "--report") == 0 and not (tmp_path / "out" / "earlier").exists()
    assert experiment(tmp_path, "--report", "--reference", "random") == 0
    (earlier,) = (tmp_path / "out" / "earlier").iterdir()
    assert json.loads((earlier / "results.json").read_text(encoding="utf-8"))["cells"] == json.loads(results)["cells"]
    assert set(json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))["paired"]) == {"shared"}


def test_the_log_of_the_command_names_what_failed(
    tmp_path: Path, in_process: InProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pairs(tmp_path / "pairs.tsv")
    write_definition(tmp_path / "toy.yaml", definition(Path("nowhere")))
    in_process.broken = ("seed0",)
    assert experiment(tmp_path) == 1
    said = capsys.readouterr().out
    assert "failed: shared-pretraining-seed0" in said and "same command" in said
    assert (tmp_path / "out" / "report.md").exists()


def test_the_dry_run_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search = {"finetune.training.learning_rate": [1e-3, 2e-3]}
    write_definition(tmp_path / "toy.yaml", definition(Path("encoder"), seeds=3, search=search))
    assert experiment(tmp_path, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "runs: 6 of tasks, 6 of pretraining, 4 of the search; 2 of them take over the training of another" in said
    assert said.count("not there yet: ") == 1 and f"not there yet: {tmp_path / 'pairs.tsv'}" in said.replace("\n", "")
    assert not (tmp_path / "out").exists()


def test_experiments_without_a_name_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    main.app(["experiment"], standalone_mode=False)
    assert "quick-ablation" in capsys.readouterr().out


def test_pretraining_in_a_run_of_its_own_changes_nothing(
    tmp_path: Path, encoder_folder: Path, in_process: InProcess
) -> None:
    """One recipe with both stages ends with the same weights, bit for bit, also where new parameters learn faster."""
    write_pairs(tmp_path / "pairs.tsv")
    warm = {"preset": "warm-start"}  # a model that does not itself remember what was new in it
    content = definition(encoder_folder, variants={"shared": {"system": warm}})
    content["recipe"]["finetune"] = stage(new_parameters_lr=3.0)
    write_definition(tmp_path / "toy.yaml", content)
    assert experiment(tmp_path) == 0
    (task,) = (tmp_path / "out" / "runs").glob("shared-seed0-*")
    text = json.dumps(content["recipe"] | content["pretraining"]).replace("{data}", str(tmp_path))
    whole = json.loads(text) | {"name": "whole", "systems": {"shared": warm}, "output": str(tmp_path / "whole")}
    write_definition(tmp_path / "whole.yaml", whole)
    main.app(["finetune", str(tmp_path / "whole.yaml")], standalone_mode=False)
    weights = "systems/shared/finetuned/model.safetensors"
    found, expected = load_file(task / weights), load_file(tmp_path / "whole" / weights)
    assert found.keys() == expected.keys()
    for name in found:
        assert "pooler" in name or torch.equal(found[name], expected[name]), name  # the pooler takes no part


def test_a_pretrained_model_goes_through_pretraining_and_task(
    tmp_path: Path, encoder_folder: Path, in_process: InProcess
) -> None:
    model, tokenizer = KINDS["mbart50"]()
    model.save_pretrained(tmp_path / "whole")
    tokenizer.save_pretrained(tmp_path / "whole")
    write_pairs(tmp_path / "pairs.tsv")
    system = {"preset": "pretrained", "options": {"name": str(tmp_path / "whole")}}
    variants = {"trained": {"system": system}, "cold": {"system": system, "pretraining": False}}
    content = definition(encoder_folder, variants=variants, reference="trained")
    write_definition(tmp_path / "toy.yaml", content)
    assert experiment(tmp_path) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert set(results["cells"]) == {"trained", "cold"}
    folders = {folder.name.rsplit("-", 1)[0]: folder for folder in (tmp_path / "out" / "runs").iterdir()}
    weights = "model.safetensors"
    for name, before, stage_folder in (
        ("trained", "trained-pretraining", "pretrained"),
        ("cold", "cold-untrained", "initial"),
    ):
        theirs = folders[f"{before}-seed0"] / "systems" / name / stage_folder / weights
        assert (folders[f"{name}-seed0"] / "systems" / name / "initial" / weights).read_bytes() == theirs.read_bytes()
    card = (folders["trained-seed0"] / "model" / "README.md").read_text(encoding="utf-8")
    assert "preset `pretrained`" in card and "whole" in card
