"""What a bridge recipe looks at besides accuracy: alignment of the languages, and learned layer weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch

from enc2gen.data.classification import LabelledText, script_of
from enc2gen.evaluation.alignment import AlignmentTable, LanguageAlignment, alignment_table
from enc2gen.evaluation.layer_weights import (
    LayerWeights,
    TokenWeights,
    language_weights,
    layer_numbers,
    token_weights,
)
from enc2gen.experiments.bridge.evaluate import test_texts
from enc2gen.experiments.bridge.prepare import PreparedBridgeData
from enc2gen.experiments.bridge.recipe import BridgeRecipe
from enc2gen.experiments.bridge.systems import Parts, Step, device, load_bridge
from enc2gen.experiments.workspace import Workspace
from enc2gen.models.bridge.fusion import Fusion, build_fusion

SHORT = 40
"""Most pieces of the text whose tokens are looked at, if there is one so short (our choice: a picture of one page)."""


def weighs_layers(recipe: BridgeRecipe, bridge: str) -> bool:
    """Whether a bridge learns how much each layer counts."""
    return _small_fusion(recipe, bridge).trainable


@torch.inference_mode()
def weighs_tokens(recipe: BridgeRecipe, bridge: str) -> bool:
    """Whether each token has weights of its own: two different tokens do not get the same."""
    fusion = _small_fusion(recipe, bridge).eval()
    states = torch.randn(fusion.num_layers, 1, 2, fusion.hidden_size, generator=torch.Generator().manual_seed(0))
    first, second = fusion.weights(states, torch.ones(1, 2, dtype=torch.long))[0]
    return not torch.allclose(first, second, atol=1e-6)


def wants_alignment(recipe: BridgeRecipe) -> bool:
    """Whether the recipe has the alignment of its languages measured."""
    return recipe.analysis.mexa and recipe.task is not None


def wants_weights(recipe: BridgeRecipe, bridge: str) -> bool:
    """Whether the recipe has a bridge's layer weights read, and the bridge learns any."""
    return recipe.analysis.layer_weights and recipe.task is not None and weighs_layers(recipe, bridge)


def wants_tokens(recipe: BridgeRecipe, bridge: str) -> bool:
    """Whether the recipe has layer weights read token by token, too."""
    return wants_weights(recipe, bridge) and weighs_tokens(recipe, bridge)


def _small_fusion(recipe: BridgeRecipe, bridge: str) -> Fusion:
    section = recipe.bridges[bridge]
    return build_fusion(section.fusion, num_layers=128, hidden_size=8, **section.fusion_options)


def shared_texts(tests: dict[str, list[LabelledText]], english: str, most: int) -> dict[str, list[str]]:
    """Texts whose translations all listed languages have, item by item the same; empty if there are too few.

    Languages without half of the English texts are left out.
    """
    by_id = {language: {text.id: text.text for text in texts} for language, texts in tests.items()}
    english_ids = set(by_id[english])
    kept = {language: ids for language, ids in by_id.items() if len(english_ids & set(ids)) >= len(english_ids) / 2}
    common = [text.id for text in tests[english] if all(text.id in ids for ids in kept.values())][:most]
    if len(common) < 2 or len(kept) < 2:
        return {}
    return {language: [ids[key] for key in common] for language, ids in kept.items()}


def analyse_encoder(recipe: BridgeRecipe, workspace: Workspace, parts: Parts, log: Callable[[str], None]) -> None:
    """Write `alignment.json`: MEXA of every test language with the training language, before any training."""
    assert recipe.task is not None
    english = recipe.task.train_languages[0]
    texts = shared_texts(test_texts(recipe, PreparedBridgeData(workspace)), english, recipe.analysis.sentences)
    path = workspace.root / "alignment.json"
    if not texts:
        log("alignment: left out, because the test texts are not translations of each other")
        workspace.write_json(path, None)
        return
    encoder: Any = parts.encoder
    table = alignment_table(
        encoder.to(device()),
        parts.encoder_tokenizer,
        texts,
        english,
        template=recipe.encoder.template,
        max_length=recipe.encoder.max_length,
    )
    workspace.write_json(path, table.to_dict())


def read_alignment(recipe: BridgeRecipe, workspace: Workspace) -> AlignmentTable | None:
    """What :func:`analyse_encoder` wrote for this recipe, or None: other settings may have left a file, too."""
    path = workspace.root / "alignment.json"
    found = workspace.read_json(path) if wants_alignment(recipe) and path.exists() else None
    if found is None:
        return None
    fields = LanguageAlignment.__dataclass_fields__
    kept_rows: list[dict[str, Any]] = [{k: v for k, v in row.items() if k in fields} for row in found["languages"]]
    rows = tuple(LanguageAlignment(**{**row, "layers": tuple(row["layers"])}) for row in kept_rows)
    kept = {name: found[name] for name in AlignmentTable.__dataclass_fields__}
    return AlignmentTable(**{**kept, "languages": rows})


