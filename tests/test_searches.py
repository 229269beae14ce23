"""Diverse, constrained and drafted searches against plain Python over the model's own logits."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch

from enc2gen import DecodingConfig, SwcmForConditionalGeneration
from enc2gen.generation.engine.beam import BeamSettings, Hypothesis
from enc2gen.generation.engine.constraints import Phrase, Requirements, allocate
from enc2gen.generation.engine.drafting import draft
from enc2gen.generation.engine.engine import Engine, beam_settings, sampling_settings
from enc2gen.generation.engine.sampling import draw
from test_engine import END, grown, sources

START = 5


def following(model: SwcmForConditionalGeneration, ids: Any, mask: Any, row: int, tokens: list[int]) -> Any:
    """Log-probabilities of what follows `tokens` (start included), from the model's forward pass."""
    with torch.inference_mode():
        output = model(ids[row : row + 1], attention_mask=mask[row : row + 1], decoder_input_ids=torch.tensor([tokens]))
    return output.logits[0].log_softmax(-1)


def log_probability(model: SwcmForConditionalGeneration, ids: Any, mask: Any, row: int, one: Hypothesis) -> float:
    target = [*one.tokens, END] if one.ended else list(one.tokens)
    logits = following(model, ids, mask, row, [START, *target[:-1]])
    return float(logits[torch.arange(len(target)), torch.tensor(target)].sum())


def reference_groups(
    model: SwcmForConditionalGeneration,
    ids: Any,
    mask: Any,
    row: int,
    settings: BeamSettings,
    groups: int,
    weight: float,
) -> list[list[tuple[int, ...]]]:
    """Diverse beam search written down plainly: for each group, its finished outputs, the best first."""
    size = settings.num_beams // groups
    beams: list[list[tuple[float, list[int]]]] = [[(0.0, [START])] for _ in range(groups)]
    finished: list[list[tuple[float, tuple[int, ...]]]] = [[] for _ in range(groups)]
    for length in range(1, settings.max_new_tokens + 1):
        written: Counter[int] = Counter()
        for group in range(groups):
            ranked = []
            for score, tokens in beams[group]:
                for token, value in enumerate(following(model, ids, mask, row, tokens)[-1].tolist()):
                    ranked.append((score + value - weight * written[token], score + value, [*tokens, token]))
            ranked.sort(key=lambda one: -one[0])
            if len(finished[group]) < size:
                for _, score, tokens in ranked[:size]:
                    if tokens[-1] == END or length == settings.max_new_tokens:
                        text = tuple(token for token in tokens[1:] if token != END)
                        finished[group].append((score / length**settings.length_penalty, text))
                finished[group] = sorted(finished[group], key=lambda one: -one[0])[:size]
            going = (one for one in ranked if one[2][-1] != END)
            beams[group] = [(score, tokens) for _, score, tokens in islice(going, size)]
            if len(finished[group]) < size:  # one that is over writes nothing any more
                written.update(tokens[-1] for _, tokens in beams[group])
    return [[text for _, text in one] for one in finished]


@pytest.mark.parametrize(("beams", "groups", "weight"), [(4, 2, 1.5), (3, 3, 0.6)])
def test_groups_write_what_the_plain_algorithm_writes(beams: int, groups: int, weight: float) -> None:
    model, (ids, mask) = grown(end=3.0), sources(5)
    config = DecodingConfig(num_beams=beams, max_new_tokens=7)
    settings, starts = beam_settings(model, config, 60), torch.full((5,), START)
    found = Engine(model, "fp32").search_diverse(ids, mask, starts, settings, groups=groups, penalty=weight)
    plain = Engine(model, "fp32").search(ids, mask, starts, settings)
    for row, hypotheses in enumerate(found):
        wanted = reference_groups(model, ids, mask, row, settings, groups, weight)
        assert {h.tokens for h in hypotheses} == {text for group in wanted for text in group}
        assert {h.tokens for h in hypotheses[:groups]} >= {group[0] for group in wanted}
        for one in hypotheses:
            total = log_probability(model, ids, mask, row, one)
            assert one.score == pytest.approx(total / (len(one.tokens) + one.ended), abs=1e-3)
    assert [[h.tokens for h in row] for row in found] != [[h.tokens for h in row] for row in plain]


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
def test_without_constraints_it_is_plain_beam_search(early_stopping: Any) -> None:
    model, (ids, mask) = grown(end=3.5), sources(8)
    config = DecodingConfig(
        num_beams=3, max_new_tokens=12, early_stopping=early_stopping, length_penalty=0.6, no_repeat_ngram_size=2
    )
    settings, engine, starts = beam_settings(model, config, 60), Engine(model, "fp32"), torch.full((8,), START)
    plain = engine.search(ids, mask, starts, settings)
    found = engine.search_with(ids, mask, starts, settings, [Requirements()] * 8)
    assert [[h.tokens for h in row] for row in found] == [[h.tokens for h in row] for row in plain]
    assert [h.score for h in found[3]] == pytest.approx([h.score for h in plain[3]], abs=1e-4)
    assert len({len(row[0].tokens) for row in plain}) > 1


