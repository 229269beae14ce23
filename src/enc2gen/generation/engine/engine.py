"""The decoding engine of a grown model: encoder, decoder and output layer packed for one precision."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from enc2gen.errors import ConfigError
from enc2gen.generation.decoding import DecodingConfig
from enc2gen.generation.engine.beam import BeamSearch, BeamSettings, Hypothesis
from enc2gen.generation.engine.cache import DecoderState
from enc2gen.generation.engine.candidates import Rule, at_least, no_repeated_ngram
from enc2gen.generation.engine.constrained import ConstrainedBeamSearch
from enc2gen.generation.engine.constraints import Requirements
from enc2gen.generation.engine.decoder import EngineDecoder
from enc2gen.generation.engine.diverse import DiverseBeamSearch
from enc2gen.generation.engine.drafting import DraftedGreedySearch
from enc2gen.generation.engine.head import OutputHead
from enc2gen.generation.engine.linear import PackedLinear, Precision, pack_module
from enc2gen.generation.engine.sampling import Sampler, SamplingSettings
from enc2gen.models.compilation import check_compiler
from enc2gen.models.swcm.modeling import SwcmForConditionalGeneration


class _PackedModule(nn.Module):
    """A packed product in the place of an `nn.Linear` of the encoder."""

    def __init__(self, linear: nn.Linear, precision: Precision) -> None:
        super().__init__()
        self._multiply: PackedLinear = pack_module(linear, precision)

    def forward(self, states: Tensor) -> Tensor:
        """`[..., I]` to `[..., O]`."""
        return self._multiply(states.flatten(0, -2)).unflatten(0, states.shape[:-1])


def _packed_encoder(encoder: PreTrainedModel, precision: Precision) -> PreTrainedModel:
    """An encoder in `precision`; the original stays as it is, and on a CPU all but the products is shared with it."""
    if next(encoder.parameters()).device.type != "cpu":
        if precision == "fp32":
            return encoder
        return cast(Any, copy.deepcopy(encoder)).to(torch.bfloat16 if precision == "bf16" else torch.float16)
    shared = {id(tensor): tensor for tensor in (*encoder.parameters(), *encoder.buffers())}
    packed = copy.deepcopy(encoder, memo=cast("dict[int, object]", shared))
    for module in list(packed.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, _PackedModule(child, precision))
    return packed


def chosen_precision(config: DecodingConfig, device: torch.device) -> Precision:
    """The precision that `config` means on `device`; `ConfigError` where there is no such arithmetic."""
    cpu = device.type == "cpu"
    if config.precision == "auto":
        return "fp32" if cpu else "bf16"
    if config.precision == ("fp16" if cpu else "int8"):
        raise ConfigError(
            f"{config.precision} is not for a {'CPU' if cpu else 'GPU'}",
            where="precision",
            remedy=f"use {'int8 or bf16' if cpu else 'bf16 or fp16'}",
        )
    return config.precision


def compiles(config: DecodingConfig, device: torch.device) -> bool:
    """Whether `config` asks for compiled layers; `ConfigError` where it does and `device` cannot."""
    if config.compile:
        if device.type == "cpu":
            raise ConfigError(
                "compiled decoding is for GPUs: on a CPU the products are oneDNN's, which cannot be compiled",
                where="compile",
                remedy="leave it out; precision int8 is the quickest on a CPU",
            )
        check_compiler(device, where="compile")
    return config.compile


class Engine:
    """Decodes with one model. Weights are packed when the engine is made: make another one after training on.

    Args:
        model: in evaluation mode, on its device.
        precision: of the matrix products.
        shortlist: sorted ids of the only tokens to be written; all by default.
        compiles: whether the decoder's layers are compiled; on GPUs only.
    """

    def __init__(
        self,
        model: SwcmForConditionalGeneration,
        precision: Precision,
        *,
        shortlist: Tensor | None = None,
        compiles: bool = False,
    ) -> None:
        self._precision = precision
        self._encoder = _packed_encoder(model.encoder, precision)
        self.decoder = EngineDecoder(model.decoder, precision, compiles=compiles)
        self.head = _head(model, precision, shortlist)

    def limited_to(self, shortlist: Tensor, model: SwcmForConditionalGeneration) -> Engine:
        """An engine of the same model that writes these tokens only; it shares all else with this one."""
        limited = copy.copy(self)
        limited.head = _head(model, self._precision, shortlist)
        return limited

    def read(self, ids: Tensor, mask: Tensor) -> DecoderState:
        """Run the encoder once over sources `[B, S]` and their mask."""
        encoded = self._encoder(input_ids=ids, attention_mask=mask, return_dict=True).last_hidden_state
        return self.decoder.start(encoded, mask)

    @torch.inference_mode()
    def search(self, ids: Tensor, mask: Tensor, starts: Tensor, settings: BeamSettings) -> list[list[Hypothesis]]:
        """Beam search; hypotheses of each source, the best first.

        Args:
            ids, mask: sources, `[B, S]`.
            starts: `[B]`, the token that each output starts from.
        """
        return BeamSearch(self.decoder, self.head, settings).run(self.read(ids, mask), starts)

    @torch.inference_mode()
    def sample(
        self, ids: Tensor, mask: Tensor, starts: Tensor, settings: SamplingSettings, seeds: Sequence[Sequence[int]]
    ) -> list[list[Hypothesis]]:
        """Greedy search or samples; arguments as in :meth:`search`, and the numbers that seed each source's samples."""
        return Sampler(self.decoder, self.head, settings).run(self.read(ids, mask), starts, seeds)

    @torch.inference_mode()
    def search_diverse(
        self, ids: Tensor, mask: Tensor, starts: Tensor, settings: BeamSettings, *, groups: int, penalty: float
    ) -> list[list[Hypothesis]]:
        """Beam search in groups that differ (:class:`DiverseBeamSearch`); arguments as in :meth:`search`."""
        search = DiverseBeamSearch(self.decoder, self.head, settings, groups=groups, penalty=penalty)
        return search.run(self.read(ids, mask), starts)

    @torch.inference_mode()
    def search_with(
        self,
        ids: Tensor,
        mask: Tensor,
        starts: Tensor,
        settings: BeamSettings,
        requirements: Sequence[Requirements],
    ) -> list[list[Hypothesis]]:
        """Beam search for outputs that contain the phrases required of each source (:class:`ConstrainedBeamSearch`)."""
        search = ConstrainedBeamSearch(self.decoder, self.head, settings)
        return search.run(self.read(ids, mask), starts, requirements)

    @torch.inference_mode()
    def draft(
        self,
        ids: Tensor,
        mask: Tensor,
        starts: Tensor,
        settings: SamplingSettings,
        sources: Sequence[Sequence[int]],
        *,
        draft_tokens: int,
    ) -> list[list[Hypothesis]]:
        """Greedy search that reads drafts (:class:`DraftedGreedySearch`); `sources` are the ids without padding."""
        search = DraftedGreedySearch(self.decoder, self.head, settings, draft_tokens=draft_tokens)
        return search.run(self.read(ids, mask), starts, sources)


