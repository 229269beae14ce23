"""Tiny random halves of real layouts, and bridges of them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MT5Config,
    MT5EncoderModel,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from conftest import tiny_encoder, tiny_tokenizer
from enc2gen.models.bridge import BridgeForConditionalGeneration

VOCABULARY = 120


def tiny_llm(kind: str = "llama", *, seed: int = 1, **changes: Any) -> PreTrainedModel:
    """A random language model whose logits differ clearly; its EOS (2) is its pad token too."""
    common: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 2}
    torch.manual_seed(seed)
    model: PreTrainedModel
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(**common, n_positions=96, n_embd=32, n_layer=2, n_head=4, **changes))
    elif kind == "opt":  # word embeddings narrower than hidden states, no argument for the last logits
        sizes = {"hidden_size": 32, "word_embed_proj_dim": 16, "num_hidden_layers": 2, "ffn_dim": 48}
        model = OPTForCausalLM(
            OPTConfig(**common, **sizes, num_attention_heads=4, max_position_embeddings=96, **changes)
        )
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        common |= {"num_key_value_heads": 2, "max_position_embeddings": 96, **changes}
        model = LlamaForCausalLM(LlamaConfig(**common, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.tie_weights()
    model.set_attn_implementation("eager")  # as load_llm does on the CPU
    return model.eval()


def tiny_mt5() -> PreTrainedModel:
    torch.manual_seed(3)
    sizes = {"d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 3, "num_heads": 4}
    model = MT5EncoderModel(MT5Config(vocab_size=VOCABULARY, **sizes, pad_token_id=1, eos_token_id=2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def llm_tokenizer() -> PreTrainedTokenizerFast:
    """In the manner of many LLMs: no pad token."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    return tokenizer


def tiny_bridge(
    encoder: PreTrainedModel | None = None, llm: PreTrainedModel | None = None, **options: Any
) -> BridgeForConditionalGeneration:
    """A bridge with everything that is trained off its initial value."""
    options = {
        "encoder_tokenizer": tiny_tokenizer(),
        "llm_tokenizer": llm_tokenizer(),
        "end_vector": "random",
    } | options
    model = BridgeForConditionalGeneration.from_parts(encoder or tiny_encoder(), llm or tiny_llm(), **options)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(7)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model
