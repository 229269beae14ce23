"""The model as transformers users meet it: decoding, caches, padding, saving, Seq2SeqTrainer, peft."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer, EncoderDecoderCache, GenerationConfig

from conftest import tiny_encoder, tiny_tokenizer
from enc2gen import SwcmForConditionalGeneration
from enc2gen.errors import LanguageError, ModelError

SOURCE = torch.tensor([[0, 9, 8, 7, 50, 2], [0, 30, 31, 32, 33, 2]])


@pytest.fixture(params=["xlm-roberta", "bert"])
def model(request: pytest.FixtureRequest) -> SwcmForConditionalGeneration:
    return SwcmForConditionalGeneration.from_encoder(tiny_encoder(request.param), languages=["kk", "ug"], verbose=False)


def targets(model: SwcmForConditionalGeneration, length: int = 7) -> torch.Tensor:
    ids = torch.randint(4, 100, (2, length), generator=torch.Generator().manual_seed(3))
    ids[:, 0] = model.language_id("kk")
    return ids


def test_no_causal_leak(model: SwcmForConditionalGeneration) -> None:
    first = targets(model)
    second = first.clone()
    second[:, 4:] = 11
    with torch.no_grad():
        a, b = (model(input_ids=SOURCE, decoder_input_ids=ids).logits for ids in (first, second))
    torch.testing.assert_close(a[:, :4], b[:, :4])
    assert not torch.allclose(a[:, 4], b[:, 4])


def test_every_layer_reads_the_source(model: SwcmForConditionalGeneration) -> None:
    other = SOURCE.clone()
    other[:, 2] = 60
    ids = targets(model)
    with torch.no_grad():
        a, b = (
            model(input_ids=x, decoder_input_ids=ids, output_hidden_states=True).decoder_hidden_states
            for x in (SOURCE, other)
        )
    assert torch.equal(a[0], b[0])
    assert all(not torch.allclose(x, y) for x, y in zip(a[1:], b[1:], strict=True))


@pytest.mark.parametrize("chunks", [(1,) * 7, (3, 1, 3), (2, 5)])
def test_cached_equals_uncached(model: SwcmForConditionalGeneration, chunks: tuple[int, ...]) -> None:
    ids = targets(model)
    with torch.no_grad():
        full = model(input_ids=SOURCE, decoder_input_ids=ids, use_cache=False).logits
        cache, start, pieces = None, 0, []
        for length in chunks:
            output = model(
                input_ids=SOURCE,
                decoder_input_ids=ids[:, start : start + length],
                past_key_values=cache,
                use_cache=True,
            )
            cache, start = output.past_key_values, start + length
            pieces.append(output.logits)
    assert isinstance(cache, EncoderDecoderCache)
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, atol=2e-5, rtol=1e-5)


def test_pad_ids_inside_the_target_do_not_shift_positions(model: SwcmForConditionalGeneration) -> None:
    """transformers' XLM-R counts positions from the ids, so a pad token at the start corrupts cached decoding."""
    ids = targets(model)
    ids[:, 0] = 1
    with torch.no_grad():
        full = model(input_ids=SOURCE, decoder_input_ids=ids, use_cache=False).logits
        first = model(input_ids=SOURCE, decoder_input_ids=ids[:, :1], use_cache=True)
        rest = model(
            input_ids=SOURCE, decoder_input_ids=ids[:, 1:], past_key_values=first.past_key_values, use_cache=True
        )
    torch.testing.assert_close(rest.logits, full[:, 1:], atol=2e-5, rtol=1e-5)


def test_first_target_token_reads_the_layouts_first_position(model: SwcmForConditionalGeneration) -> None:
    offset = 2 if model.config.encoder_config.model_type == "xlm-roberta" else 0
    ids = targets(model)
    with torch.no_grad():
        implicit = model(input_ids=SOURCE, decoder_input_ids=ids).logits
        positions = torch.arange(ids.shape[1]).expand(2, -1) + offset
        explicit = model(input_ids=SOURCE, decoder_input_ids=ids, decoder_position_ids=positions).logits
    assert torch.equal(implicit, explicit)