def _head(model: SwcmForConditionalGeneration, precision: Precision, shortlist: Tensor | None) -> OutputHead:
    bias = None if model.lm_head.bias is None else model.lm_head.bias.detach()
    return OutputHead(model.lm_head.weight.detach(), bias, precision, shortlist=shortlist)


_UNKNOWN: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None,),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,),
    "sequence_bias": (None,),
}


def unsupported(model: PreTrainedModel, config: DecodingConfig) -> str | None:
    """Why the engine cannot decode with `model` as `config` says; None if it can."""
    if not isinstance(model, SwcmForConditionalGeneration):
        return f"{type(model).__name__} is decoded by transformers"
    if config.do_sample and config.num_beams > 1 and not config.mbr_samples:
        return "beams are not sampled"
    saved = model.generation_config
    for name, harmless in _UNKNOWN.items():
        if getattr(saved, name, None) not in harmless:
            return f"the model's generation_config sets {name}"
    return None if isinstance(saved.eos_token_id, int) else "the model's generation_config has no single end token"


def longest_output(model: SwcmForConditionalGeneration, config: DecodingConfig, positions: int) -> int:
    """Most tokens to write: of the configuration, else saved with the model, and never more than positions."""
    saved = model.generation_config
    wanted = config.max_new_tokens or saved.max_new_tokens or ((saved.max_length or 21) - 1)
    return min(int(wanted), positions - 1)


def rules_of(model: SwcmForConditionalGeneration, config: DecodingConfig) -> list[Rule]:
    """What `config`, or else the model's generation_config, forbids."""
    saved, rules = model.generation_config, []
    ngram = config.no_repeat_ngram_size or saved.no_repeat_ngram_size or 0
    least = config.min_new_tokens or saved.min_new_tokens or max(0, (saved.min_length or 0) - 1)
    if ngram:
        rules.append(no_repeated_ngram(ngram))
    if least:
        rules.append(at_least(least, cast(int, saved.eos_token_id)))
    return rules


def beam_settings(model: SwcmForConditionalGeneration, config: DecodingConfig, positions: int) -> BeamSettings:
    """Settings of a beam search."""
    return BeamSettings(
        num_beams=config.num_beams,
        max_new_tokens=longest_output(model, config, positions),
        end=cast(int, model.generation_config.eos_token_id),
        length_penalty=config.length_penalty,
        coverage_penalty=config.coverage_penalty,
        early_stopping=config.early_stopping,
        rules=rules_of(model, config),
    )


def sampling_settings(
    model: SwcmForConditionalGeneration,
    config: DecodingConfig,
    positions: int,
    *,
    samples: int = 1,
) -> SamplingSettings:
    """Settings of greedy search, or of `samples` samples."""
    return SamplingSettings(
        max_new_tokens=longest_output(model, config, positions),
        end=cast(int, model.generation_config.eos_token_id),
        samples=samples,
        temperature=config.temperature if config.samples else 0.0,
        top_p=config.top_p,
        epsilon=config.epsilon,
        rules=rules_of(model, config),
    )
