"""Corpora: languages and scripts, language identification, readers, and the text inside installed
packages."""
