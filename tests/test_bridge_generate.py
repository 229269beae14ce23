"""Generation with bridges: against the plain LLM, alone and in batches, with and without cache, from prompts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bridge_toys import tiny_bridge, tiny_llm
from enc2gen.errors import DataError, ModelError
from enc2gen.models.bridge import BridgeForConditionalGeneration

TEXTS = ["abc de fghi", "a", "klm no"]
PROMPTS = [[0, 20], [0, 21, 22, 23, 24], [0]]
MANY = {"num_beams": 3, "num_return_sequences": 3}


def sources(model: BridgeForConditionalGeneration, texts: list[str] = TEXTS) -> dict[str, Tensor]:
    assert model.processor is not None
    inputs = model.processor(texts)
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def prompts(rows: list[list[int]]) -> dict[str, Tensor]:
    """Padded on the left, with the EOS that is this LLM's pad token."""
    width = max(map(len, rows))
    return {
        "decoder_input_ids": torch.tensor([[2] * (width - len(row)) + row for row in rows]),
        "decoder_attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }


def written(ids: Tensor, start: int) -> list[list[int]]:
    """What follows position `start`, up to EOS."""
    rows = [row[start:].tolist() for row in ids]
    return [row[: row.index(2)] if 2 in row else row for row in rows]


@torch.no_grad()
def naive(model: BridgeForConditionalGeneration, text: str, prompt: list[int], steps: int) -> list[int]:
    """Greedy search by calling the plain LLM on everything in every step."""
    inputs = sources(model, [text])
    prefix = model.get_encoder()(**inputs).last_hidden_state
    words, ids = model.llm.get_input_embeddings(), list(prompt)
    bos = words(torch.tensor([[0]]))
    for _ in range(steps):
        told = words(torch.tensor([ids[1:]], dtype=torch.long))
        logits = model.llm(inputs_embeds=torch.cat([bos, prefix, model.end_vector[None, None], told], 1)).logits
        ids.append(int(logits[0, -1].argmax()))
        if ids[-1] == 2:
            break
    found = ids[len(prompt) :]
    return found[: found.index(2)] if 2 in found else found


@pytest.mark.parametrize("llm", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_search_of_a_batch_with_prompts_is_the_plain_llms(llm: str, use_cache: bool) -> None:
    model = tiny_bridge(llm=tiny_llm(llm))
    options = {"max_new_tokens": 7, "use_cache": use_cache}
    ids = model.generate(**sources(model), **prompts(PROMPTS), **options)
    expected = [naive(model, text, prompt, 7) for text, prompt in zip(TEXTS, PROMPTS, strict=True)]
    assert written(ids, 5) == expected and len({tuple(row) for row in expected}) > 1
    alone = model.generate(**sources(model), **options)
    assert alone[:, 0].tolist() == [0, 0, 0], "by default the start token alone"
    assert written(alone, 1) == [naive(model, text, [0], 7) for text in TEXTS]


@pytest.mark.parametrize("aligner", [None, True])
@pytest.mark.parametrize("options", [{"num_beams": 4}, MANY, {"num_beams": 2, "length_penalty": 2.0}])
def test_beam_search_with_cache_is_beam_search_without(aligner: bool | None, options: dict[str, Any]) -> None:
    model = tiny_bridge(aligner=aligner, fusion="transformer")
    inputs = sources(model) | prompts(PROMPTS)
    both = [
        model.generate(
            **inputs, **options, max_new_tokens=8, use_cache=cache, return_dict_in_generate=True, output_scores=True
        )
        for cache in (True, False)
    ]
    assert torch.equal(both[0].sequences, both[1].sequences)
    torch.testing.assert_close(both[0].sequences_scores, both[1].sequences_scores)


@pytest.mark.parametrize("aligner", [None, True])
def test_beam_search_of_a_batch_is_that_of_its_singles(aligner: bool | None) -> None:
    model = tiny_bridge(aligner=aligner)
    ids = model.generate(**sources(model), **prompts(PROMPTS), **MANY, max_new_tokens=6)
    alone = [
        written(model.generate(**sources(model, [text]), **prompts([prompt]), **MANY, max_new_tokens=6), len(prompt))
        for text, prompt in zip(TEXTS, PROMPTS, strict=True)
    ]
    assert written(ids, 5) == [row for rows in alone for row in rows]
    assert len({tuple(row) for row in alone[0]}) == 3


def test_sampling_follows_the_seed_and_returns_several() -> None:
    model = tiny_bridge()
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        options = {"do_sample": True, "num_return_sequences": 4, "max_new_tokens": 6}
        runs.append(model.generate(**sources(model), **prompts(PROMPTS), **options))
    assert runs[0].shape[0] == 12 and torch.equal(runs[0], runs[1]) and runs[0].tolist() != runs[2].tolist()


def test_writing_ends_at_eos_although_it_is_the_pad_token_too() -> None:
    model = tiny_bridge()
    inputs = sources(model)
    free = model.generate(**inputs, max_new_tokens=5, suppress_tokens=[2])
    head, eos = model.llm.get_output_embeddings(), torch.tensor([2])
    handle = head.register_forward_hook(lambda _, __, logits: logits.index_fill(-1, eos, 1e4))
    ids = model.generate(**inputs, max_new_tokens=5)
    handle.remove()
    assert free.shape[1] == 6 and ids.tolist() == [[0, 2]] * 3
    assert model.processor is not None and model.processor.batch_decode(ids) == [""] * 3


def test_the_encoder_runs_once_and_its_outputs_can_be_used_again() -> None:
    model, calls = tiny_bridge(fusion="global"), []
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    inputs = sources(model)
    expected = model.generate(**inputs, **MANY, max_new_tokens=5)
    assert calls == [1]
    read = model.get_encoder()(**inputs)
    for _ in range(2):
        assert torch.equal(model.generate(encoder_outputs=read, **MANY, max_new_tokens=5), expected)
    states, mask = model.encode(**inputs), inputs["attention_mask"]
    assert torch.equal(model.generate(encoder_states=states, attention_mask=mask, **MANY, max_new_tokens=5), expected)
    fused = model.fusion(states, mask)
    assert torch.equal(model.generate(fused_states=fused, attention_mask=mask, **MANY, max_new_tokens=5), expected)
    assert len(calls) == 3


def test_the_models_own_prompt_is_read_by_default() -> None:
    model = tiny_bridge(prompt="ab")
    assert model.processor is not None
    inputs = model.processor(TEXTS)
    assert set(inputs) == {"input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask"}
    told = model.generate(**inputs, max_new_tokens=4)
    assert torch.equal(told, model.generate(**sources(model), max_new_tokens=4))
    start = model.processor.codec.encode_prompts([""])[0]
    assert told[0, : len(start)].tolist() == start and len(start) > 1
    model.processor = None
    with pytest.raises(ModelError, match="no tokenizer"):
        model.generate(inputs["input_ids"], max_new_tokens=2)


def test_a_prompt_with_the_source_comes_from_the_processor() -> None:
    model = tiny_bridge(prompt="{source} k", prompt_with_source=True)
    assert model.processor is not None
    inputs = model.processor(TEXTS)
    assert inputs["decoder_attention_mask"].sum(1).tolist() != [inputs["decoder_input_ids"].shape[1]] * 3
    ids = model.generate(**inputs, max_new_tokens=4)
    alone = [model.generate(**model.processor(text), max_new_tokens=4) for text in TEXTS]
    assert [row[-4:].tolist() for row in ids] == [row[0, -4:].tolist() for row in alone]
    with pytest.raises(ModelError, match="needs the source text"):
        model.generate(**sources(model), max_new_tokens=2)


def test_the_start_token_may_be_left_out_of_all_prompts_but_not_of_some() -> None:
    model = tiny_bridge()
    inputs, rows = sources(model), [[0, 20], [0, 21, 22, 23, 24], [0, 9]]
    expected = written(model.generate(**inputs, **prompts(rows), max_new_tokens=4), 5)
    without = [row[1:] for row in rows]
    assert written(model.generate(**inputs, **prompts(without), max_new_tokens=4), 5) == expected
    wide = {name: torch.nn.functional.pad(value, (2, 0)) for name, value in prompts(rows).items()}
    assert written(model.generate(**inputs, **wide, max_new_tokens=4), 5) == expected
    with pytest.raises(ModelError, match="some rows begin"):
        model.generate(**inputs, **prompts([[0, 20], [21, 22], [0]]), max_new_tokens=4)


def test_an_llm_without_bos_starts_from_its_end_vector() -> None:
    llm = tiny_llm(bos_token_id=None)
    tokenizer = tiny_bridge().processor.llm_tokenizer
    tokenizer.bos_token = None
    model = tiny_bridge(llm=llm, llm_tokenizer=tokenizer)
    assert model.config.bos_token_id is None and model.config.decoder_start_token_id == 2
    ids = model.generate(**sources(model), max_new_tokens=4)
    assert ids[:, 0].tolist() == [2, 2, 2] and ids.shape[1] == 5
    alone = [model.generate(**sources(model, [text]), max_new_tokens=4) for text in TEXTS]
    assert written(ids, 1) == [written(row, 1)[0] for row in alone]


@torch.no_grad()
def test_a_half_precision_llm_generates() -> None:
    model = tiny_bridge(llm_dtype="bfloat16")
    assert model.mapper.map.weight.dtype == torch.float32
    assert model.generate(**sources(model), num_beams=2, max_new_tokens=4).shape[0] == 3


def test_wrong_inputs_are_refused() -> None:
    model = tiny_bridge()
    inputs = sources(model)
    flipped = {name: value.flip(1) for name, value in prompts(PROMPTS).items()}
    with pytest.raises(ModelError, match="padded on the left"):
        model.generate(**inputs, **flipped, max_new_tokens=2)
    with pytest.raises(ModelError, match="cannot use the cache 'static'"):
        model.generate(**inputs, cache_implementation="static", max_new_tokens=2)
    with pytest.raises(ModelError, match="positions for 64"):
        model.generate(torch.full((1, 70), 5), max_new_tokens=2)
    with pytest.raises(DataError, match="no token"):
        model.generate(torch.ones(1, 4, dtype=torch.long), max_new_tokens=2)
