"""Training a bridge: which parts learn, and one run of the trainer over (source, target) examples.

A bridge's frozen parts are the larger ones by far. They are left as they are, in their own precision and out of the
checkpoints, and what a frozen encoder says of a source is computed once (`FrozenStateCache`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn
from transformers import PreTrainedModel

from enc2gen.data.batching import BatchingConfig, BatchStream, EncodedExample
from enc2gen.data.bridge import bridge_evaluation_batches, collate_bridge
from enc2gen.data.mixture import MixtureSampler
from enc2gen.errors import ConfigError, DataError
from enc2gen.models.bridge.modeling import BridgeForConditionalGeneration
from enc2gen.models.bridge.state_cache import FrozenStateCache
from enc2gen.models.lora import LoraSettings, add_lora, is_lora, merge_lora
from enc2gen.training.callbacks import Callback
from enc2gen.training.config import TrainingConfig
from enc2gen.training.state import TrainingResult
from enc2gen.training.trainer import Trainer

Tuning = Literal["frozen", "full", "lora"]
Log = Callable[[str], None]


class TuningConfig(BaseModel):
    """Which parts of a bridge model learn in a stage. The default is the published one: the bridge alone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bridge: bool = Field(
        default=True, description="fusion, mapper, end vector and aligner learn; false: LinguaLIFT's second stage"
    )
    encoder: Tuning = Field(
        default="frozen", description="frozen (arXiv 2508.09091), full (LangBridge on plain LLMs), or low-rank updates"
    )
    llm: Tuning = Field(
        default="frozen", description="frozen, full, or low-rank updates (LinguaLIFT, MERLIN and LLINK tune the LLM)"
    )
    lora: LoraSettings = Field(default_factory=LoraSettings, description="of the parts that are tuned with lora")

    @model_validator(mode="after")
    def _something_learns(self) -> TuningConfig:
        if not self.bridge and self.encoder == self.llm == "frozen":
            raise ValueError("nothing learns: set bridge to true, or tune encoder or llm")
        return self


def train_bridge(
    model: BridgeForConditionalGeneration,
    train: Sequence[EncodedExample],
    dev: Mapping[str, Sequence[EncodedExample]],
    training: TrainingConfig,
    batching: BatchingConfig,
    output_dir: Path,
    *,
    tuning: TuningConfig | None = None,
    cache: FrozenStateCache | None = None,
    callbacks: Sequence[Callback] = (),
    resume: bool = True,
    log: Log | None = None,
) -> TrainingResult:
    """Train `model` in place to write each example's target after its source; the loss is on the target only.

    Low-rank updates are merged into the weights at the end, so the trained model needs no peft.

    Args:
        train: examples of `BridgeCodec.encode_pair`; every epoch sees each once, in an order given by the seed.
        dev: named sets; their mean loss picks the best weights.
        training: settings; its seed also orders the examples.
        batching: batches of examples.
        output_dir: gets checkpoints (of what learns) and metrics.
        tuning: what learns; by default the bridge.
        cache: states of a frozen encoder, shared between runs; None computes them in every step.
        log: gets one line about what learns.

    Raises:
        DataError: no training example.
        ConfigError: settings that do not fit the model; a cache with an encoder that learns.
        CheckpointError, OutputError, TrainingError: as `Trainer.train`.
    """
    tuning = tuning or TuningConfig()
    if not train:
        raise DataError("there is no example to train the bridge on", remedy="check the task's data")
    if cache is not None and tuning.encoder != "frozen":
        raise ConfigError("an encoder that learns has no fixed states to cache", where="tuning.encoder")
    encoder_pad, llm_pad = cast(int, model.config.encoder_pad_token_id), cast(int, model.config.pad_token_id)

    def collated(examples: Sequence[Any], _: int) -> Any:
        return collate_bridge(examples, encoder_pad, llm_pad, cache=cache)

    validation = {
        name: bridge_evaluation_batches(
            examples,
            encoder_pad,
            llm_pad,
            max_tokens=batching.max_tokens,
            max_examples=batching.max_examples,
            cache=cache,
        )
        for name, examples in dev.items()
        if examples
    }
    with _learning(model, tuning, training.seed):
        if log is not None:
            log(_describe(model))
        stream = BatchStream(
            lambda _, item, __: train[item],
            MixtureSampler({"task": len(train)}, seed=training.seed),
            encoder_pad,
            batching,
            training.seed,
            {"examples": _fingerprint(train), "tuning": tuning.model_dump()},
            collate=collated,
        )
        trainer = Trainer(
            model,
            stream,
            validation,
            training,
            output_dir,
            callbacks,
            new_parameters=lambda name: not name.startswith(("encoder.", "llm.")),
            leave_frozen=True,
        )
        return trainer.train(resume=resume)


def _fingerprint(examples: Sequence[EncodedExample]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        for ids in (example.input_ids, example.decoder_input_ids, example.labels):
            digest.update(np.asarray([len(ids), *ids], dtype=np.int64).tobytes())
    return digest.hexdigest()


def _describe(model: nn.Module) -> str:
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{learning:,} of {sum(p.numel() for p in model.parameters()):,} parameters learn"


@contextmanager
def _learning(model: BridgeForConditionalGeneration, tuning: TuningConfig, seed: int) -> Iterator[None]:
    """Only what `tuning` names needs gradients; afterwards low-rank updates are merged in.

    What has learnt keeps its `requires_grad`, which is how the model knows which weights to save.
    """
    halves: dict[str, tuple[PreTrainedModel, Tuning]] = {
        "encoder": (model.encoder, tuning.encoder),
        "llm": (model.llm, tuning.llm),
    }
    learnt = {name: any(p.requires_grad for p in half.parameters()) for name, (half, _) in halves.items()}
    inside = {id(p) for half, _ in halves.values() for p in half.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in inside:
            parameter.requires_grad_(tuning.bridge)
    for half, how in halves.values():
        half.requires_grad_(how == "full")
        if how == "lora":
            add_lora(half, tuning.lora, seed)
            for name, parameter in half.named_parameters():
                parameter.requires_grad_(is_lora(name))
    try:
        yield
    finally:
        for name, (half, how) in halves.items():
            if how == "lora":
                merge_lora(half)
            half.requires_grad_(how != "frozen" or learnt[name])
        for parameter in model.parameters():
            if id(parameter) not in inside:
                parameter.requires_grad_(True)
