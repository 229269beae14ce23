"""Mappers: published equations and parameter counts, padding, options."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from enc2gen.errors import ConfigError
from enc2gen.models.bridge.mapper import MAPPERS, build_mapper

BATCH, LENGTH, HIDDEN, LLM = 3, 6, 12, 20


def mapper_of(name: str, **options: Any) -> Any:
    mapper = build_mapper(name, encoder_size=HIDDEN, llm_size=LLM, **options).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in mapper.parameters():  # biases and norms too
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return mapper


def mask() -> Tensor:
    return (torch.arange(LENGTH) < torch.tensor([[6], [3], [1]])).long()


def fused() -> Tensor:
    states = torch.randn(BATCH, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(6))
    return states * mask()[..., None]


def weights(mapper: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: value.numpy().astype(np.float64) for name, value in mapper.state_dict().items()}


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def test_linear_is_the_published_map_of_each_token() -> None:
    mapper = mapper_of("linear")
    prefix, prefix_mask = mapper(fused(), mask())
    w = weights(mapper)
    expected = (fused().numpy() @ w["map.weight"].T + w["map.bias"]) * mask().numpy()[..., None]
    np.testing.assert_allclose(prefix.detach().numpy(), expected, atol=1e-5)
    assert torch.equal(prefix_mask, mask())


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_mlp_is_the_published_map_of_each_token(activation: str) -> None:
    mapper = mapper_of("mlp", activation=activation)
    w = weights(mapper)
    assert w["map.0.weight"].shape == (2 * HIDDEN, HIDDEN)
    inner = fused().numpy() @ w["map.0.weight"].T + w["map.0.bias"]
    inner = np.maximum(inner, 0) if activation == "relu" else gelu(inner)
    expected = (inner @ w["map.2.weight"].T + w["map.2.bias"]) * mask().numpy()[..., None]
    np.testing.assert_allclose(mapper(fused(), mask())[0].detach().numpy(), expected, atol=1e-5)


def token_means() -> np.ndarray:
    rows = fused().numpy().astype(np.float64)
    return np.stack([row[:length].mean(0) for row, length in zip(rows, mask().sum(1).tolist(), strict=True)])


def test_slots_are_made_from_the_mean_of_the_real_tokens() -> None:
    mapper = mapper_of("slots", slots=4)
    w = weights(mapper)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    assert w["map.0.weight"].shape == (4 * HIDDEN, HIDDEN)
    vector = norm(linear(gelu(linear(token_means(), "map.0")), "map.3"), "map.4")
    slots = norm(linear(gelu(linear(vector, "map.5")), "map.7").reshape(BATCH, 4, LLM), "map.9")
    prefix, prefix_mask = mapper(fused(), mask())
    np.testing.assert_allclose(prefix.detach().numpy(), slots, atol=1e-4)
    assert torch.equal(prefix_mask, torch.ones(BATCH, 4, dtype=mask().dtype))


def test_linear_slots_are_one_map_of_the_mean() -> None:
    mapper = mapper_of("slots", kind="linear")
    w = weights(mapper)
    expected = (token_means() @ w["map.weight"].T + w["map.bias"]).reshape(BATCH, 8, LLM)
    np.testing.assert_allclose(mapper(fused(), mask())[0].detach().numpy(), expected, atol=1e-5)
    with pytest.raises(ConfigError, match="kind='linear' has neither"):
        mapper_of("slots", kind="linear", dropout=0.2)


@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_sentence_share_mixes_in_the_mean_of_the_real_tokens(name: str) -> None:
    plain, mixed, all_mean = mapper_of(name), mapper_of(name, sentence=0.25), mapper_of(name, sentence=1.0)
    means = torch.from_numpy(token_means()).float()[:, None]
    by_hand = (0.75 * fused() + 0.25 * means) * mask()[..., None]
    torch.testing.assert_close(mixed(fused(), mask())[0], plain(by_hand, mask())[0], rtol=1e-5, atol=1e-5)
    whole = all_mean(fused(), mask())[0]
    torch.testing.assert_close(whole[0], whole[0, :1].expand(LENGTH, LLM))


@pytest.mark.parametrize(
    ("name", "options"), [("linear", {}), ("mlp", {}), ("linear", {"sentence": 0.5}), ("slots", {})]
)
def test_padding_is_zero_and_changes_nothing(name: str, options: dict[str, Any]) -> None:
    mapper = mapper_of(name, **options)
    prefix, prefix_mask = mapper(fused(), mask())
    assert (prefix[~prefix_mask.bool()] == 0).all()
    assert torch.equal(prefix, mapper(fused(), mask().bool())[0])
    for row, length in enumerate(mask().sum(1).tolist()):
        alone, alone_mask = mapper(fused()[row : row + 1, :length], torch.ones(1, length))
        torch.testing.assert_close(prefix[row : row + 1, : alone_mask.shape[1]], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("linear", 8_392_704),  # LangBridge, mT5-xl to a 7B model
        ("mlp", 25_174_016),  # MindMerger: 25.18 M with the end vector of 4,096
    ],
)
def test_parameter_counts_are_the_published_ones(name: str, count: int) -> None:
    with torch.device("meta"):
        mapper = build_mapper(name, encoder_size=2048, llm_size=4096)
    assert sum(p.numel() for p in mapper.parameters()) == count


@pytest.mark.parametrize("name", list(MAPPERS))
def test_states_in_half_precision_meet_parameters_in_float32(name: str) -> None:
    mapper = mapper_of(name)
    prefix, _ = mapper(fused().bfloat16(), mask())
    assert prefix.dtype == torch.float32
    assert torch.equal(prefix, mapper(fused().bfloat16().float(), mask())[0])
    prefix.sum().backward()
    assert all(p.grad is not None for p in mapper.parameters())


def test_a_text_without_tokens_gives_finite_slots() -> None:
    assert mapper_of("slots")(fused(), torch.zeros(BATCH, LENGTH))[0].isfinite().all()


def test_the_seed_decides_and_the_global_generator_stays() -> None:
    before = torch.get_rng_state()
    one, same, other = (
        build_mapper("mlp", encoder_size=HIDDEN, llm_size=LLM, seed=seed).state_dict()["map.0.weight"]
        for seed in (3, 3, 4)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_wrong_names_and_options_are_explained() -> None:
    with pytest.raises(ConfigError, match=r"unknown mapper 'linaer'(.|\n)*did you mean 'linear'"):
        build_mapper("linaer", encoder_size=4, llm_size=4)
    known = "feature_dropout, hidden_size, activation, sentence"
    with pytest.raises(ConfigError, match=rf"unknown option 'width'(.|\n)*options: {known}"):
        build_mapper("mlp", encoder_size=4, llm_size=4, width=3)
    with pytest.raises(ConfigError, match=r"sentence=1\.5"):
        build_mapper("linear", encoder_size=4, llm_size=4, sentence=1.5)


@pytest.mark.parametrize(("name", "options"), [("linear", {}), ("mlp", {}), ("slots", {"kind": "linear", "slots": 2})])
def test_feature_dropout_drops_whole_features_of_a_text_and_only_in_training(
    name: str, options: dict[str, Any]
) -> None:
    mapper = build_mapper(name, encoder_size=64, llm_size=8, feature_dropout=0.5, **options)
    plain = build_mapper(name, encoder_size=64, llm_size=8, **options)
    states, mask = torch.ones(3, 5, 64), torch.ones(3, 5, dtype=torch.long)
    assert torch.equal(mapper.eval()(states, mask)[0], plain.eval()(states, mask)[0])
    seen: list[torch.Tensor] = []
    first = next(module for module in mapper.modules() if isinstance(module, torch.nn.Linear))
    first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].reshape(3, -1, 64)))
    torch.manual_seed(0)
    mapper.train()(states, mask)
    kept = seen[0]
    assert set(kept.unique().tolist()) == {0.0, 2.0}  # dropped, or scaled by 1 / (1 - 0.5)
    assert torch.equal(kept, kept[:, :1].expand_as(kept))  # the same features in all tokens of a text
    assert not torch.equal(kept[0], kept[1])  # others in the next text
    assert 0.3 < (kept == 0).float().mean() < 0.7