def analyse_bridge(recipe: BridgeRecipe, workspace: Workspace, parts: Parts, step: Step) -> None:
    """Write `weights.json` into the bridge's folder: mean weight of every layer for each language."""
    model = cast(Any, load_bridge(recipe, workspace, parts, step)).to(device())
    tests = test_texts(recipe, PreparedBridgeData(workspace))
    texts = {language: [text.text for text in rows[: recipe.analysis.sentences]] for language, rows in tests.items()}
    rows = language_weights(model, texts, batch_size=recipe.evaluate.batch_size)
    content = {
        "layers": _layers(recipe, step, len(rows[0].weights)),
        "languages": [
            {"name": row.name, "weights": row.weights.tolist(), "spread": row.spread.tolist(), "tokens": row.tokens}
            for row in rows
        ],
    }
    workspace.write_json(workspace.root / "bridges" / step.bridge / "weights.json", content)


def _layers(recipe: BridgeRecipe, step: Step, count: int) -> list[int]:
    return layer_numbers(count, include_embeddings=recipe.hidden_states(step.bridge).include_embeddings)


def analyse_tokens(recipe: BridgeRecipe, workspace: Workspace, parts: Parts, step: Step) -> None:
    """Write `tokens.json` into the bridge's folder: weights of every token of one test text and of its translation."""
    assert recipe.task is not None
    model = cast(Any, load_bridge(recipe, workspace, parts, step)).to(device())
    tests = test_texts(recipe, PreparedBridgeData(workspace))
    pair = _text_and_translation(
        tests, recipe.task.train_languages[0], recipe.analysis.sentences, model.processor.encode_sources
    )
    found = {language: token_weights(model, text) for language, text in pair.items()}
    content = {
        "layers": _layers(recipe, step, next(iter(found.values())).weights.shape[1]),
        "texts": {
            language: {"text": row.text, "tokens": row.tokens, "weights": row.weights.tolist()}
            for language, row in found.items()
        },
    }
    workspace.write_json(workspace.root / "bridges" / step.bridge / "tokens.json", content)


def _text_and_translation(
    tests: dict[str, list[LabelledText]], home: str, most: int, pieces: Callable[[list[str]], list[list[int]]]
) -> dict[str, str]:
    """A text of at most :data:`SHORT` pieces if there is one, and its translation, in another script if there is one.

    Texts without translations stand alone.
    """
    texts = shared_texts(tests, home, most) or {home: [text.text for text in tests[home]][:most]}
    others = [language for language in texts if language != home]
    others.sort(key=lambda language: script_of(language) == script_of(home))
    chosen = [home, *others[:1]]
    lengths = np.max([[len(ids) for ids in pieces(texts[language])] for language in chosen], axis=0)
    index = int(np.argmax(lengths <= SHORT)) if (lengths <= SHORT).any() else int(np.argmin(lengths))
    return {language: texts[language][index] for language in chosen}


def read_tokens(
    recipe: BridgeRecipe, workspace: Workspace, bridge: str
) -> tuple[dict[str, TokenWeights], list[int]] | None:
    """What :func:`analyse_tokens` wrote for this recipe, by language, and the encoder's layer of each column; or None.

    A file that other settings left is not read.
    """
    path = workspace.root / "bridges" / bridge / "tokens.json"
    if not wants_tokens(recipe, bridge) or not path.exists():
        return None
    found = workspace.read_json(path)
    texts = {
        language: TokenWeights(row["text"], tuple(row["tokens"]), np.array(row["weights"]))
        for language, row in found["texts"].items()
    }
    return texts, found["layers"]


def read_weights(
    recipe: BridgeRecipe, workspace: Workspace, bridge: str
) -> tuple[list[LayerWeights], list[int]] | None:
    """What :func:`analyse_bridge` wrote for this recipe, and the encoder's layer of each column; or None.

    A file that other settings left is not read.
    """
    path = workspace.root / "bridges" / bridge / "weights.json"
    if not wants_weights(recipe, bridge) or not path.exists():
        return None
    found = workspace.read_json(path)
    rows = [
        LayerWeights(row["name"], np.array(row["weights"]), np.array(row["spread"]), row["tokens"])
        for row in found["languages"]
    ]
    return rows, found["layers"]
