"""The LLM alone writes by the same search as bridges do."""

from __future__ import annotations

import torch
from transformers import LlamaForCausalLM

from bridge_toys import tiny_llm
from conftest import tiny_tokenizer
from enc2gen.experiments.bridge.llm_writing import write_alone
from enc2gen.generation.decoding import DecodingConfig


def opinionated_llm(*liked: int) -> LlamaForCausalLM:
    """It wants to write the first of `liked`, whatever it reads; if it must not, the second, and so on."""
    llm = tiny_llm()
    assert isinstance(llm, LlamaForCausalLM)
    llm.lm_head = torch.nn.Linear(llm.config.hidden_size, llm.config.vocab_size)
    with torch.no_grad():
        llm.lm_head.weight.zero_()
        llm.lm_head.bias.zero_()
        for rank, token in enumerate(liked):
            llm.lm_head.bias[token] = 10 - rank
    return llm


def test_ngrams_of_the_message_may_be_written_and_those_written_may_not_be_repeated() -> None:
    tokenizer = tiny_tokenizer()
    a, b, c = tokenizer.convert_tokens_to_ids(["a", "b", "c"])
    llm = opinionated_llm(a, b, c)
    for size, written in ((0, "aaaaa"), (1, "abc"), (2, "aabac")):
        decoding = DecodingConfig(num_beams=1, no_repeat_ngram_size=size, max_new_tokens=len(written))
        found = write_alone(llm, tokenizer, ["ab", "cabcab"], instruction="aab {text}", decoding=decoding)
        assert found == [written, written]


def test_beams_find_what_transformers_finds_with_them() -> None:
    tokenizer, llm = tiny_tokenizer(), tiny_llm(seed=5)
    texts = ["abc", "gh", "fed"]
    outputs = {}
    for beams in (1, 4):
        decoding = DecodingConfig(num_beams=beams, max_new_tokens=6, batch_size=2)
        outputs[beams] = write_alone(llm, tokenizer, texts, instruction="q {text}", decoding=decoding)
        for text, output in zip(texts, outputs[beams], strict=True):
            ids = torch.tensor(
                [[tokenizer.bos_token_id, *tokenizer(f"q {text}\nAnswer:", add_special_tokens=False)["input_ids"]]]
            )
            options = {
                "num_beams": beams,
                "max_new_tokens": 6,
                "do_sample": False,
                "pad_token_id": 1,
                "eos_token_id": 2,
            }
            written = llm.generate(ids, early_stopping=beams > 1, **options)[0, ids.shape[1] :]
            assert output == tokenizer.decode(written, skip_special_tokens=True).strip().partition("\n")[0].strip()
    assert outputs[1] != outputs[4]
