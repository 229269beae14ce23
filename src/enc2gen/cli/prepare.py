"""`enc2gen prepare`: clean a corpus; or the first stage of a recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from enc2gen.errors import ConfigError

if TYPE_CHECKING:
    from enc2gen.corpora.cleaning import CleaningConfig

_SHOWN_FILES = 5  # our choice: enough to know which ones are meant
_CORPUS, _RECIPE = "To clean a corpus", "To prepare a recipe"

Sources = Annotated[
    list[str],
    typer.Argument(
        help="Files or folders (txt, jsonl, json, csv, tsv, po, also .gz, .xz, .bz2; parquet), hub:NAME; or one "
        "recipe, .yaml.",
        show_default=False,
    ),
]
Language = Annotated[
    str | None, typer.Option("--lang", help="Language of the texts, such as bo.", rich_help_panel=_CORPUS)
]
TextField = Annotated[
    str | None, typer.Option("--field", help="Field of the text; else text.", rich_help_panel=_CORPUS)
]
DocumentField = Annotated[
    str | None,
    typer.Option(
        "--document-field",
        help="Field that names the document: its lines stay in one split. Else a record is a document.",
        rich_help_panel=_CORPUS,
    ),
]
Documents = Annotated[
    str | None,
    typer.Option(
        "--documents",
        help="What a document is in .txt: file, block (up to a blank line), line. Else files from 20 on, or blocks.",
        rich_help_panel=_CORPUS,
    ),
]
Encoding = Annotated[
    str | None,
    typer.Option("--encoding", help="Encoding of text that is not UTF-8; else it is dropped.", rich_help_panel=_CORPUS),
]
Duplicates = Annotated[
    str | None,
    typer.Option("--duplicates", help="Which to drop: near (and exact), exact, none.", rich_help_panel=_CORPUS),
]
Against = Annotated[
    list[Path] | None,
    typer.Option(
        "--against", help="Evaluation file; lines that are in it are dropped. Repeatable.", rich_help_panel=_CORPUS
    ),
]
DevPercent = Annotated[
    float | None, typer.Option("--dev-percent", help="Documents for dev, in percent; else 2.", rich_help_panel=_CORPUS)
]
TestPercent = Annotated[
    float | None,
    typer.Option("--test-percent", help="Documents for test, in percent; else 2.", rich_help_panel=_CORPUS),
]
EngineName = Annotated[
    str | None,
    typer.Option(
        "--engine", help="local (processes) or ray (a cluster; needs the extra ray).", rich_help_panel=_CORPUS
    ),
]
Workers = Annotated[
    int | None, typer.Option("--workers", min=1, help="Processes; else all cores.", rich_help_panel=_CORPUS)
]
Explain = Annotated[
    bool, typer.Option("--explain", help="Write every dropped line with its reason.", rich_help_panel=_CORPUS)
]
RecipeLanguages = Annotated[
    str | None,
    typer.Option("--languages", "-l", help="Languages instead of the recipe's: kk,ug.", rich_help_panel=_RECIPE),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="One setting, key=value, of the cleaning or the recipe. Repeatable."),
]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Of the split; or instead of the recipe's.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what was made with other settings.")]

HELP = """Clean a corpus, or prepare a recipe's.

[bold]enc2gen prepare corpus/ --lang bo --output bo-clean[/bold]
reads files, folders or a Hub data set; repairs, filters, deduplicates and splits the lines; writes Parquet shards
(train, dev, test) and a report of what was dropped, and why. Run again, it goes on where it was stopped.

