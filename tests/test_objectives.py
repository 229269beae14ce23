"""The objective against torch's own cross-entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from enc2gen.models.token_loss import cross_entropy


def _case(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(3, 7, 11, generator=generator)).to(dtype)
    labels = torch.randint(11, (3, 7), generator=generator)
    labels[0, 3:] = labels[2, 1:] = -100
    return logits, labels


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_sum_and_gradient_equal_torch(smoothing: float) -> None:
    logits, labels = _case()
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    result = cross_entropy(ours, labels, smoothing)
    expected = F.cross_entropy(theirs.flatten(0, 1), labels.flatten(), reduction="sum", label_smoothing=smoothing)
    result.loss.backward()
    expected.backward()
    torch.testing.assert_close(result.loss, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert result.count.item() == 3 + 7 + 1


def test_validation_loss_is_free_of_smoothing() -> None:
    logits, labels = _case()
    smoothed, plain = cross_entropy(logits, labels, 0.3), cross_entropy(logits, labels)
    assert smoothed.negative_log_likelihood == plain.loss
    assert abs(smoothed.loss - plain.loss) > 1.0
    assert not smoothed.negative_log_likelihood.requires_grad


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_bfloat16_logits_are_summed_in_float32(smoothing: float) -> None:
    logits, labels = _case(torch.bfloat16)
    result = cross_entropy(logits, labels, smoothing)
    expected = cross_entropy(logits.float(), labels, smoothing)
    assert result.loss.dtype is torch.float32
    assert result.loss == expected.loss


def test_rank_does_not_matter() -> None:
    logits, labels = _case()
    flat = cross_entropy(logits.flatten(0, 1), labels.flatten(), 0.1)
    assert flat.loss == cross_entropy(logits, labels, 0.1).loss


def test_only_ignored_labels_give_zero_not_nan() -> None:
    logits, labels = _case()
    result = cross_entropy(logits, torch.full_like(labels, -100), 0.1)
    assert result.loss == 0 and result.count == 0
