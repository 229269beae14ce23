"""R-Drop and contrastive alignment against their equations in plain torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import tiny_encoder
from enc2gen import SwcmForConditionalGeneration
from enc2gen.data.batching import Batch, EncodedExample, collate
from enc2gen.errors import ConfigError
from enc2gen.models import extra_losses
from enc2gen.models.extra_losses import ContrastiveConfig, divergence, info_nce, linear_divergence, mean_pooled
from enc2gen.training import Trainer, TrainingConfig
from enc2gen.training.objective import Objective
from training_toys import SignalAt, ToySeq2Seq, assert_same, final_state, toy_batch, trainer

CPU = torch.device("cpu")


def config(**changes: Any) -> TrainingConfig:
    return TrainingConfig(**{"max_steps": 4, "warmup": 0, "label_smoothing": 0.1, **changes})


def case(tokens: int = 23) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, tokens, 7, generator=generator, dtype=torch.float64)
    weight = torch.randn(37, 7, generator=generator, dtype=torch.float64)
    bias = torch.randn(37, generator=generator, dtype=torch.float64)
    targets = torch.randint(37, (tokens,), generator=generator)
    targets[::3] = -100
    return first, second, weight, bias, targets


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(P || Q) of logits, summed over rows, by torch's own function."""
    return F.kl_div(F.log_softmax(q, -1), F.log_softmax(p, -1), reduction="sum", log_target=True)


def plain_divergence(first: Tensor, second: Tensor) -> Tensor:
    """arXiv 2106.14448, equation 2."""
    return (kl(first, second) + kl(second, first)) / 2


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rows", [1, 5, 100])
def test_divergence_and_its_gradients_equal_torch(with_bias: bool, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extra_losses, "_BLOCK", rows * 37)
    first, second, weight, bias, targets = case()
    leaves = [tensor.requires_grad_() for tensor in (first, second, weight, *([bias] if with_bias else []))]
    used = bias if with_bias else None
    real = targets != -100
    logits = [F.linear(states, weight, used)[real] for states in (first, second)]
    expected = plain_divergence(*logits)
    torch.testing.assert_close(divergence(*logits), expected)
    ours = linear_divergence(first, second, weight, used, targets)
    torch.testing.assert_close(ours, expected)
    got, wanted = (torch.autograd.grad(3.0 * loss, leaves) for loss in (ours, expected))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_divergence_of_frozen_weights_and_of_nothing() -> None:
    first, second, weight, bias, targets = case()
    loss = linear_divergence(first.requires_grad_(), second, weight, bias, targets)
    loss.backward()
    assert first.grad is not None and weight.grad is None
    assert linear_divergence(first, second, weight, bias, torch.full_like(targets, -100)).item() == 0.0
    with torch.no_grad():
        torch.testing.assert_close(linear_divergence(first, second, weight, bias, targets), loss)


