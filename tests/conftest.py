"""Fixtures that several test files share: tiny random encoders and a tiny tokenizer. No network, no downloads."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import Unigram
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaModel,
)

LETTERS = "abcdefghijklmnopqrstuvwxyzабвгдежзийклмнопрстуфхцчшщъыьэюяқңөұүіәғһ"


def tiny_encoder(
    kind: str = "xlm-roberta", *, layers: int = 4, vocabulary: int = 120, seed: int = 0
) -> PreTrainedModel:
    """A random encoder of a real layout, with every tensor (norms and biases too) off its default value."""
    common: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 40,
        "max_position_embeddings": 66,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    torch.manual_seed(seed)
    model: PreTrainedModel
    if kind == "bert":
        model = BertModel(BertConfig(**common), add_pooling_layer=False)
    else:
        model = XLMRobertaModel(XLMRobertaConfig(**common, type_vocab_size=1), add_pooling_layer=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.fixture
def make_encoder() -> Callable[..., PreTrainedModel]:
    """Factory of tiny random encoders."""
    return tiny_encoder


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A Unigram tokenizer in XLM-R's manner: <s> 0, <pad> 1, </s> 2, <unk> 3, one piece a letter, <mask> last."""
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "▁", *LETTERS, *(f"▁{letter}" for letter in LETTERS[:10]), "<mask>"]
    backend = Tokenizer(Unigram([(piece, -float(index % 7)) for index, piece in enumerate(pieces)], unk_id=3))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        cls_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        sep_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=64,
    )


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """The tiny tokenizer."""
    return tiny_tokenizer()


@pytest.fixture
def encoder_folder(tmp_path: Path) -> Path:
    """A saved tiny XLM-R with its tokenizer: what a user has on disk."""
    folder = tmp_path / "encoder"
    tiny_encoder().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
