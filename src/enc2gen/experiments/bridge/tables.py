"""Tables of a bridge run: what the report, `results.md` and the terminal show, as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from enc2gen.evaluation.parallel_texts import language_label
from enc2gen.experiments.findings import METRIC_LABELS
from enc2gen.experiments.report_tables import NOTHING, Table, points, signed, with_interval

CONTROL_LABELS = {"majority": "majority class", "probe": "linear probe on the encoder", "llm_alone": "LLM alone"}


def result_tables(results: Mapping[str, Any]) -> list[Table]:
    """All tables of a run."""
    tables = []
    if results["languages"]:
        tables += [_summary(results), _groups(results), _languages(results)]
        if results["paired_by"]:
            tables[0]["note"] = f"Labels by {results['method']}. {tables[0]['note']}"
        for method in results["paired_by"]:
            view = _by_method(results, method)
            tables += [_named(table, method) for table in (_summary(view), _groups(view), _languages(view))]
        if results["alignment"] is not None:
            tables.append(_correlations(results))
    if any(entry["pairs"] for entry in results["bridges"].values()):
        tables += [_pairs(results), *(_samples(results, group) for group in results["samples"])]
    if results["search"]:
        tables.append(_search(results))
    return [*tables, _training(results)]


def _by_method(results: Mapping[str, Any], method: str) -> dict[str, Any]:
    """The same results with another way of choosing labels in front."""
    return {**results, "method": method, "paired": results["paired_by"][method]}


def _named(table: Table, method: str) -> Table:
    note = f"Labels of the bridges by {method}, those of the controls as above. {table['note']}"
    joined = " by" if table["title"] == "Accuracy" else ", by"
    return {**table, "title": f"{table['title']}{joined} {method}", "note": note}


def systems(results: Mapping[str, Any]) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Bridges, then controls: name -> (label, its accuracies by the first method); those without any are left out."""
    found = {name: (name, entry["accuracy"].get(results["method"])) for name, entry in results["bridges"].items()}
    found |= {name: (CONTROL_LABELS.get(name, name), entry["accuracy"]) for name, entry in results["controls"].items()}
    return {name: (label, accuracy) for name, (label, accuracy) in found.items() if accuracy}


def best_bridge(results: Mapping[str, Any]) -> str | None:
    """The bridge, other than the reference, of the highest mean over the languages that were not trained on."""
    means = {
        name: accuracy["groups"]["transfer"]["value"]
        for name, (_, accuracy) in systems(results).items()
        if name in results["bridges"] and name != results["reference"] and "transfer" in accuracy["groups"]
    }
    return max(means, key=lambda name: means[name]) if means else None


def home(results: Mapping[str, Any]) -> str:
    """The languages of training, in words."""
    return ", ".join(language_label(language) for language in results["train_languages"])


def _share(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.0f} %"


