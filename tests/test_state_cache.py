"""The cache of a frozen encoder's states: the same losses, in less time."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bridge_toys import tiny_bridge
from conftest import tiny_encoder
from enc2gen.data.batching import EncodedExample
from enc2gen.data.bridge import collate_bridge
from enc2gen.errors import ConfigError
from enc2gen.models.bridge.state_cache import FrozenStateCache

PAD = 1
SOURCES = [(0, 7, 8, 9, 2), (0, 5, 2), (0, 11, 12, 13, 14, 15, 2), (0, 5, 2)]


class Fusion(nn.Module):
    """Mean over layers, or weighted by learned numbers; zero at padding."""

    def __init__(self, layers: int, trainable: bool) -> None:
        super().__init__()
        self.trainable = trainable
        weights = torch.linspace(0.1, 0.4, layers)
        self.layer_weights = nn.Parameter(weights) if trainable else weights

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        return torch.einsum("l,lbth->bth", self.layer_weights, states) * mask[..., None]


class ToyBridge(nn.Module):
    """A real encoder, a fusion and a linear head in the place of an LLM; counts the encoder's runs."""

    def __init__(self, *, trainable: bool) -> None:
        super().__init__()
        self.encoder = tiny_encoder().requires_grad_(False)
        self.fusion = Fusion(4, trainable)
        torch.manual_seed(1)
        self.head = nn.Linear(24, 20)
        self.encoded: list[int] = []

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        self.encoded.append(input_ids.shape[0])
        output = self.encoder(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)
        return torch.stack(output.hidden_states[1:])

    def loss(self, inputs: dict[str, Tensor]) -> Tensor:
        fused = inputs.get("fused_states")
        if fused is None:
            states = inputs.get("encoder_states")
            states = self.encode(inputs["input_ids"], inputs["attention_mask"]) if states is None else states
            fused = self.fusion(states, inputs["attention_mask"])
        return nn.functional.cross_entropy(self.head(fused).sum(1), inputs["labels"][:, 0])


def batch_of(cache: FrozenStateCache | None) -> Any:
    examples = [EncodedExample(s, (0, 3 + i), (3 + i, 9)) for i, s in enumerate(SOURCES)]
    return collate_bridge(examples, PAD, 9, cache)


@pytest.mark.parametrize("trainable", [False, True])
def test_losses_and_gradients_are_those_without_a_cache(trainable: bool) -> None:
    model = ToyBridge(trainable=trainable)
    cache = FrozenStateCache(model, batch_tokens=10)
    assert cache.add(SOURCES)
    results = []
    for known in (None, cache):
        model.zero_grad()
        before = len(model.encoded)
        loss = model.loss(batch_of(known).as_model_inputs())
        loss.backward()
        assert (len(model.encoded) == before) is (known is not None)
        gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None]
        results.append((loss.detach(), gradients))
    assert len(results[0][1]) == 2 + trainable
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("trainable", "layers"), [(False, 1), (True, 4)])
def test_every_distinct_source_is_encoded_once_longest_first(trainable: bool, layers: int) -> None:
    model = ToyBridge(trainable=trainable)
    cache = FrozenStateCache(model, batch_tokens=10)
    cache.add(SOURCES)
    cache.add(reversed(SOURCES))
    assert model.encoded == [1, 2]  # 7 tokens alone, then 5 and 3 padded to 5: at most 10 tokens at once
    assert len(cache) == 3 and SOURCES[0] in cache
    assert cache.bytes == (7 + 5 + 3) * 24 * 4 * layers


def test_padding_is_zero_and_states_are_those_of_each_source_alone() -> None:
    model = ToyBridge(trainable=True)
    cache = FrozenStateCache(model)
    cache.add(SOURCES)
    states = cache.lookup(SOURCES[:2])["encoder_states"]
    assert states.shape == (4, 2, 5, 24)
    assert torch.equal(states[:, 1, 3:], torch.zeros(4, 2, 24))
    for row, source in enumerate(SOURCES[:2]):
        alone = model.encode(torch.tensor([source]), torch.ones(1, len(source), dtype=torch.long))
        torch.testing.assert_close(states[:, row, : len(source)], alone[:, 0], rtol=1e-5, atol=1e-5)


def test_states_that_would_not_fit_are_not_kept_and_training_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    model = ToyBridge(trainable=True)
    needed = 15 * 24 * 4 * 4
    full = FrozenStateCache(model, needed / 1e9)
    assert full.add(SOURCES)
    small = FrozenStateCache(model, (needed - 1) / 1e9, batch_tokens=8)
    with caplog.at_level(logging.WARNING):
        assert not small.add(SOURCES)
    assert "the cache may hold 0.00 GB" in caplog.text
    assert len(small) == small.bytes == 0
    torch.testing.assert_close(
        model.loss(batch_of(small).as_model_inputs()), model.loss(batch_of(full).as_model_inputs())
    )


def test_a_source_that_is_not_there_is_encoded_by_the_model() -> None:
    model = ToyBridge(trainable=False)
    cache = FrozenStateCache(model)
    cache.add(SOURCES[:1])
    assert cache.lookup(SOURCES) == {}
    assert model.loss(batch_of(cache).as_model_inputs()).isfinite()


def test_half_precision_halves_the_memory() -> None:
    model = ToyBridge(trainable=True)
    whole, half = FrozenStateCache(model), FrozenStateCache(model, dtype=torch.bfloat16)
    whole.add(SOURCES)
    half.add(SOURCES)
    assert half.bytes * 2 == whole.bytes
    torch.testing.assert_close(
        half.lookup(SOURCES)["encoder_states"].float(), whole.lookup(SOURCES)["encoder_states"], rtol=1e-2, atol=1e-2
    )


def test_an_encoder_that_is_trained_is_refused() -> None:
    model = ToyBridge(trainable=False)
    model.encoder.encoder.layer[0].requires_grad_(True)
    with pytest.raises(ConfigError, match="of the encoder are trained"):
        FrozenStateCache(model)


def test_a_bridge_with_an_aligner_is_refused() -> None:
    model = ToyBridge(trainable=False)
    model.aligner = nn.Linear(1, 1)
    with pytest.raises(ConfigError, match="aligner"):
        FrozenStateCache(model)


@pytest.mark.parametrize("fusion", ["last", "mean", "global", "transformer"])
def test_the_logits_of_a_real_bridge_are_those_without_a_cache(fusion: str) -> None:
    model = tiny_bridge(fusion=fusion).eval()
    cache = FrozenStateCache(model, batch_tokens=10)
    assert cache.add(SOURCES)
    outputs = []
    for known in (None, cache):
        inputs = batch_of(known).as_model_inputs()
        assert (cache.argument in inputs) is (known is not None)
        inputs.pop("labels")
        outputs.append(model(**inputs).logits.detach())
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)
