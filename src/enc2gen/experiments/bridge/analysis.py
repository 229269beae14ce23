"""What a bridge recipe looks at besides accuracy: alignment of the languages, and learned layer weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from enc2gen.data.classification import LabelledText
from enc2gen.evaluation.alignment import AlignmentTable, LanguageAlignment, alignment_table
from enc2gen.evaluation.layer_weights import LayerWeights, language_weights, layer_numbers
from enc2gen.experiments.bridge.evaluate import test_texts
from enc2gen.experiments.bridge.prepare import PreparedBridgeData
from enc2gen.experiments.bridge.recipe import BridgeRecipe
from enc2gen.experiments.bridge.systems import Parts, Step, device, load_bridge
from enc2gen.experiments.workspace import Workspace
from enc2gen.models.bridge.fusion import build_fusion


def weighs_layers(recipe: BridgeRecipe, bridge: str) -> bool:
    """Whether a bridge learns how much each layer counts."""
    section = recipe.bridges[bridge]
    return build_fusion(section.fusion, num_layers=128, hidden_size=8, **section.fusion_options).trainable


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


def read_alignment(workspace: Workspace) -> AlignmentTable | None:
    """What :func:`analyse_encoder` wrote, or None."""
    path = workspace.root / "alignment.json"
    found = workspace.read_json(path) if path.exists() else None
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
    layers = layer_numbers(
        len(rows[0].weights), include_embeddings=recipe.hidden_states(step.bridge).include_embeddings
    )
    content = {
        "layers": layers,
        "languages": [
            {"name": row.name, "weights": row.weights.tolist(), "spread": row.spread.tolist(), "tokens": row.tokens}
            for row in rows
        ],
    }
    workspace.write_json(workspace.root / "bridges" / step.bridge / "weights.json", content)


def read_weights(workspace: Workspace, bridge: str) -> tuple[list[LayerWeights], list[int]] | None:
    """What :func:`analyse_bridge` wrote, and the encoder's layer of each column; or None."""
    import numpy as np

    path = workspace.root / "bridges" / bridge / "weights.json"
    if not path.exists():
        return None
    found = workspace.read_json(path)
    rows = [
        LayerWeights(row["name"], np.array(row["weights"]), np.array(row["spread"]), row["tokens"])
        for row in found["languages"]
    ]
    return rows, found["layers"]
