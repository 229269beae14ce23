"""Stage `evaluate` of a bridge recipe: what each trained bridge and each control gets right, item by item."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, cast

import numpy as np
import torch

from enc2gen.data.classification import LabelledText
from enc2gen.evaluation.alignment import read_sentences
from enc2gen.evaluation.classification import classify, correctness
from enc2gen.evaluation.llm_alone import LlmAlone
from enc2gen.evaluation.metrics import METRICS
from enc2gen.evaluation.probe import Labelled, linear_probe, majority_class
from enc2gen.experiments.bridge.llm_writing import write_alone
from enc2gen.experiments.bridge.prepare import PreparedBridgeData, TextPair, language_written
from enc2gen.experiments.bridge.recipe import BridgeRecipe, Control
from enc2gen.experiments.bridge.systems import DEV_EXAMPLES, Parts, Step, device, load_bridge
from enc2gen.experiments.workspace import Workspace
from enc2gen.generation.bridge_generator import BridgeGenerator
from enc2gen.generation.decoding import DecodingConfig
from enc2gen.training.checkpoint import writing

Log = Callable[[str], None]


def test_texts(recipe: BridgeRecipe, data: PreparedBridgeData) -> dict[str, list[LabelledText]]:
    """The task's test texts by language, cut to `evaluate.limit`, in an order given by their ids alone.

    Translations of one text have one id, so that item i is the same in all languages wherever the data are parallel.
    """
    found: dict[str, list[LabelledText]] = {}
    for text in data.texts("test") if recipe.task is not None else ():
        found.setdefault(text.language, []).append(text)
    return {
        language: sorted(texts, key=lambda text: hashlib.sha256(text.id.encode()).digest())[: recipe.evaluate.limit]
        for language, texts in found.items()
    }


def is_parallel(tests: Mapping[str, Sequence[LabelledText]]) -> bool:
    """Whether item i has one id in all languages."""
    return len({tuple(text.id for text in texts) for texts in tests.values()}) == 1


def evaluate_bridge(recipe: BridgeRecipe, workspace: Workspace, parts: Parts, step: Step, log: Log) -> None:
    """Write `scores.json`, `predictions.jsonl` and `outputs.jsonl` into the folder of `step`."""
    model = cast(Any, load_bridge(recipe, workspace, parts, step)).to(device())
    codec = parts.codec(model, recipe.prompt(step.bridge)[0])
    data, folder = PreparedBridgeData(workspace), step.folder(workspace)
    tests, labels = test_texts(recipe, data), data.summary["labels"]
    texts = [text for rows in tests.values() for text in rows]
    scores: dict[str, Any] = {"classification": {}, "pairs": {}}
    predictions: dict[str, Sequence[str]] = {}
    cache = parts.cache(model, step.bridge)
    if cache is not None and cache.argument != "fused_states":
        cache = None  # all layers of all test texts are too much to keep
    for method in recipe.evaluate.methods if texts else ():
        found = classify(
            model,
            codec,
            [text.text for text in texts],
            labels,
            method=method,
            batch_size=recipe.evaluate.batch_size,
            cache=cache,
        )
        predictions[method] = found.predictions
        scores["classification"][method] = _by_language(tests, found.predictions)
        english = 100 * float(np.mean([np.mean(scores["classification"][method][tag]) for tag in _trained(recipe)]))
        log(f"{step.bridge}, seed {step.seed}: {method}, {', '.join(_trained(recipe))} {english:.1f}")
    _write_lines(
        workspace,
        step,
        "predictions.jsonl",
        [asdict(text) | {method: rows[i] for method, rows in predictions.items()} for i, text in enumerate(texts)],
    )
    outputs = []
    for group, pairs in data.tests(recipe).items():
        sources = [pair.source for pair in pairs]
        written = BridgeGenerator(model, codec).generate(sources, config=_decoding(recipe), seed=step.seed)
        scores["pairs"][group] = _pair_scores(recipe, written, pairs)
        outputs += [asdict(pair) | {"output": text} for pair, text in zip(pairs, written, strict=True)]
    _write_lines(workspace, step, "outputs.jsonl", outputs)
    workspace.write_json(folder / "scores.json", scores)


def _decoding(recipe: BridgeRecipe) -> DecodingConfig:
    """How bridges write, and the LLM alone: as the recipe says, at most `max_target_length` tokens by default."""
    decoding = recipe.evaluate.decoding
    return decoding.model_copy(update={"max_new_tokens": decoding.max_new_tokens or recipe.max_target_length})


def _trained(recipe: BridgeRecipe) -> list[str]:
    return recipe.task.train_languages if recipe.task else []


def _by_language(tests: Mapping[str, Sequence[LabelledText]], predictions: Sequence[str]) -> dict[str, list[int]]:
    """Language -> 1 for each right prediction, 0 for each wrong one."""
    found, start = {}, 0
    for language, texts in tests.items():
        own = predictions[start : start + len(texts)]
        found[language] = [int(right) for right in correctness(own, [text.label for text in texts])]
        start += len(texts)
    return found


def _pair_scores(recipe: BridgeRecipe, written: Sequence[str], pairs: Sequence[TextPair]) -> dict[str, Any]:
    """Metric -> value and interval; None where a metric cannot be measured."""
    references = [list(pair.references or (pair.target,)) for pair in pairs]
    found: dict[str, Any] = {}
    for name in recipe.evaluate.metrics:
        score = METRICS.get(name).score(
            written,
            references,
            language=language_written(pairs[0].group),
            resamples=recipe.evaluate.resamples,
            seed=recipe.seeds[0],
        )
        found[name] = None if score is None else {k: v for k, v in asdict(score).items() if k != "name"}
    return found


def _write_lines(workspace: Workspace, step: Step, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    path = step.folder(workspace) / name
    with writing(path):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_text("".join(lines), encoding="utf-8", errors="replace")


def evaluate_control(recipe: BridgeRecipe, workspace: Workspace, parts: Parts, control: Control, log: Log) -> None:
    """Write `controls/NAME.json`: what a control gets right, in the form of a bridge's scores."""
    data = PreparedBridgeData(workspace)
    tests = test_texts(recipe, data)
    scores: dict[str, Any] = {"classification": {}, "pairs": {}, "settings": {}}
    if control == "llm_alone":
        scores = _llm_alone(recipe, parts, tests, data)
    elif tests and control == "majority":
        label = majority_class([text.label for text in data.texts("train")])
        scores["classification"] = _by_language(tests, [label] * sum(map(len, tests.values())))
        scores["settings"] = {"label": label}
    elif tests:
        scores |= _probe(recipe, parts, tests, data)
    workspace.write_json(workspace.root / "controls" / f"{control}.json", scores)
    log(f"{control}: done")


