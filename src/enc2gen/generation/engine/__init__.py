"""The decoding engine: what `Generator` decodes grown models with."""