class Largest(TorchDispatchMode):
    """The most elements that any tensor made within it has."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_logits_exist_for_one_block_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extra_losses, "_BLOCK", 4 * 37)
    first, second, weight, bias, targets = case(400)
    with Largest() as mode:
        linear_divergence(first.requires_grad_(), second, weight.requires_grad_(), bias, targets).backward()
    assert mode.elements <= 400 * 7


def test_info_nce_equals_its_definition() -> None:
    left, right = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total = 0.0
    for i in range(5):
        for a, b in ((left, right), (right, left)):
            scores = [float(a[i] @ b[j] / a[i].norm() / b[j].norm()) / 0.2 for j in range(5)]
            total -= (scores[i] - math.log(sum(map(math.exp, scores)))) / 10
    assert info_nce(left, right, 0.2).item() == pytest.approx(total)
    assert info_nce(left[:1], right[:1], 0.2).item() == 0.0


def test_pooling_leaves_padding_out() -> None:
    states = torch.randn(2, 4, 3)
    pooled = mean_pooled(states, torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]))
    torch.testing.assert_close(pooled, torch.stack([states[0, :2].mean(0), states[1].mean(0)]))


@pytest.fixture(scope="module")
def model() -> SwcmForConditionalGeneration:
    return SwcmForConditionalGeneration.from_encoder(
        tiny_encoder(), languages=["en", "kk", "ug"], insert_every=2, dropout=0.3, verbose=False
    )


def batch(model: SwcmForConditionalGeneration, pairs: Sequence[tuple[str, str]]) -> Batch:
    """Rows `<s> <language> text </s>` -> `<language> text </s>` of different lengths."""
    generator = torch.Generator().manual_seed(1)
    examples = []
    for source, target in pairs:
        texts = [torch.randint(5, 90, (int(n),), generator=generator) for n in torch.randint(2, 8, (2,))]
        ids = [text.tolist() for text in texts]
        examples.append(
            EncodedExample(
                input_ids=(0, model.language_id(source), *ids[0], 2),
                decoder_input_ids=(model.language_id(target), *ids[1]),
                labels=(*ids[1], 2),
            )
        )
    return collate(examples, 1)


MIXED = [("en", "kk"), ("kk", "kk"), ("ug", "en"), ("en", "en"), ("kk", "en")]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_r_drop_is_half_of_equation_4(model: SwcmForConditionalGeneration, precision: str) -> None:
    model.train()
    rows = batch(model, MIXED)
    objective = Objective(model, config(r_drop=2.0), CPU, precision)
    torch.manual_seed(5)
    ours = objective.training(model, rows)
    torch.manual_seed(5)
    inputs = {name: torch.cat([tensor, tensor]) for name, tensor in rows.as_model_inputs().items()}
    labels = inputs.pop("labels").chunk(2)[0].flatten()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        first, second = model(**inputs, use_cache=False).logits.float().flatten(0, 1).chunk(2)
    nll = sum(
        F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100, label_smoothing=0.1)
        for logits in (first, second)
    )
    real = labels != -100
    apart = plain_divergence(first[real], second[real])
    assert apart > 1.0
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    torch.testing.assert_close(ours.loss, (nll + 2.0 * apart) / 2, rtol=tolerance, atol=0.0)
    assert ours.count.item() == rows.num_target_tokens
    ours.loss.backward()
    model.zero_grad()


def test_r_drop_without_dropout_is_the_cross_entropy(model: SwcmForConditionalGeneration) -> None:
    model.eval()
    rows = batch(model, MIXED)
    ours = Objective(model, config(r_drop=5.0), CPU, "fp32").training(model, rows)
    plain = Objective(model, config(), CPU, "fp32").training(model, rows)
    torch.testing.assert_close(ours.loss, plain.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.negative_log_likelihood, plain.negative_log_likelihood, rtol=1e-5, atol=1e-5)


def test_contrastive_loss_reads_both_sides_of_translation_pairs(model: SwcmForConditionalGeneration) -> None:
    model.eval()
    rows = batch(model, MIXED)
    settings = ContrastiveConfig(weight=0.7, temperature=0.2)
    ours = Objective(model, config(contrastive=settings), CPU, "fp32").training(model, rows)
    plain = Objective(model, config(), CPU, "fp32").training(model, rows)
    sides: list[list[Tensor]] = [[], []]
    tokens = 0
    for row in (0, 2, 4):  # the others stay in their language
        source = rows.input_ids[row][rows.attention_mask[row].bool()]
        text = rows.labels[row][rows.labels[row] != -100]
        target = torch.cat([torch.tensor([0]), rows.decoder_input_ids[row, :1], text])
        tokens += len(text)
        for side, ids in zip(sides, (source, target), strict=True):
            side.append(model.encoder(input_ids=ids[None]).last_hidden_state[0].mean(0))
    left, right = (F.normalize(torch.stack(side), dim=-1) for side in sides)
    scores = left @ right.T / 0.2
    expected = -(scores.log_softmax(1).diagonal() + scores.log_softmax(0).diagonal()).mean() / 2
    torch.testing.assert_close(ours.loss - plain.loss, 0.7 * tokens * expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(ours.negative_log_likelihood, plain.negative_log_likelihood)


@pytest.mark.parametrize("pairs", [[("kk", "kk"), ("en", "en")], [("kk", "kk"), ("en", "kk")]])
def test_fewer_than_two_pairs_teach_nothing(model: SwcmForConditionalGeneration, pairs: list[tuple[str, str]]) -> None:
    model.eval()
    rows = batch(model, pairs)
    gradients = []
    for settings in (config(contrastive=ContrastiveConfig()), config()):
        model.zero_grad()
        loss = Objective(model, settings, CPU, "fp32").training(model, rows).loss
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for with_it, without in zip(*gradients, strict=True):
        torch.testing.assert_close(with_it, without)


def test_targets_longer_than_the_encoder_are_cut(model: SwcmForConditionalGeneration) -> None:
    rows = [
        EncodedExample(
            (0, model.language_id("en"), 9, 2), (model.language_id("kk"), *range(5, 68)), (*range(5, 68), 2)
        ),
        EncodedExample((0, model.language_id("en"), 8, 2), (model.language_id("kk"), 7), (7, 2)),
    ]
    objective = Objective(model, config(contrastive=ContrastiveConfig()), CPU, "fp32")
    assert torch.isfinite(objective.training(model, collate(rows, 1)).loss)  # 66 tokens for 64 positions


def test_both_together_align_one_pass_only(model: SwcmForConditionalGeneration) -> None:
    """A pair's second pass is no negative of its first."""
    model.eval()
    rows = batch(model, MIXED)
    both = config(r_drop=1.0, contrastive=ContrastiveConfig())
    one = Objective(model, both, CPU, "fp32").training(model, rows)
    other = Objective(model, config(contrastive=ContrastiveConfig()), CPU, "fp32").training(model, rows)
    torch.testing.assert_close(one.loss, other.loss, rtol=1e-5, atol=1e-4)


