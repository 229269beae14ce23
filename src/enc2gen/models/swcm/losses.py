"""The training loss of a grown model, from the states of its decoder and encoder.

Shapes: B batch, S source length, T target length, H hidden size, P translation pairs of the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from enc2gen.encoders.donor import donor_for
from enc2gen.errors import ModelError
from enc2gen.models.extra_losses import ContrastiveConfig, ExtraLosses, info_nce, linear_divergence, mean_pooled
from enc2gen.models.linear_cross_entropy import linear_cross_entropy
from enc2gen.models.padding_free import SequencePair, Sequences
from enc2gen.models.token_loss import TokenLoss
from enc2gen.models.training_attention import sequence_options
from enc2gen.tokenization.examples import IGNORED_LABEL

if TYPE_CHECKING:
    from enc2gen.models.swcm.modeling import SwcmForConditionalGeneration


def training_loss(
    model: SwcmForConditionalGeneration,
    decoded: Tensor,
    encoded: Tensor,
    inputs: Mapping[str, Tensor | None],
    label_smoothing: float,
    extra: ExtraLosses | None,
) -> TokenLoss:
    """Label-smoothed cross-entropy, and what `extra` adds to it, summed over target tokens.

    Args:
        decoded: `[B, T, H]`, what the LM head reads; encoded: `[B, S, H]`, the encoder's last states, which only the
            contrastive loss looks at.
        inputs: `labels`; for the contrastive loss `input_ids`, `attention_mask` and `decoder_input_ids` too.

    Raises:
        ModelError: an input is missing; an odd number of rows with `extra.r_drop`.
    """
    labels = _needed(inputs, "labels")
    head = cast(nn.Linear, model.lm_head)
    loss = linear_cross_entropy(decoded, head.weight, head.bias, labels, label_smoothing=label_smoothing)
    if extra is None:
        return loss
    rows = len(labels)
    if extra.r_drop:
        if rows % 2:
            raise ModelError(f"R-Drop needs a batch twice, but there are {rows} rows", where="extra_losses.r_drop")
        rows //= 2
        first, second = decoded.split(rows)
        apart = linear_divergence(first, second, head.weight, head.bias, labels[:rows])
        loss = TokenLoss(
            (loss.loss + extra.r_drop * apart) / 2, loss.negative_log_likelihood / 2, loss.count // 2
        )  # half of arXiv 2106.14448, equation (4)
    if extra.contrastive is not None:
        names = ("input_ids", "attention_mask", "decoder_input_ids", "labels")
        once = {name: _needed(inputs, name)[:rows] for name in names}
        loss = loss._replace(loss=loss.loss + contrastive_loss(model, encoded[:rows], once, extra.contrastive))
    return loss


def padding_free_loss(
    model: SwcmForConditionalGeneration,
    inputs: Mapping[str, Tensor | None],
    label_smoothing: float,
    extra: ExtraLosses | None,
) -> TokenLoss:
    """`training_loss`, with encoder and decoder running on real tokens only (`models.padding_free`).

    Args:
        inputs: `input_ids` and `attention_mask` `[B, S]`, `decoder_input_ids`, `decoder_attention_mask` and `labels`
            `[B, T]`; without a mask all tokens are real.

    Raises:
        ModelError: an input is missing; the attention implementation cannot keep sequences apart.
    """
    input_ids, decoder_input_ids = _needed(inputs, "input_ids"), _needed(inputs, "decoder_input_ids")
    sources = Sequences(_mask(inputs.get("attention_mask"), input_ids))
    written = _mask(inputs.get("decoder_attention_mask"), decoder_input_ids)
    targets = Sequences(written | (_needed(inputs, "labels") != IGNORED_LABEL))
    implementation = model.encoder.config._attn_implementation
    options = sequence_options(SequencePair(sources, sources), implementation)
    # a mask of four dimensions is what transformers leaves as it is; flash attention wants none
    mask = sources.mask.new_ones(1, 1, 1, 1) if "sequence_pair" in options else None
    encoded = model.encoder(
        input_ids=sources.join(input_ids),
        attention_mask=mask,
        position_ids=sources.positions + model.config.position_offset,
        return_dict=True,
        **options,
    ).last_hidden_state
    decoded = model.decoder(
        input_ids=targets.join(decoder_input_ids), encoder_hidden_states=encoded, sequences=(targets, sources)
    ).last_hidden_state
    if extra is not None and extra.contrastive is not None:
        encoded, inputs = sources.split(encoded), {**inputs, "attention_mask": sources.mask.long()}
    return training_loss(model, targets.split(decoded), encoded, inputs, label_smoothing, extra)


def _mask(mask: Tensor | None, ids: Tensor) -> Tensor:
    return torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()


def _needed(inputs: Mapping[str, Tensor | None], name: str) -> Tensor:
    tensor = inputs.get(name)
    if tensor is None:
        raise ModelError(f"the training loss needs {name}", where=name)
    return tensor


def contrastive_loss(
    model: SwcmForConditionalGeneration, encoded: Tensor, inputs: Mapping[str, Tensor], config: ContrastiveConfig
) -> Tensor:
    """weight x target tokens of the pairs x mean InfoNCE between the encoder's readings of both sides.

    A row is a pair where source and target are in different languages. The encoder reads the target as it would a
    source, `<s> <language> text </s>`, and both sides are means over their tokens. The number of target tokens brings
    a loss of sentences to the scale of the loss of tokens, as the mean length does in mRASP2 (arXiv 2105.09501).
    Negatives are the other pairs of this batch in this process; both directions count (our choice).

    Args:
        encoded: `[B, S, H]`, of `inputs["input_ids"]`.
        inputs: `input_ids` and `attention_mask` `[B, S]`, `decoder_input_ids` and `labels` `[B, T]`.

    Returns:
        A scalar; 0, with a gradient of 0, where the batch has fewer than two pairs.
    """
    rows = translation_pairs(inputs["input_ids"], inputs["decoder_input_ids"], model.config.language_ids.values())
    if not len(rows):
        rows = rows.new_zeros(1)  # the encoder reads something in every process: sharded ones must go in step
    labels = inputs["labels"][rows]
    ids, mask = target_as_source(
        inputs["input_ids"][rows, :1], inputs["decoder_input_ids"][rows, :1], labels, model.config.pad_token_id
    )
    limit = donor_for(model.encoder.config).max_positions
    ids, mask = ids[:, :limit], mask[:, :limit]
    target = model.encoder(input_ids=ids, attention_mask=mask, return_dict=True).last_hidden_state
    source = mean_pooled(encoded[rows], inputs["attention_mask"][rows])
    tokens = (labels != IGNORED_LABEL).sum()
    return config.weight * tokens * info_nce(source, mean_pooled(target, mask), config.temperature)


def translation_pairs(input_ids: Tensor, decoder_input_ids: Tensor, languages: object) -> Tensor:
    """Indices `[P]` of the rows whose source and target begin with tokens of different languages.

    Args:
        input_ids: `[B, S]`, `<s> <language> ...`; decoder_input_ids: `[B, T]`, `<language> ...`; languages: ids.
    """
    known = torch.tensor(list(cast("list[int]", languages)), device=input_ids.device)
    if input_ids.shape[1] < 2:
        return input_ids.new_zeros(0)
    source, target = input_ids[:, 1], decoder_input_ids[:, 0]
    return (torch.isin(source, known) & torch.isin(target, known) & (source != target)).nonzero().squeeze(1)


def target_as_source(start: Tensor, language: Tensor, labels: Tensor, pad: int) -> tuple[Tensor, Tensor]:
    """Targets `text </s>` as the encoder reads texts, `<s> <language> text </s>`: ids and mask, each `[P, T + 2]`.

    Args:
        start, language: `[P, 1]`; labels: `[P, T]`, -100 behind the text; pad: id of the pad token.
    """
    text = labels != IGNORED_LABEL
    ids = torch.cat([start, language, labels.masked_fill(~text, pad)], dim=1)
    mask = torch.cat([torch.ones_like(start), torch.ones_like(language), text.to(start.dtype)], dim=1)
    return ids, mask
