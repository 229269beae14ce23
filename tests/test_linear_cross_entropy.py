"""The loss without logits against torch's cross-entropy of the logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from enc2gen.models import linear_cross_entropy as module
from enc2gen.models.linear_cross_entropy import linear_cross_entropy, without_projection


def case(
    tokens: int, size: int, vocabulary: int, dtype: torch.dtype = torch.float64, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = scale * torch.randn(tokens, size, generator=generator, dtype=dtype)
    weight = torch.randn(vocabulary, size, generator=generator, dtype=dtype)
    bias = torch.randn(vocabulary, generator=generator, dtype=dtype)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    targets[::3] = -100
    return hidden, weight, bias, targets


def gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves))


def plain(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    return F.cross_entropy(logits, targets, reduction="sum", ignore_index=-100, label_smoothing=smoothing)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks and slices, neither of which divides the sizes."""
    monkeypatch.setattr(module, "_COLUMNS", 16)
    monkeypatch.setattr(module, "_ROWS", 32)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("with_bias", [True, False])
def test_value_and_all_gradients_equal_torch(smoothing: float, scale: float, with_bias: bool) -> None:
    hidden, weight, bias, targets = case(101, 7, 37, scale=scale)
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, *([bias] if with_bias else []))]
    used = bias if with_bias else None
    ours = linear_cross_entropy(hidden, weight, used, targets, label_smoothing=smoothing)
    expected = plain(hidden, weight, used, targets, smoothing)
    torch.testing.assert_close(ours.loss, expected)
    torch.testing.assert_close(ours.negative_log_likelihood, plain(hidden, weight, used, targets).detach())
    assert ours.count.item() == (targets != -100).sum().item()
    for got, wanted in zip(gradients(3.0 * ours.loss, *leaves), gradients(3.0 * expected, *leaves), strict=True):
        torch.testing.assert_close(got, wanted)


def test_exact_at_the_full_vocabulary() -> None:
    """V = 250,002 in float32 against float64: sums over so many pieces must not lose digits."""
    hidden, weight, bias, targets = case(40, 8, 250_002, torch.float32)
    leaves = [hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    ours = linear_cross_entropy(*leaves, targets, label_smoothing=0.1)
    doubles = [tensor.detach().double().requires_grad_() for tensor in leaves]
    expected = plain(*doubles, targets, 0.1)
    torch.testing.assert_close(ours.loss.double(), expected, rtol=1e-6, atol=0.0)
    for got, wanted in zip(gradients(ours.loss, *leaves), gradients(expected, *doubles), strict=True):
        assert (got.double() - wanted).norm() < 2e-6 * wanted.norm()


def test_bfloat16_products_are_no_worse_than_the_plain_path() -> None:
    hidden, weight, bias, targets = case(96, 32, 5000, torch.float32, scale=0.3)
    leaves = [hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    exact = gradients(plain(hidden, weight, bias, targets), *leaves)
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(hidden, weight, bias, targets).loss
        logits = F.linear(hidden, weight, bias)
    assert ours.dtype is torch.float32
    theirs = F.cross_entropy(logits.float(), targets, reduction="sum")
    rounded = gradients(theirs, *leaves)
    for got, plain_bf16, wanted in zip(gradients(ours, *leaves), rounded, exact, strict=True):
        assert got.dtype is torch.float32
        assert (got - wanted).norm() <= 1.2 * (plain_bf16 - wanted).norm() + 1e-3 * wanted.norm()


def test_gradient_of_a_sure_prediction_keeps_its_digits() -> None:
    """p - 1 of the target: in bfloat16, p near 1 has no digits left for it."""
    weight = torch.eye(64)
    hidden = torch.zeros(1, 64)
    hidden[0, 5] = 12.0
    hidden.requires_grad_()
    target = torch.tensor([5])
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, None, target).loss
    wanted = hidden.detach().softmax(1)[0, 5] - 1.0
    got = gradients(loss, hidden)[0][0, 5]
    torch.testing.assert_close(got, wanted, rtol=1e-2, atol=0.0)


@pytest.mark.usefixtures("small_blocks")
def test_logits_far_apart_neither_overflow_nor_vanish() -> None:
    """A target 1,000 nats below the best piece, found in a later slice than the target's."""
    weight = torch.linspace(-500.0, 500.0, 40, dtype=torch.float64)[:, None].requires_grad_()
    hidden, target = torch.ones(1, 1, dtype=torch.float64, requires_grad=True), torch.tensor([0])
    loss = linear_cross_entropy(hidden, weight, None, target).loss
    expected = plain(hidden, weight, None, target)
    torch.testing.assert_close(loss, expected)
    ours, theirs = gradients(loss, hidden, weight), gradients(expected, hidden, weight)
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, wanted)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.usefixtures("small_blocks")
def test_no_logits_are_made_and_rows_without_a_target_cost_nothing() -> None:
    hidden, weight, bias, targets = case(1000, 4, 48, torch.float32)
    targets[100:] = -100
    hidden.requires_grad_()
    for used in (weight, weight.clone().requires_grad_()):
        with LargestTensor() as seen:
            linear_cross_entropy(hidden, used, bias, targets).loss.backward()
        assert seen.elements == 1000 * 4  # the gradient of the states; logits of 66 rows alone would be 3,168 x 2
        assert hidden.grad is not None and not hidden.grad[100:].any()