def test_batch_equals_single_under_padding(model: SwcmForConditionalGeneration) -> None:
    rows = [([0, 9, 8, 7, 50, 51, 2], [5, 6, 7, 8]), ([0, 30, 2], [9, 10])]
    width, depth = 7, 5
    source = torch.full((2, width), 1)
    decoder, mask = torch.full((2, depth), 1), torch.zeros(2, depth, dtype=torch.long)
    for index, (src, tgt) in enumerate(rows):
        source[index, : len(src)] = torch.tensor(src)
        decoder[index, : len(tgt) + 1] = torch.tensor([model.language_id("ug"), *tgt])
        mask[index, : len(tgt) + 1] = 1
    with torch.no_grad():
        batched = model(
            input_ids=source,
            attention_mask=(source != 1).long(),
            decoder_input_ids=decoder,
            decoder_attention_mask=mask,
        ).logits
        for index, (src, tgt) in enumerate(rows):
            single = model(
                input_ids=torch.tensor([src]), decoder_input_ids=torch.tensor([[model.language_id("ug"), *tgt]])
            ).logits
            torch.testing.assert_close(batched[index, : len(tgt) + 1], single[0], atol=2e-5, rtol=1e-5)


def test_generation_starts_with_the_language_and_differs_by_language(model: SwcmForConditionalGeneration) -> None:
    kk, ug = (model.generate(SOURCE, target_language=tag, max_new_tokens=5) for tag in ("kk", "ug"))
    assert set(kk[:, 0].tolist()) == {model.language_id("kk")} and set(ug[:, 0].tolist()) == {model.language_id("ug")}
    mixed = model.generate(SOURCE, target_language=["kk", "ug"], max_new_tokens=5)
    assert mixed[:, 0].tolist() == [model.language_id("kk"), model.language_id("ug")]


def test_one_beam_is_greedy_and_greedy_follows_the_logits(model: SwcmForConditionalGeneration) -> None:
    greedy = model.generate(SOURCE, target_language="kk", max_new_tokens=6, do_sample=False)
    beam = model.generate(SOURCE, target_language="kk", max_new_tokens=6, num_beams=1)
    assert torch.equal(greedy, beam)
    ids = torch.full((2, 1), model.language_id("kk"))
    done = torch.zeros(2, dtype=torch.bool)
    while ids.shape[1] < greedy.shape[1]:
        with torch.no_grad():
            step = model(input_ids=SOURCE, decoder_input_ids=ids, use_cache=False).logits[:, -1].argmax(-1)
        step = torch.where(done, torch.tensor(1), step)
        done |= step == 2
        ids = torch.cat([ids, step[:, None]], dim=1)
    assert torch.equal(ids, greedy)


def test_beam_search_finds_no_worse_score_and_sampling_is_seeded(model: SwcmForConditionalGeneration) -> None:
    def score(num_beams: int) -> torch.Tensor:
        out = model.generate(
            SOURCE, target_language="kk", num_beams=num_beams, max_new_tokens=4, min_new_tokens=4, length_penalty=0.0
        )
        labels = out[:, 1:]
        with torch.no_grad():
            logp = model(input_ids=SOURCE, decoder_input_ids=out[:, :-1]).logits.log_softmax(-1)
        return logp.gather(-1, labels[..., None]).sum((1, 2))

    assert (score(8) >= score(1) - 1e-4).all()
    samples = []
    for _ in range(2):
        torch.manual_seed(4)
        samples.append(model.generate(SOURCE, target_language="kk", do_sample=True, max_new_tokens=5))
    assert torch.equal(*samples)


def test_generation_without_cache_is_the_same(model: SwcmForConditionalGeneration) -> None:
    outputs = [
        model.generate(SOURCE, target_language="kk", num_beams=3, max_new_tokens=8, use_cache=flag)
        for flag in (True, False)
    ]
    assert torch.equal(*outputs)


def test_generate_needs_a_known_language(model: SwcmForConditionalGeneration) -> None:
    with pytest.raises(LanguageError, match=r"no language 'bo'(?s:.)*kk, ug"):
        model.generate(SOURCE, target_language="bo")
    with pytest.raises(LanguageError, match="no target language"):
        model.generate(SOURCE)