[bold]enc2gen prepare recipe.yaml[/bold]
carries out the first stage of a recipe: reads and splits the corpora it names.
"""


def register(app: typer.Typer, recipe_prepare: Callable[..., None] | None = None) -> None:
    """Add the command `prepare` to `app`.

    Args:
        recipe_prepare: called for a single source that ends in .yaml or .yml, with (path, languages, settings,
            output, seed, overwrite).
    """

    @app.command("prepare", help=HELP)
    def prepare(
        sources: Sources,
        lang: Language = None,
        output: Output = None,
        field: TextField = None,
        document_field: DocumentField = None,
        documents: Documents = None,
        encoding: Encoding = None,
        duplicates: Duplicates = None,
        against: Against = None,
        dev_percent: DevPercent = None,
        test_percent: TestPercent = None,
        settings: Settings = None,
        seed: Seed = None,
        engine: EngineName = None,
        workers: Workers = None,
        explain: Explain = False,
        overwrite: Overwrite = False,
        languages: RecipeLanguages = None,
    ) -> None:
        cleaning = {
            "language": lang,
            "duplicates": duplicates,
            "against": [str(path) for path in against] if against else None,
            "dev_percent": dev_percent,
            "test_percent": test_percent,
        }
        reading = {"field": field, "document_field": document_field, "documents": documents, "encoding": encoding}
        if recipe_prepare is not None and len(sources) == 1 and sources[0].lower().endswith((".yaml", ".yml")):
            given = {"engine": engine, "workers": workers, "explain": explain or None, **cleaning, **reading}
            _refuse(given, "is for cleaning a corpus, not for a recipe")
            recipe_prepare(Path(sources[0]), languages, settings, output, seed, overwrite)
            return
        _refuse({"languages": languages}, "is for recipes; a corpus is in one language, --lang")
        config = cleaning_config({**cleaning, "seed": seed}, reading, settings or [])
        if output is None:
            raise ConfigError("no output folder", where="prepare", remedy="add --output FOLDER")
        _prepare(sources, output, config, engine or "local", workers, explain, overwrite)


def _refuse(given: dict[str, Any], why: str) -> None:
    names = {"language": "lang"}
    for name, value in given.items():
        if value is not None:
            raise ConfigError(
                f"--{names.get(name, name).replace('_', '-')} {why}",
                where="prepare",
                remedy="`enc2gen prepare --help` shows both uses",
            )


def cleaning_config(cleaning: dict[str, Any], reading: dict[str, Any], settings: list[str]) -> CleaningConfig:
    """Build the configuration from options, None for what is not given, and `key=value` settings on top.

    Raises:
        ConfigError: a setting is unknown or its value not allowed; all of them are named.
        LanguageError: the language is unknown.
    """
    import yaml
    from pydantic import ValidationError

    from enc2gen.corpora.cleaning import CleaningConfig
    from enc2gen.corpora.languages import normalise_language

    values: dict[str, Any] = {name: value for name, value in cleaning.items() if value is not None}
    values["reading"] = {name: value for name, value in reading.items() if value is not None}
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(f"{setting!r} is no setting", where="--set", remedy="write key=value")
        target = values
        *parents, name = path.strip().split(".")
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise ConfigError(f"{path!r} is no setting", where="--set", remedy="a part of it is a single value")
        try:
            target[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(
                f"{text!r} is no value: {getattr(error, 'problem', None) or error}",
                where=f"--set {path}",
                remedy="write a value as in YAML: 5, 0.5, false, [a.txt, b.txt], or text in quotation marks",
            ) from error
    if "language" not in values:
        raise ConfigError(
            "no language", where="prepare", remedy="add --lang with the language of the texts, such as bo"
        )
    values["language"] = normalise_language(str(values["language"]), where="--lang")
    try:
        return CleaningConfig.model_validate(values)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, problem['loc'])) or 'settings'}: {problem['msg'].removeprefix('Value error, ')}"
            for problem in error.errors()
        ]
        raise ConfigError(
            "; ".join(problems),
            where="prepare",
            remedy=f"settings: {', '.join(CleaningConfig.model_fields)}; see `enc2gen prepare --help`",
        ) from error


def _prepare(
    sources: list[str],
    output: Path,
    config: CleaningConfig,
    engine: str,
    workers: int | None,
    explain: bool,
    overwrite: bool,
) -> None:
    from enc2gen.cli.cleaning_progress import cleaning_progress
    from enc2gen.corpora.cleaning import DROP_REASONS
    from enc2gen.corpora.cleaning_report import print_cleaning_report
    from enc2gen.corpora.pipeline import prepare_corpus, remarks
    from enc2gen.corpora.readers import unread_files

    console = Console()
    with cleaning_progress(Console(stderr=True)) as on_progress:
        stats = prepare_corpus(
            sources,
            output,
            config,
            engine=engine,
            workers=workers,
            explain=explain,
            overwrite=overwrite,
            on_progress=on_progress,
        )
    print_cleaning_report(stats, console, DROP_REASONS)
    unread = [file for source in sources for file in unread_files(Path(source))]
    for remark in [*remarks(stats, config), *_on_unread(unread)]:
        console.print(f"note: {remark}", highlight=False, markup=False)
    lines = [f"Corpus in {output}; what was dropped, with examples, in {output / 'report.html'}."]
    if explain:
        lines.append(f"Every dropped line in {output / 'dropped'}.")
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def _on_unread(files: list[Path]) -> list[str]:
    if not files:
        return []
    shown = ", ".join(map(str, files[:_SHOWN_FILES])) + (" ..." if len(files) > _SHOWN_FILES else "")
    return [f"{len(files):,} packed files are not read (only single files in .gz, .xz or .bz2 are): unpack {shown}"]
