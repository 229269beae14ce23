"""Models and texts that the benchmarks share, and how many operations a step of them takes."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from enc2gen import SwcmForConditionalGeneration, TextCodec

MODELS = ("embedded", "cino", "tiny")
"""`embedded`: multilingual-e5-small out of an installed package (12 layers, 384 wide, vocabulary 250,037). `cino`: the
shape of CINO-base (12 layers, 768 wide, vocabulary 135,359), random weights. `tiny`: two narrow layers, for smoke runs.
Anything else is the folder of a trained model."""

LANGUAGES = ("kk", "mn", "ug", "uz")
TRIMMED_SIZE = 16_000
_SHAPES = {
    "cino": {"vocab_size": 135_359, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "tiny": {"vocab_size": 2_000, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
}
_TEXTS = Path(__file__).parents[2] / "shared" / "data" / "parallel"

Pair = tuple[str, str, str]
"""Source (English), target, target language."""


def load_pairs(limit: int | None = None, languages: Sequence[str] = LANGUAGES) -> tuple[list[Pair], str]:
    """Translated sentences and where they are from: NTREX where its files lie beside the repository, else the strings
    of installed packages. In turn from each language; always the same."""
    columns: list[list[Pair]] = []
    files = [_TEXTS / f"{language}-en.ntrex.jsonl.gz" for language in languages]
    if all(file.is_file() for file in files):
        origin = "NTREX (newstest2019)"
        for language, file in zip(languages, files, strict=True):
            with gzip.open(file, "rt", encoding="utf-8") as lines:
                rows = [json.loads(line) for line in lines]
            columns.append([(row["tgt"], row["src"], language) for row in rows])
    else:
        from enc2gen.corpora.builtin import localisation_pairs

        origin = "strings of installed packages (enc2gen's built-in corpus)"
        found = localisation_pairs(languages)
        columns = [
            [(p.source, p.target, p.target_language) for p in found if p.target_language == t] for t in languages
        ]
    pairs = [pair for row in zip(*columns, strict=False) for pair in row]
    return pairs[:limit], origin


def build_model(
    name: str, *, growth: str, trimmed: bool, pairs: Sequence[Pair], seed: int = 0
) -> SwcmForConditionalGeneration:
    """The model called `name`, with its tokenizer as `model.tokenizer`.

    Args:
        name: one of `MODELS`, or a folder with a trained generator, which is loaded as it is.
        growth: of `SwcmForConditionalGeneration.from_encoder`.
        trimmed: cut the vocabulary to 16,000 pieces (of `tiny` to what the texts use).
        pairs: the texts to keep pieces for.
    """
    import torch

    from enc2gen import Generator, SwcmForConditionalGeneration
    from enc2gen.encoders.loading import load_tokenizer

    languages = sorted({language for _, _, language in pairs})
    if name not in MODELS:
        generator = Generator.from_pretrained(name, device="cpu")
        generator.model.tokenizer = generator.tokenizer
        return generator.model
    embedded = "embedded:multilingual-e5-small"
    common: dict[str, Any] = {"growth": growth, "languages": languages, "seed": seed, "verbose": False}
    if name == "embedded":
        model = SwcmForConditionalGeneration.from_encoder(embedded, **common)
    else:
        torch.manual_seed(seed)
        encoder = _random_encoder(name)
        tokenizer = _shortened(load_tokenizer(embedded), encoder.config.vocab_size, pairs)
        model = SwcmForConditionalGeneration.from_encoder(encoder, tokenizer=tokenizer, **common)
    if trimmed:
        from enc2gen.models.surgery import trim_model

        texts = [text for pair in pairs for text in pair[:2]]
        change = trim_model(model, model.tokenizer, texts, max_size=TRIMMED_SIZE)
        model.tokenizer = change.tokenizer
    model.set_default_target_language(languages[0])
    return model


def _random_encoder(name: str) -> PreTrainedModel:
    from transformers import XLMRobertaConfig, XLMRobertaModel

    shape = _SHAPES[name]
    config = XLMRobertaConfig(
        **shape,
        intermediate_size=4 * shape["hidden_size"],
        max_position_embeddings=514,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
    )
    return XLMRobertaModel(config, add_pooling_layer=False)


def _shortened(tokenizer: PreTrainedTokenizerBase, size: int, pairs: Sequence[Pair]) -> PreTrainedTokenizerBase:
    """The tokenizer with at most `size` pieces: those of the texts (of a few if `size` is small), and the next ids."""
    from enc2gen.tokenization.vocabulary import trim_vocabulary

    if size < TRIMMED_SIZE:
        return trim_vocabulary(tokenizer, [pair[0] for pair in pairs[:20]]).tokenizer
    texts = [text for pair in pairs for text in pair[:2]]
    needed = len(trim_vocabulary(tokenizer, texts).tokenizer)
    keep = tokenizer.convert_ids_to_tokens(list(range(4, size - needed)))
    return trim_vocabulary(tokenizer, texts, keep=keep).tokenizer


def codec_of(model: SwcmForConditionalGeneration) -> TextCodec:
    """The model's own reading and writing of text."""
    from enc2gen import TextCodec

    assert model.tokenizer is not None
    return TextCodec(model.tokenizer, model.config.language_ids, max_source_length=256, max_target_length=256)


def product_rows(model: SwcmForConditionalGeneration) -> dict[str, int]:
    """Multiply-adds per token in the model's matrix products, by what they are spent on.

    Keys: `source`: encoder layers and the decoder's cross-attention keys and values, per source token; `target`:
    decoder layers, per target token; `head`: output projection, per token that is predicted.
    """
    config = model.config
    width, inner = config.hidden_size, config.intermediate_size
    key_values = width * (config.num_key_value_heads or config.num_attention_heads) // config.num_attention_heads
    ffn = (3 if config.ffn_type == "gated" else 2) * width * inner
    attention = 2 * width * width + 2 * width * key_values
    custom = sum(layer.kind == "custom" for layer in config.plan)
    layers = len(config.plan)
    return {
        "source": config.encoder_config.num_hidden_layers * (attention + ffn) + layers * 2 * width * key_values,
        "target": layers * (attention + 2 * width * width + ffn) + custom * ffn,
        "head": width * config.vocab_size,
    }


def attention_products(model: SwcmForConditionalGeneration, source: int, target: int) -> int:
    """Multiply-adds of attention scores and sums of one example; the future is not counted."""
    layers, width = len(model.config.plan), model.config.hidden_size
    encoder = model.config.encoder_config.num_hidden_layers * 2 * width * source * source
    return encoder + layers * width * target * (target + 1) + layers * 2 * width * source * target


def forward_operations(model: SwcmForConditionalGeneration, lengths: Sequence[tuple[int, int]]) -> float:
    """FLOP of one forward pass over examples of (source, target) tokens, padding not counted."""
    per_token = product_rows(model)
    total = 0
    for source, target in lengths:
        total += source * per_token["source"] + target * (per_token["target"] + per_token["head"])
        total += attention_products(model, source, target)
    return 2.0 * total
