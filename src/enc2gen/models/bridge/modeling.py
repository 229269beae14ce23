"""The bridge as a transformers model: a language model writes what a multilingual encoder has understood.

Fusions: arXiv 2508.09091; the plain bridge: LangBridge, arXiv 2401.10695; two-layer mapper: MindMerger, arXiv
2405.17386; aligner: LayAlign, arXiv 2502.11405.

Shapes: B batch, S source length, T decoder positions, L fused layers, H encoder size, V the LLM's vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_outputs import Seq2SeqLMOutput

from enc2gen.encoders.reading import encoder_facts
from enc2gen.errors import ModelError
from enc2gen.models.bridge.aligner import LayerwiseAligner, build_aligner
from enc2gen.models.bridge.building import PartOptions, bare_halves, build_from_parts
from enc2gen.models.bridge.configuration import BridgeConfig
from enc2gen.models.bridge.fusion import build_fusion
from enc2gen.models.bridge.generating import decoder_start, ids_from_labels
from enc2gen.models.bridge.hidden_states import HiddenStates, HiddenStatesConfig
from enc2gen.models.bridge.llm_inputs import llm_inputs
from enc2gen.models.bridge.mapper import build_mapper
from enc2gen.models.bridge.options import checked_options
from enc2gen.models.bridge.processor import BridgeProcessor
from enc2gen.models.bridge.reader import BridgeEncoderOutput, BridgeReader, is_frozen
from enc2gen.models.bridge.storing import load_bridge, save_bridge
from enc2gen.models.bridge.writing import write, written_loss
from enc2gen.models.seeding import seeded
from enc2gen.models.token_loss import TokenLoss, mean_cross_entropy

HALVES = ("encoder", "llm")


class BridgeForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Encoder, fusion, mapper and LLM. Build one with `from_parts`, load one with `from_pretrained`.

    `input_ids` are the encoder's ids. `decoder_input_ids` are the LLM's: `[start, prompt..., target...]`, and the LLM
    reads `[BOS][prefix][end vector][prompt...][target...]`: the start's position holds the learned end vector. The
    source text never goes to the LLM unless a prompt holds it.

    Attributes:
        encoder, llm: the pretrained halves, transformers' own modules.
        states, fusion, mapper, end_vector, aligner: what connects them; `aligner` may be `None`.
        processor: both tokenizers; saved and loaded with the model where known.
    """

    config: BridgeConfig
    config_class = BridgeConfig
    base_model_prefix = "bridge"
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(
        self, config: BridgeConfig, encoder: PreTrainedModel | None = None, llm: PreTrainedModel | None = None
    ) -> None:
        super().__init__(config)
        self.encoder, self.llm = bare_halves(config, encoder, llm)
        facts, seed = encoder_facts(self.encoder), config.seed
        convention = checked_options(HiddenStatesConfig, config.hidden_states or {}, where="hidden_states")
        self.states = HiddenStates(convention, num_hidden_layers=facts.num_layers, hidden_size=facts.hidden_size)
        self.fusion = build_fusion(
            config.fusion,
            num_layers=self.states.num_layers,
            hidden_size=facts.hidden_size,
            seed=seed,
            **(config.fusion_options or {}),
        )
        # Word embeddings can be narrower than hidden states (OPT-350m).
        size = cast(nn.Embedding, self.llm.get_input_embeddings()).weight.shape[1]
        self.mapper = build_mapper(
            config.mapper, encoder_size=facts.hidden_size, llm_size=size, seed=seed, **(config.mapper_options or {})
        )
        with seeded(seed):
            self.end_vector = nn.Parameter(torch.randn(size) if config.end_vector == "random" else torch.zeros(size))
        self.aligner: LayerwiseAligner | None = None
        if config.aligner is not None:
            layers, width = facts.num_layers, facts.hidden_size
            self.aligner = build_aligner(config.aligner, num_layers=layers, encoder_size=width, llm=self.llm, seed=seed)
        self.processor: BridgeProcessor | None = None
        self._freeze()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: fusion, mapper and aligner start as their constructors leave them, the halves have own rules."""

    def _freeze(self) -> None:
        for half, frozen in ((self.encoder, self.config.freeze_encoder), (self.llm, self.config.freeze_llm)):
            half.requires_grad_(not frozen)

    @classmethod
    def from_parts(
        cls,
        encoder: str | os.PathLike[str] | PreTrainedModel,
        llm: str | os.PathLike[str] | PreTrainedModel,
        *,
        fusion: str = "last",
        fusion_options: Mapping[str, Any] | None = None,
        mapper: str = "linear",
        mapper_options: Mapping[str, Any] | None = None,
        hidden_states: Mapping[str, Any] | HiddenStatesConfig | None = None,
        aligner: Mapping[str, Any] | bool | None = None,
        end_vector: Literal["zeros", "random"] = "zeros",
        source_template: str = "{text}",
        prompt: str = "",
        prompt_with_source: bool = False,
        prefix_bos: bool = True,
        max_source_length: int | None = None,
        encoder_tokenizer: PreTrainedTokenizerBase | None = None,
        llm_tokenizer: PreTrainedTokenizerBase | None = None,
        encoder_dtype: str | torch.dtype | None = None,
        llm_dtype: str | torch.dtype | None = None,
        freeze_encoder: bool = True,
        freeze_llm: bool = True,
        seed: int = 0,
    ) -> BridgeForConditionalGeneration:
        """Connect an encoder with a language model.

        Args:
            encoder: Hub name, folder, `embedded:multilingual-e5-small`, or a loaded model, which is not copied.
            llm: Hub name, folder, GGUF file, `embedded:smollm2-135m-instruct`, or a loaded causal LM.
            fusion, fusion_options: `last`, `mean`, `global`, `transformer`, `layer_index` and their options.
            mapper, mapper_options: `linear`, `mlp`, `slots` and their options.
            hidden_states: fields of `HiddenStatesConfig`; by default the published convention, all layers but the
                embedding output, raw (arXiv 2508.09091).
            aligner: options of LayAlign's aligner, or True for the published ones (arXiv 2502.11405); `None`: none.
            end_vector: `zeros` (arXiv 2508.09091) or `random`, N(0, 1) (arXiv 2401.10695).
            source_template: what the encoder reads, for example `query: {text}` for E5 encoders.
            prompt: what the LLM reads after the prefix.
            prompt_with_source: allows `{source}` in the prompt; see `BridgeConfig` for what that does.
            prefix_bos: let the LLM read its BOS before the prefix, as all published bridges do.
            max_source_length: longest source in encoder tokens; by default what the encoder has positions for.
            encoder_tokenizer, llm_tokenizer: needed with loaded halves to have a `processor`.
            encoder_dtype, llm_dtype: precision of the halves, such as `bfloat16`; by default float32, and as stored.
            freeze_encoder, freeze_llm: whether the halves stay as they are.
            seed: of all random tensors.

        Returns:
            The model in evaluation mode, with `processor` where both tokenizers are known.

        Raises:
            ModelError: a half that cannot be loaded, lacks what a bridge needs, or does not fit its tokenizer.
            ConfigError: an option is unknown or has an impossible value.
            CheckpointError: a half's weights are damaged.
        """
        given = {name: value for name, value in locals().items() if name not in ("cls", "encoder", "llm")}
        return build_from_parts(cls, encoder, llm, PartOptions(**given))

    def get_encoder(self, modality: str | None = None) -> BridgeReader:
        """Encoder, fusion and mapper as one module: from source ids to the prefix."""
        return BridgeReader(self)

    def get_decoder(self) -> PreTrainedModel:
        """The LLM."""
        return self.llm

    def get_input_embeddings(self) -> nn.Module:
        """The LLM's word embeddings, `[V, D]`."""
        return self.llm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the LLM's word embeddings."""
        self.llm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The LLM's head."""
        return cast(nn.Module, self.llm.get_output_embeddings())

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the LLM's head."""
        self.llm.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in transformers, of the LLM."""
        return self.llm.resize_token_embeddings(*args, **kwargs)

    def train(self, mode: bool = True) -> BridgeForConditionalGeneration:
        """Training mode for what learns; a frozen half stays in evaluation mode (the published code's does not)."""
        super().train(mode)
        for half in (self.encoder, self.llm):
            if is_frozen(half):
                half.eval()
        return self

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of the parameters that do not learn."""
        return tuple(name for name, parameter in self.named_parameters() if not parameter.requires_grad)

    def count_trainable(self) -> dict[str, int]:
        """Parameters that learn, by part; parts without any are left out."""
        counts: dict[str, int] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                part = name.partition(".")[0]
                counts[part] = counts.get(part, 0) + parameter.numel()
        return counts

    def trained_state_dict(self) -> dict[str, Tensor]:
        """Weights and statistics of what connects the halves, and the halves' tensors that learn."""
        learning = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {
            name: tensor
            for name, tensor in self.state_dict().items()
            if name.partition(".")[0] not in HALVES or name in learning
        }

    def encode_raw(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """The encoder's hidden states, embedding output first: as many `[B, S, H]` as layers, and one more."""
        return self.get_encoder().encode_raw(input_ids, attention_mask)

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The layers that are fused, `[L, B, S, H]`, without gradients if the encoder is frozen.

        The argument `encoder_states` of `forward` and `generate`. Raises as `BridgeReader.encode_raw`.
        """
        reader = self.get_encoder()
        return reader.stack(reader.encode_raw(input_ids, attention_mask))

    def fit_states(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Measure the statistics of `hidden_states: {normalise: standardise}` on batches of (ids, mask)."""
        moved = ([part.to(self.encoder.device) for part in batch] for batch in batches)
        self.states.fit((self.states.select(self.encode_raw(ids, mask)), mask) for ids, mask in moved)

    @torch.no_grad()
    def layer_weights(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """How much of each layer the fusion takes, per token: `[B, S, L]`; rows sum to 1, or to 0 at padding."""
        mask = self.get_encoder().mask(input_ids, attention_mask)
        return self.fusion.weights(self.encode(input_ids, mask), mask)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        encoder_states: Tensor | None = None,
        aligner_states: Tensor | None = None,
        fused_states: Tensor | None = None,
        encoder_outputs: BridgeEncoderOutput | tuple[Tensor, ...] | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int = 0,
        label_smoothing: float | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **_: Any,
    ) -> Seq2SeqLMOutput | TokenLoss | tuple[Tensor, ...]:
        """Predict each target token from the source's prefix and the tokens before it.

        Args:
            input_ids: source in encoder ids, `[B, S]`.
            attention_mask: `[B, S]`; by default 1 on everything but the encoder's pad token.
            decoder_input_ids: `[B, T]`: start, prompt, target, in LLM ids. Made from `labels` where missing.
            decoder_attention_mask: `[B, T]`, padding on either side; with a cache, over all decoder positions so far.
            labels: `[B, T]`: what is written after each decoder position; -100 is ignored. EOS counts like any token.
            encoder_states: `[L, B, S, H]`, what `encode` returned, instead of running the encoder.
            aligner_states: `[layers, B, S, H]`, `encode_raw` without the last; needed with these by an aligner.
            fused_states: `[B, S, H]`, what the fusion returned, instead of running encoder and fusion.
            encoder_outputs: what `get_encoder()` returned, instead of all that.
            logits_to_keep: logits of this many last positions only (0: of all decoder positions).
            label_smoothing: where given, no logits are computed: only the loss of `labels`, with this smoothing.
            num_items_in_batch: divides the loss, instead of the targets here (accumulation in transformers' Trainer).

        Returns:
            `loss` (mean cross-entropy per target token, nats), `logits` `[B, T, V]`, cache, states of the LLM; or with
            `label_smoothing` the summed loss alone.

        Raises:
            ModelError: a source or target longer than there are positions for, none given, or shapes that do not fit.
            DataError: a source without a token.
        """
        read: Any = encoder_outputs
        if read is None:
            read = self.get_encoder()(input_ids, attention_mask, encoder_states, aligner_states, fused_states)
        elif isinstance(read, tuple):
            read = BridgeEncoderOutput(*read)
        if decoder_input_ids is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        if labels is not None and (logits_to_keep or labels.shape != decoder_input_ids.shape):
            raise ModelError(
                f"labels {tuple(labels.shape)} need the logits of all decoder positions "
                f"{tuple(decoder_input_ids.shape)}",
                where="labels",
            )
        cache: Any = past_key_values  # generate makes one of two parts, of which the LLM wants the first
        cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        inputs = llm_inputs(
            self.llm,
            read,
            decoder_input_ids,
            decoder_attention_mask,
            end_vector=self.end_vector,
            bos_token_id=self.config.bos_token_id if self.config.prefix_bos else None,
            past_length=0 if cache is None else int(cache.get_seq_length()),
        )
        if label_smoothing is not None:
            if labels is None:
                raise ModelError("label_smoothing needs labels", where="labels")
            return written_loss(self, inputs, read, labels, label_smoothing)
        written = write(
            self,
            inputs,
            read,
            logits_to_keep or inputs.written,
            past_key_values=cache,
            use_cache=use_cache if use_cache is not None else (labels is None and self.config.use_cache),
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        loss = None
        if labels is not None:
            loss = mean_cross_entropy(written.logits, labels, num_items_in_batch)
        output = Seq2SeqLMOutput(
            loss=loss,
            logits=written.logits,
            past_key_values=cast(Any, past_key_values)
            if past_key_values is not None
            else written.get("past_key_values"),
            decoder_hidden_states=written.get("hidden_states"),
            decoder_attentions=written.get("attentions"),
            encoder_last_hidden_state=read.last_hidden_state,
        )
        as_dict = return_dict if return_dict is not None else self.config.return_dict
        return output if as_dict else output.to_tuple()

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor | None) -> Tensor:
        """Shift `labels` `[B, T]` right behind the start; only for targets without a prompt."""
        return ids_from_labels(labels, self.config)

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`; see `generating.decoder_start` for prompts.

        Args:
            inputs: sources in encoder ids, `[B, S]`; or give `fused_states`, `encoder_states` or `encoder_outputs`.

        Returns:
            LLM ids `[B, T]`, beginning with start and prompt; or what `return_dict_in_generate` asks for.

        Raises:
            ModelError, DataError: as `forward`; decoder ids that are not padded on the left.
        """
        states = {name: kwargs.pop(name, None) for name in ("encoder_states", "aligner_states", "fused_states")}
        read = kwargs.get("encoder_outputs")
        if read is None:
            ids = inputs if inputs is not None else kwargs.get("input_ids")
            read = self.get_encoder()(input_ids=ids, attention_mask=kwargs.get("attention_mask"), **states)
        # A copy, because beam search repeats its rows in place.
        kwargs["encoder_outputs"] = BridgeEncoderOutput(**read)
        return cast(Any, super()).generate(inputs, *args, **decoder_start(self, kwargs))

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        *args: Any,
        parts: Literal["all", "trained"] = "all",
        **kwargs: Any,
    ) -> None:
        """As in transformers, with both tokenizers.

        Args:
            parts: `all`: the folder is complete. `trained`: without the weights of a half that is as it was loaded;
                `from_pretrained` then loads that half by its name (`config.encoder_name`, `config.llm_name`) again.

        Raises:
            ModelError: `trained`, but where a half came from is not known; low-rank updates that are not merged.
        """
        save_bridge(self, super().save_pretrained, save_directory, is_main_process, *args, parts=parts, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, with `processor` where the folder holds the tokenizers.

        Args:
            kwargs: also `encoder_name`, `llm_name`: where the halves are now, for a folder saved with
                `parts="trained"`. `dtype` is that of the halves; what was trained stays float32.

        Raises:
            CheckpointError: tensors are missing, or a half is not the one that the bridge was trained with.
            ModelError: a half or a tokenizer cannot be loaded.
        """
        return load_bridge(cls, super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)
