"""Encoders that a bridge reads: the same states as from transformers, the facts, and errors that help."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    FNetConfig,
    FNetModel,
    LlamaConfig,
    LlamaForCausalLM,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MBartConfig,
    MBartForConditionalGeneration,
    ModernBertConfig,
    ModernBertForMaskedLM,
    MPNetConfig,
    MPNetForMaskedLM,
    MT5Config,
    MT5ForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
    XLMRobertaXLConfig,
    XLMRobertaXLForMaskedLM,
)

from enc2gen.encoders.dtypes import check_dtype, parse_dtype
from enc2gen.encoders.loading import load_tokenizer
from enc2gen.encoders.reading import encoder_facts, load_reading_encoder, reading_encoder_from_config
from enc2gen.errors import CheckpointError, ConfigError, ModelError

LAYERS, HIDDEN, ROWS = 3, 16, 60
_TOKENS = {"vocab_size": ROWS, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
BERT = _TOKENS | {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "max_position_embeddings": 34,
}
BART = _TOKENS | {
    "d_model": HIDDEN,
    "encoder_layers": LAYERS,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 20,
    "max_position_embeddings": 32,
}
T5: dict[str, Any] = {
    "vocab_size": ROWS,
    "d_model": HIDDEN,
    "d_kv": 8,
    "d_ff": 20,
    "num_layers": LAYERS,
    "num_decoder_layers": 2,
    "num_heads": 2,
}
# model with its head, its configuration, longest source, class of the norm that only the last state has passed
KINDS: dict[str, tuple[Any, Any, int | None, str | None]] = {
    "t5": (T5ForConditionalGeneration, T5Config(**T5), None, "T5LayerNorm"),
    "mt5": (MT5ForConditionalGeneration, MT5Config(**T5), None, "MT5LayerNorm"),
    "umt5": (UMT5ForConditionalGeneration, UMT5Config(**T5), None, "UMT5LayerNorm"),
    "m2m_100": (M2M100ForConditionalGeneration, M2M100Config(**BART), 32, "LayerNorm"),
    "mbart": (MBartForConditionalGeneration, MBartConfig(**BART), 32, "LayerNorm"),
    "xlm-roberta": (XLMRobertaForMaskedLM, XLMRobertaConfig(**BERT), 32, None),
    "xlm-roberta-xl": (XLMRobertaXLForMaskedLM, XLMRobertaXLConfig(**BERT), 32, "LayerNorm"),
    "bert": (BertForMaskedLM, BertConfig(**BERT), 34, None),
    "modernbert": (ModernBertForMaskedLM, ModernBertConfig(**BERT, local_attention=8), 34, "LayerNorm"),
    # Norms and relative positions that mean something else than their names suggest.
    "deberta-v2": (
        DebertaV2ForMaskedLM,
        DebertaV2Config(**BERT, relative_attention=True, norm_rel_ebd="layer_norm", position_buckets=8),
        34,
        None,
    ),
    "mpnet": (MPNetForMaskedLM, MPNetConfig(**BERT), 32, None),
}


def full_model(kind: str) -> PreTrainedModel:
    """With heads (and decoder), every weight off its default value."""
    model_class, config, _, _ = KINDS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[PreTrainedModel, Path]]:
    """The full model of a kind and its folder, made once."""
    made: dict[str, tuple[PreTrainedModel, Path]] = {}

    def get(kind: str) -> tuple[PreTrainedModel, Path]:
        if kind not in made:
            model, folder = full_model(kind), tmp_path_factory.mktemp(kind)
            model.save_pretrained(folder)
            made[kind] = model, folder
        return made[kind]

    return get


Saved = Callable[[str], tuple[PreTrainedModel, Path]]


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, ROWS, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, 5:], mask[1, 5:] = 1, 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def states(encoder: PreTrainedModel) -> tuple[torch.Tensor, ...]:
    return encoder(**batch(), output_hidden_states=True).hidden_states


@torch.no_grad()
def reference(model: PreTrainedModel) -> tuple[torch.Tensor, ...]:
    """The encoder's hidden states as the full model itself reports them."""
    if model.config.is_encoder_decoder:
        output = model(**batch(), decoder_input_ids=torch.tensor([[2], [2]]), output_hidden_states=True)
        return output.encoder_hidden_states
    return model(**batch(), output_hidden_states=True).hidden_states


