"""XLM-SWCM (arXiv 2502.10852): an encoder-decoder whose decoder is woven from the encoder's own weights."""

from transformers import AutoConfig, AutoModelForSeq2SeqLM

from enc2gen.models.swcm.configuration import COPY_PARTS, LayerPlan, SwcmConfig, plan_layers
from enc2gen.models.swcm.modeling import SwcmForConditionalGeneration
from enc2gen.models.swcm.report import InitReport

AutoConfig.register(SwcmConfig.model_type, SwcmConfig, exist_ok=True)
AutoModelForSeq2SeqLM.register(SwcmConfig, SwcmForConditionalGeneration, exist_ok=True)

__all__ = ["COPY_PARTS", "InitReport", "LayerPlan", "SwcmConfig", "SwcmForConditionalGeneration", "plan_layers"]