@torch.inference_mode()
def _probe(
    recipe: BridgeRecipe, parts: Parts, tests: Mapping[str, Sequence[LabelledText]], data: PreparedBridgeData
) -> dict[str, Any]:
    """A linear probe on the encoder's mean-pooled layers; layer and penalty chosen on the development texts."""
    encoder: Any = parts.encoder
    encoder = encoder.to(device())

    def states(texts: Sequence[LabelledText]) -> Any:
        settings: dict[str, Any] = {"template": recipe.encoder.template, "max_length": recipe.encoder.max_length}
        return read_sentences(encoder, parts.encoder_tokenizer, [text.text for text in texts], **settings).states

    train, dev = data.texts("train"), data.texts("dev")
    probe, predictions = linear_probe(
        Labelled(states(train), [text.label for text in train]),
        Labelled(states(dev), [text.label for text in dev]),
        {language: states(texts) for language, texts in tests.items()},
    )
    flat = [label for language in tests for label in predictions[language]]
    settings = {"layer": probe.layer, "penalty": probe.penalty, "dev_accuracy": probe.dev_accuracy}
    return {"classification": _by_language(tests, flat), "settings": settings}


def _llm_alone(
    recipe: BridgeRecipe, parts: Parts, tests: Mapping[str, Sequence[LabelledText]], data: PreparedBridgeData
) -> dict[str, Any]:
    """The LLM reads the texts themselves, in a prompt; with or without calibration, whichever the dev set prefers."""
    llm = cast(Any, parts.llm).to(device())
    scores: dict[str, Any] = {"classification": {}, "pairs": {}, "settings": {}}
    if tests:
        alone = LlmAlone(llm, parts.llm_tokenizer, data.summary["labels"], instruction=recipe.evaluate.instruction)
        dev = data.texts("dev")[:DEV_EXAMPLES]
        right = {
            calibrate: correctness(
                alone.classify([text.text for text in dev], calibrate=calibrate).predictions,
                [text.label for text in dev],
            ).mean()
            for calibrate in (False, True)
        }
        calibrate = bool(right[True] > right[False])
        texts = [text.text for rows in tests.values() for text in rows]
        found = alone.classify(texts, calibrate=calibrate, batch_size=recipe.evaluate.batch_size)
        scores["classification"] = _by_language(tests, found.predictions)
        scores["settings"] = {"calibrated": calibrate, "dev_accuracy": 100 * float(right[calibrate])}
    for group, pairs in data.tests(recipe).items():
        written = write_alone(
            llm,
            parts.llm_tokenizer,
            [pair.source for pair in pairs],
            instruction=recipe.evaluate.translation_instruction,
            decoding=_decoding(recipe),
            seed=recipe.seeds[0],
        )
        scores["pairs"][group] = _pair_scores(recipe, written, pairs)
    return scores
