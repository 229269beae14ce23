"""Held-out denoising: how surprising clean text is to a system that has read it noised."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from enc2gen.data.batching import Batch, evaluation_batches
from enc2gen.data.held_out import drawn
from enc2gen.errors import DataError
from enc2gen.evaluation.significance import Statistics, bootstrap_interval
from enc2gen.experiments.objectives import DenoisingEncoder
from enc2gen.experiments.prepare import PreparedData
from enc2gen.experiments.recipe import Recipe
from enc2gen.experiments.workspace import Workspace
from enc2gen.tokenization.examples import IGNORED_LABEL, EncodedExample
from enc2gen.tokenization.tokenizer import TextCodec

Row = Mapping[str, Any]


def held_out_texts(recipe: Recipe, workspace: Workspace) -> dict[str, list[Row]]:
    """Rows with `text` and `language` that no stage of the run trains on, at most `evaluate.limit` a language.

    Plain texts that `test_percent` holds out and, with `denoise_targets`, the targets of the split that is evaluated;
    but none that also occurs among the training texts or targets, as short texts do.
    """
    data = PreparedData(workspace.data)
    found: dict[str, dict[str, Row]] = {}
    for row in data.held_out_texts():
        found.setdefault(row["language"], {})[row["text"]] = row
    if recipe.data.denoise_targets:
        for row in data.examples(recipe.evaluate.split):
            text, language = row["target"], row["target_language"]
            found.setdefault(language, {})[text] = {"text": text, "language": language}
    for table, text, language in ((data.texts(), "text", "language"), (data.trained(), "target", "target_language")):
        for row in table.select_columns([text, language]):
            found.get(row[language], {}).pop(row[text], None)
    found = {language: rows for language, rows in found.items() if rows}
    return {
        language: drawn(list(rows.values()), recipe.evaluate.limit, itemgetter("text"))
        for language, rows in sorted(found.items())
    }


def noised_example(encoder: DenoisingEncoder, row: Row) -> EncodedExample:
    """The denoising example of a held-out text; its noise depends on the text alone, whatever the run's seed."""
    seed = int.from_bytes(hashlib.sha256(row["text"].encode("utf-8", "surrogatepass")).digest()[:8], "big")
    return encoder(row, np.random.default_rng(seed))


def measure_denoising(
    recipe: Recipe, workspace: Workspace, name: str, model: PreTrainedModel, codec: TextCodec
) -> dict[str, dict[str, Any]]:
    """By language: `nats_per_token`, `perplexity` (its exponential) and `nats_per_character`, with intervals.

    Intervals are over texts. Perplexities compare systems of one vocabulary, nats per character any two. Writes nats,
    tokens and characters of each text to `systems/NAME/denoising.jsonl`.

    Raises:
        DataError: no text is held out.
    """
    encoder = DenoisingEncoder(codec, recipe.evaluate.noise)
    results: dict[str, dict[str, Any]] = {}
    lines: list[dict[str, Any]] = []
    for language, rows in held_out_texts(recipe, workspace).items():
        examples = [noised_example(encoder, row) for row in rows]
        nats = text_losses(model, evaluation_batches(examples, codec.pad_id, 4096))
        tokens = np.array([example.target_length for example in examples])
        characters = np.array([max(1, len(codec.decode(example.labels))) for example in examples])
        results[language] = _measures(recipe, nats, tokens, characters, len(codec.tokenizer))
        lines += [
            {"language": language, "text": row["text"], "nats": loss, "tokens": length, "characters": letters}
            for row, loss, length, letters in zip(
                rows, nats.tolist(), tokens.tolist(), characters.tolist(), strict=True
            )
        ]
    if not results:
        raise DataError(
            "no text is held out for evaluate.denoising", where="data.monolingual", remedy="raise test_percent"
        )
    (workspace.system(name) / "denoising.jsonl").write_text(
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8"
    )
    return results


def _measures(
    recipe: Recipe, nats: np.ndarray, tokens: np.ndarray, characters: np.ndarray, vocabulary: int
) -> dict[str, Any]:
    settings = "|".join(f"{name}:{value}" for name, value in recipe.evaluate.noise.model_dump().items())
    per_token, per_character = (
        _ratio(
            nats, units, recipe.evaluate.resamples, recipe.seed, f"nats|per:{unit}|{settings}|vocabulary:{vocabulary}"
        )
        for units, unit in ((tokens, "token"), (characters, "character"))
    )
    powers = {end: math.exp(min(per_token[end], 700.0)) for end in ("value", "low", "high")}  # the largest float: e^709
    return {
        "nats_per_token": per_token,
        "perplexity": {**per_token, **powers},
        "nats_per_character": per_character,
    }


@torch.inference_mode()
def text_losses(model: PreTrainedModel, batches: Sequence[Batch]) -> np.ndarray:
    """Nats of each text's target, end token included, in the order of the examples. *Shape:* `[texts]`."""
    losses = np.zeros(sum(len(batch.order) for batch in batches))
    for batch in batches:
        inputs = batch.to(model.device).as_model_inputs()
        labels = inputs.pop("labels")
        logits = model(**inputs, use_cache=False).logits
        for place, row, wanted in zip(batch.order, logits, labels, strict=True):  # one at a time: float32 takes room
            losses[place] = F.cross_entropy(row.float(), wanted, ignore_index=IGNORED_LABEL, reduction="sum").item()
    return losses


def _ratio(nats: np.ndarray, units: np.ndarray, resamples: int, seed: int, signature: str) -> dict[str, Any]:
    """All nats over all units, with its bootstrap interval over texts."""
    statistics = Statistics(
        np.stack([nats, units.astype(np.float64)], axis=1), lambda sums: sums[:, 0] / sums[:, 1], signature
    )
    low, high = bootstrap_interval(statistics, resamples=resamples, seed=seed)
    return {"value": statistics.value(), "low": low, "high": high, "n": len(nats), "signature": signature}
