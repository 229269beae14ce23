"""Fields of bridge recipes that several sections have, checked alike in all of them."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import AfterValidator

from enc2gen.evaluation.llm_alone import TEXT


def _different_seeds(seeds: list[int]) -> list[int]:
    if len(set(seeds)) < len(seeds) or any(not 0 <= seed < 2**31 for seed in seeds):
        raise ValueError("seeds must be different whole numbers from 0 to 2147483647")
    return seeds


def _positive_rates(rates: list[float]) -> list[float]:
    # Stages and tables are named by the rate as {:g} writes it: what it writes alike would be one training.
    if any(not (math.isfinite(rate) and rate > 0) for rate in rates) or len({f"{r:g}" for r in rates}) < len(rates):
        raise ValueError("learning rates must be above 0, finite and different (in six digits)")
    return rates


def _different(entries: list[str]) -> list[str]:
    if twice := sorted({entry for entry in entries if entries.count(entry) > 1}):
        raise ValueError(f"{', '.join(twice)} twice: name each once, its texts would count twice")
    return entries


def _with_text(instruction: str) -> str:
    if instruction.count(TEXT) != 1:
        raise ValueError(f'must contain {TEXT} once, for example "... Text: {TEXT}"')
    return instruction


Seeds = Annotated[list[int], AfterValidator(_different_seeds)]
"""Seeds that torch and numpy take, each once."""

Rates = Annotated[list[float], AfterValidator(_positive_rates)]
"""Learning rates to choose from, each once."""

Names = Annotated[list[str], AfterValidator(_different)]
"""Names as the data have them, each once."""

Instruction = Annotated[str, AfterValidator(_with_text)]
"""What an LLM is asked, with the place of the text."""
