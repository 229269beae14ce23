"""Embedding rows for pieces that a vocabulary did not have before.

result = initialise_rows(table, old_tokenizer, new_tokenizer, origins, InitialisationConfig(method="focus"),
                         texts=pairs)
result.table, result.summary
"""

from __future__ import annotations

from enc2gen.models.embedding_init.config import EMBEDDING_INITIALISATIONS, InitialisationConfig
from enc2gen.models.embedding_init.rows import InitialisedRows, initialise_rows

__all__ = ["EMBEDDING_INITIALISATIONS", "InitialisationConfig", "InitialisedRows", "initialise_rows"]