def test_only_what_learns_gets_a_gradient() -> None:
    hidden, weight, bias, targets = case(9, 4, 11)
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, bias, targets).loss
    (got,) = gradients(loss, hidden)
    torch.testing.assert_close(got, gradients(plain(hidden, weight, bias, targets), hidden)[0])


@pytest.mark.usefixtures("small_blocks")
def test_validation_keeps_no_exponentials() -> None:
    hidden, weight, bias, targets = case(64, 2, 2000)
    leaves = [hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    loss = linear_cross_entropy(*leaves, targets).loss
    for context in (torch.no_grad, torch.inference_mode):
        with context(), LargestTensor() as seen:
            assert linear_cross_entropy(*leaves, targets).loss == loss
        assert seen.elements == 2 * 2000  # the weights themselves


def test_no_target_at_all_is_zero_with_zero_gradients() -> None:
    hidden, weight, bias, targets = case(6, 4, 11)
    leaves = [hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    ours = linear_cross_entropy(*leaves, torch.full_like(targets, -100), label_smoothing=0.1)
    assert ours.loss == 0 and ours.count == 0
    assert all(not grad.any() for grad in gradients(ours.loss, *leaves))


def test_leading_dimensions_do_not_matter() -> None:
    hidden, weight, bias, targets = case(12, 4, 11)
    flat = linear_cross_entropy(hidden, weight, bias, targets)
    folded = linear_cross_entropy(hidden.view(3, 4, 4), weight, bias, targets.view(3, 4))
    assert flat.loss == folded.loss and flat.count == folded.count


def test_projection_is_left_out_within_the_context_only() -> None:
    head, states = nn.Linear(4, 11), torch.randn(2, 4)
    before = head(states)
    with without_projection(head):
        assert head(states) is states
    assert torch.equal(head(states), before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_on_a_gpu_in_bfloat16(smoothing: float) -> None:
    leaves = [t.cuda().requires_grad_() for t in case(96, 64, 5000, torch.float32, scale=0.3)[:3]]
    targets = case(96, 64, 5000)[3].cuda()
    with torch.autocast("cuda", torch.bfloat16):
        loss = linear_cross_entropy(*leaves, targets, label_smoothing=smoothing).loss
    expected = plain(*leaves, targets, smoothing)
    torch.testing.assert_close(loss, expected, rtol=2e-3, atol=0.0)
    for got, wanted in zip(gradients(loss, *leaves), gradients(expected, *leaves), strict=True):
        assert (got - wanted).norm() < 1e-2 * wanted.norm()
