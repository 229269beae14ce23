"""enc2gen: grow a text generator out of any pretrained multilingual encoder."""

from enc2gen.errors import Enc2genError
from enc2gen.generation.generator import DecodingConfig, Generator
from enc2gen.models.swcm import SwcmConfig, SwcmForConditionalGeneration
from enc2gen.tokenization.tokenizer import TextCodec

__version__ = "0.1.0"

__all__ = [
    "DecodingConfig",
    "Enc2genError",
    "Generator",
    "SwcmConfig",
    "SwcmForConditionalGeneration",
    "TextCodec",
    "__version__",
]
