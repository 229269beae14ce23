"""The LLM alone, asked to write something about a text that it reads itself: the floor of bridges that write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.logits_process import NoRepeatNGramLogitsProcessor

from enc2gen.evaluation.label_scoring import length_sorted_batches
from enc2gen.evaluation.llm_alone import LlmAlone
from enc2gen.generation.decoding import DecodingConfig
from enc2gen.generation.generator import pad_rows


class _Questions(LlmAlone):
    """The questions of :class:`LlmAlone`, as ids."""

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        return self._encode(texts)


class _NoRepeatBehind(LogitsProcessor):
    """`no_repeat_ngram_size` for what is written alone, as in a bridge: here the text stands before it."""

    def __init__(self, size: int, start: int) -> None:
        self._inner, self._start = NoRepeatNGramLogitsProcessor(size), start

    def __call__(self, input_ids: Any, scores: Any) -> Tensor:
        return self._inner(input_ids[:, self._start :], scores)


@torch.inference_mode()
def write_alone(
    llm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    instruction: str,
    decoding: DecodingConfig,
    seed: int = 0,
) -> list[str]:
    """What the LLM answers, in the order of `texts`; without a chat template, its first line.

    Args:
        instruction: the message, with `{text}`.
        decoding: the bridges' own, so that they differ in nothing else; n-grams of the message may be repeated.
        seed: of sampling.
    """
    questions = _Questions(llm, tokenizer, ["-"], instruction=instruction)  # the label is not used
    rows = questions.ids(texts)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    assert isinstance(pad, int)
    answers = [""] * len(rows)
    model: Any = llm
    arguments = {**decoding.arguments(), "pad_token_id": pad, "eos_token_id": tokenizer.eos_token_id}
    no_repeat = arguments.pop("no_repeat_ngram_size", 0)
    torch.manual_seed(seed)
    for chosen in length_sorted_batches([len(row) for row in rows], decoding.batch_size):
        ids, mask = pad_rows([rows[index] for index in chosen], pad, llm.device, left=True)
        behind = LogitsProcessorList([_NoRepeatBehind(no_repeat, ids.shape[1])] if no_repeat else [])
        output = model.generate(input_ids=ids, attention_mask=mask, logits_processor=behind, **arguments)
        for index, text in zip(
            chosen, tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True), strict=True
        ):
            answers[index] = text.strip() if questions.chat else text.strip().partition("\n")[0].strip()
    return answers
