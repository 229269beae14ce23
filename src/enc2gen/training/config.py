"""Settings of a training run. Defaults are this project's choice unless a source is named beside them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, field_validator, model_validator

from enc2gen.errors import ConfigError
from enc2gen.models.extra_losses import ContrastiveConfig

Schedule = Literal["linear", "cosine", "constant"]
Warmup = Annotated[StrictInt, Field(ge=0)] | Annotated[StrictFloat, Field(ge=0.0, lt=1.0)]

# Fields that may change between an interrupted run and its continuation: they do not touch the weights.
FREE_ON_RESUME = frozenset({"save_every", "log_every", "keep_last", "load_best", "progress", "tensorboard"})

# Later fields: left out of identities where they change nothing, so that older runs keep theirs.
_ABSENT = {"layer_decay": 1.0, "r_drop": 0.0, "contrastive": None, "compile": False}

# What transformers' trainer does not have.
_OURS_ALONE = (
    "new_parameters_lr",
    "layer_decay",
    "r_drop",
    "contrastive",
    "freeze_encoder_steps",
    "nonfinite",
    "compile",
    "padding_free",
)


class TrainingConfig(BaseModel):
    """How the trainer optimises a model; the same for pretraining and fine-tuning."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_steps: int = Field(ge=1, description="Number of optimiser updates.")
    learning_rate: float = Field(
        1e-4, gt=0, description="Peak learning rate (XLM-SWCM, arXiv 2502.10852, section 4: 1e-4)."
    )
    warmup: Warmup = Field(
        0.1,
        description="Warm-up: an integer is a number of updates, a float below 1 a share of max_steps "
        "(XLM-SWCM, arXiv 2502.10852: 0.1), in which the rate rises linearly.",
    )
    schedule: Schedule = Field(
        "linear",
        description="Share of the peak rate after w warm-up updates out of n = max_steps, for update t = w ... n - 1: "
        "linear (n - t) / (n - w); cosine (1 + cos(pi (t - w) / (n - w))) / 2 (arXiv 1608.03983, one period); "
        "constant 1.",
    )
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW moment decay rates (arXiv 1711.05101).")
    eps: float = Field(1e-8, gt=0, description="AdamW denominator term (arXiv 1711.05101).")
    weight_decay: float = Field(0.01, ge=0, description="Decoupled weight decay.")
    no_decay: tuple[Literal["bias", "norm", "embedding"], ...] = Field(
        ("bias", "norm", "embedding"), description="Kinds of parameters that weight decay leaves alone."
    )
    max_grad_norm: float | None = Field(
        1.0,
        gt=0,
        description="Gradients are scaled down to this L2 norm (XLM-SWCM: 1.0); null switches it off.",
    )
    gradient_accumulation: int = Field(
        1,
        ge=1,
        description="Batches per update and process; the loss is the mean over all their target tokens.",
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="Arithmetic of forward and backward; weights and optimiser are float32 always. "
        "auto is bf16 where the hardware multiplies bfloat16 natively and a numeric test passes.",
    )
    gradient_checkpointing: bool = Field(False, description="Recompute activations in backward to save memory.")
    compile: bool = Field(
        False,
        description="Compile the layers with torch.compile, which takes a minute and needs a compiler (Triton for a "
        "GPU, C++ for a CPU). Meant for GPUs; on CPUs it gains nothing. A resumed run need no longer equal an "
        "uninterrupted one bit for bit.",
    )
    padding_free: Literal["auto"] | bool = Field(
        "auto",
        description="Run on real tokens only; attention never crosses sequences. Changes the time and the numbers that "
        "dropout draws, not the loss. auto: where the model can (a grown one with sdpa or flash_attention_2).",
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Probability mass spread over the vocabulary.")
    eval_every: int = Field(500, ge=1, description="Updates between validations; the last update is validated too.")
    save_every: int = Field(500, ge=1, description="Updates between resumable checkpoints.")
    log_every: int = Field(10, ge=1, description="Updates between two lines of metrics.")
    keep_last: int = Field(2, ge=1, description="Resumable checkpoints kept on disk, besides the best weights.")
    patience: int | None = Field(
        None,
        ge=1,
        description="Validations without a better mean loss before training stops early; null: never.",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of everything random in training, such as dropout.")
    new_parameters_lr: float = Field(
        1.0,
        gt=0,
        description="Multiplies the learning rate of randomly initialised parameters; in a bridge, of all but the "
        "encoder's and the LLM's (with their low-rank updates).",
    )
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Layer-wise learning rates: with factor d, the k-th layer from the top of the encoder and of the "
        "decoder learns at d^k times the rate, what lies below the n-th at d^(n+1) (ELECTRA, arXiv 2003.10555; BEiT, "
        "arXiv 2106.08254). Randomly initialised parameters and all outside the layers keep the whole rate, and "
        "decoder layers that hold nothing else are not counted. 1 switches it off.",
    )
    r_drop: float = Field(
        0.0,
        ge=0,
        description="R-Drop (arXiv 2106.14448): weight alpha of the divergence between two passes over each batch with "
        "different dropout, which takes twice the time; half of its equation (4), so that the loss stays comparable. "
        "0 switches it off.",
    )
    contrastive: ContrastiveConfig | None = Field(
        None,
        description="Contrastive loss between encoder states of the two sides of translation pairs; null: none.",
    )
    freeze: tuple[str, ...] = Field(
        (), description='Name patterns of parameters that are never trained, such as "encoder.embeddings.*".'
    )
    freeze_encoder_steps: int = Field(
        0,
        ge=0,
        description="Updates during which the encoder is frozen, before everything is trained "
        "(two-stage fine-tuning of DeltaLM, arXiv 2106.13736).",
    )
    nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="What to do with an update whose loss or gradient is NaN or infinite."
    )
    max_skipped_in_row: int = Field(10, ge=1, description="With nonfinite=skip: stop after so many in a row.")
    load_best: bool = Field(
        True, description="After training, give the model the weights with the best validation loss."
    )
    progress: bool = Field(True, description="Show a progress line (plain lines where there is no terminal).")
    tensorboard: bool = Field(True, description="Write TensorBoard curves to OUTPUT/tensorboard.")

    @field_validator("betas")
    @classmethod
    def _betas_in_range(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must lie in [0, 1), got {betas}")
        return betas

    @model_validator(mode="after")
    def _stages_fit(self) -> TrainingConfig:
        if self.warmup_steps >= self.max_steps and self.warmup_steps > 0:
            raise ValueError(f"warmup ({self.warmup}) leaves no update after it; max_steps is {self.max_steps}")
        return self

    @property
    def warmup_steps(self) -> int:
        """Warm-up in updates."""
        return self.warmup if isinstance(self.warmup, int) else round(self.warmup * self.max_steps)

    def check_transformers(self) -> None:
        """Raise `ConfigError` if a setting asks for what transformers' trainer does not do (`training.cross_check`)."""
        fields = type(self).model_fields
        if own := [name for name in _OURS_ALONE if getattr(self, name) != fields[name].default]:
            raise ConfigError(
                f"transformers' trainer has no {', '.join(own)}",
                where="training",
                remedy="leave them at their defaults, or use trainer enc2gen",
            )

    def identity(self) -> dict[str, object]:
        """The settings that decide the weights, JSON-able; a run is resumed with the same ones only."""
        absent = {name for name, value in _ABSENT.items() if getattr(self, name) == value}
        # the trainer adds what padding_free comes to with its model
        return self.model_dump(mode="json", exclude=absent | FREE_ON_RESUME | {"padding_free"})
