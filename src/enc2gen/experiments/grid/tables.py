"""What an experiment's results say: sentences about the differences, and tables as text, for every kind of report."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from enc2gen.corpora.languages import language_name
from enc2gen.experiments.findings import FLOOR_LABELS, METRIC_LABELS, duration
from enc2gen.experiments.grid.learning import MEAN
from enc2gen.experiments.grid.plots import excludes_zero, group_title, groups, headline, label, languages, variants
from enc2gen.experiments.report_tables import NOTHING, Table, points, signed, with_interval


def findings(results: Mapping[str, Any]) -> list[str]:
    """One sentence per variant: where its difference to the reference excludes zero, and where it does not."""
    reference = results["experiment"]["reference"]
    higher = results["higher_is_better"].get(headline(results), True)
    sentences = []
    for variant in variants(results):
        if variant == reference:
            continue
        sides: dict[str, list[str]] = {"better": [], "worse": [], "undecided": []}
        for place, difference in _differences(results, variant):
            if not excludes_zero(difference):
                sides["undecided"].append(f"{place} ({signed(difference)})")
            else:
                better = (difference["low"] > 0) == higher
                sides["better" if better else "worse"].append(f"{place} ({signed(difference)})")
        parts = [f"{side} in {', '.join(places)}" for side, places in sides.items() if places]
        said = "; ".join(parts) or "not compared: there is no finished run of both"
        sentences.append(f"{label(results, variant)}, against {label(results, reference)}: {said}.")
    return sentences or [f"Nothing is compared: no variant but {label(results, reference)} has a finished run."]


def _differences(results: Mapping[str, Any], variant: str) -> list[tuple[str, Mapping[str, Any]]]:
    """(Language, and task and size where there are several; difference) of every comparison of a variant."""
    found = groups(results)
    single = len({task for task, _ in found}) == 1
    return [
        (", ".join(filter(None, (language_name(tag), group_title(task, size, single=single)))), difference)
        for (task, size), cells in found.items()
        for tag, difference in results["paired"].get(cells.get(variant, ""), {}).items()
    ]


def caution(results: Mapping[str, Any]) -> str:
    """What the intervals are over, and how many would exclude zero by chance."""
    count = sum(len(by_language) for by_language in results["paired"].values())
    seeds = sorted({len(place["runs"]) for place in results["grid"].values()})
    if seeds and seeds[-1] == 1:
        drawn = (
            "One seed: the intervals are over test sentences only. Another training run could give another result, "
            "which these intervals do not show."
        )
    else:
        drawn = (
            "Intervals are 95 % and over both training seeds and test sentences (two-level bootstrap, the same draws "
            "for all cells; those of seeds are stretched, because few show less than their spread). See the single "
            "seeds."
        )
    if len(seeds) > 1:
        drawn += f" Cells have {seeds[0]} to {seeds[-1]} finished seeds; those with one have intervals over sentences."
    for place in results["grid"].values():
        most = max(place["examples"].values(), default=0)
        if place["size"] is not None and most < place["size"]:
            drawn += f" Size {place['size']:,} was trained on {most:,} examples: there are no more."
            break
    chance = f" Of {count} comparisons, up to {0.05 * count:.1f} would exclude zero by chance alone." if count else ""
    return drawn + chance


def result_tables(results: Mapping[str, Any]) -> list[Table]:
    """All tables: a main table and the other metrics per task, size and language; then costs and what led to them."""
    tables = []
    found = groups(results)
    single = len({task for task, _ in found}) == 1
    for (task, size), cells in found.items():
        for tag in languages(results, list(cells.values())):
            title = group_title(task, size, single=single)
            tables.append(_main(results, cells, task, tag, ": ".join(filter(None, (title, language_name(tag))))))
    for (task, size), cells in found.items():
        tables += _other_metrics(results, cells, group_title(task, size, single=single))
    tables += [_denoising(results)] if results["denoising"] else []
    tables += [_speed(results)] if results["speed"] else []
    tables.append(_costs(results))
    tables += [_search(results)] if results["search"] else []
    tables += [_published(results)] if results["published"] else []
    tables += [_reruns(results)] if results["grid"] else []
    tables += [_failed(results)] if results["failed"] else []
    return tables


# The main table


def _main(results: Mapping[str, Any], cells: Mapping[str, str], task: str, tag: str, title: str) -> Table:
    metric, reference = headline(results), results["experiment"]["reference"]
    name = METRIC_LABELS.get(metric, metric)
    header = ["system", name, f"minus {label(results, reference)}", "p", "single seeds", "gain from the true source"]
    header += ["permuted chrF++", "distinct outputs", "uses its source", "sentences", "seeds", "tokens", "core time"]
    paper = _paper_column(results, task, tag)
    header += [paper[0]] if paper else []
    rows = []
    for variant, cell in cells.items():
        row = _cell_row(results, cell, tag, is_reference=variant == reference)
        rows.append([label(results, variant), *row, *([paper[1].get(variant, NOTHING)] if paper else [])])
    for floor, by_language in results["floors"].get(task, {}).items():
        if (score := (by_language.get(tag) or {}).get(metric)) is not None:
            row = [f"({FLOOR_LABELS[floor]})", with_interval(score)]
            rows.append(row + [NOTHING] * (len(header) - len(row)))
    signatures = sorted(
        {
            results["cells"][cell][tag][metric]["signature"]
            for cell in cells.values()
            if metric in results["cells"].get(cell, {}).get(tag, {})
        }
    )
    note = f"Signature: {'; '.join(signatures)}" if signatures else ""
    pairs = [results["paired"].get(cell, {}).get(tag) for cell in cells.values()]
    if left_out := max((pair["left_out"] for pair in pairs if pair is not None), default=0):
        note += f". Differences leave out up to {left_out:,} sentences that not all compared runs wrote"
    if paper and (told := results["published"].get("note")):
        note += f". Of the paper's column: {told}"
    return {"title": title, "note": note.removeprefix(". "), "header": header, "rows": rows}


def _cell_row(results: Mapping[str, Any], cell: str, tag: str, *, is_reference: bool) -> list[str]:
    score = results["cells"].get(cell, {}).get(tag, {}).get(headline(results))
    difference = results["paired"].get(cell, {}).get(tag)
    control = results["controls"].get(cell, {}).get(tag)
    cost = results["costs"].get(cell, {})
    row = [with_interval(score), "reference" if is_reference else signed(difference)]
    row += [NOTHING if difference is None else f"{difference['p_value']:.3f}"]
    row += [NOTHING if score is None else ", ".join(f"{value:.1f}" for value in score["seeds"].values())]
    if control is None:
        row += [NOTHING] * 4
    else:
        row += [f"{control['gain']:.2f}", f"{control['permuted_chrf']:.1f}"]
        row += [f"{control['distinct_outputs']:,.0f} of {control['outputs']:,}", _reading(control)]
    row += [NOTHING, NOTHING] if score is None else [f"{score['n']:,}", str(len(score["seeds"]))]
    return [*row, _count(cost.get("tokens")), _time(cost.get("core_seconds"))]


def _reading(control: Mapping[str, Any]) -> str:
    shown, of_seeds = control["reading_seeds"], control["of_seeds"]
    if shown is None:
        return "not measured"
    if shown in (0, of_seeds):
        return "yes" if shown else "not shown"
    return f"{shown} of {of_seeds} seeds"


def _paper_column(results: Mapping[str, Any], task: str, tag: str) -> tuple[str, dict[str, str]] | None:
    """Header and figure of each variant, if the paper has one of this task, or of this task and language."""
    published = results["published"]
    values = {} if published is None else published["values"]
    found = {
        variant: f"{figures[key]:.1f}"
        for variant, figures in values.items()
        for key in (task, f"{task} {tag}")
        if key in figures
    }
    return (f"paper ({published['metric']})", found) if published is not None and found else None


# The other tables


def _other_metrics(results: Mapping[str, Any], cells: Mapping[str, str], title: str) -> list[Table]:
    metrics = [name for name in results["higher_is_better"] if name != headline(results)]
    rows = [
        [language_name(tag), label(results, variant)]
        + [with_interval(results["cells"].get(cell, {}).get(tag, {}).get(metric)) for metric in metrics]
        for tag in languages(results, list(cells.values()))
        for variant, cell in cells.items()
    ]
    if not metrics or not rows:
        return []
    lower = [METRIC_LABELS.get(name, name) for name in metrics if not results["higher_is_better"][name]]
    note = f"Lower is better: {', '.join(lower)}." if lower else ""
    header = ["language", "system", *(METRIC_LABELS.get(name, name) for name in metrics)]
    named = ", ".join(filter(None, ("Other metrics", title)))
    return [{"title": named, "note": note, "header": header, "rows": rows}]


def _denoising(results: Mapping[str, Any]) -> Table:
    reference = label(results, results["experiment"]["reference"])
    rows = []
    for cell, by_language in results["denoising"].items():
        for tag, measures in by_language.items():
            shown = [_nats(measures["nats_per_character"]), _nats(measures.get("paired"), sign="+")]
            shown += [_nats(measures["nats_per_token"]), with_interval(measures["perplexity"])]
            texts = measures["nats_per_token"]
            rows.append([cell, language_name(tag), *shown, f"{texts['n']:,}", str(len(texts["seeds"]))])
    note = (
        "How surprising held-out text is after its noised form was read; lower is better. Perplexities compare systems "
        "of one vocabulary, nats per character any two. Systems are not ranked on it."
    )
    header = ["cell", "language", "nats per character", f"minus {reference}", "nats per token", "perplexity"]
    return {"title": "Held-out denoising", "note": note, "header": [*header, "texts", "seeds"], "rows": rows}


def _nats(score: Mapping[str, Any] | None, sign: str = "") -> str:
    if score is None:
        return NOTHING
    value, low, high = (f"{score[end]:{sign}.3f}" for end in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _speed(results: Mapping[str, Any]) -> Table:
    reference = label(results, results["experiment"]["reference"])
    rows = []
    for panel, by_variant in results["speed"].items():
        for variant, by_language in by_variant.items():
            for tag, entry in by_language.items():
                seeds = ", ".join("never" if share is None else f"{share:.2f}" for share in entry["seeds"].values())
                mean = "not by all seeds" if entry["share"] is None else f"{entry['share']:.2f}"
                language = "mean over languages" if tag == MEAN else language_name(tag)
                rows.append([panel, label(results, variant), language, mean, seeds])
    note = (
        f"Tokens of this stage after which the validation loss was as low as the best of {reference} (same seed), as a "
        f"share of the tokens that {reference} took: below 1 is quicker. Nothing is ranked on it."
    )
    header = ["stage", "system", "language", "share of tokens", "single seeds"]
    return {"title": f"Tokens to the validation loss of {reference}", "note": note, "header": header, "rows": rows}


def _costs(results: Mapping[str, Any]) -> Table:
    rows = [
        [
            cell,
            _count(cost["tokens"]), _count(cost["steps"]), _time(cost["core_seconds"]), _count(cost["parameters"]),
        ]
        for cell, cost in results["costs"].items()
    ]  # fmt: skip
    total = results["core_seconds"]
    note = "Mean of one seed, with the pretraining that it started from. Tokens: source and target tokens seen. "
    note += "Core time: CPU seconds of all threads."
    if total:
        note += f" All runs together, search included: {_time(total)}."
    header = ["cell", "tokens", "updates", "core time", "parameters"]
    return {"title": "Costs", "note": note, "header": header, "rows": rows}


def _search(results: Mapping[str, Any]) -> Table:
    rows = []
    for variant, found in results["search"].items():
        chosen = found.get("chosen", {})
        for settings, scores in found.items():
            for values, score in scores.items() if settings != "chosen" else ():
                mark = ""
                if values == _joined(settings, chosen):
                    edges = _at_edges(settings, values, list(scores))
                    mark = f"chosen, at an edge of {edges}" if edges else "chosen"
                rows.append([label(results, variant), settings, values, points(score), mark])
    name = METRIC_LABELS.get(headline(results), headline(results))
    note = "On the development set and the first seed; the best value is used. At an edge: nothing beyond was tried. "
    note += _who_searched(results)
    header = ["system", "setting", "value", f"{name} (development set)", ""]
    return {"title": "Search", "note": note, "header": header, "rows": rows, "texts": True}


def _who_searched(results: Mapping[str, Any]) -> str:
    """Whether the variants were searched alike."""
    tried = {
        variant: {settings: list(scores) for settings, scores in found.items() if settings != "chosen"}
        for variant, found in results["search"].items()
    }
    every = dict.fromkeys([*tried, *(place["variant"] for place in results["grid"].values())])
    without = [label(results, variant) for variant in every if variant not in tried]
    if not without and all(one == next(iter(tried.values())) for one in tried.values()):
        return "Every variant gets the same search."
    return "The variants' searches are not the same" + (f"; without one: {', '.join(without)}." if without else ".")


def _at_edges(settings: str, chosen: str, tried: Sequence[str]) -> str:
    """The chosen numbers that are the smallest or largest tried, where a better one may lie beyond."""
    width = len(settings.split(", "))
    rows = [_separate(values) if width > 1 else [values] for values in (chosen, *tried)]
    if any(len(row) != width for row in rows):  # values that have commas of their own cannot be told apart
        return ""
    found = []
    for value, *column in zip(*rows, strict=True):
        try:
            numbers = sorted({float(one) for one in column})
        except ValueError:  # not numbers
            continue
        if len(numbers) > 1 and float(value) in (numbers[0], numbers[-1]):
            found.append(value)
    return ", ".join(found)


def _separate(values: str) -> list[str]:
    """The values of several settings, which the search joins by commas; those within brackets belong to one value."""
    return re.split(r", (?![^\[\]{}]*[\]}])", values)


def _joined(settings: str, chosen: Mapping[str, Any]) -> str:
    """Chosen values as the search writes those of several settings: joined by commas."""
    values = [chosen.get(name) for name in settings.split(", ")]
    return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


def _published(results: Mapping[str, Any]) -> Table:
    published = results["published"]
    systems = published["values"] | published.get("others", {})
    tasks = list(dict.fromkeys(task for figures in systems.values() for task in figures))
    rows = [
        [label(results, variant), *(f"{figures[task]:.1f}" if task in figures else NOTHING for task in tasks)]
        for variant, figures in systems.items()
    ]
    source = results["experiment"].get("source")
    note = (
        f"{published['metric']}, as published{f' ({source})' if source else ''}: other data, other scale, no intervals."
    )
    note = " ".join(filter(None, (note, published.get("note", ""))))
    return {"title": "The paper's figures", "note": note, "header": ["system", *tasks], "rows": rows}


def _reruns(results: Mapping[str, Any]) -> Table:
    rows: list[list[str]] = []
    starts: dict[str, list[str]] = {}
    for cell, place in results["grid"].items():
        for seed, folder in place["runs"].items():
            rows.append([cell, seed, _again("run", folder)])
            if (start := place.get("starts", {}).get(seed)) is not None:
                what = f"{place['variant']}: {'pretraining' if start['verb'] == 'pretrain' else 'untrained model'}"
                starts.setdefault(start["folder"], [what, seed, _again(start["verb"], start["folder"])])
    note = (
        "From the folder in which the experiment was started; each does one run again in a new folder (in its own, "
        "everything is done and kept)."
    )
    if starts:
        note += (
            " A task starts from the model that its recipe names in `start`; "
            "`--set systems.SYSTEM.start=MODEL_FOLDER` takes another."
        )
    rows += starts.values()
    return {"title": "Rerun a cell", "note": note, "header": ["cell", "seed", "command"], "rows": rows, "texts": True}


def _again(verb: str, folder: str) -> str:
    """The command that does a run again, elsewhere."""
    target = f"runs/again/{folder.rpartition('/')[2]}"
    return f"enc2gen {verb} {shlex.quote(f'{folder}/recipe.yaml')} --output {shlex.quote(target)}"


def _failed(results: Mapping[str, Any]) -> Table:
    rows = [
        [str(entry["run"]), str(entry.get("cell", NOTHING)), str(entry.get("reason", ""))]
        for entry in results["failed"]
    ]
    note = "Not in any table above. The same command goes on with them."
    return {
        "title": "Runs without a result",
        "note": note,
        "header": ["run", "cell", "reason"],
        "rows": rows,
        "texts": True,
    }


# Numbers


def _count(value: float | None) -> str:
    return NOTHING if value is None else f"{value:,.0f}"


def _time(seconds: float | None) -> str:
    return NOTHING if seconds is None else duration(seconds)


def _code(codes: Mapping[str, Any]) -> str:
    """Which code carried the runs out, where that is known."""
    runs = codes.get("runs", {})
    if set(runs) <= {"unknown"}:
        return ""
    return f"(code {', '.join(f'{name}: {count} runs' for name, count in runs.items())})"


def facts(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the experiment was carried out with, as (name, value)."""
    machine = results["machine"]
    seeds: Sequence[Any] = results["seeds"]
    found = [
        ("scale", str(results["scale"])),
        ("seeds", ", ".join(map(str, seeds))),
        ("compared with", label(results, results["experiment"]["reference"])),
        ("metric of the comparison", METRIC_LABELS.get(headline(results), headline(results))),
        ("machine", f"{machine['processor']}, cores: {machine['cores']}, {machine['gpu'] or 'no GPU'}"),
        ("enc2gen", " ".join([str(results["enc2gen"]), _code(results.get("code", {}))]).strip()),
        ("libraries", ", ".join(f"{name} {version}" for name, version in results.get("versions", {}).items())),
        ("command", str(results["command"])),
    ]
    return [(name, value) for name, value in found if value]
