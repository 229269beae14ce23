"""enc2gen: grow a text generator out of any pretrained multilingual encoder."""

from enc2gen.errors import Enc2genError
from enc2gen.models.swcm import SwcmConfig, SwcmForConditionalGeneration

__version__ = "0.1.0"

__all__ = ["Enc2genError", "SwcmConfig", "SwcmForConditionalGeneration", "__version__"]
