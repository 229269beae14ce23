"""The `enc2gen` command."""

from __future__ import annotations

import io
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from enc2gen.cli import (
    add_language,
    align,
    classify,
    experiment,
    generate_command,
    prepare,
    shortlist,
    tokenizer_report,
    vocab,
)
from enc2gen.cli.bridge import is_bridge_recipe, listed, output_setting, run_bridge
from enc2gen.errors import ConfigError, Enc2genError, Interrupted

if TYPE_CHECKING:
    from enc2gen.experiments.recipe import Recipe

app = typer.Typer(
    name="enc2gen",
    help="Grow a text generator out of any pretrained multilingual encoder, or bridge the encoder to an LLM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
console = Console()
errors = Console(stderr=True)

_STAGED = ("run", "prepare", "adapt", "build", "pretrain", "finetune", "evaluate", "report", "experiment")
_CTRL_C = 130  # status of a command that Ctrl-C ends

RecipeFile = Annotated[Path, typer.Argument(help="Recipe, a YAML file.", show_default=False)]
Languages = Annotated[
    str | None,
    typer.Option(
        "--languages",
        "-l",
        help="Languages instead of the recipe's, such as kk,ug,mn,zh: to write; of a bridge recipe, to test.",
    ),
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", "-s", help="Replace one setting: section.key=value. Repeatable.")
]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the run instead of the recipe's.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace training in the folder that was done with other settings.")
]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed instead of the recipe's.")]
StoreFolder = Annotated[
    Path | None,
    typer.Option("--store", help="Folder of prepared data and vocabularies to share with other runs, as links."),
]


def _load(
    path: Path, languages: str | None, settings: list[str] | None, output: Path | None, seed: int | None
) -> Recipe:
    """The recipe at `path` with the command line's settings on top."""
    from enc2gen.experiments.recipe import load_recipe

    overrides = list(settings or [])
    if output is not None:
        overrides.append(output_setting(output))
    if seed is not None:
        overrides.append(f"seed={seed}")
    return load_recipe(path, overrides, languages=listed(languages))


def _run(recipe: Recipe, overwrite: bool, stage: str, store: Path | None = None) -> None:
    from enc2gen.experiments.run import Run

    folder = Run(recipe, console, overwrite=overwrite, store=store).run([stage])
    if stage != "report":
        console.print(f"{stage} done; output in {folder}", highlight=False, markup=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        from enc2gen import __version__

        print(f"enc2gen {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    recipe: RecipeFile,
    languages: Languages = None,
    settings: Settings = None,
    output: Output = None,
    seed: Seed = None,
    overwrite: Overwrite = False,
    store: StoreFolder = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Validate the recipe and print the plan; do nothing.")
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", help="Of a bridge recipe: train and test BRIDGE or BRIDGE:SEED alone. Repeatable."),
    ] = None,
) -> None:
    """Carry out a recipe: prepare, adapt, build, pretrain, finetune, evaluate, report. Finished stages are kept.

    Bridge recipes (kind: bridge) train and compare bridges between an encoder and an LLM. Start the same command in
    several terminals, and they share the work.
    """
    if is_bridge_recipe(recipe):
        if store is not None:
            raise ConfigError("bridge recipes share nothing", where="--store", remedy="leave --store out")
        run_bridge(recipe, languages, settings, output, seed, overwrite, dry_run, only, console)
        return
    if only:
        raise ConfigError("this recipe has no bridges", where="--only", remedy="leave --only out")
    loaded = _load(recipe, languages, settings, output, seed)
    if dry_run:
        from enc2gen.cli.plan import print_plan

        print_plan(recipe, loaded, console)
        return
    _run(loaded, overwrite, "report", store)


def _add_stage(stage: str, text: str) -> None:
    def verb(
        recipe: RecipeFile,
        languages: Languages = None,
        settings: Settings = None,
        output: Output = None,
        seed: Seed = None,
        overwrite: Overwrite = False,
        store: StoreFolder = None,
    ) -> None:
        _run(_load(recipe, languages, settings, output, seed), overwrite, stage, store)

    app.command(stage, help=text)(verb)


