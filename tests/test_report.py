"""The report and the terminal's results: true of the figures, safe with any text, self-contained."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from enc2gen.errors import CheckpointError
from enc2gen.experiments.findings import choose_samples, durations, generate_command, read_outputs
from enc2gen.experiments.recipe import Recipe
from enc2gen.experiments.report import print_results, write_report
from enc2gen.experiments.workspace import Workspace


@pytest.fixture(autouse=True)
def installed_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("enc2gen.experiments.findings.command_name", lambda: "enc2gen")


TRAINING = {"training": {"max_steps": 20}}
PAIRS = {
    "kk": [
        ("Save changes", "Өзгерістерді сақтау", "Өзгерістерді сақтау", "Қазақстан"),
        ("Samoa", "Самоа", "Самау", "Қазақстан"),
        ("Delete the selected files", "Таңдалған файлдарды жою", "Таңдалған файлды", "Қазақстан"),
        ("Permission denied", "Рұқсат жоқ", "Рұқсат бас тартылды", "Қазақстан"),
        ("Western European Summer Time", "Батыс Еуропа жазғы уақыты", "Батыс Еуропа жазғы уақыты", "уақыты"),
        ("<b>%(name)s</b> & co", "<b>%(name)s</b> және т.б.", "<script>alert('%(name)s')</script>", ""),
    ],
    "ug": [
        ("Save changes", "ئۆزگىرىشلەرنى ساقلا", "ئۆزگەرتىش ساقلا", "ۋاقتى"),
        ("Samoa", "ساموئا", "سامو", "ۋاقتى"),
        ("Tuesday", "سەيشەنبە", "سەيشەنبە", "ۋاقتى"),
        ("Permission denied", "ئىجازەت رەت قىلىندى", "ئىجازەت رەت قىلىندى", "ۋاقتى"),
        ("[bold]Remove[/bold] item", "[bold]ئۆچۈر[/bold]", "[bold]ئۆچۈرۈش[/bold]", "ۋاقتى"),
        ("%d minutes ago", "%d مىنۇت بۇرۇن", "\x1b[31m%d مىنۇت", "ۋاقتى"),
    ],
}


def score(value: float, margin: float = 1.5, n: int = 443) -> dict[str, Any]:
    signature = "nrefs:1|bs:1000|seed:0|case:mixed|eff:yes|nc:6|nw:2|space:no|version:2.6.0"
    low, high = max(0.0, value - margin), min(100.0, value + margin)
    return {"value": value, "low": low, "high": high, "n": n, "signature": signature, "confidence": 0.95}


def a_recipe(root: Path, **changes: Any) -> Recipe:
    content: dict[str, Any] = {
        "name": "quickstart",
        "description": "multilingual-e5-small learns to write <Kazakh> & Uyghur.",
        "output": str(root),
        "languages": ["kk", "ug"],
        "encoder": {"name": "embedded:multilingual-e5-small", "layers": [0, 2, 4, 7, 9, 11]},
        "data": {
            "datasets": [
                {
                    "path": "builtin:localisation?languages={languages}",
                    "fields": {"source_language_field": "source_language", "target_language_field": "target_language"},
                }
            ]
        },
        "systems": {"shared": {"preset": "swcm"}, "random_decoder": {"preset": "random-decoder"}},
        "pretrain": TRAINING,
        "finetune": TRAINING,
    }
    return Recipe(**(content | changes))


def some_metrics(recipe: Recipe, chrf: Mapping[str, float]) -> dict[str, Any]:
    """Figures of a run; `chrf` gives each system's chrF++."""
    names = recipe.evaluate.metrics
    off_target, exact = {"shared": 2.0, "copy_source": 99.0}, {"shared": 7.4, "random_decoder": 0.2}
    systems: dict[str, Any] = {}
    for system, value in chrf.items():
        available = {
            "chrf++": score(value),
            "bleu": score(value / 4, 0.8),
            "exact-match": score(exact.get(system, 0.0), 1.0),
            "off-target": score(off_target.get(system, 9.0), 1.1),
        }
        systems[system] = {tag: {name: available.get(name) for name in names} for tag in recipe.languages}
    if "ug" in recipe.languages and "off-target" in names:
        for scores in systems.values():
            scores["ug"]["off-target"] = None
    for tag in systems.get("best_constant", {}):
        systems["best_constant"][tag]["text"] = "Қазақстан <уақыты>" if tag == "kk" else "ئەۋرىپى ۋاقتى"
    use = {
        "loss": 4.087, "shuffled_loss": 7.294, "gain": 3.207, "permuted_chrf++": score(4.2, 0.8),
        "distinct_outputs": 402, "outputs": 443,
    }  # fmt: skip
    trained = {
        "steps": 350, "best_step": 350, "best_loss": 4.087, "losses": {"kk": 4.1, "ug": 4.0}, "tokens": 412345,
        "seconds": 133.2, "tokens_per_second": 3095.7, "stopped_early": False, "skipped": 0,
    }  # fmt: skip
    stages = [stage for stage in ("pretrain", "finetune") if getattr(recipe, stage) is not None]
    measured = {f"{stage}-{name}": 21.0 for stage in ("build", "evaluate") for name in recipe.systems}
    return {
        "recipe": recipe.name,
        "recipe_hash": "0123456789abcdef" * 4,
        "seed": recipe.seed,
        "enc2gen": "0.1.0",
        "machine": {"processor": "x86_64", "cores": 2, "gpu": None},
        "higher_is_better": {name: name != "off-target" for name in names},
        "systems": systems,
        "source_use": {name: {tag: dict(use) for tag in recipe.languages} for name in recipe.systems},
        "training": {f"{name}/{stage}": dict(trained) for name in recipe.systems for stage in stages},
        "seconds": {"prepare": 6.3, "evaluate-floors": 4.0, "build-forgotten": 999.0, **measured},
    }


