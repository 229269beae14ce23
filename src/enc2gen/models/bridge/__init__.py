"""Bridges from a frozen encoder to a frozen large language model (arXiv 2508.09091 and relatives)."""

from transformers import AutoConfig, AutoModelForSeq2SeqLM

from enc2gen.models.bridge.configuration import BridgeConfig
from enc2gen.models.bridge.fusion import build_fusion
from enc2gen.models.bridge.mapper import build_mapper
from enc2gen.models.bridge.modeling import BridgeForConditionalGeneration
from enc2gen.models.bridge.processor import BridgeProcessor

AutoConfig.register(BridgeConfig.model_type, BridgeConfig, exist_ok=True)
AutoModelForSeq2SeqLM.register(BridgeConfig, BridgeForConditionalGeneration, exist_ok=True)

__all__ = ["BridgeConfig", "BridgeForConditionalGeneration", "BridgeProcessor", "build_fusion", "build_mapper"]
