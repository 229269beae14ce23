"""Span corruption: spans of a text leave one mask token each, and only what they held is written.

T5 (arXiv 1910.10683, section 3.1.4), the mixture of denoisers of UL2 (arXiv 2205.05131, section 3.1), and
translation span corruption (mT6, arXiv 2104.08692; DeltaLM, arXiv 2106.13736, section 3.2).

T5 marks each span with a sentinel of its own. An encoder's vocabulary has no sentinels, so the mask token stands in
for all of them, and their order says which span is which: of `A B C D E F` with the spans `B C` and `F`, the source is
`A <mask> D E <mask>` and the target `<mask> B C <mask> F`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from enc2gen.errors import ConfigError


class SpanCorruptionConfig(BaseModel):
    """How much of a text is masked, in tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mask_ratio: float = Field(
        default=0.15, gt=0, lt=1, description="share of the tokens that is masked (0.15: T5, arXiv 1910.10683)"
    )
    mean_span: float = Field(
        default=3.0, ge=1, description="mean length of a masked span in tokens (3: T5, arXiv 1910.10683)"
    )


class TranslationSpanCorruptionConfig(SpanCorruptionConfig):
    """How much of a sentence pair is masked, in tokens, on either side."""

    mask_ratio: float = Field(
        default=0.5,
        gt=0,
        lt=1,
        description="share of the tokens that is masked on either side (our choice: half, so that the other language's "
        "side is needed)",
    )


class UL2Denoiser(SpanCorruptionConfig):
    """One of the denoisers that UL2 mixes."""

    at_end: bool = Field(
        default=False, description="mask one span that ends the text: the sequential (S) denoiser, a prefix LM"
    )
    weight: float = Field(default=1.0, ge=0, description="how often it is drawn, relative to the others")


class UL2Config(BaseModel):
    """The mixture of denoisers of UL2 (arXiv 2205.05131, section 3.1), without its mode tokens.

    R: mean_span 3 or 8, mask_ratio 0.15. S: the last quarter. X: mean_span 3 or 8 with mask_ratio 0.5, and 64 with
    0.15 or 0.5. Each is drawn equally often (our choice).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    denoisers: tuple[UL2Denoiser, ...] = Field(
        default=(
            UL2Denoiser(mean_span=3, mask_ratio=0.15),
            UL2Denoiser(mean_span=8, mask_ratio=0.15),
            UL2Denoiser(mask_ratio=0.25, at_end=True),
            UL2Denoiser(mean_span=3, mask_ratio=0.5),
            UL2Denoiser(mean_span=8, mask_ratio=0.5),
            UL2Denoiser(mean_span=64, mask_ratio=0.15),
            UL2Denoiser(mean_span=64, mask_ratio=0.5),
        ),
        min_length=1,
        description="mean_span, mask_ratio, at_end and weight of each (the seven of arXiv 2205.05131: R, S and X)",
    )

    @field_validator("denoisers")
    @classmethod
    def _one_is_drawn(cls, denoisers: tuple[UL2Denoiser, ...]) -> tuple[UL2Denoiser, ...]:
        if not any(denoiser.weight for denoiser in denoisers):
            raise ValueError("give one of them a weight above 0")
        return denoisers

    def draw(self, rng: np.random.Generator) -> UL2Denoiser:
        """One of the denoisers, by weight."""
        weights = np.array([denoiser.weight for denoiser in self.denoisers])
        return self.denoisers[int(rng.choice(len(weights), p=weights / weights.sum()))]


@dataclass(frozen=True)
class CorruptedText:
    """What is left of a text, and what was masked: the ids to read, and the ids to write."""

    source: list[int]
    target: list[int]


class SpanCorruptor:
    """Masks spans of ids. Ids are opaque: no tokenizer is needed.

    Args:
        mask_token_id: stands for each masked span in the source, and before what it held in the target.

    Raises:
        ConfigError: `mask_token_id` is negative.
    """

    def __init__(self, mask_token_id: int) -> None:
        if mask_token_id < 0:
            raise ConfigError(f"mask_token_id is {mask_token_id}", remedy="use a tokenizer that has a mask token")
        self.mask_token_id = mask_token_id

    def corrupt(self, ids: Sequence[int], config: SpanCorruptionConfig, rng: np.random.Generator) -> CorruptedText:
        """Mask spans of `ids` as `config` says.

        Of `n` tokens, `mask_ratio * n` are masked: rounded at random, so that the rate holds on average for short
        texts also; at least one, and at most `n - 1` unless there is only one. They fall into
        `masked / mean_span` spans (rounded, at least one) of random length; all divisions are equally likely, as in
        T5. Spans lie anywhere and never touch; T5's always end the text, which ours do with `at_end` only.
        """
        if not ids:
            return CorruptedText([], [])
        masked = min(max(1, int(config.mask_ratio * len(ids) + rng.random())), max(1, len(ids) - 1))
        visible = len(ids) - masked
        if isinstance(config, UL2Denoiser) and config.at_end:
            return self._split(ids, {visible: masked}, visible)
        spans = min(max(1, round(masked / config.mean_span)), masked, visible + 1)
        # Lengths of at least 1 that sum to `masked`: cut a row of so many tokens at distinct places.
        cuts = sorted(rng.choice(masked - 1, size=spans - 1, replace=False).tolist()) if spans > 1 else []
        lengths = np.diff([0, *(cut + 1 for cut in cuts), masked]).tolist()
        # Spans stand in distinct gaps between visible tokens: gap g lies before the g-th of them.
        gaps = sorted(rng.choice(visible + 1, size=spans, replace=False).tolist())
        return self._split(ids, dict(zip(gaps, lengths, strict=True)), visible)

    def _split(self, ids: Sequence[int], spans: dict[int, int], visible: int) -> CorruptedText:
        """Read and written ids, with `spans[gap]` tokens masked before the visible token number `gap`."""
        source: list[int] = []
        target: list[int] = []
        position = 0
        for gap in range(visible + 1):
            if gap in spans:
                source.append(self.mask_token_id)
                target += [self.mask_token_id, *ids[position : position + spans[gap]]]
                position += spans[gap]
            if gap < visible:
                source.append(ids[position])
                position += 1
        return CorruptedText(source, target)