def _ratio(score: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> float | None:
    """One accuracy as a share of another, in percent."""
    if score is None or other is None or not other["value"]:
        return None
    return float(100 * score["value"] / other["value"])


def _paired(results: Mapping[str, Any], bridge: str, other: str, group: str) -> Mapping[str, Any] | None:
    found: Mapping[str, Any] | None = results["paired"].get(bridge, {}).get(other, {}).get("groups", {}).get(group)
    return found


def _summary(results: Mapping[str, Any]) -> Table:
    found = systems(results)
    reference = results["reference"] if results["reference"] in found else None
    header = ["system", f"{home(results)} (trained)", "other languages", "transferred", "without Latin letters"]
    header += [f"against {reference}"] if reference else []
    header += ["share of the probe"] if "probe" in found else []
    header += ["against the LLM, without Latin letters"] if "llm_alone" in found else []
    ceiling = found["probe"][1]["groups"].get("transfer") if "probe" in found else None
    rows = []
    for name, (label, accuracy) in found.items():
        groups = accuracy["groups"]
        mean = groups.get("transfer")
        row = [label, with_interval(accuracy["trained"]), with_interval(mean)]
        row += [_share(accuracy["transferred_share"]), with_interval(groups.get("non-Latin"))]
        if reference:
            row.append(signed(_paired(results, name, reference, "transfer")))
        if "probe" in found:
            row.append(_share(None if name == "probe" else _ratio(mean, ceiling)))
        if "llm_alone" in found:
            row.append(signed(_paired(results, name, "llm_alone", "non-Latin")))
        rows.append(row)
    return {"title": "Accuracy", "note": _summary_note(found, reference), "header": header, "rows": rows}


def _summary_note(found: Mapping[str, Any], reference: str | None) -> str:
    note = (
        "Accuracy in percent with 95 % intervals (items and seeds resampled). Other languages: mean over all that were "
        "not trained on. Transferred: that mean as a share of the accuracy in the trained language. "
    )
    if reference:
        note += f"Against {reference}: paired difference over the other languages, in points. "
    if "probe" in found:
        note += (
            "Share of the probe: accuracy over the other languages as a share of that of a linear classifier on the "
            "encoder. "
        )
    if "llm_alone" in found:
        note += (
            "Against the LLM: paired difference to the LLM that reads the texts itself, over the languages without "
            "Latin letters, in points. "
        )
    return note.strip()


def _groups(results: Mapping[str, Any]) -> Table:
    found = systems(results)
    names = sorted(
        {group for _, accuracy in found.values() for group in accuracy["groups"]} - {"transfer", "non-Latin"}
    )
    others = [language for language in results["languages"] if language not in results["train_languages"]]
    counts = {name: sum(results["scripts"][tag] == name for tag in others) for name in names}
    rows = [
        [label, *(with_interval(accuracy["groups"].get(name)) for name in names)] for label, accuracy in found.values()
    ]
    header = ["system", *(f"{name} ({counts[name]})" for name in names)]
    note = "Mean over the languages of each script (how many), without those trained on, with 95 % intervals."
    return {"title": "By script", "note": note, "header": header, "rows": rows, "long": True}


def _languages(results: Mapping[str, Any]) -> Table:
    found = systems(results)
    best, reference = best_bridge(results), results["reference"]
    paired = results["paired"].get(best, {}).get(reference, {}).get("languages", {})
    rows = []
    for language in results["languages"]:
        values = [accuracy["languages"].get(language) for _, accuracy in found.values()]
        row = [f"{language_label(language)} ({language})", *(points((v or {}).get("value")) for v in values)]
        rows.append([*row, signed(paired.get(language))] if paired else row)
    first = next(iter(found.values()))[1]["languages"]
    sizes = sorted({entry["n"] for entry in first.values()})
    items = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    header = ["language", *(label for label, _ in found.values())]
    note = f"{items} test texts a language."
    if paired:
        header.append(f"{best} against {reference}")
        note += (
            f" Last column: paired difference in points with its 95 % interval; of the other bridges, {best} has the "
            "highest mean over the languages that were not trained on."
        )
    return {"title": "By language", "note": note, "header": header, "rows": rows, "long": True}


def _correlations(results: Mapping[str, Any]) -> Table:
    alignment = results["alignment"]
    kinds = {"correlation": "mean over layers", "correlation_best": "best layer"}
    rows = []
    for name in alignment["correlation"]:
        for key, kind in kinds.items():
            found = alignment[key][name]
            cells = [
                f"{found[which]:.2f} [{found[f'{which}_low']:.2f}, {found[f'{which}_high']:.2f}]" if found else NOTHING
                for which in ("pearson", "spearman")
            ]
            rows.append([CONTROL_LABELS.get(name, name), kind, *cells])
    note = (
        f"Does alignment with {home(results)}, known before training, foretell accuracy? Correlation over languages, "
        "with 95 % intervals. Alignment: MEXA, the mean over layers that enc2gen align ranks by, or that of each "
        "language's best layer, which is near 100 for many."
    )
    header = ["system", "alignment", "Pearson", "Spearman"]
    return {"title": "Alignment and accuracy", "note": note, "header": header, "rows": rows}


def _pairs(results: Mapping[str, Any]) -> Table:
    measured = {name: entry["pairs"] for name, entry in results["bridges"].items()}
    measured |= {CONTROL_LABELS.get(n, n): entry["pairs"] for n, entry in results["controls"].items() if entry["pairs"]}
    groups = {group: list(metrics) for pairs in measured.values() for group, metrics in pairs.items()}
    columns = [(group, metric) for group, metrics in groups.items() for metric in metrics]
    rows = [
        [name, *(with_interval(pairs.get(group, {}).get(metric)) for group, metric in columns)]
        for name, pairs in measured.items()
    ]
    header = ["system", *(f"{group} {METRIC_LABELS.get(metric, metric)}" for group, metric in columns)]
    note = "With 95 % intervals (texts resampled); of several seeds the means, of the intervals' ends too."
    return {"title": "Writing", "note": note, "header": header, "rows": rows}


def _samples(results: Mapping[str, Any], group: str) -> Table:
    bridges, rows = list(results["bridges"]), []
    for sample in results["samples"][group]:
        written = [sample["outputs"].get(name, NOTHING) for name in bridges]
        rows.append([sample["source"], " / ".join(sample["references"]), *written])
    note = "Test texts drawn at random, not picked, and what each bridge writes for them with its first seed."
    return {
        "title": f"Sample outputs, {group}",
        "note": note,
        "header": ["source", "reference", *bridges],
        "rows": rows,
        "texts": True,
    }


def _search(results: Mapping[str, Any]) -> Table:
    rates = sorted({rate for losses in results["search"].values() for rate in losses}, key=float)
    rows, edges = [], []
    for name, losses in results["search"].items():
        finite = {rate: loss for rate, loss in losses.items() if loss is not None}
        best = min(finite, key=lambda rate: (finite[rate], float(rate)))
        at_edge = len(losses) > 1 and best in (min(losses, key=float), max(losses, key=float))
        edges += [name] if at_edge else []
        mark = " * edge" if at_edge else " *"
        shown = dict.fromkeys(losses, "diverged")
        shown |= {rate: f"{loss:.3f}" + (mark if rate == best else "") for rate, loss in finite.items()}
        rows.append([name, *(shown.get(rate, NOTHING) for rate in rates)])
    note = "Development loss in the trained language, first seed; * is chosen."
    if edges:
        note += f" Edge: nothing beyond it was tried, and a better rate may lie there ({', '.join(edges)})."
    return {"title": "Learning rates", "note": note, "header": ["bridge", *rates], "rows": rows}


def _training(results: Mapping[str, Any]) -> Table:
    rows, unfinished = [], []
    for name, entry in results["bridges"].items():
        runs = [stage for stages in entry["training"].values() for stage in stages.values()]
        seconds = sum(run["seconds"] for run in runs) / len(entry["seeds"])
        at_end = sum(run["best_step"] == run["steps"] for run in runs)
        unfinished += [name] if at_end else []
        row = [name, f"{entry['parameters']:,}", f"{entry['learning_rate']:g}", str(len(entry["seeds"]))]
        rows.append([*row, f"{seconds:,.0f}", "; ".join(_best_steps(entry)), f"{at_end} of {len(runs)}"])
    header = ["bridge", "parameters that learn", "learning rate", "seeds", "seconds a seed"]
    note = (
        "Best step: the one of least development loss, whose weights are kept, of the steps trained; from the earliest "
        "to the latest seed."
    )
    if unfinished:
        note += (
            " Where the last step is the best, the training may not have converged, and more steps may help "
            f"({', '.join(unfinished)})."
        )
    header += ["best step", "last step best"]
    return {"title": "Training", "note": note, "header": header, "rows": rows}


def _best_steps(entry: Mapping[str, Any]) -> Iterator[str]:
    """For each stage "200-300 of 400", over seeds; with the stage's name where there are several."""
    stages = list(next(iter(entry["training"].values())))
    for stage in stages:
        runs = [trained[stage] for trained in entry["training"].values()]
        best = sorted({run["best_step"] for run in runs if run["best_step"] is not None})
        shown = "\N{EN DASH}".join(f"{step:,}" for step in sorted({*best[:1], *best[-1:]})) or NOTHING
        yield (f"{stage} " if len(stages) > 1 else "") + f"{shown} of {max(run['steps'] for run in runs):,}"
