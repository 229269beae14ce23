"""Bridges' codec: what the encoder reads, what the LLM reads, and what it should write."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from enc2gen.errors import ConfigError, DataError, ModelError
from enc2gen.tokenization.bridge_codec import BridgeCodec

END = "<|end|>"


def llm_tokenizer(**roles: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges, in SmolLM2's manner: pad = eos, nothing added around a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<|start|>", END, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **(roles or {"bos_token": "<|start|>", "eos_token": END}))


@pytest.fixture
def make_codec(tokenizer: PreTrainedTokenizerFast) -> Callable[..., BridgeCodec]:
    def make(llm: PreTrainedTokenizerFast | None = None, **options: Any) -> BridgeCodec:
        settings = {"max_source_length": 40, "max_target_length": 20, **options}
        return BridgeCodec(tokenizer, llm or llm_tokenizer(), **settings)

    return make


def letters(llm: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Ids of an ASCII text, one a character: an oracle that knows nothing of the codec."""
    return [llm.get_vocab()["Ġ" if char == " " else char] for char in text]


def test_the_encoder_reads_the_template_inside_its_own_special_tokens(make_codec, tokenizer) -> None:
    codec = make_codec(source_template="query: {text}")
    (ids,) = codec.encode_sources(["abc"])
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert ids == tokenizer("query: abc")["input_ids"]


@pytest.mark.parametrize(
    ("template", "around"), [("$A </s>", ([], [2])), ("<s> <s> $A", ([0, 0], [])), ("$A", ([], []))]
)
def test_special_tokens_are_those_of_the_tokenizers_own_template(make_codec, tokenizer, template, around) -> None:
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    plain = tokenizer("abc", add_special_tokens=False)["input_ids"]
    assert make_codec().encode_sources(["abc"]) == [[*around[0], *plain, *around[1]]]


def test_a_tokenizer_without_special_tokens_refuses_empty_text_and_others_take_it(make_codec, tokenizer) -> None:
    assert make_codec().encode_sources([""]) == [[0, 2]]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    with pytest.raises(DataError, match="text 2: a source is empty"):
        make_codec().encode_sources(["a", ""])


def test_the_end_is_a_label_although_it_is_the_padding_too(make_codec) -> None:
    codec = make_codec()
    example = codec.encode_pair("abc", "yes")
    yes = letters(codec.llm_tokenizer, "yes")
    assert codec.llm_pad_id == codec.eos_id == 1
    assert example.decoder_input_ids == (0, *yes)
    assert example.labels == (*yes, 1)


def test_the_prompt_is_read_and_not_learnt(make_codec) -> None:
    codec = make_codec(prompt="T:")
    example = codec.encode_pair("abc", "no")
    prompt, no = letters(codec.llm_tokenizer, "T:"), letters(codec.llm_tokenizer, "no")
    assert example.decoder_input_ids == (0, *prompt, *no)
    assert example.labels == (-100, -100, *no, 1)
    assert codec.encode_prompts(["x", "y"]) == [[0, *prompt]] * 2
    assert codec.encode_prompts(["x"], prompt="") == [[0]]


def test_the_source_goes_to_the_llm_only_when_allowed(make_codec) -> None:
    with pytest.raises(ConfigError, match=r"show the LLM the source.*\n.*ignore the encoder"):
        make_codec(prompt="{source} =")
    with pytest.raises(ConfigError, match="show the LLM the source"):
        make_codec().encode_pair("abc", "no", prompt="{source}")
    codec = make_codec(prompt="<{source}>", prompt_with_source=True, source_template="query: {text}")
    assert codec.encode_prompts(["ab", "{c}"]) == [
        [0, *letters(codec.llm_tokenizer, "<ab>")],
        [0, *letters(codec.llm_tokenizer, "<{c}>")],
    ]