def test_languages_are_normalised_and_one_per_source(model: SwcmForConditionalGeneration) -> None:
    assert model.generate(SOURCE, target_language="KK", max_new_tokens=2)[0, 0] == model.language_id("kk")
    with pytest.raises(LanguageError, match="3 target languages for 2 sources"):
        model.generate(SOURCE, target_language=["kk", "ug", "kk"])
    with pytest.raises(LanguageError, match="no target language"):
        model.generate(SOURCE, generation_config=GenerationConfig(max_new_tokens=3))


def test_a_generation_config_without_start_leaves_the_models_default(model: SwcmForConditionalGeneration) -> None:
    model.set_default_target_language("ug")
    told = model.generate(SOURCE, generation_config=GenerationConfig(max_new_tokens=4, pad_token_id=1, eos_token_id=2))
    assert torch.equal(told, model.generate(SOURCE, target_language="ug", max_new_tokens=4))
    other = GenerationConfig(max_new_tokens=4, decoder_start_token_id=model.language_id("kk"))
    assert model.generate(SOURCE, generation_config=other)[0, 0] == model.language_id("kk")


def test_the_stored_limit_of_new_tokens_overrules_max_length(model: SwcmForConditionalGeneration) -> None:
    model.generation_config.eos_token_id, model.generation_config.max_new_tokens = None, 9
    assert model.generate(SOURCE, target_language="kk", max_length=6).shape[1] == 10, "as docs/model.md says"
    assert model.generate(SOURCE, target_language="kk", max_new_tokens=5).shape[1] == 6


def test_a_default_target_language_is_stored_under_the_models_tag(model: SwcmForConditionalGeneration) -> None:
    model.set_default_target_language("kaz")
    assert model.config.default_target_language == "kk"
    assert model.generate(SOURCE, max_new_tokens=2)[0, 0] == model.language_id("kk")
    with pytest.raises(LanguageError, match="no language 'bo'"):
        model.set_default_target_language("bod")
    assert model.config.default_target_language == "kk"


def test_a_loaded_model_is_saved_with_its_tokenizer(tmp_path: Path) -> None:
    model = SwcmForConditionalGeneration.from_encoder(
        tiny_encoder(), tokenizer=tiny_tokenizer(), languages=["kk"], verbose=False
    )
    model.save_pretrained(tmp_path / "a")
    SwcmForConditionalGeneration.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == sorted(p.name for p in (tmp_path / "a").iterdir())
    text = "<kk> abc де ө"
    ids = [AutoTokenizer.from_pretrained(tmp_path / folder)(text)["input_ids"] for folder in "ab"]
    assert ids[0] == ids[1] and model.language_id("kk") in ids[1]
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "b")
    assert loaded.tokenizer(text)["input_ids"] == ids[0]
    loaded.tokenizer = None
    loaded.save_pretrained(tmp_path / "c")
    assert not (tmp_path / "c" / "tokenizer.json").exists()


def test_a_model_whose_folder_is_gone_can_still_be_saved(tmp_path: Path) -> None:
    model = SwcmForConditionalGeneration.from_encoder(tiny_encoder(), tokenizer=tiny_tokenizer(), verbose=False)
    model.save_pretrained(tmp_path / "a")
    loaded = SwcmForConditionalGeneration.from_pretrained(tmp_path / "a")
    shutil.rmtree(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    assert loaded.tokenizer is None and (tmp_path / "b" / "model.safetensors").is_file()


def test_labels_that_fit_no_logits_are_refused(model: SwcmForConditionalGeneration) -> None:
    ids = targets(model)
    for options in ({"labels": ids, "logits_to_keep": 1}, {"labels": ids[:, 1:]}, {"labels": ids[:1]}):
        with pytest.raises(ModelError, match="need the logits of all decoder positions") as caught:
            model(input_ids=SOURCE, decoder_input_ids=ids, **options)
        assert caught.value.where == "labels"


def test_init_report_and_positional_save_arguments_survive(model: SwcmForConditionalGeneration, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "a", True)
    loaded = SwcmForConditionalGeneration.from_pretrained(tmp_path / "a")
    assert loaded.init_report is not None and loaded.init_report.counts() == model.init_report.counts()
    loaded.save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / "init_report.json").read_text() == (tmp_path / "a" / "init_report.json").read_text()


def test_default_target_language_survives_saving(model: SwcmForConditionalGeneration, tmp_path: Path) -> None:
    model.set_default_target_language("ug")
    model.generation_config.max_new_tokens = 33
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert loaded.generate(SOURCE, max_new_tokens=3)[0, 0] == model.language_id("ug")
    assert loaded.generation_config.max_new_tokens == 33


