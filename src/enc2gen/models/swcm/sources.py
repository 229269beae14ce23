"""Which decoder tensor grows from which encoder tensor, and which parameters are one and the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from enc2gen.encoders.donor import Source, donor_for
from enc2gen.errors import ModelError
from enc2gen.models.swcm.configuration import SwcmConfig


def decoder_sources(config: SwcmConfig) -> dict[str, Source]:
    """Decoder tensor -> encoder tensor it grows from, by the plan and the copied parts (arXiv 2502.10852, section 3).

    Names are relative to the model: `decoder.layers.0.ffn1.fc1.weight` <- `encoder.encoder.layer.0.intermediate...`.
    """
    donor = donor_for(cast(Any, config.encoder_config))
    parts = set(config.copied_parts or ())
    pairs: dict[str, Source] = {"decoder.embed_tokens.weight": Source(donor.word_embeddings())}
    if "embeddings" in parts:
        pairs |= {f"decoder.{ours}": theirs for ours, theirs in donor.embeddings().items()}

    def take(part: str, prefix: str, sources: Mapping[str, Source]) -> None:
        if part in parts:
            pairs.update({f"{prefix}.{ours}": theirs for ours, theirs in sources.items()})

    for index, layer in enumerate(config.plan):
        if layer.first is None or layer.second is None:
            continue
        prefix = f"decoder.layers.{index}"
        for number, source, attention in ((1, layer.first, "self_attention"), (2, layer.second, "cross_attention")):
            take(attention, f"{prefix}.{attention}", donor.attention(source))
            take("ffn", f"{prefix}.ffn{number}", donor.ffn(source))
            if attention in parts and (layer.input_norm or attention == "cross_attention"):
                take("norms", f"{prefix}.{attention}_norm", donor.attention_norm(source))
            if "ffn" in parts:
                take("norms", f"{prefix}.ffn{number}_norm", donor.ffn_norm(source))
    if config.norm_order == "pre" and any(layer.first is not None for layer in config.plan):
        take("norms", "decoder.final_norm", donor.final_norm())
    return {ours: theirs.within("encoder") for ours, theirs in pairs.items()}


def tied_parameters(config: SwcmConfig) -> dict[str, str]:
    """{target: source} of parameters that are one and the same: word embeddings always, the rest by configuration.

    Raises:
        ModelError: parameters would have to be tied to blocks of a fused matrix, which cannot be one parameter.
    """
    sources = decoder_sources(config)
    words = "decoder.embed_tokens.weight"
    wanted = sources if config.sharing == "tied" else {words: sources[words]}
    if fused := [source for source in wanted.values() if source.rows is not None]:
        family = cast(Any, config.encoder_config).model_type
        raise ModelError(
            f"{family} encoders fuse projections ({fused[0].name}), so that parts of them cannot be the decoder's own "
            "parameters",
            where="sharing",
            remedy="use sharing='copy'",
        )
    tied = {ours: source.name for ours, source in wanted.items()}
    return tied | ({"lm_head.weight": sources[words].name} if config.tie_lm_head else {})
