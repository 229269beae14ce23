"""The decoding engine against transformers: the model's own forward pass, and `generate()` token for token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import tiny_encoder
from enc2gen import DecodingConfig, SwcmForConditionalGeneration
from enc2gen.errors import ConfigError
from enc2gen.generation.engine import cache
from enc2gen.generation.engine.decoder import EngineDecoder
from enc2gen.generation.engine.engine import Engine, beam_settings, chosen_precision, sampling_settings, unsupported
from enc2gen.generation.engine.head import OutputHead
from enc2gen.generation.engine.linear import Precision, pack_linear
from enc2gen.generation.engine.sampling import draw
from test_donors import tiny

DONORS = ["xlm-roberta", "bert", "modernbert", "eurobert", "xlm-roberta-xl"]
END, PAD = 2, 1


def grown(
    kind: str = "xlm-roberta", *, end: float = 0.0, seed: int = 0, layers: int = 4
) -> SwcmForConditionalGeneration:
    """A random generator whose outputs differ by source; `end` makes them shorter."""
    encoder = tiny_encoder(kind, layers=layers) if kind in ("xlm-roberta", "bert") else tiny(kind)
    model = SwcmForConditionalGeneration.from_encoder(encoder, insert_every=2, tie_lm_head=False, verbose=False)
    with torch.no_grad():
        torch.manual_seed(seed)
        model.lm_head.weight.normal_(0.0, 0.35)
        model.lm_head.bias.normal_(0.0, 0.5)
        model.lm_head.bias[END] += end
        for name, parameter in model.decoder.named_parameters():
            if "norm" not in name and parameter.dim() == 2 and "embed" not in name:
                parameter.normal_(0.0, 0.6)
    model.generation_config.eos_token_id = END
    model.generation_config.pad_token_id = PAD
    return model.eval()


def sources(rows: int = 6, width: int = 9) -> tuple[Tensor, Tensor]:
    """Sources of different lengths, padded on the right."""
    ids = torch.randint(6, 90, (rows, width), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(width) < torch.arange(rows)[:, None] % width + 3).long()
    return ids.masked_fill(mask == 0, PAD), mask


def written(row: Tensor) -> list[int]:
    """Tokens of one of transformers' outputs, without start, end and padding."""
    tokens: list[int] = row[1:].tolist()
    return tokens[: tokens.index(END)] if END in tokens else tokens


