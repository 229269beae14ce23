"""The encoder's section of a recipe: what is kept of it, how its vocabulary changes, how it is adapted."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from enc2gen.corpora.languages import normalise_languages
from enc2gen.errors import Enc2genError
from enc2gen.models.embedding_init import InitialisationConfig
from enc2gen.training.adaptation import AdaptationConfig


class ExtensionConfig(BaseModel):
    """New pieces for languages that the encoder's tokenizer breaks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int | Literal["auto"] = Field(
        default="auto", description="number of new pieces, or auto: chosen on development bits per character"
    )
    languages: list[str] | None = Field(
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

    @field_validator("languages")
    @classmethod
    def _tags(cls, languages: list[str] | None) -> list[str] | None:
        try:
            return None if languages is None else normalise_languages(languages)
        except Enc2genError as error:
            raise ValueError(str(error)) from error


class EncoderConfig(BaseModel):
    """The pretrained encoder and what is done with it before a decoder grows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

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

    @property
    def changes_weights(self) -> bool:
        """Whether this encoder has to be saved anew before decoders grow from it."""
        return self.extend_vocabulary is not None or self.adapt is not None