@pytest.mark.parametrize(
    "options", [{}, {"sharing": "tied"}, {"tie_lm_head": False}, {"growth": "standard", "norm_order": "pre"}]
)
def test_auto_classes_load_the_same_logits(options: dict[str, Any], tmp_path: Path) -> None:
    model = SwcmForConditionalGeneration.from_encoder(tiny_encoder(), languages=["kk"], verbose=False, **options)
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)).__name__ == "SwcmConfig"
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    ids = targets(model)
    with torch.no_grad():
        a, b = (m(input_ids=SOURCE, decoder_input_ids=ids).logits for m in (model, loaded))
    assert torch.equal(a, b)
    assert loaded.num_parameters() == model.num_parameters()
    assert loaded.get_input_embeddings().weight is loaded.decoder.embed_tokens.weight
    assert not list(tmp_path.glob("*.bin"))


def test_embeddings_of_encoder_and_decoder_cannot_be_loaded_apart(
    model: SwcmForConditionalGeneration, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="word embeddings apart") as caught:
        SwcmForConditionalGeneration.from_pretrained(tmp_path, tie_word_embeddings=False)
    assert "tie_lm_head" in str(caught.value.remedy)


def test_too_long_source_and_target_are_refused(model: SwcmForConditionalGeneration) -> None:
    limit = 64 if model.config.encoder_config.model_type == "xlm-roberta" else 66
    long = torch.full((1, limit + 1), 7)
    with pytest.raises(ModelError, match=f"positions for {limit}"):
        model(input_ids=long, decoder_input_ids=long[:, :3])
    with pytest.raises(ModelError, match=f"positions for {limit}"):
        model(input_ids=long[:, :3], decoder_input_ids=long)
    with pytest.raises(ModelError, match=f"positions for {limit}"):
        model.generate(long, target_language="kk")
    fits = torch.full((1, limit), 7)
    assert model(input_ids=fits, decoder_input_ids=fits).logits.shape[1] == limit


def test_resized_vocabulary_keeps_old_logits(model: SwcmForConditionalGeneration) -> None:
    ids = targets(model)
    with torch.no_grad():
        before = model(input_ids=SOURCE, decoder_input_ids=ids).logits
        model.resize_token_embeddings(before.shape[-1] + 10)
        after = model(input_ids=SOURCE, decoder_input_ids=ids).logits
    assert after.shape[-1] == before.shape[-1] + 10 == model.config.vocab_size
    torch.testing.assert_close(after[..., : before.shape[-1]], before)


def test_loss_is_mean_cross_entropy_of_real_targets(model: SwcmForConditionalGeneration) -> None:
    ids = targets(model)
    labels = ids.roll(-1, dims=1)
    labels[1, 3:] = -100
    with torch.no_grad():
        output = model(input_ids=SOURCE, decoder_input_ids=ids, labels=labels)
    logp = output.logits.log_softmax(-1).numpy()
    kept = [(b, t) for b in range(2) for t in range(labels.shape[1]) if labels[b, t] != -100]
    expected = -sum(float(logp[b, t, labels[b, t]]) for b, t in kept) / len(kept)
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("tie_lm_head", [True, False])
def test_loss_without_logits_trains_as_the_loss_of_logits(tie_lm_head: bool) -> None:
    model = SwcmForConditionalGeneration.from_encoder(
        tiny_encoder(), languages=["kk"], dropout=0.0, tie_lm_head=tie_lm_head, verbose=False
    ).train()
    ids = targets(model)
    labels = ids.roll(-1, dims=1)
    labels[1, 3:] = -100
    inputs = {"input_ids": SOURCE, "decoder_input_ids": ids, "use_cache": False}
    logits = model(**inputs).logits.flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum", label_smoothing=0.1)
    loss = model(**inputs, labels=labels, label_smoothing=0.1).loss
    torch.testing.assert_close(loss, expected)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ours, theirs = (torch.autograd.grad(value, parameters, allow_unused=True) for value in (loss, expected))
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-4)


