"""Models are drawn from their seed, and whoever builds them finds the generators as they were, those of GPUs too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from bridge_toys import tiny_llm
from conftest import tiny_encoder
from enc2gen import SwcmForConditionalGeneration
from enc2gen.models.baselines import build_system
from enc2gen.models.bridge import BridgeForConditionalGeneration
from enc2gen.models.seeding import seeded

BUILDERS: dict[str, Callable[[PreTrainedModel], Any]] = {
    "grown": lambda encoder: SwcmForConditionalGeneration.from_encoder(encoder, languages=["kk"], verbose=False),
    "bridge": lambda encoder: BridgeForConditionalGeneration.from_parts(encoder, LLM, end_vector="random"),
    "mbart-shaped": lambda encoder: baseline("mbart-shaped", encoder),
    "warm-start": lambda encoder: baseline("warm-start", encoder),
}
LLM = tiny_llm()


def baseline(preset: str, encoder: PreTrainedModel) -> Any:
    return build_system(preset, encoder, tokenizer=None, languages=["kk"], seed=0, verbose=False)


@pytest.mark.parametrize("kind", BUILDERS)
def test_building_on_the_cpu_does_not_seed_gpus_that_are_not_in_use(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, seeds = tiny_encoder(), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    BUILDERS[kind](encoder)
    assert not seeds


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", BUILDERS)
def test_building_leaves_the_generators_of_gpus_in_use(kind: str) -> None:
    encoder = tiny_encoder()
    torch.cuda.manual_seed_all(7)
    before = torch.cuda.get_rng_state()
    BUILDERS[kind](encoder)
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_draws_on_the_cpu_are_those_of_the_seed_and_leave_the_generator() -> None:
    expected = torch.randn(5, generator=torch.Generator().manual_seed(11))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with seeded(11):
        assert torch.equal(torch.randn(5), expected)
    assert torch.equal(torch.get_rng_state(), state)
