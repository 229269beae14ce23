"""The loss of one batch, in training and in validation, for models with and without a loss of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from enc2gen.data.batching import IGNORED_LABEL
from enc2gen.errors import ConfigError
from enc2gen.models.extra_losses import ExtraLosses, divergence
from enc2gen.models.token_loss import TokenLoss, cross_entropy
from enc2gen.training.config import TrainingConfig
from enc2gen.training.runtime import forward_options, takes_argument

if TYPE_CHECKING:
    from enc2gen.data.protocols import TrainingBatch


class Objective:
    """What is minimised, and what is measured.

    Args:
        model: whose `forward` decides how the loss comes about: one with `extra_losses` computes everything itself,
            one with `label_smoothing` the cross-entropy; of others the logits are taken.
        config: settings.
        device: where batches go.
        precision: `bf16` or `fp32`.

    Raises:
        ConfigError: the settings ask for a loss that the model cannot give.
    """

    def __init__(self, model: nn.Module, config: TrainingConfig, device: torch.device, precision: str) -> None:
        self._device, self._half = device, precision == "bf16"
        self._smoothing, self._r_drop = config.label_smoothing, config.r_drop
        self._options = forward_options(model)
        self._computes_loss = takes_argument(model, "label_smoothing")
        computes_extra = takes_argument(model, "extra_losses")
        wanted = config.r_drop > 0 or config.contrastive is not None
        self._extra = ExtraLosses(config.r_drop, config.contrastive) if wanted and computes_extra else None
        cannot = "contrastive" if config.contrastive else "r_drop" if config.r_drop and self._computes_loss else None
        if cannot and not computes_extra:
            raise ConfigError(
                f"{type(model).__name__} has no {cannot} loss",
                where=f"training.{cannot}",
                remedy="leave it out; models that from_encoder grows have it",
            )

    def training(self, model: nn.Module, batch: TrainingBatch) -> TokenLoss:
        """Loss with everything that the settings add to it."""
        inputs = batch.to(self._device).as_model_inputs()
        if self._r_drop:  # one pass over the batch twice: dropout differs from row to row
            inputs = {name: torch.cat([tensor, tensor]) for name, tensor in inputs.items()}
        extra = {} if self._extra is None else {"extra_losses": self._extra}
        return self._loss(model, inputs, self._smoothing, self._r_drop, extra)

    def validation(self, model: nn.Module, batch: TrainingBatch) -> TokenLoss:
        """Cross-entropy alone, without smoothing."""
        return self._loss(model, batch.to(self._device).as_model_inputs(), 0.0, 0.0, {})

    def _loss(
        self, model: nn.Module, inputs: dict[str, Tensor], smoothing: float, r_drop: float, extra: dict[str, Any]
    ) -> TokenLoss:
        labels = inputs.pop("labels")
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._half):
            if self._computes_loss:
                # inside `forward`, where data-parallel wrappers see every use of a parameter
                return model(**inputs, labels=labels, label_smoothing=smoothing, **extra, **self._options)
            logits = model(**inputs, **self._options).logits
        loss = cross_entropy(logits, labels, smoothing)
        return _with_r_drop(loss, logits, labels, r_drop) if r_drop else loss


def _with_r_drop(loss: TokenLoss, logits: Tensor, labels: Tensor, alpha: float) -> TokenLoss:
    """Half of arXiv 2106.14448, equation (4): `loss` is over both passes, `[2 B, T, V]` their logits."""
    first, second = logits.chunk(2)
    real = labels.chunk(2)[0] != IGNORED_LABEL
    apart = divergence(first[real], second[real])
    return TokenLoss((loss.loss + alpha * apart) / 2, loss.negative_log_likelihood / 2, loss.count // 2)
