"""Decoder-only language models that a bridge writes with."""
