"""Vocabulary surgery on whole models: trim, extend, add a language. Tables, heads and configurations stay in step."""

from enc2gen.models.surgery.languages import AddedLanguage, LanguageLoss, add_language, check_examples
from enc2gen.models.surgery.loading import load_for_surgery
from enc2gen.models.surgery.operations import VocabularyChange, extend_model, trim_model
from enc2gen.models.surgery.replacing import replace_vocabulary

__all__ = [
    "AddedLanguage",
    "LanguageLoss",
    "VocabularyChange",
    "add_language",
    "check_examples",
    "extend_model",
    "load_for_surgery",
    "replace_vocabulary",
    "trim_model",
]
