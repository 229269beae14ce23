"""What the documentation shows, runs; what it links, exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from bridge_toys import llm_tokenizer, tiny_llm
from enc2gen.data.tasks import build_task
from enc2gen.experiments.data_config import DataConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_python_example_runs(
    encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)
    assert len(blocks) == 2 and '"hfl/cino-base-v2"' in blocks[0]
    code = blocks[0].replace('"hfl/cino-base-v2"', repr(str(encoder_folder))).replace("length=256", "length=32")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert "copied   decoder.layers.0.self_attention.q_proj.weight" in capsys.readouterr().out
    from transformers import AutoModelForSeq2SeqLM

    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "my-generator").config.language_ids.keys() == {
        "zh",
        "bo",
        "ug",
    }
    lines = [line for line in blocks[0].splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) <= 15


def test_the_bridge_example_runs(encoder_folder: Path, tmp_path: Path) -> None:
    block = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)[1]
    tiny_llm().save_pretrained(tmp_path / "llm")
    llm_tokenizer().save_pretrained(tmp_path / "llm")
    code = block.replace('"xlm-roberta-base"', repr(str(encoder_folder)))
    code = code.replace('"HuggingFaceTB/SmolLM2-135M-Instruct"', repr(str(tmp_path / "llm")))
    variables: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), variables)
    assert variables["bridge"].fusion.trainable  # type: ignore[attr-defined]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_switches_of_from_encoder_are_documented() -> None:
    import inspect

    from enc2gen import SwcmForConditionalGeneration

    text = (ROOT / "docs" / "model.md").read_text(encoding="utf-8")
    for name in inspect.signature(SwcmForConditionalGeneration.from_encoder).parameters:
        assert name in ("encoder", "tokenizer", "dropout", "seed", "verbose") or f"`{name}`" in text, name


def test_the_hub_data_sets_of_the_page_are_valid_and_fit_what_their_pages_say() -> None:
    """Records shaped like the data sets' own give examples; only the Hub itself is left out."""
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    block = page.split("### Data sets of the papers, by Hub name")[1].split("```yaml")[1].split("```")[0]
    data = DataConfig.model_validate(yaml.safe_load(block)["data"])
    records: dict[str, dict[str, Any]] = {
        "hub:masakhane/masakhanews:hau": {"headline": "h", "text": "t", "category": "sports", "url": "u"},
        "hub:hugcyp/LCSTS": {"summary": "h", "text": "t"},
        "hub:hfl/cmrc2018": {
            "id": "1", "context": "t", "question": "q", "answers": {"text": ["h"], "answer_start": [0]},
        },
        "corpus.en|corpus.kk": {"source": "t", "target": "h"},
    }  # fmt: skip
    assert [dataset.path for dataset in data.datasets] == list(records)
    for dataset in data.datasets:
        task = build_task(dataset.task, dataset.fields)
        (example,) = task.examples(iter([records[dataset.path]]), where=dataset.path)
        assert "t" in example.source and example.target == "h"
