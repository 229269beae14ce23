"""The bridge model: what the LLM reads, what learns, what is saved, and which input is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

import enc2gen
from bridge_toys import llm_tokenizer, tiny_bridge, tiny_llm, tiny_mt5
from conftest import tiny_encoder, tiny_tokenizer
from enc2gen.errors import CheckpointError, ConfigError, DataError, Enc2genError, ModelError
from enc2gen.models.bridge import BridgeForConditionalGeneration
from enc2gen.models.bridge.storing import fingerprint
from enc2gen.models.bridge.writing import has_plain_head

TEXTS = ["abc de fghi", "a", "klm no"]
TARGETS = ["xy", "abcdefg", "z"]
ENCODERS = {"xlm-roberta": tiny_encoder, "bert": lambda: tiny_encoder("bert"), "mt5": tiny_mt5}


def batch_of(model: BridgeForConditionalGeneration, texts: list[str] = TEXTS, targets: list[str] = TARGETS) -> Any:
    assert model.processor is not None
    return model.processor(texts, targets)


def singles(model: BridgeForConditionalGeneration) -> list[tuple[Tensor, Tensor]]:
    """Logits and labels of each pair by itself."""
    rows = []
    for text, target in zip(TEXTS, TARGETS, strict=True):
        inputs = batch_of(model, [text], [target])
        rows.append((model(**inputs).logits[0], inputs["labels"][0]))
    return rows


@torch.no_grad()
def test_the_llm_reads_bos_prefix_end_vector_and_target() -> None:
    encoder, llm = tiny_encoder(), tiny_llm()
    model = tiny_bridge(encoder, llm)
    inputs = batch_of(model, ["abc de"], ["xyz"])
    states = encoder(input_ids=inputs["input_ids"]).last_hidden_state[0].numpy()
    prefix = states @ model.mapper.map.weight.numpy().T + model.mapper.map.bias.numpy()
    words = llm.get_input_embeddings().weight.numpy()
    target = inputs["decoder_input_ids"][0, 1:].numpy()
    rows = np.concatenate([words[[0]], prefix, model.end_vector.numpy()[None], words[target]])
    expected = llm(inputs_embeds=torch.tensor(rows)[None]).logits[:, -len(target) - 1 :]
    output = model(**inputs)
    torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-4)
    log = torch.log_softmax(expected[0], -1).numpy()
    labels = inputs["labels"][0].numpy()
    assert labels[-1] == 2, "the target ends in EOS"
    assert output.loss.item() == pytest.approx(-log[np.arange(len(labels)), labels].mean(), rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("llm", ["llama", "gpt2", "opt"])
def test_a_batch_of_mixed_lengths_equals_its_singles(kind: str, llm: str) -> None:
    model = tiny_bridge(ENCODERS[kind](), tiny_llm(llm), fusion="transformer", prompt="qr")
    logits = model(**batch_of(model)).logits
    for row, (alone, labels) in zip(logits, singles(model), strict=True):
        torch.testing.assert_close(row[: len(labels)], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("mapper", [("mlp", {}), ("slots", {"slots": 3})])
def test_other_mappers_and_an_open_aligner_keep_batches_equal_to_singles(mapper: tuple[str, dict[str, Any]]) -> None:
    model = tiny_bridge(mapper=mapper[0], mapper_options=mapper[1], aligner=True, fusion="global")
    assert float(model.aligner.gates.abs().min()) > 0
    logits = model(**batch_of(model)).logits
    for row, (alone, labels) in zip(logits, singles(model), strict=True):
        torch.testing.assert_close(row[: len(labels)], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_left_and_right_padding_of_the_decoder_are_the_same() -> None:
    model = tiny_bridge()
    inputs = batch_of(model)
    right = model(**inputs).logits
    ids, mask = torch.zeros_like(inputs["decoder_input_ids"]), torch.zeros_like(inputs["decoder_attention_mask"])
    for row, length in enumerate(inputs["decoder_attention_mask"].sum(1).tolist()):
        ids[row, -length:], mask[row, -length:] = inputs["decoder_input_ids"][row, :length], 1
    left = model(inputs["input_ids"], inputs["attention_mask"], ids, mask).logits
    for row, length in enumerate(mask.sum(1).tolist()):
        torch.testing.assert_close(left[row, -length:], right[row, :length], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_end_vector_stands_at_the_start_alone_even_if_the_prompt_holds_that_token() -> None:
    model = tiny_bridge()
    source = batch_of(model, ["abc"], ["x"])
    ids = torch.tensor([[0, 40, 0, 41]])
    before = model(source["input_ids"], source["attention_mask"], ids).logits
    words = model.get_input_embeddings().weight
    words[0] += 1.0  # BOS: read before the prefix and inside the prompt
    after = model(source["input_ids"], source["attention_mask"], ids).logits
    other = torch.tensor([[77, 40, 0, 41]])
    assert not torch.allclose(before, after)
    assert torch.equal(after, model(source["input_ids"], source["attention_mask"], other).logits)
    model.end_vector += 1.0
    assert not torch.allclose(after, model(source["input_ids"], source["attention_mask"], ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("llm", ["llama", "opt"])
def test_the_head_gives_decoder_positions_only(llm: str) -> None:
    model = tiny_bridge(llm=tiny_llm(llm))
    inputs, seen = batch_of(model), []
    handle = model.llm.get_output_embeddings().register_forward_hook(lambda _, x, __: seen.append(x[0]))
    output = model(**inputs)
    handle.remove()
    assert output.logits.shape[:2] == inputs["labels"].shape
    if llm == "llama":
        assert seen[0].shape[1] == inputs["labels"].shape[1] and seen[0].is_contiguous()
    last = model(**{**inputs, "labels": None}, logits_to_keep=1).logits
    torch.testing.assert_close(last, output.logits[:, -1:])


@torch.no_grad()
def test_states_computed_before_give_the_same() -> None:
    model = tiny_bridge(fusion="transformer", aligner=True, hidden_states={"include_embeddings": True})
    inputs = batch_of(model)
    expected = model(**inputs).logits
    mask, raw = inputs["attention_mask"], model.encode_raw(inputs["input_ids"], inputs["attention_mask"])
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    states, below = model.encode(inputs["input_ids"], mask), torch.stack(raw[:-1])
    assert torch.equal(model(**rest, encoder_states=states, aligner_states=below).logits, expected)
    assert torch.equal(model(**rest, fused_states=model.fusion(states, mask), aligner_states=below).logits, expected)
    read = model.get_encoder()(inputs["input_ids"], mask)
    assert torch.equal(model(**rest, encoder_outputs=read).logits, expected)
    assert torch.equal(model(**rest, encoder_outputs=read.to_tuple()).logits, expected)
    with pytest.raises(ModelError, match="aligner needs"):
        model(**rest, encoder_states=states)


def test_only_the_bridge_learns_and_frozen_halves_stay_in_evaluation_mode() -> None:
    model = tiny_bridge(fusion="transformer", aligner=True).train()
    assert model.training and model.fusion.training
    assert not any(module.training for half in (model.encoder, model.llm) for module in half.modules())
    model(**batch_of(model)).loss.backward()
    for name, parameter in model.named_parameters():
        ours = name.split(".")[0] not in ("encoder", "llm")
        assert (parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)) == ours, name
        assert (name in model.frozen) != ours


def capped_llm() -> PreTrainedModel:
    """Gemma 2's family, which caps what comes out of the head."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 8,
    }
    marks = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 2, "vocab_size": 120, "num_key_value_heads": 2}
    torch.manual_seed(1)
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, **marks, max_position_embeddings=96, final_logit_softcapping=2.0))
    return model.eval()


