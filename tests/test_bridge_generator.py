"""A bridge classifies and writes: label scores against brute force, text in and text out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import normalizers, processors
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from conftest import tiny_tokenizer
from enc2gen import SwcmForConditionalGeneration
from enc2gen.errors import ConfigError, DataError, LanguageError, ModelError
from enc2gen.evaluation.classification import LabelScorer, classify
from enc2gen.generation.bridge_generator import BridgeGenerator
from enc2gen.generation.decoding import DecodingConfig
from enc2gen.generation.generator import Generator
from enc2gen.models.bridge.modeling import BridgeForConditionalGeneration
from enc2gen.models.bridge.state_cache import FrozenStateCache
from enc2gen.tokenization.bridge_codec import BridgeCodec

TEXTS = ["ab", "a long text of many words", "kk <s> zz", "қазақ"]
LABELS = ["sport", "sports", "spring", "art", "q"]


def tiny_bridge(**options: Any) -> BridgeForConditionalGeneration:
    """A tiny BERT and a tiny Llama, all tensors of the connection random."""
    sizes: dict[str, Any] = {
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 40,
    }
    ids: dict[str, Any] = {"vocab_size": 120, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    torch.manual_seed(0)
    encoder = BertModel(BertConfig(max_position_embeddings=66, **sizes, **ids), add_pooling_layer=False)
    llm = LlamaForCausalLM(
        LlamaConfig(num_key_value_heads=2, attn_implementation="eager", **(sizes | {"hidden_size": 32}), **ids)
    )
    with torch.no_grad():
        for parameter in [*encoder.parameters(), *llm.parameters()]:
            parameter.add_(torch.randn_like(parameter) * 0.15)
    model = BridgeForConditionalGeneration.from_parts(
        encoder, llm, encoder_tokenizer=tiny_tokenizer(), llm_tokenizer=tiny_tokenizer(), **options
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith(("encoder.", "llm.")):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def codec_of(model: BridgeForConditionalGeneration) -> BridgeCodec:
    assert model.processor is not None
    return model.processor.codec


def brute_force(model: BridgeForConditionalGeneration) -> np.ndarray:
    """Every text with every label on its own, through the model's forward as in training."""
    scores = np.zeros((len(TEXTS), len(LABELS)))
    for row, text in enumerate(TEXTS):
        for column, label in enumerate(LABELS):
            example = codec_of(model).encode_pair(text, label)
            with torch.inference_mode():
                output = model(
                    input_ids=torch.tensor([example.input_ids]),
                    decoder_input_ids=torch.tensor([example.decoder_input_ids]),
                )
            steps = torch.log_softmax(output.logits[0].double(), -1)
            scores[row, column] = sum(
                float(step[target]) for step, target in zip(steps, example.labels, strict=True) if target != -100
            )
    return scores


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prompt": "topic k", "prefix_bos": False},
        {"prompt": "{source} k", "prompt_with_source": True, "fusion": "transformer"},
        {"aligner": True, "mapper": "mlp"},
        {"mapper": "slots", "mapper_options": {"slots": 2}},
    ],
    ids=["plain", "prompt without BOS", "prompts of different length", "aligner", "slots"],
)
def test_label_scores_equal_brute_force(options: dict[str, Any]) -> None:
    model = tiny_bridge(**options)
    scorer, wanted = LabelScorer(model, codec_of(model), LABELS), brute_force(model)
    for size in (1, 3, 8):
        np.testing.assert_allclose(scorer.log_likelihoods(TEXTS, batch_size=size), wanted, atol=3e-4)
    assert scorer._in_one_pass
    # Texts and labels matter, so the agreement means something.
    assert np.ptp(wanted - wanted[:, :1], axis=0)[1:].max() > 0.05 and np.ptp(wanted, axis=1).min() > 1


def test_the_encoder_reads_each_text_once() -> None:
    model, rows = tiny_bridge(), []
    scorer = LabelScorer(model, codec_of(model), LABELS)
    scorer.log_likelihoods(TEXTS[:1])  # compares both ways of scoring, once
    model.encoder.register_forward_pre_hook(lambda _, __, kw: rows.append(len(kw["input_ids"])), with_kwargs=True)
    scorer.log_likelihoods(TEXTS, batch_size=2)
    assert rows == [2, 2]


@pytest.mark.parametrize("fusion", ["last", "transformer"])
def test_states_that_are_known_are_not_computed_again(fusion: str) -> None:
    """Two bridges with one frozen encoder: the second one's texts need no pass of it."""
    model = tiny_bridge(fusion=fusion)
    cache, wanted = FrozenStateCache(model), brute_force(model)
    LabelScorer(model, codec_of(model), LABELS, cache).log_likelihoods(TEXTS)
    model.encoder.register_forward_pre_hook(lambda *_: pytest.fail("the encoder ran again"))
    scores = LabelScorer(model, codec_of(model), LABELS, cache).log_likelihoods(TEXTS, batch_size=2)
    np.testing.assert_allclose(scores, wanted, atol=3e-4)


def test_predictions_and_probabilities() -> None:
    model, finished = tiny_bridge(), []
    found = classify(model, codec_of(model), TEXTS, LABELS, batch_size=3, on_batch=finished.append)
    wanted = brute_force(model)
    assert found.predictions == tuple(LABELS[index] for index in wanted.argmax(1)) and finished == [3, 4]
    assert found.probabilities is not None
    np.testing.assert_allclose(found.probabilities, np.exp(wanted) / np.exp(wanted).sum(1, keepdims=True), rtol=1e-3)


