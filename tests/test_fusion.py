"""Fusions and hidden states: published equations, identities at the start, padding, parameter counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import MT5Config, MT5EncoderModel

from enc2gen.errors import ConfigError, DataError, ModelError
from enc2gen.models.bridge.fusion import FUSIONS, GlobalFusion, TransformerFusion, build_fusion
from enc2gen.models.bridge.hidden_states import HiddenStates, HiddenStatesConfig

LAYERS, BATCH, LENGTH, HIDDEN = 5, 3, 7, 16
OPTIONS: dict[str, dict[str, Any]] = {"layer_index": {"index": 1}, "transformer": {"feed_forward": 24}}


def states(dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    scale = torch.arange(1.0, LAYERS + 1)[:, None, None, None]  # as in pre-norm encoders, upper layers are larger
    return (scale * torch.randn(LAYERS, BATCH, LENGTH, HIDDEN, generator=generator)).to(dtype)


def mask() -> Tensor:
    return (torch.arange(LENGTH) < torch.tensor([[7], [4], [1]])).long()


def fusion_of(name: str, **options: Any) -> Any:
    return build_fusion(name, num_layers=LAYERS, hidden_size=HIDDEN, **(OPTIONS.get(name, {}) | options)).eval()


def scrambled(module: nn.Module) -> nn.Module:
    """Every parameter, biases and norms too, off its initial value, by what still lets all layers weigh something."""
    scale = {"logits": 0.005, "temperature": 3e-4} if isinstance(module, GlobalFusion) else {}
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.add_(scale.get(name, 0.3) * torch.randn(parameter.shape, generator=generator))
    return module


def hidden_states(*, layers: int = LAYERS, **config: Any) -> HiddenStates:
    return HiddenStates(HiddenStatesConfig(**config), num_hidden_layers=layers, hidden_size=HIDDEN)


# fusions


def test_global_starts_as_the_exact_mean_of_the_layers() -> None:
    for temperature in ("learned", "plain"):
        fusion = fusion_of("global", temperature=temperature)
        assert torch.equal(fusion.layer_weights(), torch.full((LAYERS,), 1 / LAYERS))
        fused = fusion(states(), mask())
        assert torch.equal(fused, fusion_of("mean")(states(), mask()))
        expected = states().numpy().astype(np.float64).mean(0) * mask().numpy()[..., None]
        np.testing.assert_allclose(fused.detach().numpy(), expected, atol=1e-6)


def test_one_hot_weights_on_the_last_layer_are_last_exactly() -> None:
    for temperature in ("learned", "plain"):
        fusion = fusion_of("global", temperature=temperature)
        with torch.no_grad():
            fusion.logits.copy_(torch.tensor([0.0] * (LAYERS - 1) + [1e3]))
        for dtype in (torch.float32, torch.bfloat16):
            fused = fusion(states(dtype), mask())
            assert fused.dtype == dtype
            assert torch.equal(fused, fusion_of("last")(states(dtype), mask()))


def test_last_and_layer_index_give_the_layer_itself() -> None:
    real = mask().bool()
    assert torch.equal(fusion_of("last")(states(), mask())[real], states()[-1][real])
    for index in (0, 2, LAYERS - 1, -1, -LAYERS):
        assert torch.equal(fusion_of("layer_index", index=index)(states(), mask())[real], states()[index][real])
    with pytest.raises(ConfigError, match="no layer 5 among 5"):
        fusion_of("layer_index", index=5)


def test_global_follows_the_published_equation() -> None:
    fusion = fusion_of("global")
    with torch.no_grad():
        fusion.logits.copy_(torch.tensor([1e-3, -2e-2, 3e-5, 8e-3, 1.1e-2]))
        fusion.temperature.fill_(4e-4)
    logits = (100 + 1e5 * 4e-4) * np.array([1e-3, -2e-2, 3e-5, 8e-3, 1.1e-2])
    weights = np.exp(logits) / np.exp(logits).sum()
    expected = np.einsum("l,lbth->bth", weights, states().numpy()) * mask().numpy()[..., None]
    np.testing.assert_allclose(fusion(states(), mask()).detach().numpy(), expected, atol=1e-5)


def test_prior_starts_towards_the_upper_layers_whatever_the_temperature_learns() -> None:
    slope = np.exp(0.7 * (np.arange(1, LAYERS + 1) - LAYERS))
    for temperature in ("learned", "plain"):
        fusion = fusion_of("global", temperature=temperature, prior=0.7)
        np.testing.assert_allclose(fusion.layer_weights().detach().numpy(), slope / slope.sum(), rtol=1e-5)
    fusion = fusion_of("global", prior=0.7)
    with torch.no_grad():
        fusion.temperature.fill_(1e-2)
    np.testing.assert_allclose(fusion.layer_weights().detach().numpy(), slope / slope.sum(), rtol=1e-5)
    twelve = build_fusion("global", num_layers=12, hidden_size=HIDDEN, prior=1.0)
    assert isinstance(twelve, GlobalFusion)
    assert twelve.layer_weights()[-1].item() == pytest.approx(0.63, abs=0.005)  # as the option's description says


def numpy_transformer_weights(fusion: TransformerFusion, tokens: np.ndarray) -> np.ndarray:
    """Weights `[tokens, layers]` of states `[layers, tokens, hidden]`: the equations, token by token, in float64."""
    p = {name: value.detach().numpy().astype(np.float64) for name, value in fusion.state_dict().items()}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        return (
            centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p[f"layer.{name}.weight"]
            + p[f"layer.{name}.bias"]
        )

    def softmax(x: np.ndarray) -> np.ndarray:
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    rows = []
    for token in range(tokens.shape[1]):
        x = np.concatenate([p["cls"][None], tokens[:, token] + p["positions"]])
        q, k, v = np.split(x @ p["layer.self_attn.in_proj_weight"].T + p["layer.self_attn.in_proj_bias"], 3, axis=-1)
        attended = softmax(q @ k.T / np.sqrt(x.shape[-1])) @ v
        attended = attended @ p["layer.self_attn.out_proj.weight"].T + p["layer.self_attn.out_proj.bias"]
        x = norm(x + attended, "norm1")
        inner = np.maximum(x @ p["layer.linear1.weight"].T + p["layer.linear1.bias"], 0)
        y = norm(x + inner @ p["layer.linear2.weight"].T + p["layer.linear2.bias"], "norm2")
        rows.append(softmax(y[0] @ p["classifier.weight"].T + p["classifier.bias"]))
    return np.stack(rows)


def test_transformer_follows_the_published_equations() -> None:
    fusion = scrambled(fusion_of("transformer"))
    assert isinstance(fusion, TransformerFusion)
    real = mask().bool()
    weights = numpy_transformer_weights(fusion, states()[:, real].numpy().astype(np.float64))
    assert weights.max() - weights.min() > 0.2  # the comparison would pass for uniform weights otherwise
    np.testing.assert_allclose(fusion.weights(states(), mask())[real].detach().numpy(), weights, atol=1e-5)
    expected = np.einsum("nl,lnh->nh", weights, states()[:, real].numpy())  # raw states, without the positions
    np.testing.assert_allclose(fusion(states(), mask())[real].detach().numpy(), expected, atol=1e-4)


def test_transformer_has_the_gradients_of_the_whole_layer() -> None:
    """The short cut through cls gives what PyTorch's own layer gives, gradients included."""
    fusion = scrambled(fusion_of("transformer")).double()
    assert isinstance(fusion, TransformerFusion)
    tokens = states(torch.float64)[:, mask().bool()]
    probe = torch.randn(tokens.shape[1], LAYERS, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def gradients(logits: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad((logits * probe).sum(), list(fusion.parameters())))

    count = tokens.shape[1]
    sequence = torch.cat(
        [fusion.cls.expand(count, 1, HIDDEN), tokens.transpose(0, 1) + fusion.positions], dim=1
    )  # [tokens, 1 + layers, hidden]
    whole = fusion.classifier(fusion.layer(sequence)[:, 0])
    short = fusion._layer_logits(tokens)
    torch.testing.assert_close(short, whole)
    torch.testing.assert_close(gradients(short), gradients(whole), rtol=1e-9, atol=1e-9)


def test_transformer_drops_out_in_training_only() -> None:
    fusion = scrambled(fusion_of("transformer", dropout=0.5))
    assert torch.equal(fusion(states(), mask()), fusion(states(), mask()))
    fusion.train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert not torch.equal(fusion(states(), mask()), fusion(states(), mask()))


def test_attention_dropout_reaches_the_bias_of_the_values() -> None:
    """With values that are their bias alone, attention varies with the chances left by dropout, as PyTorch's does."""
    fusion = scrambled(fusion_of("transformer", dropout=0.0)).train()
    assert isinstance(fusion, TransformerFusion)
    attention = fusion.layer.self_attn
    attention.dropout = 0.5
    with torch.no_grad():
        attention.in_proj_weight[2 * HIDDEN :] = 0
    sequence = torch.zeros(1, 1 + LAYERS, HIDDEN)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert not torch.equal(fusion.layer(sequence), fusion.layer(sequence))
        assert not torch.equal(fusion(states(), mask()), fusion(states(), mask()))


@pytest.mark.parametrize("name", list(FUSIONS))
def test_padding_is_exactly_zero_and_changes_nothing(name: str) -> None:
    fusion = scrambled(fusion_of(name))
    whole = states()
    whole[:, ~mask().bool()] = float("inf")  # whatever an encoder leaves there
    fused = fusion(whole, mask())
    assert torch.equal(fused[~mask().bool()], torch.zeros(int((1 - mask()).sum()), HIDDEN))
    assert torch.equal(fused, fusion(whole, mask().bool()))
    for row, length in enumerate(mask().sum(1).tolist()):
        alone = fusion(states()[:, row : row + 1, :length], torch.ones(1, length))
        torch.testing.assert_close(fused[row : row + 1, :length], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", list(FUSIONS))
def test_weights_say_what_the_fusion_does(name: str) -> None:
    fusion = scrambled(fusion_of(name))
    weights = fusion.weights(states(), mask())
    assert weights.shape == (BATCH, LENGTH, LAYERS)
    torch.testing.assert_close(weights.sum(-1), mask().float())
    assert (weights[~mask().bool()] == 0).all()
    torch.testing.assert_close(torch.einsum("btl,lbth->bth", weights, states()), fusion(states(), mask()))


@pytest.mark.parametrize("name", list(FUSIONS))
def test_half_precision_states_are_summed_in_float32(name: str) -> None:
    fusion = scrambled(fusion_of(name))
    half = states(torch.bfloat16)
    expected = fusion(half.float(), mask())
    with torch.autocast("cpu", torch.bfloat16, enabled=name != "transformer"):  # its logits are learned in bfloat16
        assert torch.equal(fusion(half, mask()), expected.bfloat16())


@pytest.mark.parametrize(
    ("name", "hidden", "count"),
    [("global", 1024, 25), ("transformer", 1024, 8.45e6), ("transformer", 2048, 25.29e6), ("last", 1024, 0)],
)
def test_parameter_counts_are_the_published_ones(name: str, hidden: int, count: float) -> None:
    with torch.device("meta"):
        fusion = build_fusion(name, num_layers=24, hidden_size=hidden)
    assert sum(p.numel() for p in fusion.parameters()) == pytest.approx(count, abs=0.005e6 if count > 1e6 else 0)
    assert fusion.trainable == bool(count)


def test_every_parameter_learns() -> None:
    for name in ("global", "transformer"):
        fusion = scrambled(fusion_of(name, **({"dropout": 0.0} if name == "transformer" else {})))
        (fusion(states(), mask()) ** 2).sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in fusion.parameters())


def test_the_seed_decides_and_the_global_generator_stays() -> None:
    before = torch.get_rng_state()
    one, same, other = (
        build_fusion("transformer", num_layers=LAYERS, hidden_size=HIDDEN, seed=seed).state_dict() for seed in (3, 3, 4)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["positions"], other["positions"])
    assert one["cls"].abs().sum() == 0
    assert one["positions"].std().item() == pytest.approx(1, abs=0.25)


def test_wrong_names_options_and_shapes_are_explained() -> None:
    with pytest.raises(ConfigError, match=r"unknown fusion 'globl'(.|\n)*did you mean 'global'"):
        build_fusion("globl", num_layers=2, hidden_size=4)
    with pytest.raises(ConfigError, match=r"unknown option 'heads'(.|\n)*options: feed_forward, dropout"):
        build_fusion("transformer", num_layers=2, hidden_size=4, heads=2)
    with pytest.raises(ConfigError, match="takes no options"):
        build_fusion("last", num_layers=2, hidden_size=4, index=1)
    with pytest.raises(ConfigError, match="temperature='hot'"):
        build_fusion("global", num_layers=2, hidden_size=4, temperature="hot")
    with pytest.raises(ConfigError, match="'index' is missing"):
        build_fusion("layer_index", num_layers=2, hidden_size=4)
    for name in FUSIONS:
        with pytest.raises(ModelError, match=rf"\[4, 3, 7, 16\] do not fit(.|\n)*\[{LAYERS}, batch"):
            fusion_of(name)(states()[1:], mask())


# hidden states


def test_the_published_convention_leaves_the_embeddings_out() -> None:
    given = tuple(torch.full((1, 2, HIDDEN), float(layer)) for layer in range(LAYERS + 1))
    published, with_embeddings = hidden_states(), hidden_states(include_embeddings=True)
    assert published.num_layers == LAYERS
    assert published(given)[:, 0, 0, 0].tolist() == [1, 2, 3, 4, 5]
    assert with_embeddings.num_layers == LAYERS + 1
    assert with_embeddings(given)[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert not list(published.parameters()) and not list(published.buffers())
    with pytest.raises(ModelError, match="gave 5 hidden states"):
        published(given[1:])


def test_layer_norm_is_per_layer_and_token() -> None:
    given = torch.cat([states()[:1], states()])
    out = hidden_states(normalise="layer-norm")(tuple(given)).numpy()
    raw = states().numpy().astype(np.float64)
    expected = (raw - raw.mean(-1, keepdims=True)) / np.sqrt(raw.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    assert hidden_states(normalise="layer-norm")(tuple(given.bfloat16())).dtype == torch.bfloat16


def test_final_norm_puts_the_raw_layers_of_t5_on_the_scale_of_the_last() -> None:
    config = MT5Config(vocab_size=50, d_model=HIDDEN, d_kv=4, d_ff=32, num_layers=LAYERS, num_heads=4, dropout_rate=0.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = MT5EncoderModel(config).eval()
    norm = encoder.encoder.final_layer_norm
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, HIDDEN))
        given = encoder(input_ids=torch.arange(10)[None], output_hidden_states=True).hidden_states
        out = hidden_states(normalise="final-norm")(given, norm)
        raw = torch.stack(given[1:]).double()
        normed = raw / (raw.square().mean(-1, keepdim=True) + config.layer_norm_epsilon).sqrt() * norm.weight
    assert torch.equal(out[-1], given[-1])
    torch.testing.assert_close(out[:-1], normed[:-1].float(), rtol=1e-5, atol=1e-5)
    with pytest.raises(ModelError, match="needs an encoder whose layers share a final norm"):
        hidden_states(normalise="final-norm")(given)


def test_standardise_uses_the_statistics_of_real_tokens() -> None:
    module = hidden_states(normalise="standardise")
    raw, real = states(), mask().bool()
    raw += 1000  # a mean far from zero, as in a few features of real encoders
    raw[2, ..., 3] = 7  # and a feature that never varies
    raw[:, ~real] = float("nan")
    with pytest.raises(ModelError, match="no statistics yet"):
        module.normalised(raw)
    module.fit([(raw[:, :1], mask()[:1]), (raw[:, 1:], mask()[1:])])
    tokens = raw[:, real].numpy().astype(np.float64)
    std = tokens.std(1)
    std[2, 3] = 1
    np.testing.assert_allclose(module.mean.numpy(), tokens.mean(1), rtol=1e-6)
    np.testing.assert_allclose(module.std.numpy(), std, rtol=1e-5)
    out = module(tuple(torch.cat([raw[:1], raw])))[:, real].numpy()
    np.testing.assert_allclose(out, (tokens - tokens.mean(1)[:, None]) / std[:, None], atol=1e-3)

    loaded = hidden_states(normalise="standardise")
    loaded.load_state_dict(module.state_dict())
    assert torch.equal(loaded.normalised(raw)[:, real], module.normalised(raw)[:, real])


def test_standardise_refuses_what_it_cannot_fit() -> None:
    with pytest.raises(DataError, match="no token"):
        hidden_states(normalise="standardise").fit([(states(), torch.zeros(BATCH, LENGTH))])
    with pytest.raises(ModelError, match="do not fit"):
        hidden_states(normalise="standardise").fit([(states()[1:], mask())])
    with pytest.raises(ConfigError, match="no statistics to fit"):
        hidden_states().fit([(states(), mask())])