def a_run(recipe: Recipe) -> Workspace:
    """A finished run's folder, by hand."""
    workspace = Workspace(recipe)
    for number, name in enumerate(recipe.systems):
        lines = [
            {"language": tag, "source": source, "references": [reference], "hypothesis": written[number % 2]}
            for tag in recipe.languages
            for source, reference, *written in PAIRS[tag]
        ]
        folder = workspace.system(name)
        (folder / "initial").mkdir(parents=True)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / "hypotheses.jsonl").write_text(text, encoding="utf-8")
        report = {
            "encoder": recipe.encoder.name,
            "plan": ["custom:0", "custom:1", "custom:2", "normal", "custom:3", "custom:4", "custom:5", "normal"],
            "parameters": 39_912_345,
            "counts": {"copied": 160, "tied": 2, "random": 20, "constant": 30},
            "elements": {"copied": 7_100_000, "tied": 3_000_000, "random": 4_700_000, "constant": 15_000},
            "tensors": [],
        }
        workspace.write_json(folder / "initial" / "init_report.json", report)
        for stage in ("pretrain", "finetune"):
            if getattr(recipe, stage) is not None:
                write_losses(workspace.system(name, stage, "metrics.jsonl"), 9.0 - number, 7.0 + number)
    return workspace


def write_losses(path: Path, start: float, fall: float) -> None:
    records: list[dict[str, Any]] = []
    for step in range(10, 351, 10):
        loss = start - fall * step / (step + 200)
        records.append({"kind": "train", "step": step, "loss": None if step == 100 else loss + 0.2 * (step % 3)})
        if step % 70 == 0:
            records.append({"kind": "validation", "step": step, "losses": {"kk": loss}, "mean": loss + 0.3})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"kind": "tr', encoding="utf-8")


CLEAR = {"shared": 24.1, "random_decoder": 12.3, "copy_source": 1.5, "best_constant": 11.2}


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return a_recipe(tmp_path / "run")


