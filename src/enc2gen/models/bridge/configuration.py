"""Configuration of bridge models: two pretrained halves and what connects them."""

from __future__ import annotations

from typing import Any, ClassVar, cast

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

SOURCE_FIELD = "{source}"
"""Where a prompt holds the source text."""


class BridgeConfig(PreTrainedConfig):
    """Everything needed to rebuild a bridge model; weights are stored beside it.

    Attributes:
        encoder_config, llm_config: configurations of the two halves, as transformers knows them.
        encoder_name, llm_name: where the halves came from: Hub name, folder or `embedded:` name.
        encoder_dtype, llm_dtype: precision the halves are held in; what is trained is float32.
        hidden_states: which encoder layers are fused and how they are normalised (`HiddenStatesConfig`).
        fusion, fusion_options: name and options of the fusion (`build_fusion`).
        mapper, mapper_options: name and options of the mapper (`build_mapper`).
        end_vector: start of the learned vector behind the prefix: `zeros` (arXiv 2508.09091, 2405.17386) or `random`,
            N(0, 1) (LangBridge, arXiv 2401.10695).
        aligner: options of the layer-wise aligner (LayAlign, arXiv 2502.11405), or `None`: no aligner.
        source_template: what the encoder reads; `{text}` stands for the text.
        prompt: what the LLM reads after the prefix; the source text in place of `{source}` where `prompt_with_source`.
        prompt_with_source: whether the LLM may be given the source text. In English-only training it then learns to
            ignore the encoder (arXiv 2502.11405, Table 6).
        prefix_bos: whether the LLM reads its BOS before the prefix; without effect for an LLM that has none.
        max_source_length: longest source in encoder tokens, special tokens included; `None`: what the encoder can read.
        freeze_encoder, freeze_llm: which halves are not trained.
        saved_parts: what the weights beside this file are: `all`, or `trained`: the halves are loaded by their names.
        encoder_fingerprint, llm_fingerprint: checksums of the halves' weights as they were loaded.
        encoder_pad_token_id: pads sources.
        pad_token_id, bos_token_id, eos_token_id: the LLM's. Its EOS pads where it has no pad token.
        decoder_start_token_id: stands where the learned end vector is; never embedded as a word.
        seed: of the parts that started from random weights.
        languages: always empty: a bridge needs no language tokens.
    """

    model_type = "enc2gen-bridge"
    sub_configs_defaults: ClassVar[dict[str, Any]] = {
        "encoder_config": SubConfigSpec(config_class=AutoConfig, model_type="xlm-roberta"),
        "llm_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    encoder_config: PreTrainedConfig | dict | None = None
    llm_config: PreTrainedConfig | dict | None = None
    encoder_name: str | None = None
    llm_name: str | None = None
    encoder_dtype: str = "float32"
    llm_dtype: str = "float32"
    hidden_states: dict[str, Any] | None = None
    fusion: str = "last"
    fusion_options: dict[str, Any] | None = None
    mapper: str = "linear"
    mapper_options: dict[str, Any] | None = None
    end_vector: str = "zeros"
    aligner: dict[str, Any] | None = None
    source_template: str = "{text}"
    prompt: str = ""
    prompt_with_source: bool = False
    prefix_bos: bool = True
    max_source_length: int | None = None
    freeze_encoder: bool = True
    freeze_llm: bool = True
    saved_parts: str = "all"
    encoder_fingerprint: str | None = None
    llm_fingerprint: str | None = None
    seed: int = 0
    languages: dict[str, int] | None = None
    is_encoder_decoder: bool = True
    tie_word_embeddings: bool = False
    use_cache: bool = True
    encoder_pad_token_id: int | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    decoder_start_token_id: int | None = None

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The encoder's configuration if only that is asked for, else the LLM's, which `generate` lays the cache by."""
        if encoder and not decoder:
            return cast(PreTrainedConfig, self.encoder_config)
        return cast(PreTrainedConfig, self.llm_config).get_text_config(decoder=True)
