"""int8 on CPU: enc2gen against CTranslate2 with an encoder-decoder of the same layers, widths and vocabulary.

CTranslate2 has no converter for grown decoders, so ours is one of standard layers, and both have random weights. Every
output has the same number of tokens. Both start from text and end in text, through the same tokenizer.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.measuring import Side, SideError, Turns, alternate, compare, environment, matrix_products, peak
from benchmarks.writing import load_task, make_generator, write

CASES = [{"batch_size": batch, "num_beams": beams} for batch in (1, 32) for beams in (1, 4)]
SINGLE = 0.25  # share of the sentences that batches of one are measured on, which are slow


def _random_linear(spec: Any, rows: int, columns: int, random: np.random.Generator) -> None:
    spec.weight = (random.standard_normal((rows, columns), dtype=np.float32) / math.sqrt(columns)).astype(np.float32)
    spec.bias = np.zeros(rows, dtype=np.float32)


def _norm(spec: Any, width: int) -> None:
    spec.gamma, spec.beta = np.ones(width, dtype=np.float32), np.zeros(width, dtype=np.float32)


def _fill_stack(stack: Any, width: int, inner: int, positions: int, random: np.random.Generator) -> None:
    """Random weights for an encoder's or decoder's layers."""
    stack.scale_embeddings = False
    stack.position_encodings.encodings = random.standard_normal((positions, width), dtype=np.float32) * 0.02
    _norm(stack.layernorm_embedding, width)
    for layer in stack.layer:
        _random_linear(layer.self_attention.linear[0], 3 * width, width, random)
        _random_linear(layer.self_attention.linear[1], width, width, random)
        _norm(layer.self_attention.layer_norm, width)
        if hasattr(layer, "attention"):
            _random_linear(layer.attention.linear[0], width, width, random)
            _random_linear(layer.attention.linear[1], 2 * width, width, random)
            _random_linear(layer.attention.linear[2], width, width, random)
            _norm(layer.attention.layer_norm, width)
        _random_linear(layer.ffn.linear_0, inner, width, random)
        _random_linear(layer.ffn.linear_1, width, inner, random)
        _norm(layer.ffn.layer_norm, width)


def build_spec(config: Any, seed: int) -> tuple[Any, list[str]]:
    """A CTranslate2 model of the shape of an `SwcmConfig` with standard layers and random weights, and its pieces.

    Piece i is called `i`, except for the special ones that CTranslate2 looks up by name.
    """
    from ctranslate2.specs import TransformerSpec, common_spec

    encoder, width = config.encoder_config, config.hidden_size
    spec = TransformerSpec.from_config(
        (encoder.num_hidden_layers, len(config.plan)),
        config.num_attention_heads,
        pre_norm=False,
        activation=common_spec.Activation.GELU,
        layernorm_embedding=True,
    )
    random = np.random.default_rng(seed)
    positions = config.max_position_embeddings
    _fill_stack(spec.encoder, width, encoder.intermediate_size, positions, random)
    _fill_stack(spec.decoder, width, config.intermediate_size, positions, random)
    table = random.standard_normal((config.vocab_size, width), dtype=np.float32) * 0.02
    spec.encoder.embeddings[0].weight = spec.decoder.embeddings.weight = spec.decoder.projection.weight = table
    spec.decoder.projection.bias = np.zeros(config.vocab_size, dtype=np.float32)
    pieces = [str(index) for index in range(config.vocab_size)]
    names = {config.bos_token_id: "<s>", config.eos_token_id: "</s>", 3: "<unk>", config.pad_token_id: "<blank>"}
    for index, name in names.items():
        pieces[index] = name
    spec.register_source_vocabulary(pieces)
    spec.register_target_vocabulary(pieces)
    return spec, pieces


def translate(turns: Turns, settings: dict[str, Any]) -> None:
    """Side: CTranslate2."""
    import ctranslate2

    task = settings["task"]
    generator = make_generator(settings)
    codec, config = generator.codec, generator.model.config
    spec, pieces = build_spec(config, settings["seed"])
    spec.validate()
    spec.optimize(quantization="int8")
    places = {piece: index for index, piece in enumerate(pieces)}
    with tempfile.TemporaryDirectory() as folder:
        spec.save(folder)
        del spec, generator
        translator = ctranslate2.Translator(
            folder, device="cpu", compute_type="int8", inter_threads=1, intra_threads=settings["threads"]
        )
    length = settings["decoding"]["max_new_tokens"]
    while True:
        request = dict(turns.next())
        sources = task.sources[: request["sentences"]]
        start = time.perf_counter()
        rows = [[pieces[index] for index in ids] for ids in codec.encode_sources(sources, task.source_language)]
        rows_by_length = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
        outputs, written = [""] * len(rows), 0
        for first in range(0, len(rows), request["batch_size"]):
            chosen = rows_by_length[first : first + request["batch_size"]]
            results = translator.translate_batch(
                [rows[index] for index in chosen],
                beam_size=request["num_beams"],
                min_decoding_length=length,
                max_decoding_length=length,
            )
            for index, result in zip(chosen, results, strict=True):
                written += len(result.hypotheses[0])
                outputs[index] = codec.decode([places[piece] for piece in result.hypotheses[0]])
        turns.report(seconds=time.perf_counter() - start, sentences=len(sources), tokens=written)


def run(question: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Measure `ctranslate2_int8` and return the entry of the results file; its speed-up is that of the slowest case."""
    _require_ctranslate2()
    task = load_task(options, options["sentences"])
    settings = {
        "task": task,
        "model": options["model"],
        "growth": "standard",
        "trimmed": True,
        "seed": options["seed"],
        "threads": options["threads"],
        "decoding": {"max_new_tokens": options["max_new_tokens"], "engine": "native", "precision": "int8"},
    }
    with (
        environment(options["threads"], "cpu"),
        Side(write, settings) as mine,
        Side(translate, settings) as other,
        Side(matrix_products, {"precision": "int8"}) as machine,
    ):
        sides, found = {"ours": mine, "reference": other, "machine": machine}, {}
        for case in CASES:
            share = SINGLE if case["batch_size"] == 1 else 1
            request = case | {"sentences": max(1, round(share * options["sentences"]))}
            found[f"batch {case['batch_size']}, {case['num_beams']} beam(s)"] = alternate(
                sides, options["turns"], request=request
            )
    return entry(found, settings, options)