@pytest.mark.parametrize("kind", KINDS)
def test_states_are_those_of_the_full_model(kind: str, saved: Saved) -> None:
    model, folder = saved(kind)
    encoder = load_reading_encoder(folder)
    found, expected = states(encoder), reference(model)
    assert len(found) == LAYERS + 1
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not encoder.training
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    assert not [name for name, _ in encoder.named_modules() if "decoder" in name or name.startswith(("lm_head", "cls"))]
    assert encoder.config.name_or_path == str(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_facts(kind: str, saved: Saved) -> None:
    encoder = load_reading_encoder(saved(kind)[1])
    facts = encoder_facts(encoder)
    longest, norm = KINDS[kind][2:]
    assert (facts.num_layers, facts.hidden_size, facts.max_positions) == (LAYERS, HIDDEN, longest)
    assert (None if facts.final_norm is None else type(facts.final_norm).__name__) == norm


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind][3]])
def test_final_norm_is_what_only_the_last_state_has_passed(kind: str, saved: Saved) -> None:
    encoder = load_reading_encoder(saved(kind)[1])
    norm = encoder_facts(encoder).final_norm
    assert norm is not None
    passed: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = norm.register_forward_hook(lambda module, inputs, output: passed.append((inputs[0], output)))
    found = states(encoder)
    handle.remove()
    ((before, after),) = passed
    assert torch.equal(found[-1], after)
    assert not any(torch.equal(state, after) for state in found[:-1])
    assert not torch.allclose(before, after, atol=1e-2), "this norm would change nothing"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not KINDS[kind][3]])
