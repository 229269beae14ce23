"""The layer-wise aligner: its equations in plain NumPy; padding, caches, beams; what is trained and what is not."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from enc2gen.errors import ConfigError, ModelError
from enc2gen.models.bridge.aligner import AlignerConfig, LayerwiseAligner, build_aligner

VOCABULARY, ENCODER_LAYERS, ENCODER_SIZE, LLM_LAYERS = 50, 4, 12, 2
CONFIGS: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "llama-bias": (LlamaConfig, {"attention_bias": True}),
    "mistral": (MistralConfig, {}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"attention_bias": True}),
    "gemma": (GemmaConfig, {}),
    "gemma2": (Gemma2Config, {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 24}),
    "gemma3": (Gemma3TextConfig, {"layer_types": ["sliding_attention", "full_attention"]}),
    "smollm3": (SmolLM3Config, {"no_rope_layers": [1, 0]}),
}


def tiny_llm(family: str = "llama", attention: str = "eager", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random LLM: 4 query heads on 2 key heads, heads wider than hidden/heads, no parameter at its default value."""
    kind, options = CONFIGS[family]
    config = kind(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=40, num_hidden_layers=LLM_LAYERS,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, **options,
    )  # fmt: skip
    torch.manual_seed(1)
    llm = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in llm.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return llm.to(dtype).eval().requires_grad_(False)


def tiny_aligner(llm: PreTrainedModel, gate: float | None = 1.5, **options: Any) -> LayerwiseAligner:
    """An aligner for `llm`; `gate` is the first layer's, the next ones differ (None: as built)."""
    aligner = build_aligner(options, num_layers=ENCODER_LAYERS, encoder_size=ENCODER_SIZE, llm=llm, seed=3)
    if gate is not None:
        with torch.no_grad():
            aligner.gates.copy_(gate * torch.arange(1, LLM_LAYERS + 1))
    return aligner