def test_long_texts_are_cut_and_counted_and_keep_their_ends(make_codec) -> None:
    codec = make_codec(max_source_length=6, max_target_length=4, prompt="{source}!", prompt_with_source=True)
    example = codec.encode_pair("abcdefghij", "mnopq")
    assert len(example.input_ids) == 6 and example.input_ids[-1] == 2
    assert example.labels[-4:] == (*letters(codec.llm_tokenizer, "mno"), 1)
    assert list(example.decoder_input_ids[1:8]) == letters(codec.llm_tokenizer, "abcdef!")
    assert codec.truncated == 2, "the source, which both read cut, and the target"
    codec.encode_pair("ab", "m")
    assert codec.truncated == 2
    codec.encode_pair("я" * 4, "m")  # four pieces of the encoder, eight of the LLM
    assert codec.truncated == 3, "cut in the prompt alone"


def test_text_never_becomes_a_special_token_on_either_side(make_codec) -> None:
    codec = make_codec(prompt=END)
    example = codec.encode_pair("a </s> <s> b <pad>", f"x{END}y")
    assert not {0, 1, 2} & set(example.input_ids[1:-1])
    assert 1 not in example.decoder_input_ids
    assert codec.decode(example.labels) == f"x{END}y"


def test_a_unigram_llm_is_protected_too(make_codec, tokenizer) -> None:
    codec = make_codec(copy.deepcopy(tokenizer))
    assert codec.eos_id not in codec.encode_targets(["a</s>b"])[0][:-1]


def test_an_llm_without_bos_starts_from_its_padding_and_decoding_survives_it(make_codec) -> None:
    codec = make_codec(llm_tokenizer(eos_token=END))
    assert (codec.start_id, codec.llm_pad_id, codec.eos_id) == (1, 1, 1)
    yes = letters(codec.llm_tokenizer, "yes")
    assert codec.decode_batch([[1, *yes, 1, 1], [*yes, 1], [1, 1, 1], [1], []]) == ["yes", "yes", "", "", ""]


@pytest.mark.parametrize("roles", [{"bos_token": "<|start|>", "eos_token": END}, {"eos_token": END}])
def test_padding_on_the_left_is_no_end_although_it_has_its_id(make_codec, roles) -> None:
    codec = make_codec(llm_tokenizer(**roles), prompt="{source}:", prompt_with_source=True)
    assert codec.llm_pad_id == codec.eos_id
    prompts = codec.encode_prompts(["a", "bcd"])
    width = max(map(len, prompts))
    rows = [
        [*[codec.llm_pad_id] * (width - len(prompt)), *prompt, *letters(codec.llm_tokenizer, "yes"), codec.eos_id]
        for prompt in prompts
    ]
    rows[0] += [codec.llm_pad_id, codec.llm_pad_id]  # it ended before the others
    assert codec.decode_batch(rows) == ["a:yes", "bcd:yes"]


def test_a_start_that_is_written_in_the_middle_costs_no_text(make_codec) -> None:
    codec = make_codec()
    yes = letters(codec.llm_tokenizer, "yes")
    assert codec.decode([*yes, codec.start_id, *yes, codec.eos_id, *yes]) == "yesyes"


def test_decoding_gives_back_the_text(make_codec) -> None:
    codec = make_codec(max_target_length=200)
    for text in ("Ürümqi, қала 你好", " two  spaces ", "", "a\nb"):
        example = codec.encode_pair("abc", text)
        assert codec.decode(example.labels) == text
        assert codec.decode(codec.encode_targets([text])[0]) == text


def test_batches_equal_single_pairs(make_codec) -> None:
    codec = make_codec(prompt="?")
    sources, targets = ["abc", "d", "e f"], ["one", "two", "three"]
    singles = [codec.encode_pair(s, t) for s, t in zip(sources, targets, strict=True)]
    assert codec.encode_pairs(sources, targets) == singles


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source_template": "query:"}, "source_template.*exactly once"),
        ({"max_source_length": 2}, "max_source_length.*too short(.|\n)*use 3"),
        ({"max_target_length": 1}, "max_target_length.*too short"),
    ],
)
def test_settings_that_cannot_work_are_refused(make_codec, options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        make_codec(**options)


def test_an_llm_without_an_end_is_refused(make_codec) -> None:
    with pytest.raises(ModelError, match="no eos token"):
        make_codec(llm_tokenizer(bos_token="<|start|>"))


def test_text_that_is_not_unicode_is_refused(make_codec) -> None:
    with pytest.raises(DataError, match="surrogates"):
        make_codec().encode_pair("abc", "\ud800")
