"""Decoders grown from ModernBERT, EuroBERT and XLM-R XL; the oracle: transformers' encoders under a causal mask."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    EuroBertConfig,
    EuroBertModel,
    ModernBertConfig,
    ModernBertDecoderConfig,
    ModernBertDecoderModel,
    ModernBertForMaskedLM,
    ModernBertModel,
    PreTrainedModel,
    XLMRobertaXLConfig,
    XLMRobertaXLModel,
)

from conftest import tiny_encoder, tiny_tokenizer
from enc2gen import SwcmForConditionalGeneration
from enc2gen.encoders.donor import donor_for, supported_model_types
from enc2gen.encoders.loading import load_encoder
from enc2gen.errors import ConfigError, ModelError
from enc2gen.generation.decoding import DecodingConfig
from enc2gen.generation.generator import Generator
from enc2gen.models.baselines import PRESETS, build_system

HIDDEN, FFN, HEADS, WINDOW = 24, 40, 4, 4
KINDS = ["modernbert", "modernbert-biases", "eurobert", "eurobert-biases", "xlm-roberta-xl"]
FAMILIES = ["modernbert", "eurobert", "xlm-roberta-xl"]
PAD = {"modernbert": 5, "eurobert": 2, "xlm-roberta-xl": 1}
SOURCE = torch.tensor([[0, 9, 8, 7, 50, 61, 12, 2], [0, 30, 31, 32, 33, 34, 35, 2]])
TARGET = torch.randint(6, 100, (2, 11), generator=torch.Generator().manual_seed(3))


def tiny(kind: str, *, layers: int = 5, vocabulary: int = 120, **changes: Any) -> PreTrainedModel:
    """A random encoder with every tensor off its default; windows, bases and head counts tell layers apart."""
    family, biases = kind.removesuffix("-biases"), kind.endswith("-biases")
    common: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 66,
        "pad_token_id": PAD[family],
        "bos_token_id": 0,
        "eos_token_id": 2,
    } | changes
    torch.manual_seed(0)
    model: PreTrainedModel
    if family == "modernbert":
        rope = {
            "full_attention": {"rope_type": "default", "rope_theta": 300.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
        }
        options = dict.fromkeys(("attention_bias", "mlp_bias", "norm_bias"), biases)
        common |= {"local_attention": WINDOW, "rope_parameters": rope, "cls_token_id": 0, "sep_token_id": 2}
        model = ModernBertModel(ModernBertConfig(**options, **common))
    elif family == "eurobert":
        options = dict.fromkeys(("attention_bias", "mlp_bias"), biases)
        common |= {"num_key_value_heads": 2, "head_dim": 10, "rms_norm_eps": 1e-3, "mask_token_id": 4}
        common |= {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}, **changes}
        model = EuroBertModel(EuroBertConfig(**options, **common))
    else:
        model = XLMRobertaXLModel(XLMRobertaXLConfig(**common), add_pooling_layer=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def grow(encoder: Any, **options: Any) -> SwcmForConditionalGeneration:
    return SwcmForConditionalGeneration.from_encoder(encoder, **{"languages": ["kk"], "verbose": False, **options})


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def modernbert_copies(donor: int, biases: bool) -> dict[str, tuple[str, slice]]:
    kinds, everything = ("weight", "bias") if biases else ("weight",), slice(None)
    pairs: dict[str, tuple[str, slice]] = {}
    for kind in kinds:
        for attention in ("self_attention", "cross_attention"):
            for place, part in enumerate(("q_proj", "k_proj", "v_proj")):
                rows = slice(place * HIDDEN, (place + 1) * HIDDEN)
                pairs[f"{attention}.{part}.{kind}"] = (f"attn.Wqkv.{kind}", rows)
            pairs[f"{attention}.out_proj.{kind}"] = (f"attn.Wo.{kind}", everything)
            pairs[f"{attention}_norm.{kind}"] = (f"attn_norm.{kind}", everything)
        for ffn in ("ffn1", "ffn2"):
            pairs[f"{ffn}.gate_proj.{kind}"] = (f"mlp.Wi.{kind}", slice(0, FFN))
            pairs[f"{ffn}.up_proj.{kind}"] = (f"mlp.Wi.{kind}", slice(FFN, 2 * FFN))
            pairs[f"{ffn}.down_proj.{kind}"] = (f"mlp.Wo.{kind}", everything)
            pairs[f"{ffn}_norm.{kind}"] = (f"mlp_norm.{kind}", everything)
    if donor == 0:  # the bottom layer has no attention norm: none, and the embeddings' for cross-attention
        for kind in kinds:
            del pairs[f"self_attention_norm.{kind}"]
            pairs[f"cross_attention_norm.{kind}"] = (f"../../embeddings.norm.{kind}", everything)
    return pairs


def plain_copies(
    names: dict[str, str], norms: dict[str, str], kinds: tuple[str, ...], norm_kinds: tuple[str, ...]
) -> Any:
    everything = slice(None)
    pairs = {}
    for part, theirs in names.items():
        targets = ("self_attention", "cross_attention") if part in ("q_proj", "k_proj", "v_proj", "out_proj") else None
        for target in targets or ("ffn1", "ffn2"):
            pairs |= {f"{target}.{part}.{kind}": (f"{theirs}.{kind}", everything) for kind in kinds}
    for targets, theirs in (
        (("self_attention", "cross_attention"), norms["attention"]),
        (("ffn1", "ffn2"), norms["ffn"]),
    ):
        pairs |= {f"{t}_norm.{kind}": (f"{theirs}.{kind}", everything) for t in targets for kind in norm_kinds}
    return pairs


def copies(kind: str, donor: int) -> dict[str, tuple[str, slice]]:
    """The table of sources of one custom layer, spelled out independently of the product."""
    biases = kind.endswith("-biases")
    if kind.startswith("modernbert"):
        return modernbert_copies(donor, biases)
    if kind.startswith("eurobert"):
        names = {f"{p}_proj": f"self_attn.{p}_proj" for p in "qkv"} | {"out_proj": "self_attn.o_proj"}
        names |= {f"{p}_proj": f"mlp.{p}_proj" for p in ("gate", "up", "down")}
        norms = {"attention": "input_layernorm", "ffn": "post_attention_layernorm"}
        return plain_copies(names, norms, ("weight", "bias") if biases else ("weight",), ("weight",))
    names = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}
    names = {part: f"attention.self.{name}" for part, name in names.items()} | {"out_proj": "attention.output.dense"}
    names |= {"fc1": "intermediate.dense", "fc2": "output.dense"}
    norms = {"attention": "attention.self_attn_layer_norm", "ffn": "LayerNorm"}
    return plain_copies(names, norms, ("weight", "bias"), ("weight", "bias"))


FINAL_NORM = {"modernbert": "final_norm", "eurobert": "norm", "xlm-roberta-xl": "encoder.LayerNorm"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_of_a_custom_layer_is_its_part_of_the_encoder(kind: str) -> None:
    encoder = tiny(kind)
    model = grow(encoder, insert_every=3)
    ours, theirs = dict(model.named_parameters()), dict(encoder.named_parameters())
    assert model.init_report.plan == ["custom:0", "custom:1", "custom:2", "normal", "custom:3", "custom:4"]
    stack = "encoder.layer" if kind == "xlm-roberta-xl" else "layers"
    for place, donor in ((0, 0), (1, 1), (2, 2), (4, 3), (5, 4)):
        expected = copies(kind, donor)
        prefix = f"decoder.layers.{place}."
        assert {name.removeprefix(prefix) for name in ours if name.startswith(prefix)} == set(expected)
        for target, (source, rows) in expected.items():
            source = source.removeprefix("../../") if source.startswith("../../") else f"{stack}.{donor}.{source}"
            assert torch.equal(ours[prefix + target], theirs[source][rows]), (place, target)
    final = FINAL_NORM[kind.removesuffix("-biases")]
    for name in (n for n in ours if n.startswith("decoder.final_norm.")):
        assert torch.equal(ours[name], theirs[name.replace("decoder.final_norm", final)])
    random = model.init_report.names("random")
    assert random and all(name.startswith("decoder.layers.3.") for name in random)


def test_report_names_the_rows_of_fused_matrices() -> None:
    report = grow(tiny("modernbert")).init_report
    sources = {tensor.name: tensor.source for tensor in report.tensors}
    assert sources["decoder.layers.1.self_attention.k_proj.weight"] == "encoder.layers.1.attn.Wqkv.weight[24:48]"
    assert sources["decoder.layers.1.ffn2.up_proj.weight"] == "encoder.layers.1.mlp.Wi.weight[40:80]"


@pytest.mark.parametrize("kind", KINDS)
def test_encoder_states_equal_transformers(kind: str, tmp_path: Path) -> None:
    tiny(kind).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    ids = SOURCE.clone()
    ids[1, 5:] = PAD[kind.removesuffix("-biases")]
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    model = grow(tmp_path)
    with torch.no_grad():
        ours = model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
        theirs = AutoModel.from_pretrained(tmp_path)(input_ids=ids, attention_mask=mask).last_hidden_state
    assert torch.equal(ours, theirs)


def silence(model: SwcmForConditionalGeneration) -> None:
    """Take cross-attention and the second FFN out of every custom layer: what remains is the encoder's own layer."""
    with torch.no_grad():
        for layer in model.decoder.layers:
            for module in (layer.cross_attention.out_proj, getattr(layer.ffn2, "down_proj", None) or layer.ffn2.fc2):
                for parameter in module.parameters():
                    parameter.zero_()


