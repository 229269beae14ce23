"""What a bridge's LLM makes of its input: logits, or the loss of labels without logits.

Shapes: B batch, T decoder positions, D the LLM's hidden size, V its vocabulary.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from enc2gen.models.bridge.llm_inputs import LlmInputs, accepts, contiguous_head_input
from enc2gen.models.bridge.reader import BridgeEncoderOutput
from enc2gen.models.linear_cross_entropy import linear_cross_entropy, without_projection
from enc2gen.models.token_loss import TokenLoss, cross_entropy

if TYPE_CHECKING:
    from enc2gen.models.bridge.modeling import BridgeForConditionalGeneration

_plain_heads: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def write(
    model: BridgeForConditionalGeneration, inputs: LlmInputs, read: BridgeEncoderOutput, keep: int, **options: Any
) -> Any:
    """The LLM's output, with the logits of the last `keep` positions only: the head is the costliest layer."""
    llm = model.llm
    sliced = accepts(llm, "logits_to_keep")
    arguments = inputs.arguments(llm) | ({"logits_to_keep": keep} if sliced else {})
    with ExitStack() as stack:
        stack.enter_context(contiguous_head_input(llm))
        if model.aligner is not None:
            keys_values, mask = cast(Tensor, read.aligner_keys_values), cast(Tensor, read.source_mask)
            stack.enter_context(model.aligner.reading(llm, keys_values, mask))
        output = llm(**arguments, **options, return_dict=True)
    if not sliced:
        output.logits = output.logits[:, -keep:]
    return output


def written_loss(
    model: BridgeForConditionalGeneration,
    inputs: LlmInputs,
    read: BridgeEncoderOutput,
    labels: Tensor,
    label_smoothing: float,
) -> TokenLoss:
    """Summed loss of `labels` `[B, T]`, without logits where the LLM's last step is a linear head."""
    head = model.llm.get_output_embeddings()
    if not has_plain_head(model.llm):
        logits = write(model, inputs, read, inputs.written, use_cache=False).logits
        return cross_entropy(logits, labels.to(logits.device), label_smoothing)
    with without_projection(cast(nn.Module, head)):
        states = write(model, inputs, read, inputs.written, use_cache=False).logits
    linear = cast(nn.Linear, head)
    return linear_cross_entropy(states, linear.weight, linear.bias, labels, label_smoothing=label_smoothing)


def has_plain_head(llm: PreTrainedModel) -> bool:
    """Whether the LLM's logits are its head's output as it is.

    Some LLMs scale or cap them, and low-rank updates add to them. Found out by one call of the LLM, once.
    """
    head = llm.get_output_embeddings()
    if type(head) is not nn.Linear:  # low-rank updates come and go: not kept
        return False
    if llm not in _plain_heads:
        _plain_heads[llm] = _logits_are_head_output(llm, head)
    return _plain_heads[llm]


@torch.no_grad()
def _logits_are_head_output(llm: PreTrainedModel, head: nn.Linear) -> bool:
    was_training = llm.training
    llm.eval()
    embeds = cast(nn.Embedding, llm.get_input_embeddings()).weight[:2].unsqueeze(0)
    with torch.autocast(embeds.device.type, enabled=False):
        logits = llm(inputs_embeds=embeds, use_cache=False, return_dict=True).logits
        with without_projection(head):
            states = llm(inputs_embeds=embeds, use_cache=False, return_dict=True).logits
        fits = states.shape[-1] == head.in_features
        plain = fits and torch.equal(head(states.to(head.weight.dtype)).to(logits.dtype), logits)
    llm.train(was_training)
    return plain
