"""Results and report of an experiment: true of the runs' outputs, from results.json alone, safe with any text."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from sacrebleu.metrics import CHRF

from enc2gen.experiments.grid.learning import MEAN, read_losses, speed, tokens_to_reach
from enc2gen.experiments.grid.plan import GridRun
from enc2gen.experiments.grid.plots import draw_curves, draw_scores, draw_sizes
from enc2gen.experiments.grid.report import print_results, write_report
from enc2gen.experiments.grid.results import collect
from enc2gen.experiments.grid.tables import caution, findings, result_tables
from enc2gen.experiments.recipe import Recipe
from grid_toys import finish

WORDS = [f"сөз{index}" for index in range(60)]
SENTENCES = 25
DATASET = {
    "path": "pairs.tsv",
    "fields": {"source": "en", "target": "kk", "source_language": "en", "target_language": "kk"},
}
EXPERIMENT: dict[str, Any] = {
    "name": "sharing",
    "question": "Does sharing help?",
    "description": "One against the other.",
    "source": "arXiv 2502.10852, Table 3",
    "reference": "full",
    "headline": "chrf++",
    "variants": {"full": {}, "none": {}},
}


def score(value: float) -> dict[str, Any]:
    return {"value": value, "low": value - 1, "high": value + 1, "n": SENTENCES, "signature": "nrefs:1"}


def outputs(seed: int, noise: float, language: str) -> list[dict[str, Any]]:
    """Test sentences, the same for all, with hypotheses that lose a share `noise` of the references' words."""
    same, rng = np.random.default_rng(9), np.random.default_rng([seed, int(1000 * noise)])
    rows = []
    for number in range(SENTENCES):
        words = list(same.choice(WORDS, size=6))
        written = [str(rng.choice(WORDS)) if rng.random() < noise else word for word in words]
        text, hypothesis = " ".join(words), " ".join(written)
        rows.append({"language": language, "source": f"s{number}", "references": [text], "hypothesis": hypothesis})
    return rows