def contains(tokens: tuple[int, ...], phrase: tuple[int, ...]) -> bool:
    return any(tokens[start : start + len(phrase)] == phrase for start in range(len(tokens)))


def test_outputs_contain_what_is_required_and_scores_are_the_models() -> None:
    model, (ids, mask) = grown(end=3.0), sources(6)
    wanted = [[], [(70,)], [(71, 72, 73)], [(71, 71, 72)], [(74, 75), (80,)], [(81, 82), (82, 83), (20, 21, 22, 23)]]
    requirements = [Requirements([Phrase((one,)) for one in phrases]) for phrases in wanted]
    config = DecodingConfig(num_beams=4, max_new_tokens=16)
    settings, engine, starts = beam_settings(model, config, 60), Engine(model, "fp32"), torch.full((6,), START)
    plain = engine.search(ids, mask, starts, settings)
    found = engine.search_with(ids, mask, starts, settings, requirements)
    assert [h.tokens for h in found[0]] == [h.tokens for h in plain[0]]
    for row, (hypotheses, phrases) in enumerate(zip(found, wanted, strict=True)):
        assert hypotheses
        for one in hypotheses:
            assert all(contains(one.tokens, phrase) for phrase in phrases), (one, phrases)
            total = log_probability(model, ids, mask, row, one)
            assert one.score == pytest.approx(total / (len(one.tokens) + one.ended), abs=1e-3)
        if phrases:
            assert not any(contains(plain[row][0].tokens, phrase) for phrase in phrases)
    alone = [
        engine.search_with(ids[r : r + 1], mask[r : r + 1], starts[:1], settings, requirements[r : r + 1])[0]
        for r in range(6)
    ]
    assert [[h.tokens for h in row] for row in found] == [[h.tokens for h in row] for row in alone]


def test_a_constraint_costs_no_more_than_writing_it_first() -> None:
    """The best constrained output is at least as probable as the phrase followed by greedy search."""
    model, (ids, mask) = grown(end=3.0), sources(4)
    settings = beam_settings(model, DecodingConfig(num_beams=5, max_new_tokens=10, length_penalty=0.0), 60)
    found = Engine(model, "fp32").search_with(
        ids, mask, torch.full((4,), START), settings, [Requirements([Phrase(((70, 71),))])] * 4
    )
    for row, hypotheses in enumerate(found):
        tokens = [START, 70, 71]
        while tokens[-1] != END and len(tokens) < 11:
            tokens.append(int(following(model, ids, mask, row, tokens)[-1].argmax()))
        ended = tokens[-1] == END
        naive = Hypothesis(tuple(tokens[1:-1] if ended else tokens[1:]), 0.0, ended)
        assert hypotheses[0].score >= log_probability(model, ids, mask, row, naive) - 1e-4


def test_what_does_not_fit_is_met_as_far_as_it_goes() -> None:
    model, (ids, mask) = grown(end=3.0), sources(2)
    settings = beam_settings(model, DecodingConfig(num_beams=4, max_new_tokens=3), 60)
    wanted = Requirements([Phrase(((70,),)), Phrase(((71, 72, 73, 74),))])
    found = Engine(model, "fp32").search_with(ids, mask, torch.full((2,), START), settings, [wanted] * 2)
    for hypotheses in found:
        assert wanted.met(wanted.of(hypotheses[0].tokens)) == 3 and not hypotheses[0].ended


def test_a_broken_phrase_restarts() -> None:
    wanted = Requirements([Phrase(((1, 1, 2),)), Phrase(((7, 8), (9,)))])
    states = [wanted.start()]
    for token in (1, 1, 1, 7, 1, 1, 2, 9):
        states.append(wanted.after(states[-1], token))
    assert [state[0] for state in states] == [(), (1,), (1, 1), (1, 1), (), (1,), (1, 1), None, None]
    assert [state[1] for state in states[3:]] == [(), (7,), (), (), (), None]
    assert wanted.wanted(states[2]) == {2, 7, 9} and wanted.wanted(states[4]) == {1, 8}
    assert wanted.met(states[-1]) == wanted.total == 5 and wanted.met(states[4]) == 1


def test_beams_are_shared_out_over_the_banks() -> None:
    assert allocate([9, 9, 9], 7) == [2, 2, 3]
    assert allocate([9, 1, 0], 6) == [5, 1, 0]
    assert allocate([9, 9, 1, 0], 3) == [0, 2, 1, 0]
    assert allocate([1, 0], 4) == [1, 0]


