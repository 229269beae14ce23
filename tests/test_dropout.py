"""Quick dropout: rate, scale, gradients and repeatability."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from enc2gen.models.dropout import Dropout, use_quick_dropout


@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rate_scale_and_gradient(rate: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    states = torch.ones(999, 1001, dtype=dtype, requires_grad=True)
    out = Dropout(rate)(states)
    assert out.dtype is dtype
    kept = out != 0
    assert kept.double().mean().item() == pytest.approx(1 - rate, abs=2e-3)  # four standard errors
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / (1 - rate)), rtol=4e-3, atol=0.0)
    out.backward(torch.full_like(out, 2.0))
    torch.testing.assert_close(states.grad, 2 * out.detach())


def test_neighbours_are_independent() -> None:
    torch.manual_seed(0)
    kept = (Dropout(0.3)(torch.ones(2**20)) != 0).double()
    for distance in (1, 2, 3, 4, 5, 384):
        pair = (kept[:-distance] * kept[distance:]).mean().item()
        assert pair == pytest.approx(0.49, abs=3e-3)


def test_a_function_of_the_seed_and_nothing_in_evaluation() -> None:
    layer, states = Dropout(0.3), torch.randn(7, 5)
    drawn = [layer(states) for _ in range(2) if torch.manual_seed(3)]
    assert torch.equal(*drawn)
    assert layer.eval()(states) is states or torch.equal(layer(states), states)
    assert torch.equal(Dropout(0.0)(states), states)
    assert not Dropout(1.0)(states).any()


def test_all_dropout_of_a_model_is_replaced() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.4), nn.Sequential(nn.Dropout(0.2))).eval()
    names = list(model.state_dict())
    use_quick_dropout(model)
    found = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    assert [type(module) for module in found] == [Dropout, Dropout] and [m.p for m in found] == [0.4, 0.2]
    assert not any(module.training for module in found) and list(model.state_dict()) == names
