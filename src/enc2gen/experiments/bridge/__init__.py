"""Bridge experiments: recipes of `kind: bridge`, from frozen encoder and LLM to tables per language."""
