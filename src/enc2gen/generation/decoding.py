"""How outputs are searched."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from enc2gen.errors import ConfigError

_NATIVE_ONLY = (
    "coverage_penalty",
    "beam_groups",
    "diversity_penalty",
    "mbr_samples",
    "draft_tokens",
    "precision",
    "compile",
)
"""Settings that transformers' `generate` does not have."""


class DecodingConfig(BaseModel):
    """How outputs are searched. Lengths are limited by the model's own generation_config."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_beams: int = Field(default=4, ge=1, description="beams; 1 is greedy search")
    length_penalty: float = Field(default=1.0, description="exponent of the length that scores are divided by")
    coverage_penalty: float = Field(
        default=0.0,
        ge=0,
        description="weight of the penalty on source tokens that got little attention (arXiv 1609.08144, equation 14)",
    )
    early_stopping: bool | Literal["never"] = Field(
        default=True,
        description="true: stop with as many finished outputs as beams; false, never: as in transformers",
    )
    beam_groups: int = Field(
        default=1,
        ge=1,
        description="groups of beams that are kept different from each other (arXiv 1610.02424); 1: plain beams",
    )
    diversity_penalty: float = Field(
        default=0.0,
        ge=0,
        description="taken off a token's log-probability for each beam of an earlier group that writes it in the same "
        "step",
    )
    no_repeat_ngram_size: int = Field(default=0, ge=0, description="no token n-gram of this size twice; 0: allowed")
    min_new_tokens: int = Field(default=0, ge=0, description="least tokens before an output may end")
    do_sample: bool = Field(default=False, description="sample instead of searching (give num_beams 1)")
    temperature: float = Field(default=1.0, gt=0, description="of sampling")
    top_p: float = Field(default=1.0, gt=0, le=1, description="nucleus of sampling (arXiv 1904.09751)")
    epsilon: float = Field(
        default=0.0, ge=0, lt=1, description="never sample tokens that are less probable than this (arXiv 2210.15191)"
    )
    mbr_samples: int = Field(
        default=0,
        ge=0,
        description="draw so many samples instead of searching, and keep the one with the highest mean chrF against "
        "the others (minimum Bayes risk, arXiv 2111.04800); 0: off",
    )
    draft_tokens: int = Field(
        default=0,
        ge=0,
        description="tokens that greedy search guesses ahead by copying from the source or the output so far, and "
        "checks in one step; outputs stay the same",
    )
    max_new_tokens: int | None = Field(default=None, ge=1, description="overrides the limit saved with the model")
    batch_size: int = Field(default=32, ge=1, description="sources decoded at once")
    engine: Literal["auto", "native", "transformers"] = Field(
        default="auto",
        description="native: this project's decoder; transformers: its generate(); auto: native where the model has it",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8"] = Field(
        default="auto",
        description="arithmetic of the native engine: int8 on CPUs, fp16 on GPUs, bf16 on both; auto is fp32 on a CPU, "
        "where outputs equal transformers', and bf16 on a GPU",
    )
    compile: bool = Field(
        default=False,
        description="compile the native engine's decoder layers with torch.compile (GPU); first batches take longer",
    )

    @model_validator(mode="after")
    def _fits(self) -> DecodingConfig:
        if self.do_sample and self.num_beams > 1 and self.engine == "native":
            raise ValueError("beams are not sampled by the native engine: give num_beams 1, or engine transformers")
        if self.engine == "transformers" and (names := self.native_only()):
            raise ValueError(f"transformers has no {', '.join(names)}: leave it out, or give engine native")
        if self.num_beams % self.beam_groups:
            raise ValueError(f"{self.num_beams} beams cannot be split into {self.beam_groups} equal groups")
        if (self.beam_groups > 1) != (self.diversity_penalty > 0):
            raise ValueError("beam_groups and diversity_penalty do nothing without each other: give both")
        if self.mbr_samples == 1:
            raise ValueError("one sample leaves no choice: give mbr_samples 2 or more")
        if self.mbr_samples and self.beam_groups > 1:
            raise ValueError("mbr_samples draws samples: leave beam_groups out")
        if self.draft_tokens and (self.num_beams > 1 or self.do_sample or self.mbr_samples):
            raise ValueError("draft_tokens is for greedy search: give num_beams 1 and do not sample")
        return self

    @property
    def samples(self) -> bool:
        """Whether outputs are drawn at random."""
        return self.do_sample or self.mbr_samples > 0

    def native_only(self) -> list[str]:
        """Settings in use that only the native engine has."""
        fields = type(self).model_fields
        return [name for name in _NATIVE_ONLY if getattr(self, name) != fields[name].default]

    def arguments(self) -> dict[str, Any]:
        """Arguments of transformers' `generate`; `ConfigError` for settings that it does not have."""
        if names := self.native_only():
            raise ConfigError(
                f"transformers' generate() cannot do this: {', '.join(names)}",
                where=names[0],
                remedy="leave it out; only grown models are decoded by the native engine",
            )
        chosen: dict[str, Any] = {"num_beams": self.num_beams, "do_sample": self.do_sample}
        if self.num_beams > 1:
            chosen |= {"length_penalty": self.length_penalty, "early_stopping": self.early_stopping}
        if self.no_repeat_ngram_size:
            chosen["no_repeat_ngram_size"] = self.no_repeat_ngram_size
        if self.min_new_tokens:
            chosen["min_new_tokens"] = self.min_new_tokens
        if self.do_sample:
            chosen |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
            chosen |= {"epsilon_cutoff": self.epsilon} if self.epsilon else {}
        if self.max_new_tokens is not None:
            chosen["max_new_tokens"] = self.max_new_tokens
        return chosen
