"""Rows without knowledge of the new language: drawn at random, or averaged over what the old tokenizer makes of it."""

from __future__ import annotations

from torch import Tensor

from enc2gen.models.embedding_init.pieces import Splitter
from enc2gen.models.embedding_init.task import NewRows


def random_rows(task: NewRows) -> tuple[Tensor, list[str]]:
    """Draw every row around the old table's mean: e ~ N(mean(E), diag(std(E)²)).

    New rows look like the average row, so that softmax and attention see nothing unusual.
    """
    return task.random, ["random"] * len(task.new_ids)


def mean_rows(task: NewRows) -> tuple[Tensor, list[str]]:
    """Average the rows of the old pieces that the old tokenizer splits a new piece into.

        e = 1/n sum_i E[s_i],   s_1 ... s_n = sub-pieces of the new piece, repetitions included

    The unknown piece, special tokens, bytes and a space mark on its own do not count: they spell nothing, and
    averaging them would give all pieces of an unknown script the same row. A piece of which nothing else is left
    gets a random row.
    """
    splitter = Splitter(task.old_tokenizer)
    rows, how = task.random.clone(), []
    for position, index in enumerate(task.new_ids):
        form = task.new_forms[index]
        ids = [old for old in splitter.split(form) if old < len(task.old_table)] if form is not None else []
        if ids:
            rows[position] = task.old_table[ids].mean(dim=0)
        how.append("mean" if ids else "random")
    return rows, how