def entry(
    found: Mapping[str, Mapping[str, list[dict[str, Any]]]], settings: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    """What the turns of all cases come to."""
    rows, cases = {}, {}
    for case, reports in found.items():
        mine, other = reports["ours"], reports["reference"]
        compared = compare(mine, other, "tokens")
        rate = sorted(report["rate"] for report in reports["machine"])[len(reports["machine"]) // 2]
        cases[case] = {
            "speedup": compared.speedup,
            "memory_ratio": peak(mine) / peak(other),
            "spread": compared.spread,
            "limit_fraction": compared.ours / mine[0]["tokens"] * mine[0]["operations"] / rate,
        }
        rows[case] = {
            "ours, tokens per second": compared.ours,
            "CTranslate2, tokens per second": compared.reference,
            "ratio": compared.speedup,
            "spread": f"{compared.spread:.0%}",
            "ours, share of the int8 matrix-product rate": cases[case]["limit_fraction"],
        }
    first = next(iter(found.values()))["ours"][0]
    return {
        **min(cases.values(), key=lambda case: case["speedup"]),
        "cases": cases,
        "rows": rows,
        "setting": f"{options['model']} with as many standard decoder layers, vocabulary {first['vocabulary']:,}, "
        f"{first['parameters'] / 1e6:,.0f} million parameters, {settings['task'].origin}, "
        f"{options['max_new_tokens']} new tokens, {options['turns']} turns; memory of both with Python and PyTorch",
    }


def _require_ctranslate2() -> None:
    try:
        import ctranslate2  # noqa: F401
    except ImportError as error:
        raise SideError("CTranslate2 is not installed: pip install 'enc2gen[bench]'") from error
