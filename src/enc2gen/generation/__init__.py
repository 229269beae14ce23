"""GENERATION: texts in, texts out."""