class Page(HTMLParser):
    """Tags in order with attributes and the text of each; checks that tags nest."""

    VOID = frozenset({"meta", "br", "link", "img", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[tuple[str, dict[str, str | None]], str]] = []
        self._attributes: list[dict[str, str | None]] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
            self._attributes.append(dict(attrs))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()
        self._attributes.pop()

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.texts.append(((self.open[-1], self._attributes[-1]), data))

    def text(self) -> str:
        return " ".join(" ".join(text for (tag, _), text in self.texts if tag != "style").split())


def page_of(recipe: Recipe, chrf: Mapping[str, float] = CLEAR) -> Page:
    return Page(write_report(recipe, a_run(recipe), some_metrics(recipe, chrf)).read_text(encoding="utf-8"))


def test_report_states_figures_and_verdicts(recipe: Recipe) -> None:
    page = page_of(recipe)
    text = page.text()
    assert "Kazakh (kk), 443 test sentences" in text
    assert "shared beats random_decoder (by 11.8), copy_source (by 22.6) and best_constant (by 12.9) in chrF++" in text
    best = [data for (tag, _), data in page.texts if tag == "strong"]
    assert best.count("24.1") == 2, "the best chrF++ of each language is bold"
    assert "12.3" not in best
    assert "22.6 – 25.6" in text
    assert "not measurable" in text, "off-target of Uyghur is null"
    assert "4.09 7.29 3.21" in text
    assert "402 of 443 yes" in text
    assert "7,100,000 in 160 tensors" in text
    assert "multilingual-e5-small learns to write <Kazakh> & Uyghur." in text
    assert "0123456789ab" in text
    assert "nrefs:1|bs:1000" in text
    assert "x86_64, 2 cores, no GPU" in text


def test_overlapping_intervals_are_not_a_win(recipe: Recipe) -> None:
    page = page_of(recipe, {**CLEAR, "random_decoder": 23.0})
    assert "Only in part:" in page.text()
    assert "ahead of random_decoder (by 1.1) in chrF++, but the intervals overlap" in page.text()
    assert "Yes:" not in page.text()


def test_outputs_that_ignore_their_source_are_called_out(recipe: Recipe) -> None:
    metrics = some_metrics(recipe, CLEAR)
    metrics["source_use"]["random_decoder"]["kk"]["permuted_chrf++"] = score(11.0)
    page = Page(write_report(recipe, a_run(recipe), metrics).read_text(encoding="utf-8"))
    assert page.text().count("402 of 443 not shown") == 1
    assert page.text().count("402 of 443 yes") == 3


def test_texts_are_escaped_and_marked_for_direction(recipe: Recipe) -> None:
    page = page_of(recipe)
    assert "script" not in {tag for tag, _ in page.tags}, "a hypothesis became markup"
    assert "<script>alert('%(name)s')</script>" in page.text()
    assert "“ Қазақстан <уақыты> ”" in page.text()
    uyghur = [attributes for (_, attributes), text in page.texts if re.search("[\u0600-\u06ff]", text)]
    assert len(uyghur) >= 9
    plain = [a for a in uyghur if a.get("dir") != "auto"]
    assert plain == [], "right-to-left text without dir"


def test_report_loads_nothing_from_elsewhere(recipe: Recipe) -> None:
    page = page_of(recipe)
    tags = [tag for tag, _ in page.tags]
    assert "svg" in tags, "loss curves are part of the page"
    assert not {"script", "link", "iframe", "object", "embed", "image", "img", "metadata"} & set(tags)
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "data", "action", "poster", "srcset"):
            assert (attributes.get(name) or "#").startswith("#"), f"<{tag} {name}={attributes[name]}>"
    html = (recipe.folder / "report.html").read_text(encoding="utf-8")
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))


