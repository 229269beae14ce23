"""DONORS: pretrained encoders, and what a decoder may take from them."""
