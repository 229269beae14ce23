"""A whole recipe on a tiny encoder: stages, cache, resume, metrics.json, and what bad input does to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from enc2gen.errors import ConfigError, DataError, Enc2genError, LanguageError, ModelError, OutputError
from enc2gen.experiments import systems
from enc2gen.experiments.recipe import Recipe, load_recipe
from enc2gen.experiments.run import Run
from enc2gen.generation.generator import Generator

LETTERS = "abcdefghij"


def write_pairs(path: Path, count: int = 240) -> Path:
    """Pairs whose target is the source in Cyrillic letters."""
    cyrillic = dict(zip(LETTERS, "абвгдежзий", strict=True))
    rows = ["en\tkk"]
    for index in range(count):
        word = "".join(LETTERS[(index // 10**place) % 10] for place in range(3))
        rows.append(f"{word}\t{''.join(cyrillic[letter] for letter in word)}")
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def recipe_content(tmp_path: Path, encoder: Path) -> dict[str, Any]:
    training = {
        "max_steps": 6,
        "learning_rate": 1e-3,
        "eval_every": 3,
        "save_every": 2,
        "precision": "fp32",
        "tensorboard": False,
    }
    return {
        "name": "tiny",
        "output": str(tmp_path / "run"),
        "languages": ["kk"],
        "encoder": {"name": str(encoder), "trim_vocabulary": True},
        "data": {
            "datasets": [
                {
                    "path": str(tmp_path / "pairs.tsv"),
                    "fields": {"source": "en", "target": "kk", "source_language": "en", "target_language": "kk"},
                    "dev_percent": 10,
                    "test_percent": 10,
                }
            ],
            "denoise_targets": True,
            "max_source_length": 32,
            "max_target_length": 32,
        },
        "systems": {"shared": {}, "random_decoder": {"preset": "random-decoder"}},
        "pretrain": {"training": training, "batching": {"max_tokens": 256}},
        "finetune": {"training": training, "batching": {"max_tokens": 256}},
        "evaluate": {"decoding": {"num_beams": 2, "max_new_tokens": 6}, "resamples": 100, "samples": 3},
    }


def load(tmp_path: Path, content: dict[str, Any]) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return load_recipe(path)


@pytest.fixture
def content(tmp_path: Path, encoder_folder: Path) -> dict[str, Any]:
    write_pairs(tmp_path / "pairs.tsv")
    return recipe_content(tmp_path, encoder_folder)


def console() -> Console:
    return Console(record=True, width=100, force_terminal=False)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_a_run_leaves_model_metrics_and_report_and_is_cached(tmp_path: Path, content: dict[str, Any]) -> None:
    screen = console()
    root = Run(load(tmp_path, content), screen).run()
    metrics = json.loads((root / "metrics.json").read_text())
    assert set(metrics["systems"]) == {"shared", "random_decoder", "copy_source", "best_constant"}
    for system in metrics["systems"].values():
        score = system["kk"]["chrf++"]
        assert score["low"] <= score["value"] <= score["high"] and "nrefs" in score["signature"]
    assert {"loss", "shuffled_loss", "gain", "distinct_outputs"} <= set(metrics["source_use"]["shared"]["kk"])
    assert (root / "report.html").exists()
    reports = json.loads((root / "systems" / "shared" / "initial" / "init_report.json").read_text())
    assert reports["counts"]["copied"] > 0
    generator = Generator.from_pretrained(root / "model")
    assert generator.model.generation_config.max_new_tokens < 32, "the limit is learnt from short targets"
    assert generator.model.config.default_source_language == "en"
    assert len(generator.generate(["abc"], target_language="kk")) == 1
    before = {p: p.stat().st_mtime_ns for p in (root / "systems").rglob("*.safetensors")}
    again = console()
    Run(load(tmp_path, content), again).run()
    assert {p: p.stat().st_mtime_ns for p in (root / "systems").rglob("*.safetensors")} == before
    assert again.export_text().count("done before, kept") >= 8
    assert "--to kk" in " ".join(screen.export_text().split())


def test_a_changed_setting_repeats_only_what_depends_on_it(tmp_path: Path, content: dict[str, Any]) -> None:
    root = Run(load(tmp_path, content), console()).run(["finetune"])
    pretrained = (root / "systems" / "shared" / "pretrained" / "model.safetensors").stat().st_mtime_ns
    old = weights(root / "systems" / "shared" / "finetuned")
    content["finetune"]["training"] = content["finetune"]["training"] | {"learning_rate": 5e-3}
    with pytest.raises(OutputError, match=r"(?s)finetune: .*other settings.*--overwrite"):
        Run(load(tmp_path, content), console()).run(["finetune"])
    assert weights(root / "systems" / "shared" / "finetuned") == old
    Run(load(tmp_path, content), console(), overwrite=True).run(["finetune"])
    assert (root / "systems" / "shared" / "pretrained" / "model.safetensors").stat().st_mtime_ns == pretrained
    assert weights(root / "systems" / "shared" / "finetuned") != old


@pytest.mark.parametrize(
    ("corpus", "stage", "message"),
    [("other.tsv", "prepare", "other settings"), ("none.tsv", "finetune", r"none\.tsv: no such file")],
)
def test_what_is_refused_leaves_a_finished_run_as_it_was(
    tmp_path: Path, content: dict[str, Any], corpus: str, stage: str, message: str
) -> None:
    del content["systems"]["random_decoder"], content["pretrain"]
    before = load(tmp_path, content)
    root = Run(before, console()).run(["finetune"])

    def files() -> dict[Path, tuple[int, bytes]]:
        rewritten = (".lock", "enc2gen-run.json")  # whenever a folder is opened, with nothing new
        found = (p for p in root.rglob("*.*") if p.is_file() and p.name not in rewritten)
        return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in found}

    found = files()
    write_pairs(tmp_path / "other.tsv", 200)
    content["data"]["datasets"][0]["path"] = str(tmp_path / corpus)
    with pytest.raises((OutputError, DataError), match=message):
        Run(load(tmp_path, content), console()).run([stage])
    assert files() == found
    again = console()
    Run(before, again).run(["finetune"])
    assert again.export_text().count("done before, kept") == 4


def test_interrupted_and_resumed_equals_uninterrupted(
    tmp_path: Path, content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    del content["systems"]["random_decoder"]
    whole = Run(load(tmp_path, content), console()).run(["finetune"])
    content["output"] = str(tmp_path / "other")
    from enc2gen.training.trainer import Trainer

    real, calls = Trainer._step, {"n": 0}

    def failing(self: Trainer, step: int) -> tuple[float, float]:
        calls["n"] += 1
        if calls["n"] == 4:
            raise KeyboardInterrupt
        return real(self, step)

    monkeypatch.setattr(Trainer, "_step", failing)
    with pytest.raises(KeyboardInterrupt):
        Run(load(tmp_path, content), console()).run(["finetune"])
    monkeypatch.setattr(Trainer, "_step", real)
    other = Run(load(tmp_path, content), console()).run(["finetune"])
    for stage in ("pretrained", "finetuned"):
        assert weights(whole / "systems" / "shared" / stage) == weights(other / "systems" / "shared" / stage)


def test_same_seed_same_model_other_seed_other_model(tmp_path: Path, content: dict[str, Any]) -> None:
    del content["systems"]["random_decoder"]
    content |= {"pretrain": None}
    found = []
    for index, seed in enumerate((1, 1, 2)):
        changed = content | {"seed": seed, "output": str(tmp_path / f"run{index}")}
        root = Run(load(tmp_path, changed), console()).run(["finetune"])
        found.append(weights(root / "systems" / "shared" / "finetuned"))
    assert found[0] == found[1] != found[2]


def test_no_test_source_is_in_training(tmp_path: Path, content: dict[str, Any]) -> None:
    root = Run(load(tmp_path, content), console()).run(["prepare"])
    from enc2gen.experiments.prepare import PreparedData

    data = PreparedData(root / "data")
    train = set(data.examples("train")["source"])
    assert train and not train & (set(data.examples("test")["source"]) | set(data.examples("dev")["source"]))
    assert {row["text"] for row in data.texts()} <= set(data.examples("train")["target"])


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("", DataError, "pairs.tsv"),
        ("en\tkk\n", DataError, "pairs.tsv"),
        ("en\tru\nabc\tабв\n", DataError, r"no field 'kk'(?s:.)*en, ru"),
        ("en\tkk\nabc\tабв\n", DataError, "only [01] (train|test) examples"),
    ],
)
def test_bad_corpora(
    tmp_path: Path, content: dict[str, Any], text: str, error: type[Enc2genError], message: str
) -> None:
    (tmp_path / "pairs.tsv").write_text(text, encoding="utf-8")
    with pytest.raises(error, match=message):
        Run(load(tmp_path, content), console()).run(["prepare"])


def test_corpus_that_is_not_utf8(tmp_path: Path, content: dict[str, Any]) -> None:
    (tmp_path / "pairs.tsv").write_bytes("en\tkk\nabc\tабв\n".encode("utf-16-le"))
    with pytest.raises(DataError, match=r"pairs\.tsv"):
        Run(load(tmp_path, content), console()).run(["prepare"])


def test_unknown_language_in_the_data_is_named(tmp_path: Path, content: dict[str, Any]) -> None:
    content["data"]["datasets"][0]["fields"] = {
        "source": "en", "target": "kk", "source_language": "en", "target_language_field": "en",
    }  # fmt: skip
    with pytest.raises(LanguageError, match=r"pairs\.tsv, record \d+"):
        Run(load(tmp_path, content), console()).run(["prepare"])


def test_both_directions_of_a_pair_are_on_the_same_side(tmp_path: Path, content: dict[str, Any]) -> None:
    content["languages"] = ["kk", "en"]
    content["data"]["datasets"][0]["fields"] |= {"directions": "both"}
    root = Run(load(tmp_path, content), console()).run(["prepare"])
    from enc2gen.experiments.prepare import PreparedData

    data = PreparedData(root / "data")
    train = {text for row in data.examples("train") for text in (row["source"], row["target"])}
    assert not train & {text for row in data.examples("test") for text in (row["source"], row["target"])}


def test_lengths_beyond_the_encoders_positions_are_refused_before_anything_is_read(
    tmp_path: Path, content: dict[str, Any]
) -> None:
    content["data"]["max_source_length"] = 65
    with pytest.raises(ConfigError, match=r"max_source_length(?s:.)*positions for 64"):
        Run(load(tmp_path, content), console()).run(["prepare"])


def test_a_changed_encoder_folder_is_noticed(tmp_path: Path, content: dict[str, Any], encoder_folder: Path) -> None:
    from conftest import tiny_encoder

    root = Run(load(tmp_path, content), console()).run(["build"])
    before = weights(root / "systems" / "shared" / "initial")
    tiny_encoder(seed=9).save_pretrained(encoder_folder)
    Run(load(tmp_path, content), console()).run(["build"])
    assert weights(root / "systems" / "shared" / "initial") != before


def test_foreign_output_folder_is_refused_and_left_alone(tmp_path: Path, content: dict[str, Any]) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "thesis.txt").write_text("precious")
    with pytest.raises(OutputError, match="not a run of enc2gen"):
        Run(load(tmp_path, content), console())
    assert (folder / "thesis.txt").read_text() == "precious"


def test_output_folder_in_use_is_refused(tmp_path: Path, content: dict[str, Any]) -> None:
    from enc2gen.locking import locked_folder

    run = Run(load(tmp_path, content), console())
    with locked_folder(tmp_path / "run"), pytest.raises(OutputError, match="in use"):
        run.run(["prepare"])


def test_disk_full_keeps_what_was_written(
    tmp_path: Path, content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    del content["systems"]["random_decoder"]
    root = Run(load(tmp_path, content), console()).run(["pretrain"])
    kept = weights(root / "systems" / "shared" / "pretrained")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("enc2gen.training.checkpoint.save_weights", full)
        with pytest.raises(OutputError, match=r"(?i)space"):
            Run(load(tmp_path, content), console()).run(["finetune"])
    assert weights(root / "systems" / "shared" / "pretrained") == kept
    Run(load(tmp_path, content), console()).run(["finetune"])
    assert (root / "systems" / "shared" / "finetuned" / "model.safetensors").exists()


def test_nan_loss_stops_with_a_remedy(tmp_path: Path, content: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from enc2gen.errors import TrainingError

    content["finetune"]["training"] = content["finetune"]["training"] | {"learning_rate": 1e30, "max_grad_norm": None}
    content |= {"pretrain": None}
    with pytest.raises(TrainingError, match=r"(?s)step.*remedy"):
        Run(load(tmp_path, content), console()).run(["finetune"])


def test_encoder_without_fast_tokenizer(tmp_path: Path, content: dict[str, Any], encoder_folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (encoder_folder / name).unlink()
    with pytest.raises(ModelError, match="no vocabulary"):
        Run(load(tmp_path, content), console()).run(["adapt"])


def test_script_that_the_tokenizer_cannot_read(tmp_path: Path, content: dict[str, Any]) -> None:
    pairs = (tmp_path / "pairs.tsv").read_text(encoding="utf-8").splitlines()
    lines = [pairs[0], *(f"{line.split(chr(9))[0]}\tབོད་ཡིག" for line in pairs[1:])]
    (tmp_path / "pairs.tsv").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(DataError, match=r"100% of the Kazakh(?s:.)*extend_vocabulary"):
        Run(load(tmp_path, content), console()).run(["adapt"])


def test_damaged_run_folder_says_what_to_do(tmp_path: Path, content: dict[str, Any]) -> None:
    root = Run(load(tmp_path, content), console()).run(["prepare"])
    (root / "data" / "summary.json").write_text("{")
    with pytest.raises(Enc2genError, match=r"summary\.json(?s:.)*stages/prepare\.json \(that file alone\)"):
        Run(load(tmp_path, content), console()).run(["build"])
    (root / "stages" / "prepare.json").unlink()
    Run(load(tmp_path, content), console()).run(["prepare"])


def test_main_system_is_published(tmp_path: Path, content: dict[str, Any]) -> None:
    assert load(tmp_path, content).main_system == "shared"
    assert issubclass(systems.Interrupted, Enc2genError) and issubclass(ConfigError, ValueError)


def test_two_processes_train_like_one_with_the_same_global_batch(tmp_path: Path, content: dict[str, Any]) -> None:
    del content["systems"]["random_decoder"], content["pretrain"]
    content["encoder"]["dropout"] = 0.0  # dropout masks differ between processes
    load(tmp_path, content)  # writes recipe.yaml
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    verb = ["-m", "enc2gen.cli.main", "finetune", str(tmp_path / "recipe.yaml")]
    result = subprocess.run([*launch, *verb], env=environment, capture_output=True, timeout=300)
    assert result.returncode == 0, result.stderr.decode()[-2000:]
    content["output"] = str(tmp_path / "one")
    content["finetune"]["training"] |= {"gradient_accumulation": 2}
    Run(load(tmp_path, content), console()).run(["finetune"])
    found = [json.loads((tmp_path / run / "systems/shared/finetune/result.json").read_text()) for run in ("run", "one")]
    assert found[0]["tokens"] == found[1]["tokens"]
    assert found[0]["best_loss"] == pytest.approx(found[1]["best_loss"], abs=1e-4)