def test_curves_picture(recipe: Recipe) -> None:
    page_of(recipe)
    data = (recipe.folder / "curves.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(data[16:20]) == 2000, "pixels across"


def test_report_is_the_same_each_time(recipe: Recipe) -> None:
    workspace, metrics = a_run(recipe), some_metrics(recipe, CLEAR)
    first = write_report(recipe, workspace, metrics).read_bytes()
    assert write_report(recipe, workspace, metrics).read_bytes() == first


def test_smallest_run(tmp_path: Path) -> None:
    """One system, no pretraining, no chrF++, no floors, no curves, no init report, no samples."""
    recipe = a_recipe(
        tmp_path / "run",
        languages=["kk"],
        systems={"only": {"preset": "warm-start"}},
        pretrain=None,
        evaluate={"metrics": ["exact-match"], "samples": 0},
    )
    workspace = a_run(recipe)
    workspace.system("only", "finetune", "metrics.jsonl").unlink()
    workspace.system("only", "initial", "init_report.json").unlink()
    stale = workspace.root / "curves.png"
    stale.write_bytes(b"of an earlier run")
    metrics = some_metrics(recipe, {"only": 20.0})
    page = Page(write_report(recipe, workspace, metrics).read_text(encoding="utf-8"))
    assert "there is no other system with exact match to compare only with" in page.text()
    assert "no init report" in page.text()
    assert "not measured" in page.text(), "source use needs chrF++"
    assert "svg" not in {tag for tag, _ in page.tags}
    assert not stale.exists()
    assert "Sample outputs" not in page.text()
    console = Console(width=80, record=True, file=StringIO())
    print_results(recipe, workspace, metrics, console)


def test_samples_are_the_same_sentences_for_all_and_spread_over_languages(recipe: Recipe) -> None:
    outputs = read_outputs(recipe, a_run(recipe))
    chosen = choose_samples(outputs, 5, seed=0)
    assert [len(samples) for samples in chosen.values()] == [3, 2]
    assert all(sample.outputs.keys() == {"shared", "random_decoder"} for s in chosen.values() for sample in s)
    assert choose_samples(outputs, 5, seed=0) == chosen
    assert any(choose_samples(outputs, 5, seed=seed) != chosen for seed in range(1, 5))
    assert sum(map(len, choose_samples(outputs, 100, seed=0).values())) == 12


def test_damaged_outputs_are_one_clear_error(recipe: Recipe) -> None:
    workspace = a_run(recipe)
    path = workspace.system("shared", "hypotheses.jsonl")
    path.write_text(path.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"hypotheses\.jsonl, line 12.*damaged"):
        write_report(recipe, workspace, some_metrics(recipe, CLEAR))


def test_durations_leave_out_systems_of_earlier_recipes(recipe: Recipe) -> None:
    rows = dict(durations(recipe, some_metrics(recipe, CLEAR)))
    assert rows["prepare"] == 6.3
    assert rows["pretrain shared"] == 133.2
    assert "build forgotten" not in rows


def test_command_is_ready_to_paste(tmp_path: Path) -> None:
    recipe = a_recipe(tmp_path / "my runs")
    workspace = a_run(recipe)
    command = generate_command(recipe, workspace, read_outputs(recipe, workspace))
    words = shlex.split(command)
    assert words[:4] == ["echo", "Save changes", "|", "enc2gen"]
    assert words[4:] == ["generate", f"{tmp_path}/my runs/model", "--to", "kk"]


def test_command_without_a_short_source(recipe: Recipe) -> None:
    command = generate_command(recipe, Workspace(recipe), {})
    assert command == f"enc2gen generate {recipe.folder}/model --to kk --input FILE_WITH_ONE_TEXT_A_LINE"


def terminal_text(recipe: Recipe, metrics: dict[str, Any], width: int = 80) -> str:
    console = Console(width=width, record=True, file=StringIO(), force_terminal=False)
    print_results(recipe, a_run(recipe), metrics, console)
    return console.export_text()


def test_terminal_fits_80_columns(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = recipe.model_copy(update={"output": "runs/quickstart"})
    text = terminal_text(recipe, some_metrics(recipe, CLEAR))
    assert max(cell_len(line.rstrip()) for line in text.splitlines()) <= 80
    assert "…" not in text.replace(" …", ""), "something was cut"
    assert "22.6 - 25.6" in text
    assert "Yes: shared beats" in text
    assert 'echo "Save changes" | enc2gen generate runs/quickstart/model --to kk\n' in text
    for name in ("report.html", "metrics.json", "model"):
        assert f"runs/quickstart/{name}" in text


def test_terminal_splits_tables_that_are_too_wide(tmp_path: Path) -> None:
    names = ["chrf++", "bleu", "exact-match", "off-target", "rouge-1", "rouge-2", "rouge-l", "token-f1"]
    recipe = a_recipe(tmp_path / "r", evaluate={"metrics": names})
    text = terminal_text(recipe, some_metrics(recipe, CLEAR))
    table = text.partition("Below each value")[0]
    assert all(label in table for label in ("chrF++ ↑", "exact match ↑", "off-target ↓", "ROUGE-L ↑", "token F1 ↑"))
    assert max(cell_len(line.rstrip()) for line in table.splitlines()) <= 80


def test_terminal_shows_texts_literally(tmp_path: Path) -> None:
    recipe = a_recipe(tmp_path / "run", evaluate={"samples": 12})
    text = terminal_text(recipe, some_metrics(recipe, CLEAR))
    assert "[bold]ئۆچۈرۈش[/bold]" in text, "square brackets of an output were read as markup"
    assert "\x1b" not in text, "an output could command the terminal"
    assert "best_constant always writes: Қазақстан <уақыты>" in text