@pytest.mark.parametrize("llm", ["llama", "gpt2", "opt", "capped"])
@pytest.mark.parametrize("freeze_llm", [True, False])
def test_loss_without_logits_trains_as_the_loss_of_logits(llm: str, freeze_llm: bool) -> None:
    model = tiny_bridge(None, capped_llm() if llm == "capped" else tiny_llm(llm), freeze_llm=freeze_llm).train()
    model.llm.eval()  # no dropout
    assert has_plain_head(model.llm) == (llm != "capped")
    inputs = batch_of(model)
    logits, labels = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits, inputs["labels"].flatten()
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum", label_smoothing=0.1)
    result = model(**inputs, label_smoothing=0.1)
    torch.testing.assert_close(result.loss, expected, rtol=1e-5, atol=1e-5)
    assert result.count == (labels != -100).sum()
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ours, theirs = (torch.autograd.grad(value, learning, allow_unused=True) for value in (result.loss, expected))
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_halves_that_are_not_frozen_learn() -> None:
    model = tiny_bridge(freeze_encoder=False).train()
    assert model.encoder.training and not model.llm.training
    model(**batch_of(model)).loss.backward()
    assert model.encoder.get_input_embeddings().weight.grad is not None
    assert all(parameter.grad is None for parameter in model.llm.parameters())
    assert set(model.count_trainable()) == {"encoder", "mapper", "end_vector"}


