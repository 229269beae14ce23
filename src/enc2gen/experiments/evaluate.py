"""Stage `evaluate`: hypotheses, scores with intervals, source use, and model-free floors."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from enc2gen.data.batching import Batch, evaluation_batches
from enc2gen.data.held_out import drawn
from enc2gen.errors import DataError
from enc2gen.evaluation.metrics import METRICS
from enc2gen.evaluation.significance import Score
from enc2gen.evaluation.source_use import (
    SourceUse,
    best_constant,
    copy_source,
    measure_source_use,
    shuffled_source_batches,
    with_another_source,
)
from enc2gen.experiments.denoising import measure_denoising
from enc2gen.experiments.encoding import encode_pair
from enc2gen.experiments.prepare import PreparedData
from enc2gen.experiments.recipe import FLOORS, Recipe
from enc2gen.experiments.systems import codec_for, final_folder, load_system
from enc2gen.experiments.workspace import Workspace
from enc2gen.generation.engine.engine import unsupported
from enc2gen.generation.generator import Generator
from enc2gen.models.token_loss import cross_entropy
from enc2gen.tokenization.tokenizer import TextCodec


@dataclass(frozen=True)
class TestSet:
    """Test (or development) examples of one target language.

    Attributes:
        rows: prepared examples.
        references: accepted outputs of each.
    """

    language: str
    rows: list[Mapping[str, Any]]

    @property
    def sources(self) -> list[str]:
        """Texts to read."""
        return [row["source"] for row in self.rows]

    @property
    def references(self) -> list[list[str]]:
        """Accepted outputs of each source."""
        return [list(row["references"] or [row["target"]]) for row in self.rows]


def evaluation_sets(recipe: Recipe, workspace: Workspace) -> list[TestSet]:
    """Sets that outputs are scored on (`evaluate.split`) of the recipe's languages, `evaluate.limit` drawn from each.

    Raises:
        DataError: none of the languages has any.
    """
    split = recipe.evaluate.split
    sets = _sets(recipe, workspace, split, recipe.evaluate.limit)
    if not sets:
        raise DataError(
            f"there are no {split} examples in {', '.join(recipe.languages)}",
            where="data.datasets",
            remedy="give a stage to one of the data sets: those with `stages: []` are read for the vocabulary only",
        )
    return sets


def _sets(recipe: Recipe, workspace: Workspace, split: str, limit: int | None) -> list[TestSet]:
    rows: dict[str, list[Mapping[str, Any]]] = {tag: [] for tag in recipe.languages}
    for row in PreparedData(workspace.data).examples(split):
        if row["target_language"] in rows:
            rows[row["target_language"]].append(row)
    return [TestSet(tag, drawn(found, limit, itemgetter("source"))) for tag, found in rows.items() if found]


def check_limit(recipe: Recipe, workspace: Workspace) -> None:
    """`DataError` if `evaluate.limit` leaves no two examples with the same languages, which the shuffled-source control
    needs; known before anything is trained.
    """
    split, limit = recipe.evaluate.split, recipe.evaluate.limit
    for test in _sets(recipe, workspace, split, limit) if limit is not None else []:
        if max(Counter(row["source_language"] for row in test.rows).values()) < 2:
            raise DataError(
                f"of {limit} {split} examples with target language {test.language!r}, no two have one source language",
                where="evaluate.limit",
                remedy="raise it: the shuffled-source control needs two",
            )


def scores(recipe: Recipe, hypotheses: Sequence[str], test: TestSet) -> dict[str, Any]:
    """Every metric of the recipe, as metric -> value, interval, n, signature; `None` where not measurable."""
    result: dict[str, Any] = {}
    for name in recipe.evaluate.metrics:
        score = METRICS.get(name).score(
            hypotheses, test.references, language=test.language, resamples=recipe.evaluate.resamples, seed=recipe.seed
        )
        result[name] = None if score is None else _score(score)
    return result


def _score(score: Score) -> dict[str, Any]:
    return {name: value for name, value in asdict(score).items() if name != "name"}


def evaluate_system(recipe: Recipe, workspace: Workspace, name: str, on_batch: Callable[[str, int, int], None]) -> None:
    """Write `systems/NAME/hypotheses.jsonl` and, once they are there, `systems/NAME/scores.json`.

    Args:
        on_batch: called with language, finished and all sentences.
    """
    folder = final_folder(recipe, workspace, name)
    model = load_system(folder)
    model = cast(Any, model).to("cuda" if torch.cuda.is_available() else "cpu").eval()
    codec = codec_for(recipe, folder, model)
    generator = Generator(model, codec.tokenizer, max_source_length=recipe.data.max_source_length)
    tests = evaluation_sets(recipe, workspace)
    written = [_generate(generator, test, recipe, on_batch) for test in tests]
    lines = [
        {"language": test.language, "source": row["source"], "references": refs, "hypothesis": hypothesis}
        for test, hypotheses in zip(tests, written, strict=True)
        for row, refs, hypothesis in zip(test.rows, test.references, hypotheses, strict=True)
    ]
    target = workspace.system(name)
    (target / "hypotheses.jsonl").write_text(
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8"
    )
    by_language, use = {}, {}
    for test, hypotheses in zip(tests, written, strict=True):
        by_language[test.language] = scores(recipe, hypotheses, test)
        loss, shuffled, left_out = source_losses(model, codec, test, recipe.seed)
        controls = measure_source_use(
            hypotheses,
            test.references,
            loss=loss,
            shuffled_loss=shuffled,
            left_out=left_out,
            seed=recipe.seed,
            resamples=recipe.evaluate.resamples,
        )
        use[test.language] = _source_use(controls)
    measured: dict[str, Any] = {"scores": by_language, "source_use": use}
    if recipe.evaluate.denoising:
        measured["denoising"] = measure_denoising(recipe, workspace, name, model, codec)
    workspace.write_json(target / "scores.json", measured)


def _source_use(use: SourceUse) -> dict[str, Any]:
    return {
        "loss": use.loss,
        "shuffled_loss": use.shuffled_loss,
        "gain": use.gain,
        "permuted_chrf++": _score(use.permuted_chrf),
        "distinct_outputs": use.distinct_outputs,
        "outputs": use.outputs,
        "left_out": use.left_out,
    }


def _generate(
    generator: Generator, test: TestSet, recipe: Recipe, on_batch: Callable[[str, int, int], None]
) -> list[str]:
    """Hypotheses of a test set; sources may be in several languages."""
    config = recipe.evaluate.decoding
    if config.precision == "auto" and config.engine != "transformers" and unsupported(generator.model, config) is None:
        # as transformers decodes systems that are not grown: all of a table in one precision
        config = config.model_copy(update={"precision": "fp32"})
    outputs = [""] * len(test.rows)
    by_source: dict[str | None, list[int]] = {}
    for index, row in enumerate(test.rows):
        by_source.setdefault(row["source_language"], []).append(index)
    finished = 0
    for language, indices in by_source.items():
        texts = [test.rows[index]["source"] for index in indices]
        written = generator.generate(
            texts,
            target_language=test.language,
            source_language=language,
            config=config,
            seed=recipe.seed,
            on_batch=lambda n, before=finished: on_batch(test.language, before + n, len(outputs)),  # type: ignore[misc]
        )
        finished += len(indices)
        for index, text in zip(indices, written, strict=True):
            outputs[index] = text
    return outputs


@torch.inference_mode()
def source_losses(model: PreTrainedModel, codec: TextCodec, test: TestSet, seed: int) -> tuple[float, float, int]:
    """Nats per target token with the true source and with a shuffled one, and how many examples both leave out because
    no other source of their language can be given to them (`evaluate.limit` may leave one alone).

    Raises:
        DataError: that is so of all of them.
    """
    languages = codec.languages.values()
    examples = [encode_pair(codec, row) for row in test.rows]
    kept = with_another_source(examples, language_ids=languages)
    batches = evaluation_batches(kept or examples, codec.pad_id, 4096)
    shuffled = shuffled_source_batches(batches, codec.pad_id, seed, language_ids=languages)
    return _mean_loss(model, batches), _mean_loss(model, shuffled), len(examples) - len(kept)


def _mean_loss(model: PreTrainedModel, batches: Sequence[Batch]) -> float:
    total, count = 0.0, 0
    for batch in batches:
        inputs = batch.to(model.device).as_model_inputs()
        labels = inputs.pop("labels")
        total += cross_entropy(model(**inputs, use_cache=False).logits, labels).loss.item()
        count += batch.num_target_tokens
    return total / max(1, count)


def evaluate_floors(recipe: Recipe, workspace: Workspace) -> dict[str, dict[str, Any]]:
    """Scores of the copied source and of the best constant string, the latter chosen on the test set itself.

    Choosing on the test set flatters the constant, so a system that beats it needs no further argument.
    """
    results: dict[str, dict[str, Any]] = {name: {} for name in FLOORS}
    train: dict[str, list[str]] = {}
    for row in PreparedData(workspace.data).trained():
        train.setdefault(row["target_language"], []).append(row["target"])
    dev = {test.language: test.references for test in _sets(recipe, workspace, "dev", None)}
    for test in evaluation_sets(recipe, workspace):
        results["copy_source"][test.language] = scores(recipe, copy_source(test.sources), test)
        constant = best_constant(
            dev.get(test.language, test.references),
            test.references,
            optimistic=True,
            candidates=train.get(test.language, []),
            seed=recipe.seed,
            resamples=recipe.evaluate.resamples,
        )
        results["best_constant"][test.language] = scores(recipe, [constant.text] * len(test.rows), test) | {
            "text": constant.text
        }
    return results