def sources(lengths: tuple[int, ...] = (5, 3), seed: int = 0) -> tuple[Tensor, Tensor]:
    """Encoder states `[layers, batch, length, hidden]`, NaN at padding (whoever reads it shows), and mask."""
    mask = (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()
    generator = torch.Generator().manual_seed(seed)
    states = 2 * torch.randn((ENCODER_LAYERS, *mask.shape, ENCODER_SIZE), generator=generator)
    return states.masked_fill(mask[None, :, :, None] == 0, torch.nan), mask


def ids(rows: int, length: int = 6, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(llm: PreTrainedModel, aligner: LayerwiseAligner, states: Tensor, mask: Tensor, **inputs: Any) -> Tensor:
    with torch.no_grad(), aligner.reading(llm, aligner.keys_values(states, mask, llm), mask):
        return llm(**inputs).logits


# The oracle: one attention layer in plain NumPy, float64.


def array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().to(torch.float64).numpy()


def linear(module: nn.Linear, x: np.ndarray) -> np.ndarray:
    return x @ array(module.weight).T + (0.0 if module.bias is None else array(module.bias))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def normalise(module: Any, x: np.ndarray, offset: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * (offset + array(module.weight))


def rope(x: np.ndarray, theta: float) -> np.ndarray:
    """Rotate `[length, heads, dim]` by position 0, 1, ..."""
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None, None] * theta ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate((a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)), -1)


def theta_of(attention: Any) -> float | None:
    if not getattr(attention, "use_rope", True):
        return None
    rope_parameters = attention.config.rope_parameters
    kind = getattr(attention, "layer_type", None)
    return rope_parameters.get(kind, rope_parameters)["rope_theta"]


def mixture(aligner: LayerwiseAligner, states: np.ndarray, row: int) -> np.ndarray:
    """Row `row` of the layer mixing, then the map to the LLM's width: `[layers, length, hidden]` -> `[length, D]`."""
    mixed = np.tensordot(array(aligner.fc1.weight)[row], states, axes=1) + array(aligner.fc1.bias)[row]
    wide = linear(aligner.fc2, np.maximum(mixed, 0))
    return wide if aligner.fc3 is None else linear(aligner.fc3, np.maximum(wide, 0))


def layer_oracle(
    attention: Any, aligner: LayerwiseAligner, index: int, x: np.ndarray, states: np.ndarray
) -> np.ndarray:
    """GA(T) = SA(T) + g CA(T, K, V) of one layer for one text `x` `[length, hidden]` and one source's real tokens."""
    config, dim, length = attention.config, attention.head_dim, len(x)
    gemma = config.model_type.startswith("gemma")
    scale = (config.query_pre_attn_scalar if config.model_type in ("gemma2", "gemma3_text") else dim) ** -0.5
    cap = config.attn_logit_softcapping if config.model_type == "gemma2" else None
    theta = theta_of(attention)

    def split(module: nn.Linear, y: np.ndarray, norm: str | None = None, rotated: bool = False) -> np.ndarray:
        heads = linear(module, y).reshape(len(y), -1, dim)
        if norm and hasattr(attention, norm):
            heads = normalise(getattr(attention, norm), heads, offset=float(gemma))
        return rope(heads, theta) if rotated and theta is not None else heads

    def attend(queries: np.ndarray, keys: np.ndarray, values: np.ndarray, mask: np.ndarray) -> np.ndarray:
        out = np.zeros((length, queries.shape[1], dim))
        for head in range(queries.shape[1]):
            shared = head // (queries.shape[1] // keys.shape[1])
            scores = queries[:, head] @ keys[:, shared].T * scale
            scores = scores if cap is None else cap * np.tanh(scores / cap)
            out[:, head] = softmax(np.where(mask, scores, -np.inf)) @ values[:, shared]
        return out.reshape(length, -1)

    queries = split(attention.q_proj, x, "q_norm", rotated=True)
    own = attend(
        queries,
        split(attention.k_proj, x, "k_norm", rotated=True),
        split(attention.v_proj, x),
        np.tri(length, dtype=bool),
    )
    keys = split(attention.k_proj, mixture(aligner, states, 2 * index), "k_norm")
    values = split(attention.v_proj, mixture(aligner, states, 2 * index + 1))
    read = attend(queries, keys, values, np.ones((length, len(keys)), dtype=bool))
    return linear(attention.o_proj, own + array(aligner.gates)[index] * read)


@pytest.mark.parametrize("structure", ["linear", "mlp"])
@pytest.mark.parametrize(
    ("family", "kernel"), [*((name, "eager") for name in CONFIGS), ("llama", "sdpa"), ("qwen3", "sdpa")]
)
def test_every_layer_computes_equation_2(family: str, kernel: str, structure: str) -> None:
    llm = tiny_llm(family, kernel)
    aligner = tiny_aligner(llm, structure=structure)
    states, mask = sources()
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    layers = [layer.self_attn for layer in llm.get_decoder().layers]
    for index, attention in enumerate(layers):
        attention.register_forward_hook(
            lambda _, args, kwargs, out, i=index: seen.update({i: (kwargs["hidden_states"], out[0])}), with_kwargs=True
        )
    logits(llm, aligner, states, mask, input_ids=ids(2))
    for index, attention in enumerate(layers):
        for row in range(2):
            real = array(states[:, row, : mask[row].sum()])
            expected = layer_oracle(attention, aligner, index, array(seen[index][0][row]), real)
            np.testing.assert_allclose(array(seen[index][1][row]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma3"])
def test_gate_at_zero_changes_not_one_bit(family: str, dtype: torch.dtype, kernel: str) -> None:
    llm = tiny_llm(family, kernel, dtype)
    aligner = tiny_aligner(llm, gate=None)
    assert all(p.dtype == torch.float32 for p in aligner.parameters())
    states, mask = sources()
    plain = llm(input_ids=ids(2)).logits
    assert plain.dtype == dtype
    assert torch.equal(logits(llm, aligner, states, mask, input_ids=ids(2)), plain)
    with torch.no_grad():
        aligner.gates[-1] = 0.5
    changed = logits(llm, aligner, states, mask, input_ids=ids(2))
    assert changed.dtype == dtype and (changed - plain).abs().max() > 1e-2


def test_bfloat16_llm_is_close_to_float32() -> None:
    states, mask = sources()
    exact = logits(llm := tiny_llm(), tiny_aligner(llm, 0.5), states, mask, input_ids=ids(2))
    rough = logits(llm := tiny_llm(dtype=torch.bfloat16), tiny_aligner(llm, 0.5), states, mask, input_ids=ids(2))
    assert (rough.float() - exact).abs().max() < 0.1 * exact.std()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_works_under_autocast(family: str) -> None:
    llm = tiny_llm(family)
    states, mask = sources()
    with torch.autocast("cpu", torch.bfloat16):
        plain = llm(input_ids=ids(2)).logits
        closed = logits(llm, tiny_aligner(llm, gate=None), states, mask, input_ids=ids(2))
        rough = logits(llm, tiny_aligner(llm, 0.5), states, mask, input_ids=ids(2))
    assert torch.equal(closed, plain)
    exact = logits(llm, tiny_aligner(llm, 0.5), states, mask, input_ids=ids(2))
    assert (rough.float() - exact).abs().max() < 0.15 * exact.std()


def test_the_encoder_is_read_per_source() -> None:
    llm = tiny_llm()
    aligner = tiny_aligner(llm)
    same_text = ids(1).repeat(2, 1)
    first, second = logits(llm, aligner, *sources((4, 4)), input_ids=same_text)
    assert (first - second).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_padding_on_both_sides_does_not_leak(family: str) -> None:
    llm = tiny_llm(family)
    aligner = tiny_aligner(llm)
    states, mask = sources((5, 2, 4))
    texts, lengths = ids(3), (3, 6, 4)
    for side in ("left", "right"):
        own = torch.zeros(3, 6, dtype=torch.long)
        for row, length in enumerate(lengths):
            own[row, 6 - length :] = 1
        own = own if side == "left" else own.flip(1)
        positions = (own.cumsum(1) - 1).clamp(min=0)
        batch = logits(llm, aligner, states, mask, input_ids=texts, attention_mask=own, position_ids=positions)
        for row in range(3):
            real = int(mask[row].sum())
            alone = logits(
                llm, aligner, states[:, row : row + 1, :real], mask[row : row + 1, :real],
                input_ids=texts[row][own[row] == 1][None],
            )  # fmt: skip
            torch.testing.assert_close(batch[row][own[row] == 1], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_cached_decoding_equals_uncached(family: str) -> None:
    llm = tiny_llm(family)
    aligner = tiny_aligner(llm)
    states, mask = sources()
    text = ids(2)
    whole = logits(llm, aligner, states, mask, input_ids=text)
    keys_values, cache, steps = aligner.keys_values(states, mask, llm), None, []
    for piece in (text[:, :3], *text[:, 3:].split(1, dim=1)):
        with torch.no_grad(), aligner.reading(llm, keys_values, mask):
            output = llm(input_ids=piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)


def test_rows_grouped_by_source_read_their_source() -> None:
    llm = tiny_llm()
    aligner = tiny_aligner(llm)
    states, mask = sources()
    beams = ids(6)
    grouped = logits(llm, aligner, states, mask, input_ids=beams)
    repeated = logits(llm, aligner, states.repeat_interleave(3, 1), mask.repeat_interleave(3, 0), input_ids=beams)
    torch.testing.assert_close(grouped, repeated, rtol=1e-5, atol=1e-5)
    for row in (2, 3):
        source = slice(row // 3, row // 3 + 1)
        alone = logits(llm, aligner, states[:, source], mask[source], input_ids=beams[row : row + 1])
        torch.testing.assert_close(grouped[row], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_beam_search_is_the_same_with_cache_without_and_alone(family: str) -> None:
    llm = tiny_llm(family)
    aligner = tiny_aligner(llm)
    states, mask = sources()

    def search(rows: slice, **options: Any) -> list[list[int]]:
        keys_values = aligner.keys_values(states[:, rows], mask[rows], llm)
        start = torch.ones(len(mask[rows]), 1, dtype=torch.long)
        with torch.no_grad(), aligner.reading(llm, keys_values, mask[rows]):
            return llm.generate(
                start, attention_mask=start, num_beams=3, do_sample=False, max_new_tokens=6, min_new_tokens=6, **options
            ).tolist()

    both = search(slice(0, 2))
    assert both == search(slice(0, 2), use_cache=False) == search(slice(0, 1)) + search(slice(1, 2))
    assert both[0] != both[1]


def test_keys_are_projected_once_per_source() -> None:
    llm = tiny_llm()
    aligner = tiny_aligner(llm)
    calls = {"fc2": 0, "k_proj": 0}
    aligner.fc2.register_forward_hook(lambda *_: calls.update(fc2=calls["fc2"] + 1))
    llm.get_decoder().layers[0].self_attn.k_proj.register_forward_hook(
        lambda *_: calls.update(k_proj=calls["k_proj"] + 1)
    )
    states, mask = sources()
    keys_values = aligner.keys_values(states, mask, llm)
    assert keys_values.shape == (2, LLM_LAYERS, 2, 2, 5, 16)
    assert (keys_values[1, ..., 3:, :] == 0).all() and (keys_values[1, ..., :3, :] != 0).any()
    start = torch.ones(2, 1, dtype=torch.long)
    with aligner.reading(llm, keys_values, mask):
        llm.generate(start, attention_mask=start, do_sample=False, max_new_tokens=5, min_new_tokens=5)
    assert calls == {"fc2": 2 * LLM_LAYERS, "k_proj": 1 + 5}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_reaches_the_aligner_and_nothing_else(dtype: torch.dtype) -> None:
    llm = tiny_llm(dtype=dtype)
    aligner = tiny_aligner(llm, 0.5)
    states, mask = sources()
    with aligner.reading(llm, aligner.keys_values(states, mask, llm), mask):
        llm(input_ids=ids(2), labels=ids(2)).loss.backward()
    for name, parameter in aligner.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name
    assert all(parameter.grad is None for parameter in llm.parameters())


def test_at_the_start_only_the_gates_have_a_gradient() -> None:
    llm = tiny_llm()
    aligner = tiny_aligner(llm, gate=None)
    states, mask = sources()
    with aligner.reading(llm, aligner.keys_values(states, mask, llm), mask):
        llm(input_ids=ids(2), labels=ids(2)).loss.backward()
    moving = {name for name, parameter in aligner.named_parameters() if parameter.grad.any()}
    assert moving == {"gates"}


def test_a_frozen_llm_learns_to_say_what_only_the_encoder_knows() -> None:
    llm = tiny_llm()
    aligner = tiny_aligner(llm, gate=None)
    states, mask = sources((4, 4, 4, 4))
    text = torch.ones(4, 1, dtype=torch.long)
    targets = torch.tensor([7, 21, 33, 48])
    optimizer = torch.optim.Adam(aligner.parameters(), lr=0.02)
    for _ in range(100):
        with aligner.reading(llm, aligner.keys_values(states, mask, llm), mask):
            loss = nn.functional.cross_entropy(llm(input_ids=text).logits[:, -1], targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.4  # without the encoder ln 4 = 1.39 is the best: one text, four targets


def test_published_parameter_count() -> None:
    with torch.device("meta"):
        aligner = LayerwiseAligner(AlignerConfig(), num_layers=24, encoder_size=2048, llm_layers=32, llm_size=4096)
    counts = {name: parameter.numel() for name, parameter in aligner.named_parameters()}
    assert counts.pop("gates") == 32
    assert sum(counts.values()) == 24 * 64 + 64 + 2048 * 4096 + 4096 == 8_394_304


def test_a_seed_fixes_the_weights_and_leaves_the_global_generator_alone() -> None:
    llm = tiny_llm()

    def weights(seed: int) -> Tensor:
        return build_aligner({}, num_layers=4, encoder_size=12, llm=llm, seed=seed).fc2.weight

    before = torch.random.get_rng_state()
    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_saved_weights_give_the_same_logits() -> None:
    llm = tiny_llm()
    aligner = tiny_aligner(llm, structure="mlp")
    copy = build_aligner(aligner.config, num_layers=ENCODER_LAYERS, encoder_size=ENCODER_SIZE, llm=llm, seed=99)
    copy.load_state_dict(aligner.state_dict())
    states, mask = sources()
    assert torch.equal(*(logits(llm, each, states, mask, input_ids=ids(2)) for each in (aligner, copy)))


@pytest.mark.parametrize("inside", [True, False], ids=["error in the LLM", "no error"])
def test_afterwards_the_llm_is_as_before(inside: bool) -> None:
    llm = tiny_llm()
    aligner = tiny_aligner(llm)
    states, mask = sources()
    plain = llm(input_ids=ids(2)).logits
    keys_values = aligner.keys_values(states, mask, llm)
    for _ in range(2):
        with pytest.raises(IndexError) if inside else nothing(), aligner.reading(llm, keys_values, mask):
            llm(input_ids=torch.tensor([[VOCABULARY]] if inside else [[1], [1]]))
    assert torch.equal(llm(input_ids=ids(2)).logits, plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in llm.modules())


@contextmanager
def nothing() -> Any:
    yield


def test_an_llm_with_lora_is_read_the_same_way() -> None:
    peft = pytest.importorskip("peft")
    llm = tiny_llm()
    states, mask = sources()
    aligner = tiny_aligner(llm)
    expected = logits(llm, aligner, states, mask, input_ids=ids(2))
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    adapted = peft.get_peft_model(llm, settings).eval()
    torch.testing.assert_close(logits(adapted, aligner, states, mask, input_ids=ids(2)), expected)


def test_a_source_without_any_real_token_adds_nothing() -> None:
    llm = tiny_llm("qwen2")
    states, mask = sources((3, 3))
    mask[1] = 0
    both = logits(llm, tiny_aligner(llm), states, mask, input_ids=ids(2))
    torch.testing.assert_close(both[1], llm(input_ids=ids(2)).logits[1])


def test_unsupported_llms_are_named() -> None:
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=20))
    with pytest.raises(ModelError, match=r"'gpt2'[\s\S]*llama, mistral, qwen2"):
        build_aligner({}, num_layers=4, encoder_size=12, llm=gpt2)


def test_what_does_not_fit_is_refused() -> None:
    llm = tiny_llm()
    aligner = tiny_aligner(llm)
    states, mask = sources()
    with pytest.raises(
        ModelError, match=r"shape \[5, 2, 5, 12\], expected \[4, 2, 5, 12\][\s\S]*all hidden states but"
    ):
        aligner.keys_values(torch.cat((states, states[:1])), mask, llm)
    with pytest.raises(ModelError, match="3 rows of the LLM's input cannot be grouped by 2 sources"):
        logits(llm, aligner, states, mask, input_ids=ids(3))
    with (
        pytest.raises(ModelError, match=r"2 sources of length 5 do not fit a mask of the shape \[4, 5\]"),
        aligner.reading(llm, aligner.keys_values(states, mask, llm), mask.repeat(2, 1)),
    ):
        pass
    with torch.no_grad():
        shallow = LayerwiseAligner(AlignerConfig(), num_layers=4, encoder_size=12, llm_layers=3, llm_size=32)
    with pytest.raises(ModelError, match="the LLM has 2 layers, the aligner was made for 3"):
        shallow.keys_values(states, mask, llm)
    with pytest.raises(ConfigError, match=r"'width'[\s\S]*options: structure"):
        build_aligner({"width": 32}, num_layers=4, encoder_size=12, llm=llm)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in llm.modules())


def test_gradient_checkpointing_is_refused_instead_of_forgetting_the_encoder() -> None:
    llm = tiny_llm()
    aligner = tiny_aligner(llm)
    states, mask = sources()
    keys_values = aligner.keys_values(states, mask, llm)
    llm.gradient_checkpointing_enable()
    with (
        pytest.raises(ModelError, match="gradient_checkpointing_disable"),
        aligner.reading(llm.train(), keys_values, mask),
    ):
        pass
    with aligner.reading(llm.eval(), keys_values, mask):
        llm(input_ids=ids(2))