def test_validation_measures_the_likelihood_alone(model: SwcmForConditionalGeneration) -> None:
    model.eval()
    rows = batch(model, MIXED)
    both = Objective(model, config(r_drop=1.0, contrastive=ContrastiveConfig()), CPU, "fp32")
    plain = Objective(model, config(label_smoothing=0.0), CPU, "fp32")
    assert torch.equal(both.validation(model, rows).loss, plain.training(model, rows).loss)


def test_r_drop_of_models_that_give_logits() -> None:
    toy, rows = ToySeq2Seq().train(), toy_batch(0, 0)
    torch.manual_seed(3)
    ours = Objective(toy, config(r_drop=1.5), CPU, "fp32").training(toy, rows)
    torch.manual_seed(3)
    inputs = {name: torch.cat([tensor, tensor]) for name, tensor in rows.as_model_inputs().items()}
    labels = inputs.pop("labels")
    logits = toy(**inputs).logits
    nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", label_smoothing=0.1)
    real = labels.chunk(2)[0] != -100
    expected = (nll + 1.5 * plain_divergence(*(half[real] for half in logits.chunk(2)))) / 2
    torch.testing.assert_close(ours.loss, expected)


def test_an_interrupted_r_drop_run_goes_on_exactly(tmp_path: Path) -> None:
    trainer(tmp_path / "whole", r_drop=1.0).train()
    assert trainer(tmp_path / "parts", r_drop=1.0, callbacks=[SignalAt(4, 8)]).train().interrupted
    trainer(tmp_path / "parts", r_drop=1.0).train()
    trainer(tmp_path / "parts", r_drop=1.0).train()
    assert_same(final_state(tmp_path / "parts"), final_state(tmp_path / "whole"))


class WithoutExtras(nn.Module):
    def forward(self, input_ids: Tensor, label_smoothing: float) -> SimpleNamespace:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("model_type", "settings", "name"),
    [
        (ToySeq2Seq, {"contrastive": ContrastiveConfig()}, "contrastive"),
        (WithoutExtras, {"r_drop": 1.0}, "r_drop"),
    ],
)
def test_models_without_such_a_loss_say_so(model_type: type[nn.Module], settings: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=f"training.{name}: {model_type.__name__} has no {name} loss"):
        Objective(model_type(), config(**settings), CPU, "fp32")


def test_settings_that_are_off_leave_identities_as_they_were() -> None:
    assert not {"r_drop", "contrastive", "layer_decay"} & config().identity().keys()
    on = config(r_drop=1.0, contrastive={"weight": 2.0}, layer_decay=0.9).identity()
    assert (on["r_drop"], on["contrastive"], on["layer_decay"]) == (1.0, {"weight": 2.0, "temperature": 0.1}, 0.9)
    with pytest.raises(ValidationError, match="temperature"):
        config(contrastive={"temperature": 0.0})


def test_the_trainer_applies_both(model: SwcmForConditionalGeneration, tmp_path: Path) -> None:
    class Stream:
        fingerprint = "five rows"

        def __iter__(self) -> Any:
            while True:
                yield batch(model, MIXED)

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            pass

    settings = config(r_drop=1.0, contrastive={}, precision="fp32", tensorboard=False, progress=False, max_steps=6)
    grown = SwcmForConditionalGeneration.from_encoder(tiny_encoder(), languages=["en", "kk", "ug"], verbose=False)
    rows = batch(model, MIXED)
    run = Trainer(grown, Stream(), {"pairs": [rows]}, settings, tmp_path)
    alignment = Objective(grown, config(contrastive=ContrastiveConfig(), label_smoothing=0.0), CPU, "fp32")

    @torch.no_grad()
    def contrast() -> float:
        grown.eval()
        return float(alignment.training(grown, rows).loss - alignment.validation(grown, rows).loss)

    before = contrast()
    run.train()
    assert contrast() < before
