"""Training: objective, optimiser, checkpoints, callbacks and the one trainer."""

from enc2gen.training.callbacks import Callback, StepMetrics, ValidationMetrics
from enc2gen.training.config import TrainingConfig
from enc2gen.training.state import TrainingResult, TrainingStream
from enc2gen.training.trainer import Trainer

__all__ = [
    "Callback",
    "StepMetrics",
    "Trainer",
    "TrainingConfig",
    "TrainingResult",
    "TrainingStream",
    "ValidationMetrics",
]
