"""One pass for all labels gives what one whole pass per label gives; the LLM on its own."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from enc2gen.errors import ConfigError, ModelError
from enc2gen.evaluation.label_scoring import LabelTree, length_sorted_batches, score_tree
from enc2gen.evaluation.llm_alone import LlmAlone

TEXTS = ["ab", "a longer text of many words", "zq </s> x", "kk kk"]
LABELS = ["sport", "sports", "spring", "art", "q"]
COMMON: dict[str, Any] = {"vocab_size": 120, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}


def tiny_llm(kind: str = "llama", attention: str = "eager") -> PreTrainedModel:
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    model: PreTrainedModel
    if kind == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=256, attn_implementation=attention, **COMMON)
        )
    elif kind == "mistral":
        model = MistralForCausalLM(
            MistralConfig(num_key_value_heads=2, sliding_window=24, attn_implementation=attention, **sizes, **COMMON)
        )
    else:
        model = LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, attn_implementation=attention, **sizes, **COMMON))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)  # far from uniform, so that a wrong mask shows
    return model.eval()


def whole_pass(llm: PreTrainedModel, source: list[int], label: list[int]) -> float:
    """The oracle: source and label in one ordinary pass without padding, mask, positions or cache."""
    with torch.inference_mode():
        logits = llm(input_ids=torch.tensor([[*source, *label]])).logits[0].double()
    steps = torch.log_softmax(logits, dim=-1)[len(source) - 1 : -1]
    return float(sum(row[token] for row, token in zip(steps, label, strict=True)))


def expected(scorer: LlmAlone) -> np.ndarray:
    return np.array([[whole_pass(scorer.llm, source, ids) for ids in scorer._ids] for source in scorer._encode(TEXTS)])


@pytest.mark.parametrize(("kind", "attention"), [("llama", "eager"), ("llama", "sdpa"), ("gpt2", "eager")])
def test_tree_equals_whole_passes(kind: str, attention: str, tokenizer: PreTrainedTokenizerFast) -> None:
    scorer = LlmAlone(tiny_llm(kind, attention), tokenizer, LABELS)
    for size in (1, 3, 32):
        scores = scorer.log_likelihoods(TEXTS, batch_size=size)
        np.testing.assert_allclose(scores, expected(scorer), atol=2e-4)
    assert scorer._in_one_pass
    assert np.ptp(scores, axis=1).min() > 1  # the labels differ, so the agreement means something


def test_sliding_windows_are_scored_label_by_label(tokenizer: PreTrainedTokenizerFast) -> None:
    scorer = LlmAlone(tiny_llm("mistral"), tokenizer, LABELS)
    scores = scorer.log_likelihoods(TEXTS[:3], batch_size=1)
    np.testing.assert_allclose(scores, expected(scorer)[:3], atol=2e-4)
    assert scorer._in_one_pass is False


def test_models_that_ignore_the_mask_are_found_out(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    llm = tiny_llm()
    honest = llm.forward

    def careless(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
        return honest(*args, attention_mask=None if attention_mask.dim() == 4 else attention_mask, **kwargs)

    scorer = LlmAlone(llm, tokenizer, LABELS)
    wanted = expected(scorer)
    llm.forward = careless
    with caplog.at_level(logging.WARNING):
        np.testing.assert_allclose(scorer.log_likelihoods(TEXTS), wanted, atol=2e-4)
    assert "does not take masks of trees" in caplog.text


def test_the_source_is_read_once_and_the_tree_is_small(tokenizer: PreTrainedTokenizerFast) -> None:
    llm, positions = tiny_llm(), []
    llm.model.register_forward_hook(lambda _, __, output: positions.append(output.last_hidden_state.shape[1]))
    scorer = LlmAlone(llm, tokenizer, LABELS)
    scorer.log_likelihoods(TEXTS)
    positions.clear()
    scorer.log_likelihoods(TEXTS)
    labels = {tuple(ids[:end]) for ids in scorer._ids for end in range(1, len(ids))}
    assert positions == [max(map(len, scorer._encode(TEXTS))), len(labels)]
    assert len(labels) < sum(len(ids) - 1 for ids in scorer._ids)  # shared beginnings are read once


def test_tree_of_one_token_labels_needs_no_pass() -> None:
    tree = LabelTree.build([[5], [7]])
    logits = torch.randn(2, 10)
    source: Any = SimpleNamespace(logits=logits)
    scores = score_tree(None, source, tree)  # type: ignore[arg-type]
    np.testing.assert_allclose(scores, torch.log_softmax(logits.double(), -1)[:, [5, 7]], atol=1e-6)


@pytest.mark.parametrize("labels", [[], [[1], []], [[1, 2], [1, 2]]])
def test_unusable_labels_are_refused(labels: list[list[int]]) -> None:
    with pytest.raises(ConfigError, match="label"):
        LabelTree.build(labels)


CHAT = "<s>{% for m in messages %}u {{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}a {% endif %}"


def test_chat_template_is_used_and_text_cannot_end_its_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    plain = LlmAlone(tiny_llm(), tokenizer, LABELS)
    assert not plain.chat
    tokenizer.chat_template = CHAT
    asked = LlmAlone(tiny_llm(), tokenizer, LABELS, instruction="{labels} {text}")
    (ids,) = asked._encode(["x </s> y"])
    assert asked.chat and ids[0] == 0 and ids.count(2) == 1  # the one of the template
    assert all(label[-1] == 2 for label in asked._ids) and all(label[-1] != 2 for label in plain._ids)
    assert "sport" in tokenizer.decode(ids)
    np.testing.assert_allclose(asked.log_likelihoods(TEXTS), expected(asked), atol=2e-4)
    tokenizer.chat_template = "{{ 'nothing' }}"
    with pytest.raises(ModelError, match="does not show the user's message"):
        LlmAlone(tiny_llm(), tokenizer, LABELS)


def test_calibration_takes_away_what_any_text_gets(tokenizer: PreTrainedTokenizerFast) -> None:
    scorer = LlmAlone(tiny_llm(), tokenizer, LABELS)
    plain, fair = scorer.classify(TEXTS), scorer.classify(TEXTS, calibrate=True)
    neutral = scorer.log_likelihoods(["N/A"])
    np.testing.assert_allclose(fair.log_likelihoods, plain.log_likelihoods - neutral, atol=1e-4)
    assert plain.predictions == tuple(LABELS[i] for i in expected(scorer).argmax(1))
    np.testing.assert_allclose(plain.probabilities.sum(1), 1)


def test_long_texts_are_cut_and_wrong_instructions_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    scorer = LlmAlone(tiny_llm(), tokenizer, LABELS, max_text_length=5)
    assert scorer._encode(["abc de f"])[0] == scorer._encode(["abc de"])[0] and scorer.truncated == 1
    with pytest.raises(ConfigError, match="exactly once"):
        LlmAlone(tiny_llm(), tokenizer, LABELS, instruction="what is it?")
    with pytest.raises(ConfigError, match="empty"):
        LlmAlone(tiny_llm(), tokenizer, ["a", " "])


def test_batches_are_bounded_in_texts_and_in_tokens() -> None:
    lengths = [5000, 30, 3000, 900, 40, 900, 35, 20, 900, 900, 900]
    batches = length_sorted_batches(lengths, 3)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(len(batch) <= 3 for batch in batches)
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 4096 for batch in batches)
    assert batches[0] == [0]  # one text alone may be longer
    assert len(batches) == 5  # and no batch could have taken the next text