def taught(label: str) -> BridgeForConditionalGeneration:
    """A bridge whose end vector and LLM make it write `label` and end, whatever the source."""
    model = tiny_bridge()
    model.llm.requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    examples = codec_of(model).encode_pairs(TEXTS, [label] * len(TEXTS))
    for _ in range(40):
        loss = sum(
            model(
                input_ids=torch.tensor([e.input_ids]),
                decoder_input_ids=torch.tensor([e.decoder_input_ids]),
                labels=torch.tensor([e.labels]),
            ).loss
            for e in examples
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def test_generation_is_compared_as_written() -> None:
    model = taught("sports")
    codec = codec_of(model)
    for method in ("likelihood", "generation"):
        found = classify(model, codec, [*TEXTS, " "], LABELS, method=method)  # type: ignore[arg-type]
        assert found.predictions[:4] == ("sports",) * 4
    assert found.log_likelihoods is None and found.probabilities is None and found.predictions[4] == ""
    # A label that is only the beginning of what is written is not what was written.
    assert classify(model, codec, TEXTS, ["sport", "q"], method="generation").predictions == ("sports",) * 4


def test_unusable_labels_and_methods_are_refused() -> None:
    model = tiny_bridge()
    codec = codec_of(model)
    for labels, message in ((["a", " "], "a label is ' '"), ([], "no label"), (["a", "a"], "same tokens")):
        with pytest.raises(ConfigError, match=message):
            classify(model, codec, TEXTS, labels)
    with pytest.raises(ConfigError, match="longer than 200 tokens"):
        classify(model, codec, TEXTS, ["a", "b" * 300])
    assert codec.truncated == 0
    with pytest.raises(ConfigError, match="method"):
        classify(model, codec, TEXTS, LABELS, method="guess")  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"prompt": "{source} k", "prompt_with_source": True}], ids=["plain", "prompt"])
def test_saved_bridge_writes_the_same_in_any_batch(tmp_path: Path, options: dict[str, Any]) -> None:
    model = tiny_bridge(source_template="q {text}", **options)
    model.save_pretrained(tmp_path / "bridge")
    generator = Generator.from_pretrained(tmp_path / "bridge")
    assert isinstance(generator, BridgeGenerator)
    texts = [TEXTS[0], "", *TEXTS[1:], "  "]
    runs = [
        generator.generate(texts, config=DecodingConfig(batch_size=size, num_beams=beams, max_new_tokens=6))
        for beams, size in ((1, 1), (1, 8), (3, 1), (3, 8))
    ]
    assert runs[0] == runs[1] and runs[2] == runs[3]
    assert runs[0][1] == runs[0][5] == "" and len(set(runs[0])) > 2
    # transformers' own generate, one text at a time, is the oracle.
    assert model.processor is not None
    for text, written in zip(texts, runs[0], strict=True):
        if text.strip():
            inputs = model.processor(text)
            ids = model.generate(**inputs, max_new_tokens=6)
            head = inputs["decoder_input_ids"].shape[1] if "decoder_input_ids" in inputs else 1
            assert model.processor.decode(ids[0, head:]) == written


def test_bridges_take_no_language_and_need_their_tokenizers(tmp_path: Path) -> None:
    model = tiny_bridge()
    generator = BridgeGenerator(model)
    with pytest.raises(LanguageError, match="'kk' was given"):
        generator.generate(["a"], target_language="kk")
    with pytest.raises(LanguageError, match="'en' was given"):
        generator.generate(["a"], source_language="en")
    model.processor = None
    with pytest.raises(ModelError, match="no tokenizers"):
        BridgeGenerator(model)


def test_a_text_that_cannot_be_read_is_named_by_its_line() -> None:
    model = tiny_bridge()
    assert model.processor is not None
    tokenizer = model.processor.codec.encoder_tokenizer
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("z", "")
    generator = BridgeGenerator(model)
    for first_line, name in ((0, "text 4"), (512, "text 516")):
        with pytest.raises(DataError, match=f"^{name}: a source is empty"):
            generator.generate(["a", "", "b", "z"], first_line=first_line)


def test_models_with_languages_are_served_as_before(encoder_folder: Path, tmp_path: Path) -> None:
    model = SwcmForConditionalGeneration.from_encoder(encoder_folder, languages=["en", "kk"], verbose=False)
    model.save_pretrained(tmp_path / "swcm")
    generator = Generator.from_pretrained(tmp_path / "swcm")
    assert type(generator) is Generator
    with pytest.raises(LanguageError, match="no target language"):
        generator.generate(["abc"])


def test_answers_may_be_as_long_as_the_codec_allows() -> None:
    model = tiny_bridge()
    model.generation_config.max_new_tokens = None
    model.generation_config.eos_token_id = None  # never ends by itself
    generator, written = BridgeGenerator(model), []
    decode = generator.codec.decode
    generator.codec.decode = lambda ids: written.append(len(ids)) or decode(ids)  # type: ignore[method-assign,func-returns-value]
    generator.generate(["ab"], config=DecodingConfig(num_beams=1))
    generator.generate(["ab"], config=DecodingConfig(num_beams=1, max_new_tokens=7))
    model.generation_config.max_new_tokens = 9
    generator.generate(["ab"], config=DecodingConfig(num_beams=1))
    assert written == [generator.codec.max_target_length, 7, 9]