def test_the_plain_bridge_trains_one_linear_map_and_one_vector() -> None:
    assert tiny_bridge().count_trainable() == {"end_vector": 32, "mapper": 24 * 32 + 32}


@torch.no_grad()
def test_a_new_aligner_changes_no_logit() -> None:
    plain = BridgeForConditionalGeneration.from_parts(tiny_encoder(), tiny_llm(), end_vector="random")
    aligned = BridgeForConditionalGeneration.from_parts(tiny_encoder(), tiny_llm(), end_vector="random", aligner=True)
    inputs = batch_of(tiny_bridge())
    assert torch.equal(plain(**inputs).logits, aligned(**inputs).logits)


def test_building_is_reproducible_and_leaves_the_random_state() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, same, other = (
        BridgeForConditionalGeneration.from_parts(tiny_encoder(), tiny_llm(), end_vector="random", seed=seed)
        for seed in (4, 4, 5)
    )
    torch.manual_seed(5)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.mapper.map.weight, same.mapper.map.weight)
    assert torch.equal(first.end_vector, same.end_vector)
    assert not torch.equal(first.mapper.map.weight, other.mapper.map.weight)
    encoder = tiny_encoder()
    assert all(torch.equal(a, b) for a, b in zip(first.encoder.parameters(), encoder.parameters(), strict=True))


@torch.no_grad()
def test_layer_weights_and_standardised_states() -> None:
    model = tiny_bridge(fusion="transformer", hidden_states={"normalise": "standardise"})
    inputs = batch_of(model)
    model.fit_states([(inputs["input_ids"], inputs["attention_mask"])])
    stack = model.encode(inputs["input_ids"], inputs["attention_mask"])[:, inputs["attention_mask"].bool()]
    torch.testing.assert_close(stack.mean(1), torch.zeros(4, 24), atol=1e-4, rtol=0)
    weights = model.layer_weights(inputs["input_ids"], inputs["attention_mask"])
    assert weights.shape == (*inputs["input_ids"].shape, 4)
    torch.testing.assert_close(weights.sum(-1), inputs["attention_mask"].float())


@torch.no_grad()
def test_a_missing_source_mask_follows_the_pad_token() -> None:
    model = tiny_bridge()
    inputs = batch_of(model)
    expected = model(**inputs).logits
    assert torch.equal(model(**{**inputs, "attention_mask": None}).logits, expected)


# Saving and loading


def saved_equals(model: BridgeForConditionalGeneration, loaded: BridgeForConditionalGeneration) -> None:
    inputs = batch_of(model)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, loaded(**inputs).logits)
    for (name, ours), (other, theirs) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other and torch.equal(ours, theirs) and ours.dtype == theirs.dtype, name
        assert ours.requires_grad == theirs.requires_grad, name
    assert dict(batch_of(loaded)).keys() == dict(inputs).keys()
    assert all(torch.equal(batch_of(loaded)[name], inputs[name]) for name in inputs)
    ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(model.generate(**ids, max_new_tokens=6), loaded.generate(**ids, max_new_tokens=6))


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_complete_bridge_is_saved_and_loaded_by_autoclass(tmp_path: Path, kind: str, dtype: str) -> None:
    options = {"source_template": "query: {text}", "prompt": "ab"}
    model = tiny_bridge(ENCODERS[kind](), llm_dtype=dtype, fusion="transformer", aligner=True, **options)
    model.save_pretrained(tmp_path)
    assert str(model.llm.dtype) == f"torch.{dtype}" and model.mapper.map.weight.dtype == torch.float32
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert type(loaded) is BridgeForConditionalGeneration and not loaded.training
    saved_equals(model, loaded)
    assert loaded.generation_config.decoder_start_token_id == 0 and loaded.generation_config.eos_token_id == 2


