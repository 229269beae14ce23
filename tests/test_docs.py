"""What the documentation shows, runs; what it links, exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bridge_toys import llm_tokenizer, tiny_llm

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
