"""Bridges with LLMs that count places and not positions: a batch is read as its texts alone, wherever padding was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPTNeoConfig,
    Lfm2Config,
    MambaConfig,
    MistralConfig,
    MptConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from bridge_toys import llm_tokenizer, tiny_bridge, tiny_llm
from conftest import tiny_encoder
from enc2gen.errors import ModelError
from enc2gen.evaluation.classification import LabelScorer
from enc2gen.llms.loading import load_llm
from enc2gen.models.bridge import BridgeForConditionalGeneration
from enc2gen.models.bridge.llm_inputs import read_mask

WINDOW = 8
COMMON: dict[str, Any] = {"vocab_size": 120, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 2}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
LLAMA = SIZES | {"num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8}
LLMS: dict[str, Callable[[], PreTrainedConfig]] = {
    "sliding window": lambda: MistralConfig(**COMMON, **LLAMA, sliding_window=WINDOW),
    "window in some layers": lambda: Gemma3TextConfig(
        **COMMON, **LLAMA, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]
    ),
    "local attention": lambda: GPTNeoConfig(
        **COMMON,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=WINDOW,
        max_position_embeddings=128,
    ),
    "ALiBi": lambda: MptConfig(**COMMON, d_model=32, n_layers=2, n_heads=4, max_seq_len=128),
    "convolutions": lambda: Lfm2Config(
        **COMMON, **(LLAMA | {"num_hidden_layers": 3}), layer_types=["conv", "conv", "full_attention"]
    ),
}
TEXTS = ["ab", "abc de fghi klm nop qrs tuv wxyz", "klm no"]
TARGETS = ["xy", "abcdefg", "z"]
PROMPTS = ["q", "", "rstuv"]


def placed_llm(kind: str, attention: str = "eager") -> PreTrainedModel:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(LLMS[kind]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.tie_weights()
    model.set_attn_implementation(attention)
    return model.eval()


def bridge_with(kind: str, attention: str = "eager", **options: Any) -> BridgeForConditionalGeneration:
    model = tiny_bridge(llm=placed_llm(kind, attention), **options)
    model.generation_config.eos_token_id = None
    return model


def inputs_of(model: BridgeForConditionalGeneration, rows: list[int]) -> dict[str, Tensor]:
    """Sources and targets, and a prompt a source, padded on the left."""
    assert model.processor is not None
    inputs = dict(model.processor([TEXTS[row] for row in rows]))
    ids = [[0, *llm_tokenizer()(PROMPTS[row], add_special_tokens=False)["input_ids"]] for row in rows]
    width = max(map(len, ids))
    inputs["decoder_input_ids"] = torch.tensor([[2] * (width - len(row)) + row for row in ids])
    inputs["decoder_attention_mask"] = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    return inputs


@torch.no_grad()
@pytest.mark.parametrize("kind", LLMS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_batch_equals_its_singles(kind: str, attention: str) -> None:
    model = bridge_with(kind, attention)
    assert model.processor is not None
    batch = model(**model.processor(TEXTS, TARGETS)).logits
    assert batch.isfinite().all()
    for row, text, target in zip(batch, TEXTS, TARGETS, strict=True):
        alone = model(**model.processor(text, target)).logits[0]
        torch.testing.assert_close(row[: len(alone)], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", LLMS)
def test_a_batch_trains_as_its_singles(kind: str) -> None:
    model = bridge_with(kind, "sdpa")
    assert model.processor is not None
    gradients = []
    for groups in ([TEXTS], [[text] for text in TEXTS]):
        model.zero_grad()
        for texts in groups:
            targets = [TARGETS[TEXTS.index(text)] for text in texts]
            model(**model.processor(texts, targets), label_smoothing=0.0).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == 3, "the map and the end vector"
    for together, alone in zip(*gradients, strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", LLMS)
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 3}])
def test_a_batch_with_prompts_writes_what_its_singles_write(kind: str, options: dict[str, Any]) -> None:
    model = bridge_with(kind)
    options = {"max_new_tokens": WINDOW + 4} | options
    together = model.generate(**inputs_of(model, [0, 1, 2]), **options)[:, -options["max_new_tokens"] :]
    alone = [model.generate(**inputs_of(model, [row]), **options)[0, -options["max_new_tokens"] :] for row in range(3)]
    assert together.tolist() == [row.tolist() for row in alone]
    assert len({tuple(row.tolist()) for row in alone}) == 3


@torch.no_grad()
@pytest.mark.parametrize("kind", LLMS)
def test_later_steps_of_a_batch_continue_what_was_read(kind: str) -> None:
    model = bridge_with(kind)
    inputs = inputs_of(model, [0, 1, 2])
    more = torch.tensor([[30, 31, 32], [33, 34, 35], [36, 37, 38]])
    cache, mask, steps = model(**inputs, use_cache=True).past_key_values, inputs["decoder_attention_mask"], []
    for ids in more.split(1, dim=1):
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        step = inputs | {"decoder_input_ids": ids, "decoder_attention_mask": mask}
        output = model(**step, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    for row, logits in enumerate(torch.cat(steps, dim=1)):
        alone = inputs_of(model, [row])
        ids = torch.cat([alone.pop("decoder_input_ids"), more[row : row + 1]], dim=1)
        del alone["decoder_attention_mask"]
        torch.testing.assert_close(logits, model(**alone, decoder_input_ids=ids).logits[0, -3:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [None, *LLMS])
def test_labels_of_a_batch_are_scored_as_alone(kind: str | None) -> None:
    model = bridge_with(kind) if kind else tiny_bridge(llm=tiny_llm())
    assert model.processor is not None
    codec = model.processor.make_codec(prompt="{source}", prompt_with_source=True)
    scorer = LabelScorer(model, codec, ["abc", "abde", "z"])
    alone = np.concatenate([scorer.log_likelihoods([text]) for text in TEXTS])
    np.testing.assert_allclose(scorer.log_likelihoods(TEXTS), alone, rtol=1e-4, atol=1e-4)


def test_the_mask_tells_what_was_read_padding_first() -> None:
    prefix, decoder = torch.tensor([[1, 1, 1], [1, 0, 0]]), torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]])
    assert read_mask(prefix, decoder, has_bos=True).tolist() == [[0, 1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 0, 0]]
    assert read_mask(prefix, decoder, has_bos=False).tolist() == [[0, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0, 0]]


def test_recurrent_llms_are_refused(tmp_path: Path) -> None:
    config = MambaConfig(**COMMON, hidden_size=16, num_hidden_layers=1, state_size=4)
    llm = AutoModelForCausalLM.from_config(config)
    llm.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="'mamba' cannot write behind a soft prefix: it takes no past_key_values") as e:
        BridgeForConditionalGeneration.from_parts(tiny_encoder(), llm)
    assert "Llama" in str(e.value.remedy)
    with pytest.raises(ModelError, match="'mamba' cannot write"):
        load_llm(tmp_path)
