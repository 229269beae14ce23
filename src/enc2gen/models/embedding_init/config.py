"""Settings of the initialisation, and the methods by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor

from enc2gen.models.static_vectors import StaticVectorsConfig
from enc2gen.registry import Registry

if TYPE_CHECKING:
    from enc2gen.models.embedding_init.task import NewRows

Method: TypeAlias = "Callable[[NewRows], tuple[Tensor, list[str]]]"
"""Gives the rows of the new pieces, `[new pieces, hidden]`, and for each where it came from."""

EMBEDDING_INITIALISATIONS: Registry[Method] = Registry("embedding initialisation")
EMBEDDING_INITIALISATIONS.add("random", "enc2gen.models.embedding_init.simple:random_rows")
EMBEDDING_INITIALISATIONS.add("mean", "enc2gen.models.embedding_init.simple:mean_rows")
EMBEDDING_INITIALISATIONS.add("lexical", "enc2gen.models.embedding_init.factorised:lexical_rows")
EMBEDDING_INITIALISATIONS.add("focus", "enc2gen.models.embedding_init.similarity:focus_rows")
EMBEDDING_INITIALISATIONS.add("ofa", "enc2gen.models.embedding_init.similarity:ofa_rows")


_READ_BY: dict[str, tuple[str, ...]] = {
    "overlap": ("lexical", "focus", "ofa"),
    "rank": ("lexical", "ofa"),
    "project_old_rows": ("ofa",),
    "neighbours": ("ofa",),
    "temperature": ("ofa",),
    "vectors": ("focus", "ofa"),
    "static_vectors": ("focus", "ofa"),
}
"""Settings that not every method reads, and our methods that do; what registered ones read is theirs to say."""
_OURS = ("random", "mean", "lexical", "focus", "ofa")


class InitialisationConfig(BaseModel):
    """How the embedding rows of new pieces are made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str = Field(default="focus", description="`random`, `mean`, `lexical`, `focus` or `ofa`.")
    overlap: Literal["fuzzy", "exact"] = Field(
        default="fuzzy",
        description="Which new pieces `lexical`, `focus` and `ofa` take for an old one: `exact` = the same string at "
        "the same place in the word; `fuzzy` = also if letter case, Unicode form (NFKC) or word start differ.",
    )
    rank: int | None = Field(
        default=None,
        ge=1,
        description="Rank of the factorised table (`lexical`, `ofa`). None: 100 for `lexical` (arXiv 2012.15562), "
        "full for `ofa`.",
    )
    project_old_rows: bool = Field(
        default=False,
        description="`ofa` with a rank: old rows become their projections too, so that the table has that rank, as in "
        "the paper. Otherwise they stay exactly as they were.",
    )
    neighbours: int = Field(
        default=10, ge=1, description="Old pieces that `ofa` mixes into a new one (10 in its authors' implementation)."
    )
    temperature: float = Field(
        default=0.1, gt=0, description="Softmax temperature of `ofa`'s mixture (0.1 in its authors' implementation)."
    )
    vectors: str | None = Field(
        default=None,
        description="File of word vectors in word2vec's text format for `focus` and `ofa`. None: learn vectors from "
        "the texts.",
    )
    static_vectors: StaticVectorsConfig = Field(
        default=StaticVectorsConfig(), description="How vectors are learnt from the texts."
    )

    @field_validator("method")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in EMBEDDING_INITIALISATIONS:
            raise ValueError(str(EMBEDDING_INITIALISATIONS.unknown(value)))
        return value

    @model_validator(mode="after")
    def _consistent(self) -> InitialisationConfig:
        for name, methods in _READ_BY.items() if self.method in _OURS else ():
            if self.method not in methods and getattr(self, name) != type(self).model_fields[name].default:
                has, known = "have" if name.endswith("s") else "has", " or ".join(f'"{method}"' for method in methods)
                raise ValueError(f'{name} {has} no meaning for method "{self.method}": use {known}, or drop {name}')
        if self.project_old_rows and self.rank is None:
            raise ValueError('project_old_rows needs method "ofa" and a rank')
        if self.vectors is not None and self.static_vectors != StaticVectorsConfig():
            raise ValueError("static_vectors have no meaning beside vectors, which are read and not learnt: drop one")
        return self
