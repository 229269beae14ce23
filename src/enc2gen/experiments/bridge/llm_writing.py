"""The LLM alone, asked to write something about a text that it reads itself: the floor of bridges that write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from enc2gen.evaluation.llm_alone import LlmAlone
from enc2gen.generation.generator import pad_rows


class _Questions(LlmAlone):
    """The questions of :class:`LlmAlone`, as ids."""

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        return self._encode(texts)


@torch.inference_mode()
def write_alone(
    llm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    instruction: str,
    max_new_tokens: int,
    batch_size: int = 32,
) -> list[str]:
    """What the LLM answers, greedily, in the order of `texts`; without a chat template, its first line.

    Args:
        instruction: the message, with `{text}`.
        max_new_tokens: most tokens of an answer.
    """
    questions = _Questions(llm, tokenizer, ["-"], instruction=instruction)  # the label is not used
    rows = questions.ids(texts)
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    assert isinstance(pad, int)
    answers = [""] * len(rows)
    model: Any = llm
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids, mask = pad_rows([rows[index] for index in chosen], pad, llm.device, left=True)
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            eos_token_id=tokenizer.eos_token_id,
        )
        for index, text in zip(
            chosen, tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True), strict=True
        ):
            answers[index] = text.strip() if questions.chat else text.strip().partition("\n")[0].strip()
    return answers
