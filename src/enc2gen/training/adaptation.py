"""Continued masked-LM pretraining of an encoder on texts of its new languages, before a decoder is grown from it.

Stages: word embeddings and head first, so that random new rows do not disturb the trained layers; then everything,
or LoRA on chosen layers. Each stage is a run of the one trainer in a folder of its own, so that an interrupted
adaptation, started again with the same arguments, ends as if it had not been interrupted:

    OUTPUT/embeddings/   OUTPUT/all/    checkpoints and metrics of the stages
    OUTPUT/encoder/                     the adapted encoder with its head and tokenizer, written last
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from enc2gen.data.batching import BatchingConfig, IndexedSource
from enc2gen.data.masking import MaskedBatch, MaskedExample, Masker, MaskingConfig, masked_batches, masked_stream
from enc2gen.data.text_blocks import text_row
from enc2gen.encoders.donor import donor_for
from enc2gen.errors import ConfigError, DataError, ModelError
from enc2gen.models.lora import LoraSettings, add_lora, is_lora, merge_lora
from enc2gen.models.masked_lm import MaskedLanguageModel, score_examples, unigram_frequencies
from enc2gen.tokenization.vocabulary import unknown_rate
from enc2gen.training.callbacks import Callback
from enc2gen.training.checkpoint import CheckpointStore, save_weights, write_checkpoint, write_json
from enc2gen.training.config import TrainingConfig
from enc2gen.training.runtime import make_accelerator
from enc2gen.training.state import TrainingResult
from enc2gen.training.trainer import Trainer

DEV_MASK_RATIO = 0.15
"""Share of words hidden in dev texts (BERT, arXiv 1810.04805, section 3.1)."""
_COUNTED_ROWS = 20_000  # rows that a fresh head's unigram frequencies are counted on (our choice)
_PROBED_ROWS = 1_000  # rows that the share of unknown text is measured on (our choice)
Log = Callable[[str], None]


class AdaptationConfig(BaseModel):
    """How an encoder is adapted to new languages. The seeds of the two stages are replaced by the adaptation's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    embeddings_only: TrainingConfig | None = Field(
        default=None, description="first stage: only the word embeddings and the masked-LM head; null: none"
    )
    training: TrainingConfig | None = Field(
        default=None, description="second stage: everything, or LoRA with embeddings and head; null: none"
    )
    new_rows_only: bool = Field(
        default=False,
        description="in the first stage, leave the embedding rows of old pieces as they are, bit for bit",
    )
    masking: MaskingConfig = Field(default_factory=MaskingConfig, description="what is masked")
    batching: BatchingConfig = Field(default_factory=BatchingConfig, description="batches of masked blocks")
    max_length: int = Field(
        default=256, ge=8, description="longest block in tokens (our choice); longer texts are cut into blocks"
    )
    alpha: float = Field(
        default=0.3, ge=0, description="exponent of the languages' shares (0.3: arXiv 2502.10852, section 3.2)"
    )
    lora: LoraSettings | None = Field(
        default=None, description="second stage: train low-rank updates of chosen layers; other layers stay"
    )

    @model_validator(mode="after")
    def _stages_fit(self) -> AdaptationConfig:
        if self.embeddings_only is None and self.training is None:
            raise ValueError("give embeddings_only, training or both")
        if self.new_rows_only and self.embeddings_only is None:
            raise ValueError("new_rows_only is a setting of the first stage; give embeddings_only")
        if self.lora is not None and self.training is None:
            raise ValueError("lora is a setting of the second stage; give training")
        decayed = self.embeddings_only and self.embeddings_only.weight_decay
        if self.new_rows_only and decayed and "embedding" not in self.embeddings_only.no_decay:  # type: ignore[union-attr]
            raise ValueError('new_rows_only needs "embedding" in no_decay: weight decay would change the old rows')
        return self

    def stages(self) -> dict[str, TrainingConfig]:
        """Name -> settings of the stages to run, in order."""
        stages = {"embeddings": self.embeddings_only, "all": self.training}
        return {name: settings for name, settings in stages.items() if settings is not None}


