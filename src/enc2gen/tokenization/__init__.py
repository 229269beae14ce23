"""Text to ids and back: language tokens, encoding, and vocabularies cut to the text in use."""
