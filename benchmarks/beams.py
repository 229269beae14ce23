"""Beam search with 4 beams: enc2gen's engine against transformers' `generate`, on the same weights and sources.

`beam4` compares both in fp32 (or `--precision bf16`), where the outputs should be the same; `beam4_int8` compares int8
with transformers' fp32, and says what int8 costs in chrF++. Random weights say nothing about that cost: give the folder
of a trained model, and its run's data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.measuring import Side, alternate, compare, environment, matrix_products, peak
from benchmarks.workloads import MODELS
from benchmarks.writing import Task, load_task, write

BEAMS = 4


def run(question: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Measure `beam4` or `beam4_int8` and return the entry of the results file.

    A model with the full vocabulary and one with a trimmed one are measured (a trained one as it is); what is stored as
    the answer is the case with the smaller speed-up.
    """
    task = load_task(options, options["sentences"])
    precision = options["precision"] or ("int8" if question == "beam4_int8" else "fp32")
    cases = ["as trained"] if options["model"] not in MODELS else ["full vocabulary", "trimmed vocabulary"]
    answers = {case: _case(case, task, precision, options) for case in cases}
    worst = min(answers.values(), key=lambda answer: answer["speedup"])
    rows = {f"{side}, {case}": row for case, answer in answers.items() for side, row in answer["rows"].items()}
    return {
        **{name: worst[name] for name in ("speedup", "memory_ratio", "spread", "limit_fraction", "setting")},
        "cases": {
            case: {name: answer[name] for name in ("speedup", "memory_ratio", "spread", "limit_fraction", "remarks")}
            for case, answer in answers.items()
        },
        "remarks": worst["remarks"],
        "rows": rows,
    }


def _case(case: str, task: Task, precision: str, options: Mapping[str, Any]) -> dict[str, Any]:
    common = {
        "task": task,
        "model": options["model"],
        "growth": "swcm",
        "trimmed": case == "trimmed vocabulary",
        "seed": options["seed"],
    }
    decoding = {"num_beams": BEAMS, "max_new_tokens": options["max_new_tokens"]}
    ours = common | {"decoding": decoding | {"engine": "native", "precision": precision}}
    # transformers has no int8 of its own; in half precision it takes a converted model
    reference = common | {"decoding": decoding | {"engine": "transformers"}, "converted": precision == "bf16"}
    with (
        environment(options["threads"], options["device"]),
        Side(write, ours) as mine,
        Side(write, reference) as other,
        Side(matrix_products, {"precision": precision}) as machine,
    ):
        reports = alternate({"ours": mine, "reference": other, "machine": machine}, options["turns"])
    return answer(reports, task, precision, options)


def answer(
    reports: Mapping[str, list[dict[str, Any]]], task: Task, precision: str, options: Mapping[str, Any]
) -> dict[str, Any]:
    """What the turns of a case come to."""
    mine, other = reports["ours"], reports["reference"]
    compared = compare(mine, other, "sentences")
    rate = sorted(report["rate"] for report in reports["machine"])[len(reports["machine"]) // 2]
    rows = {}
    for side, speed, found in (("ours", compared.ours, mine[0]), ("reference", compared.reference, other[0])):
        rows[side] = {
            "sentences per second": speed,
            "tokens per second": speed * found["tokens"] / found["sentences"],
            "peak memory, GB": peak(reports[side]) / 1e9,
            f"share of the {precision} matrix-product rate": speed * found["operations"] / found["sentences"] / rate,
            "chrF++ against references": chrf(found["outputs"], task.references, task.target_language),
        }
    first = mine[0]
    return {
        "speedup": compared.speedup,
        "memory_ratio": peak(mine) / peak(other),
        "spread": compared.spread,
        "limit_fraction": compared.ours * first["operations"] / first["sentences"] / rate,
        "remarks": remarks(first["outputs"], other[0]["outputs"], task, trained=options["model"] not in MODELS),
        "rows": rows,
        "setting": f"{options['model']}, vocabulary {first['vocabulary']:,}, {first['parameters'] / 1e6:,.0f} million "
        f"parameters, {precision}, {BEAMS} beams, {len(task.sources)} sentences of {task.origin}, "
        f"at most {options['max_new_tokens']} new tokens, {len(mine)} turns; matrix products {rate / 1e9:,.0f} GFLOP/s",
    }


def remarks(ours: Sequence[str], theirs: Sequence[str], task: Task, *, trained: bool) -> dict[str, str]:
    """How alike the outputs are, and what that costs against the references (of a trained model only)."""
    same = sum(mine == other for mine, other in zip(ours, theirs, strict=True))
    found = {"equal outputs": f"{same} of {len(ours)}"}
    between = chrf(ours, [[text] for text in theirs], task.target_language)
    if between is not None:
        found["chrF++ of ours with the reference's outputs as references"] = f"{between:.1f}"
    if trained:
        scores = [chrf(outputs, task.references, task.target_language) for outputs in (theirs, ours)]
        if None not in scores:
            found["chrF++ loss"] = f"{scores[0] - scores[1]:.2f}"
    return found


def chrf(outputs: Sequence[str], references: Sequence[Sequence[str]], language: str) -> float | None:
    """chrF++ of a corpus, 0 to 100."""
    from enc2gen.evaluation.metrics import METRICS

    score = METRICS.get("chrf++").score(list(outputs), [list(r) for r in references], language=language)
    return None if score is None else score.value