def _prepare_recipe(
    recipe: Path,
    languages: str | None,
    settings: list[str] | None,
    output: Path | None,
    seed: int | None,
    overwrite: bool,
) -> None:
    _run(_load(recipe, languages, settings, output, seed), overwrite, "prepare")


prepare.register(app, _prepare_recipe)
_add_stage("adapt", "Trim, extend and adapt a recipe's encoders, as it says; does `prepare` first.")
_add_stage("build", "Grow a recipe's systems out of its encoders, with init reports; does `adapt` first.")
_add_stage("pretrain", "Pretrain a recipe's systems; does `build` first.")
_add_stage("finetune", "Fine-tune a recipe's systems; does `pretrain` first.")
_add_stage("evaluate", "Write and score a recipe's test outputs; does `finetune` first.")
_add_stage("report", "Write a recipe's report; does `evaluate` first, and so is the same as `run`.")


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Explain the installation: versions, hardware, optional parts, what is supported."""
    from enc2gen.cli import doctor as checks

    if as_json:
        import json
        from dataclasses import asdict

        found = checks.diagnose()
        print(json.dumps([asdict(check) for check in found], indent=1))
        raise typer.Exit(1 if any(check.status == "error" for check in found) else 0)
    raise typer.Exit(checks.doctor(console))


generate_command.register(app, lambda: errors)
shortlist.register(app)
tokenizer_report.register(app)
vocab.register(app)
add_language.register(app)
classify.register(app)
align.register(app)
experiment.register(app)


def _quiet_libraries() -> None:
    """Keep other libraries' progress bars and warnings out of this command's output."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _tune_allocator() -> None:
    """Let torch ask for huge pages for large tensors, where Linux grants them: fresh memory costs few page faults."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch at its first allocation


def _escape_unknown_characters() -> None:
    """Let a message come with escapes rather than fail where the terminal's encoding lacks a character.

    What is data is no concern of this: texts are written as UTF-8 bytes, JSON and YAML have escapes of their own.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def main() -> None:
    """Run the command; every error a user can cause is one message and exit status 1."""
    os.environ["ENC2GEN_COMMAND"] = "1"  # for worker processes: see enc2gen/__init__.py
    _tune_allocator()
    _quiet_libraries()
    _escape_unknown_characters()
    try:
        status: Any = app(standalone_mode=False, prog_name="enc2gen")
    except Enc2genError as error:
        if isinstance(error, Interrupted):
            errors.print(f"{error}\nGo on with the same command:\n  {_command()}", highlight=False, markup=False)
            sys.exit(_CTRL_C)
        errors.print(f"error: {error}", highlight=False, markup=False, soft_wrap=True)
        sys.exit(1)
    except OSError as error:
        import errno

        reason = "no space left on the disk" if error.errno == errno.ENOSPC else str(error)
        errors.print(
            f"error: {error.filename or 'output'}: {reason}\n  remedy: free space or check rights, then run again"
            + ("; finished stages are kept" if _has_stages() else ""),
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        sys.exit(1)
    except (KeyboardInterrupt, typer.Abort):
        status = _CTRL_C
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # click's usage errors
            error.show()  # type: ignore[attr-defined]
            sys.exit(error.exit_code)
        raise
    if status == _CTRL_C:  # newer typers make it of Ctrl-C, older ones an Abort
        kept = f"; finished stages are kept. Go on with the same command:\n  {_command()}" if _has_stages() else ""
        errors.print(f"interrupted{kept}", highlight=False, markup=False)
    sys.exit(status if isinstance(status, int) else 0)


def _has_stages() -> bool:
    """Whether the verb as typed works in stages, of which finished ones are found again."""
    return len(sys.argv) > 1 and sys.argv[1] in _STAGED


def _command() -> str:
    from enc2gen.experiments.findings import command_name

    return f"{command_name()} {shlex.join(sys.argv[1:])}"


if __name__ == "__main__":
    main()
