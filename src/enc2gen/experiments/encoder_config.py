"""The encoder's section of a recipe: what is kept of it, how its vocabulary changes, how it is adapted."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from enc2gen.experiments.recipe_fields import Languages, Section
from enc2gen.models.embedding_init import InitialisationConfig
from enc2gen.training.adaptation import AdaptationConfig
from enc2gen.training.config import TrainingConfig


class ExtensionConfig(Section):
    """New pieces for languages that the encoder's tokenizer breaks."""

    size: int | Literal["auto"] = Field(
        default="auto", description="number of new pieces, or auto: chosen on development bits per character"
    )
    languages: Languages | None = Field(
        default=None, description="learn pieces from text in these languages; the recipe's languages by default"
    )
    byte_fallback: bool = Field(
        default=False, description="spell characters without a piece as bytes, so that nothing is ever unknown"
    )
    keep_characters: str = Field(
        default="",
        description="characters that the tokenizer must no longer rewrite (…①), or corpus for all those of the text; "
        "old languages' text that has them is then split otherwise",
    )
    initialisation: InitialisationConfig = Field(
        default_factory=InitialisationConfig, description="rows of the new pieces"
    )

    @field_validator("size")
    @classmethod
    def _positive(cls, size: int | str) -> int | str:
        if isinstance(size, int) and size < 1:
            raise ValueError("give the number of new pieces, 1 or more, or auto")
        return size


class EncoderConfig(Section):
    """The pretrained encoder and what is done with it before a decoder grows."""

    name: str = Field(description="Hub name, folder, or embedded:multilingual-e5-small")
    layers: list[int] | None = Field(
        default=None, description="encoder layers to keep, all by default (small machines)"
    )
    trim_vocabulary: bool = Field(
        default=False,
        description="keep only tokens that the training data uses (embedding rows are most of the weights)",
    )
    extend_vocabulary: ExtensionConfig | None = Field(
        default=None, description="add pieces for a script or language that the tokenizer breaks; none by default"
    )
    adapt: AdaptationConfig | None = Field(
        default=None, description="masked-LM training on the prepared text before decoders grow; none by default"
    )
    unknown_limit: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="refuse a language if more than this share of its characters is unknown to the tokenizer (our "
        "choice); 1 for a baseline that is meant to fail",
    )
    dropout: float | None = Field(default=None, ge=0, lt=1, description="replaces the encoder's dropout rates")

    @model_validator(mode="after")
    def _seed_is_the_recipes(self) -> EncoderConfig:
        unset = TrainingConfig.model_fields["seed"].default
        for name in ("embeddings_only", "training") if self.adapt is not None else ():
            if (stage := getattr(self.adapt, name)) is not None and stage.seed != unset:
                raise ValueError(f"adapt.{name}.seed: the recipe's own seed is used; set that")
        return self

    @property
    def changes_weights(self) -> bool:
        """Whether this encoder has to be saved anew before decoders grow from it."""
        return self.extend_vocabulary is not None or self.adapt is not None