def test_without_a_final_norm_every_layer_ends_in_one(kind: str, saved: Saved) -> None:
    """Post-norm: with the norms' parameters at their defaults every state has mean 0 and variance 1."""
    encoder = load_reading_encoder(saved(kind)[1])
    for module in encoder.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    for state in states(encoder)[1:]:
        torch.testing.assert_close(state.mean(-1), torch.zeros(2, 7), atol=1e-5, rtol=0)
        torch.testing.assert_close(state.var(-1, unbiased=False), torch.ones(2, 7), atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_longest_source_fits(kind: str, saved: Saved) -> None:
    encoder = load_reading_encoder(saved(kind)[1])
    length = encoder_facts(encoder).max_positions or 200
    ids = torch.full((1, length), 5)
    assert encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.shape == (1, length, HIDDEN)


def test_learned_positions_end_there(saved: Saved) -> None:
    for kind in ("xlm-roberta", "bert", "mbart", "mpnet"):
        encoder = load_reading_encoder(saved(kind)[1])
        ids = torch.full((1, (encoder_facts(encoder).max_positions or 0) + 1), 5)
        with pytest.raises((IndexError, RuntimeError)):
            encoder(input_ids=ids, attention_mask=torch.ones_like(ids))


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_model_is_read_without_copying_it(kind: str, saved: Saved) -> None:
    model, _ = saved(kind)
    encoder = load_reading_encoder(model)
    assert all(torch.equal(a, b) for a, b in zip(states(encoder), reference(model), strict=True))
    assert {id(p) for p in encoder.parameters()} <= {id(p) for p in model.parameters()}
    again = load_reading_encoder(encoder)
    assert all(torch.equal(a, b) for a, b in zip(states(again), states(encoder), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_rebuilt_from_its_configuration(kind: str, saved: Saved) -> None:
    encoder = load_reading_encoder(saved(kind)[1])
    config = type(encoder.config).from_dict(encoder.config.to_dict())
    fresh = reading_encoder_from_config(config)
    assert type(fresh) is type(encoder)
    assert not fresh.training
    fresh.load_state_dict(encoder.state_dict(), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(states(fresh), states(encoder), strict=True))


def test_a_pooler_is_left_out_and_the_given_model_keeps_its_own() -> None:
    model = BertModel(BertConfig(**BERT)).eval()
    encoder = load_reading_encoder(model)
    assert not [name for name in encoder.state_dict() if name.startswith("pooler")]
    assert model.pooler is not None
    assert model(**batch()).pooler_output is not None
    assert set(encoder.state_dict()) == set(reading_encoder_from_config(model.config).state_dict())


def test_dtype(saved: Saved) -> None:
    folder = saved("mt5")[1]
    assert {p.dtype for p in load_reading_encoder(folder, dtype="bf16").parameters()} == {torch.bfloat16}


def test_missing_encoder_tensors_are_an_error_and_missing_decoder_tensors_are_not(saved: Saved, tmp_path: Path) -> None:
    model, folder = saved("m2m_100")
    for part, fine in (("decoder", True), ("encoder", False)):
        broken = tmp_path / part
        shutil.copytree(folder, broken)
        kept = {name: tensor for name, tensor in model.state_dict().items() if f"{part}.layers.1." not in name}
        model.save_pretrained(broken, state_dict=kept)
        if fine:
            assert all(
                torch.equal(a, b) for a, b in zip(states(load_reading_encoder(broken)), reference(model), strict=True)
            )
        else:
            with pytest.raises(CheckpointError, match=r"lacks 16 of the encoder's tensors.*encoder\.layers\.1"):
                load_reading_encoder(broken)


def test_truncated_weights(saved: Saved, tmp_path: Path) -> None:
    shutil.copytree(saved("mbart")[1], tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:3000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_reading_encoder(tmp_path / "cut")


def test_a_decoder_is_no_encoder(tmp_path: Path) -> None:
    llm = LlamaForCausalLM(LlamaConfig(**BERT))
    llm.save_pretrained(tmp_path)
    for given in (tmp_path, llm):
        with pytest.raises(ModelError, match="decoder-only") as caught:
            load_reading_encoder(given)
        assert "as the LLM" in str(caught.value.remedy)
    with pytest.raises(ModelError, match="decoder-only"):
        reading_encoder_from_config(llm.config)
    with pytest.raises(ModelError, match="decoder-only"):
        load_reading_encoder(BertModel(BertConfig(**BERT, is_decoder=True)))


def test_a_model_of_images_is_no_encoder(tmp_path: Path) -> None:
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=32)
    ViTModel(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="'vit' is not a text encoder"):
        load_reading_encoder(tmp_path)


def test_an_encoder_that_takes_no_masks_is_refused(tmp_path: Path) -> None:
    config = FNetConfig(vocab_size=60, hidden_size=16, num_hidden_layers=1, intermediate_size=8)
    FNetModel(config).save_pretrained(tmp_path)
    for given in (tmp_path, FNetModel(config)):
        with pytest.raises(ModelError, match="'fnet' takes no attention_mask") as caught:
            load_reading_encoder(given)
        assert "XLM-R" in str(caught.value.remedy)
    with pytest.raises(ModelError, match="'fnet' takes no attention_mask"):
        reading_encoder_from_config(config)


def test_unknown_names_are_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="did you mean 'embedded:multilingual-e5-small'"):
        load_reading_encoder("multilingual-e5-smal")
    with pytest.raises(ConfigError, match="did you mean 'multilingual-e5-small'"):
        load_reading_encoder("embedded:multilingual-e5-smal")
    (tmp_path / "encoder").mkdir()
    with pytest.raises(ModelError, match=r"did you mean '.*/encoder'"):
        load_reading_encoder(tmp_path / "encodr")
    with pytest.raises(ModelError) as caught:
        load_reading_encoder("nothing/like-it")
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize("kind", ["t5", "mt5", "mbart", "bert", "xlm-roberta"])
def test_missing_vocabulary_files(kind: str, saved: Saved) -> None:
    """transformers answers with an empty tokenizer; T5's holds a hundred sentinels and the word boundary."""
    with pytest.raises(ModelError, match="no vocabulary") as caught:
        load_tokenizer(saved(kind)[1])
    assert "tokenizer.json" in str(caught.value.remedy)


# --- types of numbers ---


@pytest.mark.parametrize("name", ["bfloat16", "bf16", "torch.bfloat16", torch.bfloat16])
def test_names_of_types(name: str | torch.dtype) -> None:
    assert parse_dtype(name) is torch.bfloat16


def test_unknown_type() -> None:
    with pytest.raises(ConfigError, match="did you mean 'bfloat16'"):
        parse_dtype("bflot16")
    with pytest.raises(ConfigError, match="'int8' is no type"):
        parse_dtype(torch.int8)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from enc2gen.encoders.dtypes import _lack

    _lack.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    yield
    _lack.cache_clear()


@pytest.mark.usefixtures("no_gpu")
def test_a_type_that_the_device_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        check_dtype(dtype)
    with pytest.raises(ModelError, match="cpu cannot compute in float8_e4m3fn") as caught:
        check_dtype(torch.float8_e4m3fn, where="the LLM")
    assert (caught.value.where, caught.value.remedy) == ("the LLM", "use float32")
    with pytest.raises(ModelError, match="sees no CUDA device"):
        check_dtype(torch.bfloat16, "cuda")


def test_old_gpus_have_no_bfloat16(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ModelError, match=r"cuda:0 cannot compute in bfloat16 .*older than Ampere"):
        check_dtype(torch.bfloat16, "cuda:0")