@dataclass(frozen=True)
class StageOutcome:
    """A stage's training result, and masked bits per byte of the dev texts after it (None: no dev texts)."""

    name: str
    training: TrainingResult
    bits_per_byte: float | None


@dataclass(frozen=True)
class AdaptationResult:
    """What an adaptation came to.

    Attributes:
        encoder: the bare encoder, the very object that was given (or is inside it).
        model: the same encoder with its masked-LM head; `save_pretrained` keeps both.
        fresh_head: the encoder came without a head and got a new one.
        bits_per_byte_before: masked bits per byte of the dev texts before the first stage; None without dev texts.
        stages: outcome of each stage that ran, the last one perhaps interrupted.
        interrupted: stopped by Ctrl-C or SIGTERM; the same call goes on where it stopped.
        folder: where encoder, head and tokenizer were saved; None if interrupted.
    """

    encoder: PreTrainedModel
    model: PreTrainedModel
    fresh_head: bool
    bits_per_byte_before: float | None
    stages: tuple[StageOutcome, ...]
    interrupted: bool
    folder: Path | None

    @property
    def bits_per_byte(self) -> float | None:
        """Masked bits per byte of the dev texts after the last stage."""
        return self.stages[-1].bits_per_byte

    @property
    def steps(self) -> int:
        """Updates of all stages."""
        return sum(stage.training.steps for stage in self.stages)

    @property
    def seconds(self) -> float:
        """Training and validation time of all stages, over resumed parts too."""
        return sum(stage.training.seconds for stage in self.stages)


def adapt_encoder(
    encoder: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: IndexedSource[Any],
    dev_texts: IndexedSource[Any],
    config: AdaptationConfig,
    output_dir: Path,
    *,
    seed: int = 0,
    new_ids: Sequence[int] = (),
    callbacks: Sequence[Callback] = (),
    resume: bool = True,
    log: Log | None = None,
) -> AdaptationResult:
    """Train `encoder`, in place, to predict masked words of `texts`.

    Args:
        encoder: an encoder, bare or with its masked-LM head (`load_masked_lm`); a bare one gets a fresh head.
        tokenizer: its fast tokenizer, with a mask token.
        texts: rows of text: `str`, `(text, language)`, or mappings with `text` and `language`.
        dev_texts: rows of the same kind, to choose the best weights and to report on. May be empty.
        config: stages and settings.
        output_dir: see the module's docstring.
        seed: of masks, mixture, dropout and LoRA.
        new_ids: ids of the new pieces, for `new_rows_only`.
        callbacks: for the trainer of each stage.
        resume: go on where an earlier call with the same arguments stopped; False refuses a used folder.
        log: gets one line at the start and end of each stage.

    Raises:
        ConfigError: settings that do not fit the encoder.
        ModelError: an unsupported family, or a tokenizer that does not fit the encoder.
        DataError: no text, or none that the tokenizer knows.
        CheckpointError, OutputError, TrainingError: as `Trainer.train`.
    """
    return _Adaptation(encoder, tokenizer, texts, dev_texts, config, Path(output_dir), seed, new_ids, log).run(
        callbacks, resume
    )