def halves_on_disk(folder: Path) -> dict[str, Any]:
    tiny_encoder().save_pretrained(folder / "encoder")
    tiny_tokenizer().save_pretrained(folder / "encoder")
    tiny_llm().save_pretrained(folder / "llm")
    llm_tokenizer().save_pretrained(folder / "llm")
    return {"encoder": folder / "encoder", "llm": folder / "llm"}


def test_a_bridge_without_its_halves_loads_them_by_name(tmp_path: Path) -> None:
    options = {"fusion": "transformer", "hidden_states": {"normalise": "standardise"}}
    model = BridgeForConditionalGeneration.from_parts(**halves_on_disk(tmp_path), **options)
    inputs = batch_of(model)
    model.fit_states([(inputs["input_ids"], inputs["attention_mask"])])
    model.generation_config.max_new_tokens = 77
    model.save_pretrained(tmp_path / "bridge", parts="trained")
    with safe_open(tmp_path / "bridge" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert names == set(model.trained_state_dict())
    assert {name.split(".")[0] for name in names} == {"states", "fusion", "mapper", "end_vector"}
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "bridge")
    saved_equals(model, loaded)
    assert loaded.generation_config.max_new_tokens == 77
    assert model.config.saved_parts == "all"


def test_a_half_that_changed_is_saved_even_if_it_is_frozen_now(tmp_path: Path) -> None:
    model = BridgeForConditionalGeneration.from_parts(**halves_on_disk(tmp_path))
    with torch.no_grad():
        model.encoder.get_input_embeddings().weight[7, 3] += 0.5
    model.save_pretrained(tmp_path / "bridge", parts="trained")
    saved_equals(model, BridgeForConditionalGeneration.from_pretrained(tmp_path / "bridge"))


@pytest.mark.parametrize("half", ["encoder", "llm"])
def test_rows_that_changed_places_are_a_change(tmp_path: Path, half: str) -> None:
    model = BridgeForConditionalGeneration.from_parts(**halves_on_disk(tmp_path))
    with torch.no_grad():
        rows = getattr(model, half).get_input_embeddings().weight
        rows[[40, 41]] = rows[[41, 40]].clone()
    model.save_pretrained(tmp_path / "bridge", parts="trained")
    saved_equals(model, BridgeForConditionalGeneration.from_pretrained(tmp_path / "bridge"))


def test_a_half_with_exchanged_rows_is_not_the_one_trained_with(tmp_path: Path) -> None:
    model = BridgeForConditionalGeneration.from_parts(**halves_on_disk(tmp_path))
    model.save_pretrained(tmp_path / "bridge", parts="trained")
    with torch.no_grad():
        norm = model.llm.model.norm.weight
        norm.copy_(norm.flip(0))
    model.llm.save_pretrained(tmp_path / "llm")
    with pytest.raises(CheckpointError, match="llm is not the one"):
        BridgeForConditionalGeneration.from_pretrained(tmp_path / "bridge")


def test_fingerprints_do_not_depend_on_how_tensors_lie_in_memory() -> None:
    weights = torch.randn(700, 900, generator=torch.Generator().manual_seed(2))  # more than a block of the sum
    first, second = nn.Linear(900, 700, bias=False), nn.Linear(900, 700, bias=False)
    first.weight = nn.Parameter(weights)
    second.weight = nn.Parameter(weights.T.contiguous().T)
    assert fingerprint(first) == fingerprint(second)
    with torch.no_grad():
        second.weight[[0, 699]] = second.weight[[699, 0]].clone()
    assert fingerprint(first) != fingerprint(second)
    assert fingerprint(first.to(torch.bfloat16)) not in (None, fingerprint(second))
    with torch.device("meta"):
        assert fingerprint(nn.Linear(2, 2)) is None


