"""Configuration of XLM-SWCM models, and the plan that says where each decoder layer comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.configuration_utils import SubConfigSpec

from enc2gen.encoders.donor import NormOrder
from enc2gen.errors import ConfigError

COPY_PARTS = ("embeddings", "self_attention", "cross_attention", "ffn", "norms")
"""Parts a decoder can take from its encoder; every subset is an ablation."""

CopyPart = Literal["embeddings", "self_attention", "cross_attention", "ffn", "norms"]
LayerKind = Literal["custom", "normal"]
Growth = Literal["swcm", "deltalm", "standard"]
FreshOutput = Literal["random", "zero"]
TopNorm = Literal["copied", "unit"]


@dataclass(frozen=True)
class LayerPlan:
    """One decoder layer: its kind and the encoder layers it grows from.

    Attributes:
        kind: `custom` (self-attention, FFN, cross-attention, FFN) or `normal` (self-attention, cross-attention, FFN).
        first: donor layer of self-attention and the first FFN; `None` for random layers.
        second: donor layer of cross-attention and the second FFN; equal to `first` in XLM-SWCM.
        rope_theta: base of self-attention's rotary positions; `None`: no rotation. As the donor layer's.
        sliding_window: tokens that self-attention sees, the current one included; `None`: all before it.
        input_norm: whether self-attention has a norm of its own (ModernBERT's first layer has none).
    """

    kind: LayerKind
    first: int | None = None
    second: int | None = None
    rope_theta: float | None = None
    sliding_window: int | None = None
    input_norm: bool = True


def plan_layers(
    donor_layers: Sequence[int],
    *,
    growth: Growth = "swcm",
    insert_every: int | None = 3,
    normal_after_last: bool = True,
    normal_layers: Literal["random", "duplicate"] = "random",
) -> list[LayerPlan]:
    """Decide the decoder's layers, bottom to top.

    Args:
        donor_layers: encoder layers that donate, bottom to top (n of them).
        growth: `swcm`: one custom layer per donor layer (arXiv 2502.10852, section 3). `deltalm`: one custom layer per
            pair of donor layers, self-attention and first FFN from the lower (odd, counted from 1) and
            cross-attention and second FFN from the upper (even) one (arXiv 2106.13736, section 2.2).
            `standard`: one random normal layer per donor layer (the paper's Cino-Transformer).
        insert_every: X, a normal layer after every X custom layers (3 in the paper); `None` for none (BASE-A).
        normal_after_last: whether the last group of exactly X custom layers is followed by a normal layer as well.
            True is the paper's n + floor(n / X), 16 layers for n=12, X=3; False is the released checkpoint's 15.
        normal_layers: `random` (the paper), or `duplicate`: the preceding custom layer once more (BASE-B).

    Raises:
        ConfigError: no donor layer, X < 1, or an odd number of donors for `deltalm`.
    """
    if not donor_layers:
        raise ConfigError("a decoder needs at least one donor layer", where="donor_layers")
    if insert_every is not None and insert_every < 1:
        raise ConfigError(
            f"insert_every={insert_every} is not a positive number", where="insert_every", remedy="use 1..n, or none"
        )
    if growth == "standard":
        return [LayerPlan("normal") for _ in donor_layers]
    if growth == "deltalm":
        if len(donor_layers) % 2:
            raise ConfigError(
                f"growth 'deltalm' pairs donor layers, but there are {len(donor_layers)}",
                where="donor_layers",
                remedy="choose an even number of donor layers",
            )
        custom = [LayerPlan("custom", a, b) for a, b in zip(donor_layers[::2], donor_layers[1::2], strict=True)]
    else:
        custom = [LayerPlan("custom", layer, layer) for layer in donor_layers]
    plan: list[LayerPlan] = []
    for count, layer in enumerate(custom, start=1):
        plan.append(layer)
        complete = insert_every is not None and count % insert_every == 0
        if complete and (normal_after_last or count < len(custom)):
            plan.append(LayerPlan("normal") if normal_layers == "random" else layer)
    return plan


class GrowthOptions(BaseModel):
    """Arguments of `SwcmForConditionalGeneration.from_encoder`, where each is described."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    insert_every: int | None
    normal_after_last: bool
    normal_layers: Literal["random", "duplicate"]
    growth: Growth
    copy_parts: tuple[CopyPart, ...] = Field(alias="copy")
    sharing: Literal["copy", "tied"]
    tie_lm_head: bool
    encoder_layers: list[int] | None
    donor_layers: list[int] | None
    norm_order: NormOrder | None
    random_encoder: bool
    fresh_output: FreshOutput
    top_norm: TopNorm
    qk_norm: bool
    languages: list[str]
    tokenizer: PreTrainedTokenizerBase | None
    dropout: float | None = Field(ge=0, lt=1)
    seed: int
    verbose: bool


def growth_options(given: Mapping[str, Any]) -> GrowthOptions:
    """Check the arguments of `from_encoder`.

    Raises:
        ConfigError: arguments are unknown or have impossible values; all are listed.
    """
    lists = {"copy": tuple, "encoder_layers": list, "donor_layers": list, "languages": list}
    values = {
        name: lists[name](value)
        if name in lists and isinstance(value, Sequence | range) and value is not None
        else value
        for name, value in given.items()
    }
    try:
        return GrowthOptions(**values)
    except ValidationError as error:
        problems = [
            f"{'.'.join(str(part) for part in problem['loc'])}={problem['input']!r}: {problem['msg']}"
            for problem in error.errors()
        ]
        raise ConfigError(
            "; ".join(problems), where="from_encoder", remedy="docs/model.md lists the switches"
        ) from error


class SwcmConfig(PreTrainedConfig):
    """Everything needed to rebuild an XLM-SWCM model (arXiv 2502.10852); weights are stored beside it.

    Attributes:
        encoder_config: configuration of the encoder, as transformers knows it.
        layer_plan: the decoder's layers, bottom to top (`LayerPlan` as dictionaries).
        sharing: `copy`: custom layers start as copies (the paper). `tied`: they *are* the encoder's parameters.
        norm_order: place of the norms in the decoder, `post` or `pre`; copied weights keep the donor's.
        norm_type, norm_bias, layer_norm_eps: the norms: `layer` or `rms`, with a bias or not, and their epsilon.
        num_key_value_heads: heads of keys and values; `None`: `num_attention_heads`.
        head_dim: size of a head; `None`: `hidden_size / num_attention_heads`.
        qk_norm: whether each head's queries and keys are RMS-normed before they meet.
        attention_bias, ffn_bias: whether the projections have biases.
        ffn_type: `plain` (two matrices) or `gated` (three).
        embed_norm: whether the sum of embeddings is normed.
        learned_positions: whether the decoder has a position table; rotary positions are in `layer_plan`.
        position_offset: row of the position table that the first decoder token reads.
        tie_lm_head: whether output projection and word embeddings are one parameter.
        copied_parts: which of `COPY_PARTS` were taken from the encoder.
        languages: language tag -> id of its token.
        default_source_language: tag assumed for sources when none is given.
        default_target_language: tag written when none is given.
    """

    model_type = "enc2gen-swcm"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "encoder_config": SubConfigSpec(config_class=AutoConfig, model_type="xlm-roberta")
    }
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    encoder_config: PreTrainedConfig | dict | None = None
    layer_plan: list[dict] | None = None
    sharing: str = "copy"
    norm_order: str = "post"
    norm_type: str = "layer"
    norm_bias: bool = True
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    qk_norm: bool = False
    attention_bias: bool = True
    ffn_type: str = "plain"
    ffn_bias: bool = True
    embed_norm: bool = True
    learned_positions: bool = True
    position_offset: int = 0
    tie_lm_head: bool = True
    copied_parts: list[str] | None = None
    languages: dict[str, int] | None = None
    default_source_language: str | None = None
    default_target_language: str | None = None
    vocab_size: int = 0
    hidden_size: int = 0
    intermediate_size: int = 0
    num_hidden_layers: int = 0
    num_attention_heads: int = 1
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 0
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    is_encoder_decoder: bool = True
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    @property
    def plan(self) -> list[LayerPlan]:
        """`layer_plan` as `LayerPlan` objects."""
        return [LayerPlan(**entry) for entry in self.layer_plan or []]

    @property
    def language_ids(self) -> dict[str, int]:
        """Language tag -> id of its token; empty where there are none."""
        return dict(self.languages or {})

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The encoder's configuration if only that is asked for, else this one.

        transformers' own version strips name prefixes of flat encoder-decoder configurations, which this is not.
        """
        return cast(PreTrainedConfig, self.encoder_config) if encoder and not decoder else self

    def set_plan(self, plan: Sequence[LayerPlan]) -> None:
        """Store `plan` and the decoder depth that follows from it."""
        self.layer_plan = [asdict(layer) for layer in plan]
        self.num_hidden_layers = len(plan)