class _Adaptation:
    """The parts of one call of :func:`adapt_encoder`."""

    def __init__(
        self,
        encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: IndexedSource[Any],
        dev_texts: IndexedSource[Any],
        config: AdaptationConfig,
        output_dir: Path,
        seed: int,
        new_ids: Sequence[int],
        log: Log | None,
    ) -> None:
        self.config, self.output_dir, self.seed, self.texts = config, output_dir, seed, texts
        self.tokenizer, self.new_ids, self.log = tokenizer, sorted(set(new_ids)), log or (lambda line: None)
        self.masker = Masker(tokenizer, config.masking, config.max_length)
        _check_fit(encoder, tokenizer, config, self.new_ids)
        table = cast(nn.Embedding, encoder.get_input_embeddings())
        self.model = MaskedLanguageModel(encoder, self._unigram(table.num_embeddings))
        self.dev: dict[str, list[MaskedExample]] = {}
        for index in range(len(dev_texts)):
            text, language = text_row(dev_texts[index])
            examples = self.masker.scored_examples(text, DEV_MASK_RATIO, np.random.default_rng([seed, index]))
            self.dev.setdefault(language, []).extend(examples)

    def _unigram(self, vocabulary: int) -> Tensor:
        """Frequencies of ids in up to 20,000 rows spread over the texts."""
        rows = sorted({index * len(self.texts) // _COUNTED_ROWS for index in range(_COUNTED_ROWS)})
        counted = [text_row(self.texts[row])[0] for row in rows] if len(self.texts) else []
        unknown = unknown_rate(self.tokenizer, counted[:: max(1, len(counted) // _PROBED_ROWS)])
        if unknown > 0.99:
            raise DataError(
                "the tokenizer knows next to nothing of the texts",
                remedy="extend its vocabulary first (enc2gen vocab extend)",
            )
        if unknown > 0.05:
            self.log(f"warning: the tokenizer does not know {unknown:.0%} of the text, which is never predicted")
        return unigram_frequencies([self.masker.ids(text) for text in counted], vocabulary)

    def run(self, callbacks: Sequence[Callback], resume: bool) -> AdaptationResult:
        before = self._bits_before()
        outcomes: list[StageOutcome] = []
        for name, settings in self.config.stages().items():
            outcomes.append(self._stage(name, settings, callbacks, resume))
            if outcomes[-1].training.interrupted:
                break
        interrupted = outcomes[-1].training.interrupted
        folder = None if interrupted else self.output_dir / "encoder"
        if folder is not None and make_accelerator().is_main_process:
            write_checkpoint(folder, self._save, {"bits_per_byte": outcomes[-1].bits_per_byte})
        return AdaptationResult(
            encoder=self.model.encoder,
            model=self.model.model,
            fresh_head=self.model.fresh_head,
            bits_per_byte_before=before,
            stages=tuple(outcomes),
            interrupted=interrupted,
            folder=folder,
        )

    def _save(self, folder: Path) -> None:
        save_weights(self.model.model, folder)
        self.tokenizer.save_pretrained(folder)

    def _bits(self) -> float | None:
        """Masked bits per byte of the dev texts."""
        examples = [example for rows in self.dev.values() for example in rows]
        if not examples:
            return None
        self.model.to(make_accelerator().device)
        return score_examples(self.model, examples, self.masker.pad_id, self._max_tokens).bits_per_byte

    def _bits_before(self) -> float | None:
        """Of the encoder as it was at first, which a resumed run may not have any more: kept in a file."""
        path = self.output_dir / "before.json"
        dev = hashlib.sha256(repr(self.dev).encode()).hexdigest()
        started = any(CheckpointStore(self._folder(name) / "checkpoints").exists() for name in self.config.stages())
        if started and path.is_file():
            saved = json.loads(path.read_text(encoding="utf-8"))
            if saved.get("dev") == dev:
                return cast(float | None, saved["bits_per_byte"])
        bits = self._bits()
        if make_accelerator().is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            write_json(path, {"dev": dev, "bits_per_byte": bits})
        return bits

    def _folder(self, stage: str) -> Path:
        return self.output_dir / stage

    @property
    def _max_tokens(self) -> int:
        return max(self.config.max_length, self.config.batching.max_tokens or 4096)

    def _validation(self) -> Mapping[str, list[MaskedBatch]]:
        return {
            language: masked_batches(examples, self.masker.pad_id, self._max_tokens)
            for language, examples in sorted(self.dev.items())
            if any(example.covered for example in examples)
        }

    def _stage(self, name: str, settings: TrainingConfig, callbacks: Sequence[Callback], resume: bool) -> StageOutcome:
        config = self.config
        lora = config.lora if name == "all" else None
        only_new = config.new_rows_only and name == "embeddings"
        stream = masked_stream(
            self.texts,
            self.masker,
            config.batching,
            alpha=config.alpha,
            seed=self.seed,
            fingerprint_parts={
                "stage": name,
                "lora": lora and lora.model_dump(),
                "new rows": self.new_ids if only_new else None,
            },
        )
        rows = self.new_ids if only_new else None
        with _trained(self.model, name, lora, self.seed), _only_rows(self.model, rows, settings.weight_decay):
            trainer = Trainer(
                self.model,
                stream,
                self._validation(),
                settings.model_copy(update={"seed": self.seed}),
                self._folder(name),
                callbacks,
            )
            self.log(f"{_describe(name, lora, only_new)}: {settings.max_steps} updates in {trainer.precision}")
            result = trainer.train(resume=resume)
        bits = None if result.interrupted else self._bits()
        done = "interrupted" if result.interrupted else "done"
        measured = "" if bits is None else f", {bits:.3f} masked bits per byte"
        self.log(f"{name}: {done} after {result.steps} updates, {result.tokens_per_second:,.0f} tokens/s{measured}")
        return StageOutcome(name, result, bits)


def _describe(stage: str, lora: LoraSettings | None, only_new: bool) -> str:
    if stage == "embeddings":
        return f"training {'new ' if only_new else ''}word embeddings and the masked-LM head"
    return "training the whole encoder" if lora is None else f"training LoRA of rank {lora.rank}, embeddings and head"


def _check_fit(
    encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: AdaptationConfig, new_ids: Sequence[int]
) -> None:
    rows = cast(nn.Embedding, encoder.get_input_embeddings()).num_embeddings
    if len(tokenizer) > rows:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} entries, the encoder's embedding table {rows} rows",
            remedy="give the tokenizer that belongs to the encoder, or resize the encoder first",
        )
    positions = donor_for(encoder.config).max_positions
    if config.max_length > positions:
        raise ConfigError(
            f"max_length is {config.max_length}, but the encoder has {positions} positions",
            where="max_length",
            remedy=f"use {positions} or less",
        )
    if config.new_rows_only and (not new_ids or new_ids[0] < 0 or new_ids[-1] >= rows):
        raise ConfigError(
            "new_rows_only needs the ids of the new pieces, and each must be a row of the table",
            where="new_rows_only",
            remedy="pass new_ids, or train all rows",
        )


@contextmanager
def _trained(model: MaskedLanguageModel, stage: str, lora: LoraSettings | None, seed: int) -> Iterator[None]:
    """Only what the stage trains needs gradients; LoRA is merged and everything restored at the end."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    if lora is not None:
        add_lora(model.encoder, lora, seed)
    try:
        outside = [parameter for module in (*model.head, *_tables(model)) for parameter in module.parameters()]
        always = {id(parameter) for parameter in outside}
        for name, parameter in model.named_parameters():
            # A pooler takes no part in predicting pieces.
            inside = stage == "all" and (".pooler." not in name if lora is None else is_lora(name))
            parameter.requires_grad_(inside or id(parameter) in always)
        yield
    finally:
        merge_lora(model.encoder)
        for parameter, flag in before:
            parameter.requires_grad_(flag)


def _tables(model: MaskedLanguageModel) -> list[nn.Module]:
    """Word embeddings, and the output projection, which has a table of its own where it is not tied."""
    return [model.model.get_input_embeddings(), cast(nn.Module, model.model.get_output_embeddings())]


@contextmanager
def _only_rows(model: MaskedLanguageModel, rows: Sequence[int] | None, weight_decay: float) -> Iterator[None]:
    """Gradients of all other rows of the embedding tables are zero; nothing is changed if `rows` is None.

    AdamW leaves a row without gradient bit for bit as it is, as long as it is not decayed; an output projection with
    a table of its own is, as every matrix.
    """
    handles = []
    if rows is not None:
        tables = {id(table.weight): cast(Tensor, table.weight) for table in _tables(model)}
        if weight_decay and len(tables) > 1:
            raise ConfigError(
                "weight decay would change old rows of the output projection, which is not tied to the embeddings",
                where="embeddings_only.weight_decay",
                remedy="set it to 0, or new_rows_only to false",
            )
        for weight in tables.values():
            mask = weight.new_zeros(weight.shape[0], 1)
            mask[list(rows)] = 1.0
            handles.append(weight.register_hook(lambda gradient, mask=mask: gradient * mask.to(gradient.device)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