@pytest.mark.parametrize("kind", DONORS)
@torch.inference_mode()
def test_steps_equal_the_whole_decoder(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beams that are reordered, sources that leave, several tokens at once and a compacted cache change nothing."""
    monkeypatch.setattr(cache, "_COMPACT_EVERY", 8)
    model, (ids, mask) = grown(kind), sources(4)
    encoded = model.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    decoder = EngineDecoder(model.decoder, "fp32")
    state = decoder.start(encoded, mask)
    state._compact_at = 8
    random = torch.Generator().manual_seed(2)
    history = torch.full((4, 1, 1), 5)
    decoder.step(state, history)
    state.expand(3)
    history = history.expand(-1, 3, -1)
    for step in range(14):
        rows = len(history)
        parents = torch.randint(0, 3, (rows, 3), generator=random)
        tokens = torch.randint(6, 90, (rows, 3, 1 + step % 2), generator=random)
        state.reorder(parents)
        history = history.gather(1, parents[..., None].expand(-1, -1, history.shape[2]))
        history = torch.cat([history, tokens], dim=2)
        states, _ = decoder.step(state, tokens)
        whole = model.decoder(
            input_ids=history.flatten(0, 1),
            encoder_hidden_states=encoded.repeat_interleave(3, 0),
            encoder_attention_mask=mask.repeat_interleave(3, 0),
        ).last_hidden_state.view(rows, 3, -1, encoded.shape[2])
        torch.testing.assert_close(states, whole[:, :, -tokens.shape[2] :], rtol=1e-4, atol=1e-4)
        if step == 6:
            left = torch.tensor([0, 2])
            state.select(left)
            history, encoded, mask = history[left], encoded[left], mask[left]
    assert state.visible.shape[2] < 3 * 20  # the cache was compacted


@pytest.mark.parametrize("kind", DONORS)
@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 4},
        {"num_beams": 3, "early_stopping": False, "length_penalty": 0.4},
        {"num_beams": 2, "early_stopping": "never", "length_penalty": 2.0, "no_repeat_ngram_size": 2},
        {"num_beams": 1, "min_new_tokens": 4},
        {"num_beams": 1, "no_repeat_ngram_size": 1},
    ],
    ids=["beams", "heuristic", "never", "greedy", "greedy-ngrams"],
)
def test_outputs_equal_those_of_transformers(kind: str, settings: dict[str, Any]) -> None:
    model, (ids, mask) = grown(kind, end=6.0 if kind == "xlm-roberta-xl" else 4.0), sources(8)
    config = DecodingConfig(max_new_tokens=14, **settings)
    wanted = model.generate(ids, attention_mask=mask, decoder_start_token_id=5, **config.arguments())
    engine, starts = Engine(model, "fp32"), torch.full((len(ids),), 5)
    if config.num_beams > 1:
        found = engine.search(ids, mask, starts, beam_settings(model, config, 60))
    else:
        found = engine.sample(ids, mask, starts, sampling_settings(model, config, 60), [[0, i] for i in range(8)])
    outputs = [list(hypotheses[0].tokens) for hypotheses in found]
    assert outputs == [written(row) for row in wanted]
    if settings == {"num_beams": 4}:
        assert len(set(map(len, outputs))) > 1  # outputs that end at different steps, or this shows little


def test_a_score_is_the_log_probability_by_the_length() -> None:
    model, (ids, mask) = grown(end=1.0), sources(5)
    config = DecodingConfig(num_beams=3, max_new_tokens=10, length_penalty=0.7)
    found = Engine(model, "fp32").search(ids, mask, torch.full((5,), 5), beam_settings(model, config, 60))
    for row, hypotheses in enumerate(found):
        assert len(hypotheses) == 3 and [h.score for h in hypotheses] == sorted(
            (h.score for h in hypotheses), reverse=True
        )
        for hypothesis in hypotheses:
            target = [*hypothesis.tokens, END] if hypothesis.ended else list(hypothesis.tokens)
            logits = model(
                input_ids=ids[row : row + 1],
                attention_mask=mask[row : row + 1],
                decoder_input_ids=torch.tensor([[5, *target[:-1]]]),
            ).logits[0]
            total = logits.log_softmax(-1)[torch.arange(len(target)), torch.tensor(target)].sum().item()
            assert hypothesis.score == pytest.approx(total / len(target) ** 0.7, abs=1e-4)


def test_coverage_penalty_is_that_of_the_attention() -> None:
    """GNMT's equation 14, from transformers' own attention weights of the last layer."""
    model, (ids, mask) = grown(end=1.0), sources(4)
    plain = DecodingConfig(num_beams=2, max_new_tokens=8, length_penalty=0.0)
    settings = [beam_settings(model, c, 60) for c in (plain, plain.model_copy(update={"coverage_penalty": 0.8}))]
    engine, starts = Engine(model, "fp32"), torch.full((4,), 5)
    model.set_attn_implementation("eager")
    for row, hypotheses in enumerate(engine.search(ids, mask, starts, settings[1])):
        for hypothesis in hypotheses:
            target = [*hypothesis.tokens, END] if hypothesis.ended else list(hypothesis.tokens)
            output = model(
                input_ids=ids[row : row + 1],
                attention_mask=mask[row : row + 1],
                decoder_input_ids=torch.tensor([[5, *target[:-1]]]),
                output_attentions=True,
            )
            total = output.logits[0].log_softmax(-1)[torch.arange(len(target)), torch.tensor(target)].sum()
            had = output.cross_attentions[-1][0].mean(0).sum(0)[mask[row] == 1]
            assert hypothesis.score == pytest.approx((total + 0.8 * had.clamp(max=1).log().sum()).item(), abs=1e-3)


@pytest.mark.parametrize(("precision", "largest"), [("bf16", 0.02), ("int8", 0.06)])
def test_low_precision_stays_near_float32(precision: Precision, largest: float) -> None:
    torch.manual_seed(0)
    weight, bias, states = torch.randn(300, 64), torch.randn(300), torch.randn(20, 64)
    exact = torch.nn.functional.linear(states, weight, bias)
    error = (pack_linear(weight, bias, precision)(states) - exact).norm() / exact.norm()
    assert 0 < error < largest


@pytest.mark.parametrize("vocabulary", [90, 8192, 20_001])
def test_the_head_finds_what_a_softmax_over_the_vocabulary_finds(vocabulary: int) -> None:
    torch.manual_seed(0)
    weight, bias, states = torch.randn(vocabulary, 16), torch.randn(vocabulary), torch.randn(7, 16)
    whole = torch.log_softmax(states @ weight.T + bias, dim=-1)
    head = OutputHead(weight, bias, "fp32")
    top = head.top(states, 9)
    torch.testing.assert_close(top.log_probabilities, whole.topk(9).values)
    assert torch.equal(top.tokens, whole.topk(9).indices)
    assert torch.equal(head.likeliest(states), whole.argmax(-1))
    tokens = torch.randint(0, vocabulary, (7, 3))
    torch.testing.assert_close(head.log_probabilities(states, tokens), whole.gather(1, tokens), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(head.logits(states).log_softmax(-1), whole, rtol=1e-4, atol=1e-4)


def test_a_shortlist_writes_nothing_else() -> None:
    torch.manual_seed(0)
    weight, bias, states = torch.randn(500, 16), torch.randn(500), torch.randn(7, 16)
    shortlist = torch.tensor([2, 5, 17, 100, 499])
    head = OutputHead(weight, bias, "fp32", shortlist=shortlist)
    inside = torch.log_softmax((states @ weight.T + bias)[:, shortlist], dim=-1)
    top = head.top(states, 9)
    assert torch.equal(top.tokens, shortlist[inside.topk(5).indices])
    torch.testing.assert_close(top.log_probabilities, inside.topk(5).values)
    scores = head.log_probabilities(states, torch.tensor([[100, 3]] * 7))
    torch.testing.assert_close(scores[:, 0], inside[:, 3])
    assert bool((scores[:, 1] == -torch.inf).all())
    assert head.columns([[17, 3], [499]]) == [[2], [4]]


def test_drawn_tokens_have_the_probabilities_of_the_nucleus() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    count = 4000
    uniform = (torch.arange(count) + 0.5) / count
    for top_p, wanted in ((1.0, [0.5, 0.3, 0.15, 0.05]), (0.7, [0.625, 0.375, 0, 0]), (0.4, [1, 0, 0, 0])):
        drawn = draw(logits.expand(count, -1), uniform, top_p)
        shares = torch.bincount(drawn, minlength=4) / count
        torch.testing.assert_close(shares, torch.tensor(wanted, dtype=torch.float32), rtol=0, atol=1e-3)


def test_samples_do_not_depend_on_the_batch() -> None:
    model, (ids, mask) = grown(end=0.5), sources(6)
    config = DecodingConfig(num_beams=1, do_sample=True, max_new_tokens=9, temperature=1.3)
    engine, settings = Engine(model, "fp32"), sampling_settings(model, config, 60, samples=3)
    together = engine.sample(ids, mask, torch.full((6,), 5), settings, [[7, i] for i in range(6)])
    alone = [engine.sample(ids[i : i + 1], mask[i : i + 1], torch.tensor([5]), settings, [[7, i]])[0] for i in range(6)]
    assert [[h.tokens for h in row] for row in together] == [[h.tokens for h in row] for row in alone]
    assert len({h.tokens for h in together[0]}) == 3


def test_what_the_engine_cannot_do_is_said() -> None:
    model = grown()
    assert unsupported(model, DecodingConfig()) is None
    model.generation_config.repetition_penalty = 1.3
    assert "repetition_penalty" in (unsupported(model, DecodingConfig()) or "")
    with pytest.raises(ConfigError, match="fp16 is not for a CPU"):
        chosen_precision(DecodingConfig(precision="fp16"), torch.device("cpu"))


def test_packing_leaves_the_model_as_it_is() -> None:
    model, (ids, mask) = grown(), sources(2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    engine = Engine(model, "int8")
    engine.search(ids, mask, torch.full((2,), 5), beam_settings(model, DecodingConfig(max_new_tokens=3), 60))
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