def test_bridges_with_fingerprints_of_before_still_load(tmp_path: Path) -> None:
    model = BridgeForConditionalGeneration.from_parts(**halves_on_disk(tmp_path))
    model.save_pretrained(tmp_path / "bridge", parts="trained")
    settings = json.loads((tmp_path / "bridge" / "config.json").read_text())
    for half in ("encoder", "llm"):  # sums of bits without places, as they were once written
        lines = [
            f"{name} {tuple(w.shape)} {w.dtype} {int(w.numpy().view(np.int32).astype(np.int64).sum())}\n"
            for name, w in sorted(getattr(model, half).state_dict().items())
        ]
        settings[f"{half}_fingerprint"] = hashlib.sha256("".join(lines).encode()).hexdigest()[:32]
    (tmp_path / "bridge" / "config.json").write_text(json.dumps(settings))
    loaded = BridgeForConditionalGeneration.from_pretrained(tmp_path / "bridge")
    saved_equals(model, loaded)
    loaded.save_pretrained(tmp_path / "again", parts="trained")
    with safe_open(tmp_path / "again" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.trained_state_dict()), "the halves are as they were loaded"
    tiny_llm(seed=2).save_pretrained(tmp_path / "llm")
    with pytest.raises(CheckpointError, match="llm is not the one"):
        BridgeForConditionalGeneration.from_pretrained(tmp_path / "bridge")


@pytest.mark.parametrize("parts", ["all", "trained"])
def test_an_llm_with_more_or_fewer_rows_is_saved_and_loaded(tmp_path: Path, parts: Any) -> None:
    model = BridgeForConditionalGeneration.from_parts(**halves_on_disk(tmp_path))
    for rows in (131, 110):
        model.resize_token_embeddings(rows)
        model.save_pretrained(tmp_path / "bridge", parts=parts)
        state = torch.get_rng_state()
        loaded = BridgeForConditionalGeneration.from_pretrained(tmp_path / "bridge")
        assert torch.equal(state, torch.get_rng_state()) or parts == "all"
        saved_equals(model, loaded)
        assert loaded.config.llm_config.vocab_size == rows == len(loaded.get_output_embeddings().weight)


def test_another_half_than_the_one_trained_with_is_refused(tmp_path: Path) -> None:
    model = BridgeForConditionalGeneration.from_parts(**halves_on_disk(tmp_path))
    model.save_pretrained(tmp_path / "bridge", parts="trained")
    tiny_llm(seed=2).save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="llm is not the one"):
        BridgeForConditionalGeneration.from_pretrained(tmp_path / "bridge", llm_name=str(tmp_path / "other"))
    (tmp_path / "llm").rename(tmp_path / "moved")
    with pytest.raises(ModelError, match="no LLM can be loaded"):
        BridgeForConditionalGeneration.from_pretrained(tmp_path / "bridge")
    moved = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "bridge", llm_name=str(tmp_path / "moved"))
    saved_equals(model, moved)


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    model = BridgeForConditionalGeneration.from_parts(**halves_on_disk(tmp_path))
    model.save_pretrained(tmp_path / "bridge", parts="trained")
    (tmp_path / "bridge" / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="cannot be read"):
        BridgeForConditionalGeneration.from_pretrained(tmp_path / "bridge")
    without = {name: tensor for name, tensor in model.state_dict().items() if "mapper" not in name}
    model.save_pretrained(tmp_path / "bridge", state_dict=without)
    with pytest.raises(CheckpointError, match="2 tensors are missing"):
        BridgeForConditionalGeneration.from_pretrained(tmp_path / "bridge")
    model.save_pretrained(tmp_path / "bridge")
    (tmp_path / "bridge" / "encoder_tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer|vocabulary"):
        BridgeForConditionalGeneration.from_pretrained(tmp_path / "bridge")
    with pytest.raises(Enc2genError, match="no such"):
        BridgeForConditionalGeneration.from_pretrained(tmp_path / "nowhere")


