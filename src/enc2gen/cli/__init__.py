"""COMMAND LINE: thin verbs over importable functions."""