def causal_encoder_states(encoder: PreTrainedModel, ids: Tensor, implementation: str) -> Tensor:
    """The encoder itself, but each token sees only those before it (and only near ones in its local layers)."""
    distance = torch.arange(ids.shape[1])[:, None] - torch.arange(ids.shape[1])[None]
    masks = {"full_attention": distance >= 0, "sliding_attention": (distance >= 0) & (distance <= WINDOW // 2)}
    masks = {name: mask.expand(len(ids), 1, -1, -1) for name, mask in masks.items()}
    if implementation == "eager":
        masks = {n: torch.zeros(m.shape).masked_fill(~m, torch.finfo(torch.float32).min) for n, m in masks.items()}
    encoder.set_attn_implementation(implementation)
    mask = masks if encoder.config.model_type == "modernbert" else masks["full_attention"]
    with torch.no_grad():
        return encoder(input_ids=ids, attention_mask=mask).last_hidden_state


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_decoder_without_cross_attention_is_the_causal_encoder(kind: str, implementation: str) -> None:
    encoder = tiny(kind)
    model = grow(encoder, insert_every=None, languages=[])
    silence(model)
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        ours = model.decoder(input_ids=TARGET, encoder_hidden_states=torch.randn(2, 5, HIDDEN)).last_hidden_state
    theirs = causal_encoder_states(encoder, TARGET, implementation)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


def test_decoder_of_modernbert_is_transformers_modernbert_decoder() -> None:
    """transformers' window is counted without the token itself on the encoder's side and with it on the decoder's."""
    encoder = tiny("modernbert")
    model = grow(encoder, insert_every=None, languages=[])
    silence(model)
    shared = [*("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")]
    shared += [*("max_position_embeddings", "rope_parameters", "layer_types")]
    shared += [*("pad_token_id", "bos_token_id", "eos_token_id")]
    settings = {name: getattr(encoder.config, name) for name in shared}
    oracle = ModernBertDecoderModel(ModernBertDecoderConfig(**settings, local_attention=WINDOW + 2)).eval()
    state = {}
    for name, tensor in encoder.state_dict().items():
        if "Wqkv" in name:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                state[name.replace("Wqkv", f"{part}_proj")] = rows
        else:
            state[name] = tensor
    oracle.load_state_dict(state)
    with torch.no_grad():
        ours = model.decoder(input_ids=TARGET, encoder_hidden_states=torch.randn(2, 5, HIDDEN)).last_hidden_state
        theirs = oracle(input_ids=TARGET).last_hidden_state
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


def by_hand(attention: nn.Module, queries: Tensor, memory: Tensor, kv_heads: int, head_dim: int) -> Tensor:
    """Grouped-query attention without positions, head by head."""
    q, k, v = attention.q_proj(queries), attention.k_proj(memory), attention.v_proj(memory)
    outputs = []
    for head in range(HEADS):
        group = head // (HEADS // kv_heads)
        mine, shared = (slice(i * head_dim, (i + 1) * head_dim) for i in (head, group))
        scores = q[..., mine] @ k[..., shared].transpose(1, 2) / math.sqrt(head_dim)
        outputs.append(scores.softmax(-1) @ v[..., shared])
    return attention.out_proj(torch.cat(outputs, dim=-1))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_cross_attention_sees_the_whole_source_and_is_not_rotated(family: str, implementation: str) -> None:
    model = grow(tiny(family))
    model.set_attn_implementation(implementation)
    captured: dict[str, Tensor] = {}
    layer = model.decoder.layers[1]  # a local one in ModernBERT
    hook = layer.cross_attention.register_forward_hook(
        lambda module, inputs, output: captured.update(queries=inputs[0], memory=inputs[1], output=output[0])
    )
    with torch.no_grad():
        model(input_ids=SOURCE, decoder_input_ids=TARGET[:, :8])  # as long as the source: rotation would fit
        hook.remove()
        kv_heads, head_dim = (2, 10) if family == "eurobert" else (HEADS, HIDDEN // HEADS)
        expected = by_hand(layer.cross_attention, captured["queries"], captured["memory"], kv_heads, head_dim)
    torch.testing.assert_close(captured["output"], expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("chunks", [(1,) * 11, (4, 1, 6)])
def test_cached_equals_uncached(family: str, chunks: tuple[int, ...], implementation: str) -> None:
    model = grow(tiny(family))
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        full = model(input_ids=SOURCE, decoder_input_ids=TARGET, use_cache=False).logits
        cache, start, pieces = None, 0, []
        for length in chunks:
            ids = TARGET[:, start : start + length]
            output = model(input_ids=SOURCE, decoder_input_ids=ids, past_key_values=cache, use_cache=True)
            cache, start = output.past_key_values, start + length
            pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, atol=5e-5, rtol=1e-5)


def test_no_causal_leak_and_local_layers_forget(family: str) -> None:
    model = grow(tiny(family))
    other = TARGET.clone()
    other[:, 6:] = 11
    with torch.no_grad():
        a, b = (model(input_ids=SOURCE, decoder_input_ids=ids).logits for ids in (TARGET, other))
    torch.testing.assert_close(a[:, :6], b[:, :6])
    assert not torch.allclose(a[:, 6], b[:, 6])
    windows = [layer.sliding_window for layer in model.decoder.layers]
    assert windows == ([None, 3, 3, None, None, 3] if family == "modernbert" else [None] * 6)


def test_batch_equals_single_under_padding(family: str) -> None:
    model, pad = grow(tiny(family)), PAD[family]
    rows = [(SOURCE[0].tolist(), TARGET[0].tolist()), ([0, 30, 2], TARGET[1, :4].tolist())]
    source, decoder = torch.full((2, 8), pad), torch.full((2, 11), pad)
    source_mask, mask = torch.zeros(2, 8, dtype=torch.long), torch.zeros(2, 11, dtype=torch.long)
    for index, (src, tgt) in enumerate(rows):
        source[index, : len(src)], source_mask[index, : len(src)] = torch.tensor(src), 1
        decoder[index, : len(tgt)], mask[index, : len(tgt)] = torch.tensor(tgt), 1
    with torch.no_grad():
        batched = model(
            input_ids=source, attention_mask=source_mask, decoder_input_ids=decoder, decoder_attention_mask=mask
        ).logits
        for index, (src, tgt) in enumerate(rows):
            single = model(input_ids=torch.tensor([src]), decoder_input_ids=torch.tensor([tgt])).logits
            torch.testing.assert_close(batched[index, : len(tgt)], single[0], atol=5e-5, rtol=1e-5)


def test_beam_search_with_and_without_cache(family: str) -> None:
    model = grow(tiny(family))
    options: dict[str, Any] = {"attention_mask": torch.ones_like(SOURCE), "num_beams": 3, "max_new_tokens": 9}
    cached, uncached = (
        model.generate(SOURCE, target_language="kk", use_cache=flag, **options) for flag in (True, False)
    )
    assert torch.equal(cached, uncached) and cached.shape[1] > WINDOW
    assert cached[:, 0].tolist() == [model.language_id("kk")] * 2


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_static_cache_writes_what_a_dynamic_one_writes(family: str, implementation: str) -> None:
    model, pad = grow(tiny(family)), PAD[family]
    model.set_attn_implementation(implementation)
    model.generation_config.eos_token_id = None
    start = model.language_id("kk")
    prompts = torch.tensor([[pad, pad, pad, start, 7], [start, 8, 9, 10, 11]])
    mask = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]])
    for given in ({}, {"decoder_input_ids": prompts, "decoder_attention_mask": mask}):
        options: dict[str, Any] = {
            "target_language": "kk",
            "max_new_tokens": 3 * WINDOW,
            **given,
        }
        static, dynamic = (
            model.generate(
                SOURCE, cache_implementation=kind, return_dict_in_generate=True, output_scores=True, **options
            )
            for kind in ("static", "dynamic")
        )
        assert torch.equal(static.sequences, dynamic.sequences)
        for a, b in zip(static.scores, dynamic.scores, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    # padding on the left changes nothing: the first row's prompt alone
    options = {"max_new_tokens": 3 * WINDOW, "cache_implementation": "static", "target_language": "kk"}
    alone = model.generate(SOURCE[:1], decoder_input_ids=prompts[:1, 3:], **options)
    assert torch.equal(alone[0, 2:], static.sequences[0, 5:])


def rotary_frequencies(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in model.named_buffers() if "inv_freq" in name}


@pytest.mark.parametrize("rotary", ["modernbert", "eurobert"])
def test_a_half_precision_encoder_keeps_its_rotary_frequencies(rotary: str, tmp_path: Path) -> None:
    exact = rotary_frequencies(tiny(rotary))
    tiny(rotary).save_pretrained(tmp_path / "encoder")
    encoder = AutoModel.from_pretrained(tmp_path / "encoder", dtype=torch.bfloat16).eval()
    model = grow(encoder)
    model.save_pretrained(tmp_path / "model")
    loaded = SwcmForConditionalGeneration.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert exact and model.dtype == loaded.dtype == torch.bfloat16
    for grown in (model, loaded):
        found = rotary_frequencies(grown.encoder)
        assert found.keys() == exact.keys()
        assert all(torch.equal(found[name], frequencies) for name, frequencies in exact.items())
    with torch.no_grad():
        states = encoder(SOURCE).last_hidden_state
        assert torch.equal(model.encoder(SOURCE).last_hidden_state, states)
        assert torch.equal(loaded.encoder(SOURCE).last_hidden_state, states)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_model_gives_the_same_logits(kind: str, tmp_path: Path) -> None:
    model = grow(tiny(kind))
    model.save_pretrained(tmp_path)
    loaded = SwcmForConditionalGeneration.from_pretrained(tmp_path)
    with torch.no_grad():
        a, b = (m(input_ids=SOURCE, decoder_input_ids=TARGET).logits for m in (model, loaded))
    assert torch.equal(a, b)
    assert loaded.config.plan == model.config.plan and loaded.num_parameters() == model.num_parameters()


def test_models_saved_before_there_were_other_families_still_load(tmp_path: Path) -> None:
    model = grow(tiny_encoder())
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    new = ["norm_type", "norm_bias", "num_key_value_heads", "head_dim", "attention_bias", "ffn_type", "ffn_bias"]
    for name in [*new, "embed_norm", "learned_positions"]:
        config.pop(name, None)
    config["layer_plan"] = [{key: layer[key] for key in ("kind", "first", "second")} for layer in config["layer_plan"]]
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = SwcmForConditionalGeneration.from_pretrained(tmp_path)
    with torch.no_grad():
        a, b = (m(input_ids=SOURCE, decoder_input_ids=TARGET).logits for m in (model, loaded))
    assert torch.equal(a, b)


def test_gradient_checkpointing_changes_no_gradient(family: str) -> None:
    model = grow(tiny(family), dropout=0.0).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(input_ids=SOURCE, decoder_input_ids=TARGET, labels=TARGET, use_cache=False).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name, value in gradients[0].items():
        torch.testing.assert_close(value, gradients[1][name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_with_a_loss_of_ones_own_changes_no_gradient(family: str, reentrant: bool) -> None:
    model = grow(tiny(family), dropout=0.0).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        output = model(input_ids=SOURCE, decoder_input_ids=TARGET)  # without labels, a cache is made by default
        output.logits.square().mean().backward()
        assert (output.past_key_values is None) == checkpointing
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[0].items():
        torch.testing.assert_close(value, gradients[1][name], atol=1e-6, rtol=1e-4)


OUTPUTS = {
    "modernbert": ("attn.Wo", "mlp.Wo"),
    "eurobert": ("self_attn.o_proj", "mlp.down_proj"),
    "xlm-roberta-xl": ("attention.output.dense", "output.dense"),
}


def test_cut_encoder_is_the_encoder_with_the_other_layers_silent(family: str, tmp_path: Path) -> None:
    """In pre-norm order a layer whose outputs are zero does nothing, which is what leaving it out must do."""
    encoder = tiny(family)
    model = grow(encoder, encoder_layers=[0, 2, 3], insert_every=None)
    model.save_pretrained(tmp_path)
    loaded = SwcmForConditionalGeneration.from_pretrained(tmp_path)
    stack = donor_for(encoder.config).layer_list(encoder)
    assert len(stack) == encoder.config.num_hidden_layers == 5
    with torch.no_grad():
        for index in (1, 4):
            for name in OUTPUTS[family]:
                for parameter in stack[index].get_submodule(name).parameters():
                    parameter.zero_()
        theirs = encoder(input_ids=SOURCE).last_hidden_state
        for candidate in (model, loaded):
            ours = candidate.encoder(input_ids=SOURCE).last_hidden_state
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    if family == "modernbert":
        kinds = ["full_attention", "sliding_attention", "full_attention"]
        assert loaded.config.encoder_config.layer_types == kinds
        assert [layer.sliding_window for layer in loaded.decoder.layers] == [None, 3, None]


def test_modernbert_needs_its_bottom_layer() -> None:
    with pytest.raises(ConfigError, match=r"encoder_layers=\[1, 3\] leaves out layer 0"):
        grow(tiny("modernbert"), encoder_layers=[1, 3])
    top = grow(tiny("modernbert"), donor_layers=[2, 4], insert_every=None)
    assert isinstance(top.decoder.layers[0].self_attention_norm, nn.LayerNorm)


def test_bottom_layer_grown_a_second_time_gets_a_norm() -> None:
    encoder = tiny("modernbert")
    layers = grow(encoder, insert_every=1, normal_layers="duplicate").decoder.layers
    assert isinstance(layers[0].self_attention_norm, nn.Identity)
    assert torch.equal(layers[1].self_attention_norm.weight, encoder.embeddings.norm.weight)


def test_deltalm_rotates_and_windows_as_the_lower_layer_of_a_pair() -> None:
    model = grow(tiny("modernbert", layers=6), growth="deltalm", insert_every=None)
    assert [(layer.rope_theta, layer.sliding_window) for layer in model.decoder.layers] == [
        (300.0, None),
        (20.0, 3),
        (20.0, 3),
    ]


def test_tied_sharing_works_unless_matrices_are_fused(tmp_path: Path) -> None:
    for family, own in (
        ("eurobert", "layers.3.mlp.up_proj.weight"),
        ("xlm-roberta-xl", "encoder.layer.3.output.dense.weight"),
    ):
        model = grow(tiny(family), sharing="tied")
        model.save_pretrained(tmp_path / family)
        for candidate in (model, SwcmForConditionalGeneration.from_pretrained(tmp_path / family)):
            tensors = dict(candidate.named_parameters(remove_duplicate=False))
            part = "up_proj" if family == "eurobert" else "fc2"
            assert tensors[f"decoder.layers.4.ffn2.{part}.weight"] is tensors[f"encoder.{own}"]
    with pytest.raises(ModelError, match=r"(?s)fuse projections \(encoder.layers.0.attn.Wqkv.weight\).*sharing='copy'"):
        grow(tiny("modernbert"), sharing="tied")


@pytest.mark.parametrize("preset", sorted(set(PRESETS) - {"pretrained"}))  # which grows from no encoder
@pytest.mark.filterwarnings("ignore:weights copied")
def test_every_preset_trains_and_writes(family: str, preset: str) -> None:
    def build() -> PreTrainedModel:
        return build_system(
            preset,
            tiny(family, layers=4, pad_token_id=1),
            tokenizer=tiny_tokenizer(),
            languages=["en", "kk"],
            seed=0,
            verbose=False,
            options={"dropout": 0.1},
        )

    if (preset == "warm-start" and family != "xlm-roberta-xl") or (preset == "swcm-tied" and family == "modernbert"):
        with pytest.raises(ModelError, match=r"no decoder with cross-attention|fuse projections"):
            build()
        return
    model = build().train()
    ids = torch.randint(4, 90, (2, 6))
    model(input_ids=ids, decoder_input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None and "pooler" not in name]
    rates = {module.p for module in model.modules() if isinstance(module, nn.Dropout)}
    assert rates <= {0.1}
    if preset == "warm-start":
        return
    model.generation_config.max_new_tokens = 4
    writer = Generator(model, model.tokenizer)
    texts = writer.generate(
        ["abc", "d"], target_language="kk", source_language="en", config=DecodingConfig(num_beams=2)
    )
    assert len(texts) == 2


def test_random_layers_have_the_encoders_style() -> None:
    model = grow(tiny("eurobert"), growth="standard", copy=("embeddings",))
    layer = model.decoder.layers[0]
    assert isinstance(layer.self_attention_norm, nn.RMSNorm) and layer.rope_theta == 50.0
    assert layer.self_attention.k_proj.weight.shape == (20, HIDDEN)
    assert layer.ffn.gate_proj.bias is None
    assert "decoder.final_norm.weight" in model.init_report.names("constant")


@pytest.mark.parametrize("left_out", ["self_attention", "cross_attention", "ffn", "norms", "embeddings"])
def test_each_part_can_be_left_out(family: str, left_out: str) -> None:
    parts = [part for part in ("embeddings", "self_attention", "cross_attention", "ffn", "norms") if part != left_out]
    report = grow(tiny(family), copy=parts, insert_every=None).init_report
    fresh = set(report.names("random")) | set(report.names("constant")) - {"lm_head.bias"}
    marks = {"norms": ("attention_norm.", "ffn1_norm.", "ffn2_norm.", "final_norm."), "embeddings": ("embed_",)}
    wanted = marks.get(left_out, (left_out,))
    assert bool(fresh) == (family != "eurobert" or left_out != "embeddings")  # EuroBERT embeds words only
    assert all(any(mark in name for mark in wanted) for name in fresh)


def test_trimmed_rows_move_the_special_tokens(family: str) -> None:
    encoder, ids = tiny(family), SOURCE.clone()
    dropped = {3, 20, 21, 70} if family == "xlm-roberta-xl" else {1, 3, 20, 21, 70}
    rows = [row for row in range(120) if row not in dropped]
    ids[1, 5:] = PAD[family]
    trimmed = load_encoder(encoder, rows=rows)
    new = torch.tensor([[rows.index(int(i)) for i in row] for row in ids])
    with torch.no_grad():
        before, after = encoder(input_ids=ids), trimmed(input_ids=new)
    torch.testing.assert_close(after.last_hidden_state, before.last_hidden_state)
    config = trimmed.config
    assert (rows[config.pad_token_id], rows[config.eos_token_id]) == (PAD[family], 2)
    assert encoder.config.pad_token_id == PAD[family]
    with pytest.raises(ModelError, match=r"leaves out row 2, which is (eos|pad)_token_id"):
        load_encoder(encoder, rows=[row for row in rows if row != 2])


def test_default_ids_outside_the_table_mean_no_token() -> None:
    encoder = tiny("modernbert", bos_token_id=50281, eos_token_id=[2, 50282])
    config = load_encoder(encoder, rows=[2, 5, 0, 9]).config
    assert (config.bos_token_id, config.eos_token_id, config.cls_token_id) == (None, [0], 2)


def test_rows_that_move_the_pad_token_of_position_counting_layouts_are_refused() -> None:
    with pytest.raises(ModelError, match="moves the pad token away from id 1"):
        load_encoder(tiny("xlm-roberta-xl"), rows=[0, 2, 1, *range(3, 50)])


def test_special_tokens_without_a_tokenizer_come_from_the_encoder() -> None:
    model = grow(tiny("modernbert", bos_token_id=None, eos_token_id=None))
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (0, 2, 5)
    model = grow(tiny("eurobert", eos_token_id=[2, 3]))
    assert model.generation_config.eos_token_id == 2 == model.generation_config.pad_token_id


def test_masked_lm_checkpoints_are_welcome(tmp_path: Path) -> None:
    masked = ModernBertForMaskedLM(tiny("modernbert").config)
    masked.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model = grow(tmp_path)
    assert torch.equal(model.get_input_embeddings().weight[:60], masked.model.embeddings.tok_embeddings.weight[:60])


@pytest.mark.parametrize("kind", ["modernbert", "eurobert"])
def test_rescaled_rotary_positions_are_refused(kind: str) -> None:
    config = tiny(kind).config
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 50.0}
    config.rope_parameters = {"full_attention": scaled, "sliding_attention": scaled} if kind == "modernbert" else scaled
    with pytest.raises(ModelError, match="rotary positions of type 'linear'"):
        donor_for(config)


def test_too_long_targets_are_refused(family: str) -> None:
    model, limit = grow(tiny(family)), 64 if family == "xlm-roberta-xl" else 66
    long = torch.full((1, limit + 1), 7)
    with pytest.raises(ModelError, match=f"positions for {limit}"):
        model(input_ids=SOURCE[:1], decoder_input_ids=long)
    with pytest.raises(ModelError, match=f"positions for {limit}"):
        model(input_ids=long, decoder_input_ids=TARGET[:1])


def test_all_families_are_listed() -> None:
    assert set(supported_model_types()) == {
        *("bert", "roberta", "xlm-roberta", "modernbert", "eurobert", "xlm-roberta-xl")
    }


def test_mmbert_base_shape_has_579_million_parameters_on_meta() -> None:
    hidden, ffn, vocabulary, layers = 768, 1152, 256_000, 22
    with torch.device("meta"):
        encoder = ModernBertModel(
            ModernBertConfig(vocab_size=vocabulary, pad_token_id=0, eos_token_id=1, bos_token_id=2)
        )
    attention, feed_forward = 4 * hidden * hidden, 3 * hidden * ffn
    layer = attention + feed_forward + 2 * hidden
    encoder_size = vocabulary * hidden + 2 * hidden + layers * layer - hidden
    custom, normal = 2 * layer, layer + attention + hidden
    decoder_size = 2 * hidden + 22 * custom - hidden + 7 * normal
    model = SwcmForConditionalGeneration.from_encoder(encoder, verbose=False)
    assert encoder.num_parameters() == encoder_size == 306_939_648
    assert model.num_parameters() == encoder_size + decoder_size + vocabulary == 579_483_904


def test_tiny_modernbert_learns_to_copy() -> None:
    model = grow(tiny("modernbert", layers=2), insert_every=2, dropout=0.0).train()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def batch(size: int) -> tuple[Tensor, Tensor, Tensor]:
        body = torch.randint(10, 20, (size, 5), generator=generator)
        start, end = torch.zeros(size, 1, dtype=torch.long), torch.full((size, 1), 2)
        language = torch.full((size, 1), model.language_id("kk"))
        return torch.cat([start, body, end], 1), torch.cat([language, body], 1), torch.cat([body, end], 1)

    for step in range(300):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, step / 20) * (1 - step / 300)
        source, decoder, labels = batch(64)
        loss = model(input_ids=source, decoder_input_ids=decoder, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    source, _, labels = batch(64)
    output = model.eval().generate(source, target_language="kk", max_new_tokens=8)
    exact = (output[:, 1 : 1 + labels.shape[1]] == labels).all(dim=1).float().mean().item()
    assert exact >= 0.95