def test_unnamed_halves_and_unmerged_updates_cannot_be_left_out(tmp_path: Path) -> None:
    model = tiny_bridge()
    with pytest.raises(ModelError, match="encoder came from is not known"):
        model.save_pretrained(tmp_path, parts="trained")
    with pytest.raises(ModelError, match="'most' is no choice"):
        model.save_pretrained(tmp_path, parts="most")


def test_the_names_are_public() -> None:
    assert enc2gen.BridgeForConditionalGeneration is BridgeForConditionalGeneration
    assert enc2gen.BridgeConfig.model_type == "enc2gen-bridge"
    assert enc2gen.build_fusion("mean", num_layers=2, hidden_size=4).num_layers == 2


# Bad input


def test_sources_that_do_not_fit_are_refused() -> None:
    model = tiny_bridge()
    start = torch.tensor([[0]])
    with pytest.raises(ModelError, match="65 tokens long, but the encoder has positions for 64"):
        model(torch.full((1, 65), 7), decoder_input_ids=start)
    with pytest.raises(DataError, match="a source has no token"):
        model(torch.ones(1, 3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long), start)
    with pytest.raises(ModelError, match="no source"):
        model(decoder_input_ids=start)
    with pytest.raises(ModelError, match="no target"):
        model(torch.tensor([[0, 7, 2]]))
    with pytest.raises(ModelError, match="LLM has 96"):
        model(torch.full((1, 60), 7), decoder_input_ids=torch.full((1, 40), 7))
    with pytest.raises(ModelError, match="positions for 64"):
        tiny_bridge(max_source_length=65)


def test_an_empty_text_is_the_encoders_special_tokens() -> None:
    model = tiny_bridge()
    inputs = model.processor([""])
    assert inputs["input_ids"].tolist() == [[0, 2]]
    assert model.generate(**inputs, max_new_tokens=3).shape == (1, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fusion": "lats"}, "did you mean 'last'"),
        ({"mapper": "liner"}, "did you mean 'linear'"),
        ({"hidden_states": {"normalize": "none"}}, "unknown option 'normalize'"),
        ({"hidden_states": {"normalise": "final-norm"}}, "no norm behind the last layer of XLMRobertaModel is known"),
        ({"end_vector": "ones"}, "no end vector"),
        ({"source_template": "query"}, "exactly once"),
        ({"prompt": "{source}"}, "would show the LLM the source"),
        ({"llm_dtype": "bf61"}, "no type that weights"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_bridge(**options)


def test_misspelt_names_and_wrong_halves_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Enc2genError, match="multilingual-e5-smal"):
        BridgeForConditionalGeneration.from_parts("embedded:multilingual-e5-smal", tiny_llm())
    with pytest.raises(ModelError, match="decoder-only"):
        BridgeForConditionalGeneration.from_parts(tiny_encoder(), tiny_encoder())
    with pytest.raises(ModelError, match="belongs to this encoder"):
        tiny_bridge(tiny_encoder(vocabulary=60))


def test_an_llm_without_eos_is_refused_and_one_without_pad_pads_with_eos() -> None:
    tokenizer = llm_tokenizer()
    assert tokenizer.pad_token is None and tiny_bridge().config.pad_token_id == 2
    tokenizer.eos_token = None
    endless: PreTrainedModel = tiny_llm(eos_token_id=None, pad_token_id=None)
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        tiny_bridge(llm=endless, llm_tokenizer=tokenizer)


def test_the_config_says_where_the_halves_came_from(tmp_path: Path) -> None:
    halves = halves_on_disk(tmp_path)
    BridgeForConditionalGeneration.from_parts(**halves).save_pretrained(tmp_path / "bridge", parts="trained")
    config = json.loads((tmp_path / "bridge" / "config.json").read_text())
    assert config["llm_name"] == str(halves["llm"]) and config["saved_parts"] == "trained"
