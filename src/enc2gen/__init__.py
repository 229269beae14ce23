"""enc2gen: grow a text generator out of any pretrained multilingual encoder."""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from enc2gen.errors import Enc2genError
    from enc2gen.generation.decoding import DecodingConfig
    from enc2gen.generation.generator import Generator
    from enc2gen.generation.glossary import Glossary
    from enc2gen.generation.shortlist import Shortlist
    from enc2gen.models.bridge import BridgeConfig, BridgeForConditionalGeneration, build_fusion
    from enc2gen.models.swcm import SwcmConfig, SwcmForConditionalGeneration
    from enc2gen.tokenization.tokenizer import TextCodec

__version__ = "0.1.0"

__all__ = [
    "BridgeConfig",
    "BridgeForConditionalGeneration",
    "DecodingConfig",
    "Enc2genError",
    "Generator",
    "Glossary",
    "Shortlist",
    "SwcmConfig",
    "SwcmForConditionalGeneration",
    "TextCodec",
    "__version__",
    "build_fusion",
]

_MODULES = {
    "BridgeConfig": "enc2gen.models.bridge",
    "BridgeForConditionalGeneration": "enc2gen.models.bridge",
    "DecodingConfig": "enc2gen.generation.decoding",
    "Enc2genError": "enc2gen.errors",
    "Generator": "enc2gen.generation.generator",
    "Glossary": "enc2gen.generation.glossary",
    "Shortlist": "enc2gen.generation.shortlist",
    "SwcmConfig": "enc2gen.models.swcm",
    "SwcmForConditionalGeneration": "enc2gen.models.swcm",
    "TextCodec": "enc2gen.tokenization.tokenizer",
    "build_fusion": "enc2gen.models.bridge",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'enc2gen' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


# Importing the package registers its models with transformers, which takes seconds and hundreds of megabytes. The
# command and its worker processes clean text and print help without them, and import what they need.
if "ENC2GEN_COMMAND" not in os.environ and os.path.basename(sys.argv[0] if sys.argv else "") != "enc2gen":
    importlib.import_module("enc2gen.models.swcm")
    importlib.import_module("enc2gen.models.bridge")