def test_rules_of_one_source_leave_the_others_alone() -> None:
    model, (ids, mask) = grown(end=3.0), sources(3)
    engine, starts = Engine(model, "fp32"), torch.full((3,), START)
    config = DecodingConfig(num_beams=2, max_new_tokens=8)
    settings = beam_settings(model, config, 60)
    plain = engine.search(ids, mask, starts, settings)
    first = plain[1][0].tokens[0]
    own = [[], [lambda rows: [{first}] * len(rows)], []]
    found = engine.search(ids, mask, starts, replace(settings, own_rules=own))
    assert [[h.tokens for h in found[row]] for row in (0, 2)] == [[h.tokens for h in plain[row]] for row in (0, 2)]
    assert not any(first in h.tokens for h in found[1])
    greedy = sampling_settings(model, DecodingConfig(num_beams=1, max_new_tokens=8), 60)
    written = engine.sample(ids, mask, starts, replace(greedy, own_rules=own), [[0, 0]] * 3)
    free = engine.sample(ids, mask, starts, greedy, [[0, 0]] * 3)
    assert first in free[1][0].tokens and first not in written[1][0].tokens and written[0] == free[0]


def test_scored_greedy_search_tells_the_log_probability() -> None:
    model, (ids, mask) = grown(end=3.0), sources(3)
    settings = sampling_settings(model, DecodingConfig(num_beams=1, max_new_tokens=8), 60)
    engine, starts = Engine(model, "fp32"), torch.full((3,), START)
    found = engine.sample(ids, mask, starts, replace(settings, scored=True), [[0, 0]] * 3)
    drafted = engine.draft(ids, mask, starts, replace(settings, scored=True), [[]] * 3, draft_tokens=3)
    for row, (one,) in enumerate(found):
        assert one.score == pytest.approx(log_probability(model, ids, mask, row, one), abs=1e-3)
        assert drafted[row][0].tokens == one.tokens and drafted[row][0].score == pytest.approx(one.score, abs=1e-3)


def test_epsilon_leaves_out_improbable_tokens() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    uniform = (torch.arange(1000) + 0.5) / 1000
    for epsilon, wanted in ((0.1, [0.526, 0.316, 0.158, 0]), (0.9, [1, 0, 0, 0])):
        shares = torch.bincount(draw(logits.expand(1000, -1), uniform, 1.0, epsilon), minlength=4) / 1000
        torch.testing.assert_close(shares, torch.tensor(wanted, dtype=torch.float32), rtol=0, atol=2e-3)


def test_drafts_are_what_followed_before() -> None:
    assert draft([7, 8], [5, 6, 7, 8, 9, 10, 11], 2) == [9, 10]
    assert draft([1, 8], [6, 7, 8, 9], 5) == [9]
    assert draft([4, 3, 4], [6], 3) == [3, 4]
    assert draft([], [6, 7], 3) == draft([9], [6, 7], 3) == draft([7], [6, 7], 3) == []


class Counting:
    """Counts the decoder's calls."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        inner = engine.decoder.step

        def step(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            return inner(*arguments, **options)

        monkeypatch.setattr(engine.decoder, "step", step)


@pytest.mark.parametrize(
    ("rules", "limit"), [({}, 0.9), ({"no_repeat_ngram_size": 3, "min_new_tokens": 5}, 0.7)], ids=["free", "rules"]
)
def test_drafted_outputs_are_those_of_greedy_search_in_fewer_steps(
    rules: dict[str, Any], limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each source holds pieces of its own greedy output, so that drafts are right in part."""
    model, (ids, mask) = grown(end=1.0), sources(5)
    config = DecodingConfig(num_beams=1, max_new_tokens=24, **rules)
    settings, engine, starts = sampling_settings(model, config, 60), Engine(model, "fp32"), torch.full((5,), START)
    plain = engine.sample(ids, mask, starts, settings, [[0, 0]] * 5)
    texts = [[*one.tokens[:7], 99, *one.tokens[6:15], 98, 97] for (one,) in plain]
    counting = Counting(engine, monkeypatch)
    found = engine.draft(ids, mask, starts, settings, texts, draft_tokens=4)
    assert [[(h.tokens, h.ended) for h in row] for row in found] == [
        [(h.tokens, h.ended) for h in row] for row in plain
    ]
    longest = max(len(row[0].tokens) + row[0].ended for row in plain)
    assert longest > 8 and counting.calls <= limit * longest


def test_drafts_stay_within_the_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (ids, mask) = grown(end=-20.0), sources(3)
    engine, starts = Engine(model, "fp32"), torch.full((3,), START)
    config = DecodingConfig(num_beams=1, max_new_tokens=500)
    settings = sampling_settings(model, config, engine.decoder.longest)
    plain = engine.sample(ids, mask, starts, settings, [[0, 0]] * 3)
    found = engine.draft(ids, mask, starts, settings, [list(one.tokens) for (one,) in plain], draft_tokens=9)
    assert [row[0].tokens for row in found] == [row[0].tokens for row in plain]
    assert len(plain[0][0].tokens) == engine.decoder.longest - 1
