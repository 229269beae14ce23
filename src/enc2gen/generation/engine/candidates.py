"""Which tokens may follow a hypothesis: bans that are few and known by id, whatever the size of the vocabulary.

Shapes: B sources, K beams, t tokens so far.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Bans = list[set[int]]
"""For each hypothesis, the tokens that must not follow it."""
Rule = Callable[[list[list[int]]], Bans]
"""From the hypotheses' tokens (the start not included) to what is banned after each."""


def no_repeated_ngram(size: int) -> Rule:
    """No n-gram of `size` tokens twice in a hypothesis, the start token counted as in transformers."""

    def banned(hypothesis: list[int]) -> set[int]:
        if size == 1:
            return set(hypothesis)
        tail = hypothesis[len(hypothesis) - size + 1 :]
        starts = range(len(hypothesis) - size + 1)
        return {hypothesis[start + size - 1] for start in starts if hypothesis[start : start + size - 1] == tail}

    def rule(hypotheses: list[list[int]]) -> Bans:
        return [banned(hypothesis) if len(hypothesis) + 1 >= size else set() for hypothesis in hypotheses]

    return rule


def at_least(tokens: int, end: int) -> Rule:
    """No end before `tokens` tokens were written."""
    return lambda hypotheses: [{end} if len(hypothesis) - 1 < tokens else set() for hypothesis in hypotheses]


def bans(rules: Sequence[Rule], hypotheses: Tensor, own: Sequence[Sequence[Rule]] = ()) -> Bans | None:
    """What all rules together ban after hypotheses; None where there is no rule.

    Args:
        rules: for all hypotheses.
        hypotheses: `[B x K, t]`, start included.
        own: for each source, rules for its hypotheses; empty: none.
    """
    return bans_after(rules, hypotheses.tolist(), own) if rules or any(own) else None


def bans_after(rules: Sequence[Rule], rows: list[list[int]], own: Sequence[Sequence[Rule]] = ()) -> Bans:
    """As :func:`bans`, of hypotheses that may differ in length."""
    found: Bans = [set() for _ in rows]
    for rule in rules:
        for banned, more in zip(found, rule(rows), strict=True):
            banned |= more
    beams = len(rows) // len(own) if own else 0
    for source, several in enumerate(own):
        chosen = slice(source * beams, (source + 1) * beams)
        for rule in several:
            for banned, more in zip(found[chosen], rule(rows[chosen]), strict=True):
                banned |= more
    return found


def without_banned(values: Tensor, tokens: Tensor, banned: Bans | None) -> Tensor:
    """`values` `[rows, k]` with -inf where the token `[rows, k]` is banned."""
    if not banned or not any(banned):
        return values
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, (ids, forbidden) in enumerate(zip(tokens.tolist(), banned, strict=True)):
        if forbidden:
            mask[row] = torch.tensor([token in forbidden for token in ids])
    return values.masked_fill(mask.to(values.device), -torch.inf)