def test_label_smoothing_without_labels_is_an_error(model: SwcmForConditionalGeneration) -> None:
    with pytest.raises(ModelError, match="labels"):
        model(input_ids=SOURCE, decoder_input_ids=targets(model), label_smoothing=0.0)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model = SwcmForConditionalGeneration.from_encoder(tiny_encoder(), languages=["kk"], dropout=0.0, verbose=False)
    ids = targets(model)
    gradients = []
    for checkpointing in (False, True):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(input_ids=SOURCE, decoder_input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[0].items():
        torch.testing.assert_close(value, gradients[1][name], atol=1e-6, rtol=1e-4)


def test_attentions_are_returned_by_the_eager_implementation(model: SwcmForConditionalGeneration) -> None:
    model.set_attn_implementation("eager")
    ids = targets(model)
    with torch.no_grad():
        output = model(input_ids=SOURCE, decoder_input_ids=ids, output_attentions=True)
    assert len(output.cross_attentions) == len(model.decoder.layers)
    assert output.cross_attentions[0].shape == (2, 4, ids.shape[1], SOURCE.shape[1])
    assert torch.triu(output.decoder_attentions[0][0, 0], diagonal=1).abs().max() == 0


def test_seq2seq_trainer_and_peft_work(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments

    model = SwcmForConditionalGeneration.from_encoder(tiny_encoder(), languages=["kk"], verbose=False)
    model.set_default_target_language("kk")
    wrapped = peft.get_peft_model(
        model,
        peft.LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"]),
    )
    rows = [{"input_ids": [0, 5, 6, 2], "attention_mask": [1] * 4, "labels": [7, 8, 2]}] * 4
    from conftest import tiny_tokenizer

    arguments = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        predict_with_generate=True,
        generation_max_length=5,
        eval_strategy="steps",
        eval_steps=2,
    )
    trainer = Seq2SeqTrainer(
        model=wrapped,
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tiny_tokenizer(), model=wrapped),
    )
    result = trainer.train()
    assert result.global_step == 2 and result.training_loss > 0


def test_accumulation_in_transformers_trainer_is_one_large_batch(tmp_path: Path) -> None:
    from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments

    from conftest import tiny_tokenizer

    rows = [
        {"input_ids": [0, 5, 6, 2], "attention_mask": [1] * 4, "labels": labels}
        for labels in ([7, 2], [7, 8, 9, 10, 11, 2], [9, 2], [12, 13, 2])
    ]
    norms = []
    for size, accumulation in ((4, 1), (2, 2), (1, 4)):
        model = SwcmForConditionalGeneration.from_encoder(tiny_encoder(), languages=["kk"], dropout=0.0, verbose=False)
        model.set_default_target_language("kk")
        arguments = Seq2SeqTrainingArguments(
            output_dir=str(tmp_path / str(size)),
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            save_strategy="no",
        )
        collator = DataCollatorForSeq2Seq(tiny_tokenizer(), model=model)
        trainer = Seq2SeqTrainer(model=model, args=arguments, train_dataset=rows, data_collator=collator)
        trainer.train()
        norms.append(next(record["grad_norm"] for record in trainer.state.log_history if "grad_norm" in record))
    assert norms[1:] == pytest.approx([norms[0]] * 2, rel=1e-3)


def test_tiny_model_learns_to_copy() -> None:
    """Proof that gradients reach everything needed: a copy task is solved within a few hundred steps."""
    model = SwcmForConditionalGeneration.from_encoder(
        tiny_encoder(layers=2), insert_every=2, languages=["kk"], dropout=0.0, verbose=False
    ).train()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    kk = model.language_id("kk")

    def batch(size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        body = torch.randint(10, 20, (size, 4), generator=generator)
        one, two = torch.zeros(size, 1, dtype=torch.long), torch.full((size, 1), 2)
        return (
            torch.cat([one, body, two], 1),
            torch.cat([torch.full((size, 1), kk), body], 1),
            torch.cat([body, two], 1),
        )

    for step in range(400):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, step / 20) * (1 - step / 400)
        source, decoder, labels = batch(64)
        loss = model(input_ids=source, decoder_input_ids=decoder, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    source, _, labels = batch(64)
    output = model.eval().generate(source, target_language="kk", max_new_tokens=8)
    exact = (output[:, 1 : 1 + labels.shape[1]] == labels).all(dim=1).float().mean().item()
    assert exact >= 0.95