def a_run(
    root: Path, variant: str, seed: int, noise: float, *, size: int | None = None, tokens: int = 4000, **more: Any
) -> GridRun:
    """A finished run of a variant, as files; `noise` decides its score, `tokens` how long it took."""
    name = "-".join([variant, *([str(size)] if size else []), f"seed{seed}"])
    folder = root / "runs" / name
    recipe = Recipe(
        name=name, seed=seed, output=str(folder), languages=["kk", "ug"],
        encoder={"name": "embedded:multilingual-e5-small"}, data={"datasets": [DATASET]}, systems={variant: {}},
        finetune={"training": {"max_steps": 20}}, evaluate={"metrics": ["chrf++", "exact-match"], "resamples": 200},
    )  # fmt: skip
    system = folder / "systems" / variant
    (system / "finetune").mkdir(parents=True)
    (system / "initial").mkdir()
    rows = [row for language in ("kk", "ug") for row in outputs(seed, noise, language)]
    (system / "hypotheses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (system / "initial" / "init_report.json").write_text(json.dumps({"parameters": 1234}))
    (system / "finetune" / "result.json").write_text(json.dumps({"tokens": tokens, "steps": 20}))
    records: list[dict[str, Any]] = []
    for step in (5, 10, 15, 20):
        loss = 5 - step / 10 + noise
        records.append({"kind": "train", "step": step, "tokens": tokens * step // 20, "loss": 1.0})
        records.append({"kind": "validation", "step": step, "losses": {"kk": loss, "ug": loss + 1}, "mean": loss + 0.5})
    (system / "finetune" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    use = {"loss": 2.0, "shuffled_loss": 3.0 + seed, "gain": 1.0 + seed, "distinct_outputs": 20 + seed, "outputs": 25}
    metrics = {
        "systems": {
            variant: {tag: {"chrf++": score(50.0)} for tag in ("kk", "ug")},
            "copy_source": {tag: {"chrf++": score(3.0)} for tag in ("kk", "ug")},
            "best_constant": {tag: {"chrf++": score(9.0), "text": "сөз"} for tag in ("kk", "ug")},
        },
        "source_use": {variant: {tag: {**use, "permuted_chrf++": score(5.0)} for tag in ("kk", "ug")}},
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    cell = f"{variant}/{size}" if size else variant
    return finish(GridRun(cell, variant, "task", size, seed, folder, recipe, "task", **more))


def some_runs(root: Path, seeds: tuple[int, ...] = (0, 1, 2)) -> list[GridRun]:
    return [a_run(root, name, seed, noise) for name, noise in (("full", 0.2), ("none", 0.6)) for seed in seeds]


def some_results(root: Path, seeds: tuple[int, ...] = (0, 1, 2), **changes: Any) -> dict[str, Any]:
    runs = some_runs(root, seeds)
    results = collect(EXPERIMENT | changes, runs, scale="tiny", seeds=seeds, command="enc2gen experiment sharing")
    again: dict[str, Any] = json.loads(json.dumps(results))
    return again


def chrf(seed: int, noise: float) -> float:
    rows = outputs(seed, noise, "kk")
    references = [[row["references"][0] for row in rows]]
    return float(CHRF(word_order=2).corpus_score([row["hypothesis"] for row in rows], references).score)


def table(results: dict[str, Any], title: str) -> dict[str, Any]:
    return next(found for found in result_tables(results) if found["title"] == title)


def test_cells_hold_the_mean_over_seeds_and_the_difference_to_the_reference(tmp_path: Path) -> None:
    results = some_results(tmp_path)
    cell = results["cells"]["none"]["kk"]["chrf++"]
    wanted = {str(seed): chrf(seed, 0.6) for seed in (0, 1, 2)}
    assert cell["seeds"] == pytest.approx(wanted) and cell["value"] == pytest.approx(np.mean(list(wanted.values())))
    assert cell["low"] < cell["value"] < cell["high"] and cell["n"] == SENTENCES and "seeds:3" in cell["signature"]
    pair = results["paired"]["none"]["kk"]
    assert pair["value"] == pytest.approx(cell["value"] - np.mean([chrf(seed, 0.2) for seed in (0, 1, 2)]))
    assert pair["high"] < 0 and pair["n"] == SENTENCES and pair["left_out"] == 0 and "full" not in results["paired"]
    assert results["controls"]["none"]["ug"]["gain"] == pytest.approx(2.0)
    assert results["controls"]["none"]["ug"]["reading_seeds"] == 3
    assert results["floors"]["task"]["best_constant"]["kk"]["chrf++"]["value"] == 9.0
    assert results["grid"]["none"]["runs"]["2"].endswith("runs/none-seed2")


def test_costs_hold_the_pretraining_that_was_paid_for(tmp_path: Path) -> None:
    start = a_run(tmp_path, "start", 0, 0.1, tokens=1000)
    run = a_run(tmp_path, "full", 0, 0.2, start=start)
    twin = a_run(tmp_path, "none", 0, 0.2, start=start, same_training=run)
    spent = {start.name: 10.0, run.name: 5.0, twin.name: 1.0}
    costs = collect(EXPERIMENT, [run, twin], core_seconds=spent)["costs"]
    assert costs["full"] == {"tokens": 5000, "steps": 40, "core_seconds": 15.0, "parameters": 1234}
    assert costs["none"]["core_seconds"] == 16.0, "a model that was taken over costs what its training cost"
    assert collect(EXPERIMENT, [run])["costs"]["full"]["core_seconds"] is None


def test_unfinished_runs_are_told_and_lose_nobody_else(tmp_path: Path) -> None:
    runs = some_runs(tmp_path)
    (runs[-1].folder / "metrics.json").unlink()
    failed = [{"run": "none-seed9", "cell": "none", "seed": 9, "reason": "killed by <signal> 9"}]
    results = collect(EXPERIMENT, runs, failed=failed)
    assert [entry["run"] for entry in results["failed"]] == ["none-seed9", "none-seed2"]
    assert list(results["cells"]["none"]["kk"]["chrf++"]["seeds"]) == ["0", "1"]
    assert list(results["paired"]["none"]["kk"]["seeds"]) == ["0", "1"], "compared on the seeds that both have"
    assert "2 to 3 finished seeds" in caution(results)
    nothing = collect(EXPERIMENT, [], failed=failed)
    page = write_report(nothing, tmp_path).read_text()
    assert "killed by &lt;signal&gt; 9" in page and not (tmp_path / "scores.png").exists()


def test_what_was_done_with_other_data_or_failed_since_is_not_counted(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    runs = some_runs(tmp_path, (0, 1))
    finish(runs[-1], status=1)
    results = collect(EXPERIMENT, runs)
    assert list(results["cells"]["none"]["kk"]["chrf++"]["seeds"]) == ["0"]
    assert list(results["curves"]["fine-tuning"]["none"]) == ["0"]
    assert [entry["run"] for entry in results["failed"]] == ["none-seed1"]
    (tmp_path / "pairs.tsv").write_text("en\tkk\n")
    finish(runs[0])
    assert list(collect(EXPERIMENT, runs)["cells"]) == ["full"]


def test_other_test_sentences_are_left_out_of_a_comparison(tmp_path: Path) -> None:
    runs = some_runs(tmp_path, (0,))
    full, none = (run.folder / "systems" / run.variant / "hypotheses.jsonl" for run in runs)
    lines = none.read_text().splitlines()
    none.write_text("\n".join(reversed(lines[3:])) + "\n")  # other order, and three Kazakh sentences fewer
    lines = full.read_text().splitlines()
    full.write_text("\n".join(lines[: SENTENCES - 1] + lines[SENTENCES:]) + "\n")  # without the last Kazakh one
    results = collect(EXPERIMENT, runs)
    pair = results["paired"]["none"]["kk"]
    assert (pair["n"], pair["left_out"]) == (SENTENCES - 4, 3)
    rows = [outputs(0, noise, "kk")[3:-1] for noise in (0.6, 0.2)]
    own, other = (
        CHRF(word_order=2).corpus_score([r["hypothesis"] for r in part], [[r["references"][0] for r in part]]).score
        for part in rows
    )
    assert pair["value"] == pytest.approx(own - other)
    assert results["cells"]["full"]["kk"]["chrf++"]["n"] == SENTENCES - 1
    assert "leave out up to 3 sentences" in table(results, "Kazakh")["note"]
    assert "leave out" not in table(results, "Uyghur")["note"]


def test_a_damaged_run_is_named_and_the_others_are_reported(tmp_path: Path) -> None:
    runs = some_runs(tmp_path, (0,))
    (runs[0].folder / "systems" / "full" / "hypotheses.jsonl").write_text('{"language": "kk"}\n')
    results = collect(EXPERIMENT, runs)
    (failed,) = results["failed"]
    assert failed["run"] == "full-seed0" and list(results["cells"]) == ["none"], "the others are reported all the same"
    assert re.search(r"(?s)damaged.*full-seed0.*only run that is repeated", failed["reason"])


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("data/summary.json", '{"counts": {"tr'),
        ("data/summary.json", "{}"),
        ("systems/full/finetune/result.json", ""),
        ("systems/full/initial/init_report.json", "[]"),
        ("systems/full/denoising.jsonl", '{"language": "kk"}'),
        ("metrics.json", '{"systems": {}}'),
        ("metrics.json", '{"systems": {}, "source_use": {"full": {"kk": {"loss": 1.0}}}}'),
        ("metrics.json", '{"systems": {"copy_source": null}, "source_use": {"full": {}}}'),
    ],
)
def test_whatever_file_of_a_run_is_damaged_the_others_are_reported(tmp_path: Path, path: str, content: str) -> None:
    runs = some_runs(tmp_path, (0, 1))
    file = runs[0].folder / path
    file.parent.mkdir(exist_ok=True)
    file.write_text(content)
    results = collect(EXPERIMENT, runs)
    (failed,) = results["failed"]
    assert failed["run"] == "full-seed0" and re.search(r"(?s)full-seed0: .*damaged.*remove", failed["reason"])
    assert (
        list(results["cells"]["full"]["kk"]["chrf++"]["seeds"]) == ["1"] and len(results["grid"]["none"]["runs"]) == 2
    )
    assert write_report(results, tmp_path).exists()


def test_damage_of_the_pretraining_is_said_to_be_there(tmp_path: Path) -> None:
    start = a_run(tmp_path, "start", 0, 0.1)
    (start.folder / "systems" / "start" / "finetune" / "result.json").write_text("{")
    results = collect(EXPERIMENT, [a_run(tmp_path, "full", 0, 0.2, start=start), a_run(tmp_path, "none", 0, 0.2)])
    (failed,) = results["failed"]
    assert failed["run"] == "full-seed0" and failed["reason"].startswith(f"{start.folder}: ")
    assert list(results["cells"]) == ["none"]


def test_losses_are_read_against_tokens(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    train = [{"kind": "train", "step": step, "tokens": tokens} for step, tokens in ((10, 1000), (20, 2200))]
    found = [{"kind": "validation", "step": step, "losses": {"kk": 1.0}, "mean": 1.0} for step in (5, 15, 20, 24)]
    path.write_text("\n".join(map(json.dumps, [*train, *found])) + '\n{"kind": "val')
    assert [tokens for tokens, _ in read_losses(path)] == [500, 1600, 2200, 2200 + 4 * 110]
    assert read_losses(tmp_path / "missing.jsonl") == []


def test_tokens_to_a_loss_are_interpolated_and_never_guessed() -> None:
    losses = [(100.0, {"kk": 4.0}), (200.0, {"kk": 3.0}), (300.0, {"kk": 3.5}), (400.0, {"kk": 2.0})]
    assert tokens_to_reach(losses, "kk", 3.25) == 175
    assert tokens_to_reach(losses, "kk", 2.5) == pytest.approx(300 + 100 * 1.0 / 1.5)
    assert tokens_to_reach(losses, "kk", 4.5) == 100, "what came before the first validation is not known"
    assert tokens_to_reach(losses, "kk", 1.9) is None and tokens_to_reach(losses, "ug", 3.0) is None
    quick = [(tokens / 2, values) for tokens, values in losses]
    panel = {"full": {0: losses, 1: losses}, "quick": {0: quick, 1: quick}, "slow": {0: losses[:3], 1: losses}}
    found = speed({"fine-tuning": panel}, "full")["fine-tuning"]
    assert found["quick"]["kk"] == {"share": 0.5, "seeds": {"0": 0.5, "1": 0.5}}
    assert found["slow"]["kk"] == {"share": None, "seeds": {"0": None, "1": 1.0}} and "full" not in found
    assert MEAN not in found["quick"], "the mean over one language says nothing new"


def test_findings_say_better_worse_and_undecided_by_the_interval(tmp_path: Path) -> None:
    results = some_results(tmp_path)
    (sentence,) = findings(results)
    assert re.fullmatch(r"none, against full: worse in Kazakh \(-\d+\.\d \[.*\]\), Uyghur \(.*\)\.", sentence)
    results["paired"]["none"]["ug"].update(value=-2.0, low=-4.1, high=0.3)
    assert re.search(r"worse in Kazakh .*; undecided in Uyghur \(-2\.0 \[-4\.1, \+0\.3\]\)\.", findings(results)[0])
    results["higher_is_better"]["chrf++"] = False  # as of an error rate
    assert "better in Kazakh" in findings(results)[0]
    assert "two-level bootstrap" in caution(results) and "Of 2 comparisons, up to 0.1" in caution(results)
    del results["grid"]["none"], results["cells"]["none"], results["paired"]["none"]
    assert findings(results) == ["Nothing is compared: no variant but full has a finished run."]


def test_one_seed_is_said_to_be_one_seed(tmp_path: Path) -> None:
    results = some_results(tmp_path, (4,))
    assert "One seed: the intervals are over test sentences only" in caution(results)
    write_report(results, tmp_path)
    assert "One seed:" in (tmp_path / "report.md").read_text() and "One seed:" in (tmp_path / "report.html").read_text()


def test_the_main_table_has_controls_floors_and_costs(tmp_path: Path) -> None:
    main = table(some_results(tmp_path), "Kazakh")
    rows = {row[0]: dict(zip(main["header"], row, strict=True)) for row in main["rows"]}
    assert list(rows) == ["full", "none", "(copied source)", "(best constant string)"]
    assert rows["full"]["minus full"] == "reference" and rows["none"]["minus full"].startswith("-")
    assert rows["none"]["gain from the true source"] == "2.00" and rows["none"]["distinct outputs"] == "21 of 25"
    assert rows["none"]["uses its source"] == "yes" and rows["none"]["tokens"] == "4,000"
    assert len(rows["none"]["single seeds"].split(", ")) == 3 and rows["(copied source)"]["chrF++"].startswith("3.0 [")
    assert "Signature: nrefs:1|seeds:3|bs:200" in main["note"]


def test_published_figures_stay_in_a_column_of_their_own(tmp_path: Path) -> None:
    published = {
        "metric": "ROUGE-L",
        "note": "Tibetan.",
        "values": {"full": {"task": 25.7, "reading": 16.4}, "none": {"task kk": 5.6, "task ug": 12.5}},
        "others": {"mBART": {"reading": 7.9}},
    }
    results = some_results(tmp_path, published=published)
    main = table(results, "Kazakh")
    assert [row[-1] for row in main["rows"]] == ["25.7", "5.6", "–", "–"] and main["header"][-1] == "paper (ROUGE-L)"
    assert "Of the paper's column: Tibetan." in main["note"]
    paper = table(results, "The paper's figures")
    assert paper["header"] == ["system", "task", "reading", "task kk", "task ug"]
    assert paper["rows"] == [
        ["full", "25.7", "16.4", "–", "–"],
        ["none", "–", "–", "5.6", "12.5"],
        ["mBART", "–", "7.9", "–", "–"],
    ]
    assert "arXiv 2502.10852" in paper["note"]
    assert "25.7" not in json.dumps(results["cells"]) and "25.7" not in json.dumps(results["paired"])


def test_search_marks_what_was_chosen(tmp_path: Path) -> None:
    results = some_results(tmp_path)
    results["search"] = {"none": {"rate": {"0.0001": 30.0, "0.0003": 33.0}, "chosen": {"rate": 0.0003}}}
    results["search"]["full"] = {"rate, norm": {"1e-05, pre": None, "1e-05, post": 3.0}}
    results["search"]["full"]["chosen"] = {"rate": 1e-5, "norm": "post"}
    marks = [(row[2], row[-1]) for row in table(results, "Search")["rows"]]
    assert marks == [
        ("0.0001", ""),
        ("0.0003", "chosen, at an edge of 0.0003"),
        ("1e-05, pre", ""),
        ("1e-05, post", "chosen"),
    ]
    results["search"] = {"none": {"rate": {"1": 3.0, "2": 4.0, "3": 2.0}, "chosen": {"rate": 2}}}
    assert [row[-1] for row in table(results, "Search")["rows"]] == ["", "chosen", ""]


def test_searched_values_with_commas_of_their_own_are_shown(tmp_path: Path) -> None:
    results = some_results(tmp_path)
    tried: dict[str, Any] = {"layers": {"[0, 1]": 30.0, "[0, 1, 2]": 33.0}, "chosen": {"layers": [0, 1, 2]}}
    both = {"rate, layers": {"0.1, [0, 1]": 1.0, "0.2, [0, 1]": 3.0}, "chosen": {"rate": 0.2, "layers": [0, 1]}}
    texts = {"rate, words": {"1, a, b": 2.0, "2, a": 1.0}, "chosen": {"rate": 1, "words": "a, b"}}
    mappings = {"size": {"{'a': 1, 'b': 2}": 1.0, "{'a': 1}": 3.0}, "chosen": {"size": {"a": 1}}}
    results["search"] = {"full": tried, "none": both, "texts": texts, "mappings": mappings}
    marks = {(row[0], row[2]): row[-1] for row in table(results, "Search")["rows"] if row[-1]}
    assert marks == {
        ("full", "[0, 1, 2]"): "chosen",
        ("none", "0.2, [0, 1]"): "chosen, at an edge of 0.2",
        ("texts", "1, a, b"): "chosen",
        ("mappings", "{'a': 1}"): "chosen",
    }


def test_square_brackets_of_names_are_shown_on_the_terminal(tmp_path: Path) -> None:
    labels = {"full": {"label": "full [tied]"}, "none": {"label": "a[/b]"}}
    results = some_results(tmp_path, name="[red]ours", variants=labels)
    results["cells"]["a[/b]"] = results["cells"].pop("none")
    screen = Console(record=True, width=160, force_terminal=False)
    print_results(results, screen)
    shown = screen.export_text()
    assert "[red]ours: chrF++" in shown and "minus full [tied]" in shown and "│ a[/b] " in shown


def test_a_reference_without_a_finished_run_has_its_own_name(tmp_path: Path) -> None:
    labels = {"full": {"label": "the paper's"}, "none": {"label": "random"}}
    results = collect(EXPERIMENT | {"variants": labels}, [a_run(tmp_path, "none", 0, 0.2)])
    assert "minus the paper's" in table(results, "Kazakh")["header"]


def test_held_out_denoising_is_a_ratio_of_sums_over_seeds(tmp_path: Path) -> None:
    runs, rng = some_runs(tmp_path), np.random.default_rng(0)
    tokens, nats = rng.integers(3, 30, size=40), {}
    for run in runs:
        extra = 0.5 if run.variant == "none" else 0.0
        nats[run.name] = tokens * (1.0 + extra + 0.1 * run.seed) + rng.normal(0, 1, size=40)
        rows = [
            {"language": "kk", "text": f"t{i}", "nats": nats[run.name][i], "tokens": int(n), "characters": int(3 * n)}
            for i, n in enumerate(tokens)
        ]
        path = run.folder / "systems" / run.variant / "denoising.jsonl"
        order = rng.permutation(40)
        path.write_text("".join(json.dumps(rows[place]) + "\n" for place in order))
    results = collect(EXPERIMENT, runs)
    entry = results["denoising"]["none"]["kk"]
    by_seed = [nats[f"none-seed{seed}"].sum() / tokens.sum() for seed in (0, 1, 2)]
    assert list(entry["nats_per_token"]["seeds"].values()) == pytest.approx(by_seed)
    assert entry["nats_per_token"]["value"] == pytest.approx(np.mean(by_seed))
    assert entry["perplexity"]["value"] == pytest.approx(np.mean(np.exp(by_seed)))
    assert entry["nats_per_character"]["value"] == pytest.approx(np.mean(by_seed) / 3)
    base = [nats[f"full-seed{seed}"].sum() / tokens.sum() for seed in (0, 1, 2)]
    pair = entry["paired"]
    assert pair["value"] == pytest.approx((np.mean(by_seed) - np.mean(base)) / 3) and 0 < pair["low"] < pair["high"]
    # The seeds differ by more than this, but alike in both variants: draws are paired.
    assert pair["high"] - pair["low"] < 0.5 * (entry["nats_per_character"]["high"] - entry["nats_per_character"]["low"])
    rows = table(results, "Held-out denoising")["rows"]
    assert [row[:2] for row in rows] == [["full", "Kazakh"], ["none", "Kazakh"]] and rows[0][3] == "–"
    assert "Held-out denoising" not in [found["title"] for found in result_tables(some_results(tmp_path / "without"))]


def test_the_report_needs_results_json_only_and_nothing_from_elsewhere(tmp_path: Path) -> None:
    results = some_results(tmp_path, question="Does <b>sharing</b> & co help?")
    results["grid"]["none"]["label"] = "<script>alert(1)</script> $x|y$"
    results["experiment"]["description"] = "All but `full` & `<none>`."
    shutil.rmtree(tmp_path / "runs")
    path = write_report(results, tmp_path)
    page, text = path.read_text(), (tmp_path / "report.md").read_text()
    assert "All but <code>full</code> &amp; <code>&lt;none&gt;</code>." in page
    assert "<script" not in page and "Does &lt;b&gt;sharing" in page and page.count("<svg") == 2
    loaded = re.findall(r"""(?:src|href)=["']([^"'#][^"']*)|url\(([^)#]+)""", page)
    assert not loaded, "nothing is loaded from elsewhere"
    assert "![" in text and "(scores.png)" in text and "(curves.png)" in text
    assert r"&lt;script>alert(1)&lt;/script> $x\|y$" in text
    assert {path.name for path in tmp_path.glob("*.???")} == {
        f"{n}.{s}" for n in ("scores", "curves") for s in ("png", "svg")
    }
    screen = Console(record=True, width=120, force_terminal=False)
    print_results(results, screen)
    shown = screen.export_text()
    assert "against full: worse" in shown and re.search(r"none +│ Kazakh +│ +\d+\.\d \[", shown)


def test_the_search_is_called_the_same_only_if_it_is(tmp_path: Path) -> None:
    results = some_results(tmp_path)
    tried = {"rate": {"0.0001": 30.0, "0.0003": 33.0}, "chosen": {"rate": 0.0003}}
    results["search"] = {"full": tried, "none": {**tried, "chosen": {"rate": 0.0001}}}
    assert "Every variant gets the same search." in table(results, "Search")["note"]
    results["search"] = {"full": tried, "none": {"rate": {"0.01": 3.0}}}
    assert "searches are not the same." in table(results, "Search")["note"]
    results["search"] = {"full": tried}
    assert "searches are not the same; without one: none." in table(results, "Search")["note"]


def test_each_run_is_done_again_by_one_command_in_a_new_folder(tmp_path: Path) -> None:
    before = finish(replace(a_run(tmp_path, "before", 0, 0.1), kind="pretrain", stage="pretrain"))
    built = finish(replace(a_run(tmp_path, "untrained", 0, 0.1), kind="pretrain", stage="build"))
    twins = [a_run(tmp_path, name, 0, 0.2, start=before) for name in ("full", "none")]
    results = collect(EXPERIMENT, [*twins, a_run(tmp_path, "none", 1, 0.2, start=built), a_run(tmp_path, "full", 2, 0)])
    found = {
        row[2].split()[2]: (row[2].split()[1], row[2].split()[3:]) for row in table(results, "Rerun a cell")["rows"]
    }
    assert len(table(results, "Rerun a cell")["rows"]) == len(found) == 6
    verbs = {"before-seed0": "pretrain", "untrained-seed0": "build", "full-seed0": "run", "full-seed2": "run"}
    for name, verb in verbs.items():
        wanted = (verb, ["--output", f"runs/again/{name}"])
        assert found[f"{(tmp_path / 'runs' / name).as_posix()}/recipe.yaml"] == wanted


def test_sizes_are_compared_with_the_reference_of_the_same_size(tmp_path: Path) -> None:
    plan = [("full", 0.2), ("none", 0.6)]
    runs = [a_run(tmp_path, name, seed, noise + (0.3 if size == 100 else 0), size=size)
            for name, noise in plan for size in (100, 1000) for seed in (0, 1)]  # fmt: skip
    for run in runs:  # among more training targets a better constant string is found
        content = json.loads((run.folder / "metrics.json").read_text())
        content["systems"]["best_constant"]["kk"]["chrf++"] = score(float(run.size or 0) / 100)
        (run.folder / "metrics.json").write_text(json.dumps(content))
    results = collect(EXPERIMENT, runs, seeds=[0, 1])
    assert results["floors"]["task"]["best_constant"]["kk"]["chrf++"]["value"] == 10.0, "of the largest size"
    assert set(results["paired"]) == {"none/100", "none/1000"}
    for size in (100, 1000):
        own, base = (results["cells"][f"{name}/{size}"]["kk"]["chrf++"]["value"] for name in ("none", "full"))
        assert results["paired"][f"none/{size}"]["kk"]["value"] == pytest.approx(own - base)
    assert table(results, "100 examples: Kazakh") and table(results, "1,000 examples: Uyghur")
    for place in results["grid"].values():
        place["examples"] = {"kk": 640, "ug": 90}
    assert "Size 1,000 was trained on 640 examples" in caution(results) and "Size 100 " not in caution(results)
    write_report(results, tmp_path)
    assert (tmp_path / "sizes.svg").exists()
    line = draw_sizes(results).axes[0].containers[0][0]
    wanted = [results["cells"][f"full/{size}"]["kk"]["chrf++"]["value"] for size in (100, 1000)]
    assert line.get_ydata() == pytest.approx(wanted) and line.get_xdata() == pytest.approx([100, 1000], rel=0.05)
    assert draw_scores(results).axes[0].lines[1].get_xdata()[0] == pytest.approx(wanted[1]), "the largest size"


def test_floors_are_grey_lines_with_a_legend(tmp_path: Path) -> None:
    results = some_results(tmp_path)
    figure = draw_scores(results)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["copied source", "best constant string"]
    looks = [(line.get_linestyle(), line.get_color()) for line in legend.get_lines()]
    upright = {line.get_xdata()[0]: line for line in figure.axes[0].lines if list(line.get_ydata()) == [0, 1]}
    assert [(upright[at].get_linestyle(), upright[at].get_color()) for at in (3.0, 9.0)] == looks
    assert looks[0] != looks[1]
    results["floors"] = {}
    assert not draw_scores(results).legends


def test_long_names_leave_room_for_the_scores(tmp_path: Path) -> None:
    results = some_results(tmp_path)
    for place in results["grid"].values():
        place["label"] = "a warm-started encoder-decoder with small batches, " + place["variant"]
    results["cells"] = {cell: {"kk": scores["kk"]} for cell, scores in results["cells"].items()}
    figure = draw_scores(results)
    figure.draw_without_rendering()
    (axis,) = figure.axes
    assert axis.get_window_extent().width / figure.dpi > 2.5, "inches of one panel"
    boxes = [text.get_window_extent() for text in axis.get_yticklabels()]
    assert len(boxes) == 2 and boxes[0].y0 > boxes[1].y1, "names do not touch"
    assert figure.bbox.x0 <= min(box.x0 for box in boxes)


def test_curves_are_means_over_seeds_with_their_range(tmp_path: Path) -> None:
    runs = [a_run(tmp_path, "full", seed, 0.2 + 0.1 * seed, tokens=4000 + 400 * seed) for seed in (0, 1, 2)]
    axis = draw_curves(collect(EXPERIMENT, runs)).axes[0]
    (line,), (band,) = axis.lines, axis.collections
    assert line.get_xdata() == pytest.approx([1100, 2200, 3300, 4400])
    assert line.get_ydata() == pytest.approx([5.3, 4.8, 4.3, 3.8])
    edge = band.get_paths()[0].vertices
    assert (edge[:, 1].min(), edge[:, 1].max()) == pytest.approx((3.7, 5.4))
    assert axis.get_title(loc="left") == "fine-tuning"


def test_tasks_have_rows_and_languages_columns_of_one_scale(tmp_path: Path) -> None:
    results = some_results(tmp_path)
    for cell, place in list(results["grid"].items()):  # a second task, without the first language
        results["grid"][f"{cell}/other"] = {**place, "task": "other"}
        results["cells"][f"{cell}/other"] = {"ug": results["cells"][cell]["ug"]}
    results["floors"] = {}
    figure = draw_scores(results)
    figure.draw_without_rendering()
    places = {
        axis.get_title(loc="left"): (axis.get_subplotspec().rowspan.start, axis.get_subplotspec().colspan.start)
        for axis in figure.axes
        if axis.get_frame_on()
    }
    assert places == {"task: Kazakh": (0, 0), "task: Uyghur": (0, 1), "other: Uyghur": (1, 1)}
    assert len({axis.get_xlim() for axis in figure.axes if axis.get_frame_on()}) == 1
    (empty,) = (axis for axis in figure.axes if not axis.get_frame_on())
    assert empty.get_visible() and [text.get_text() for text in empty.get_yticklabels()] == ["full", "none"]
