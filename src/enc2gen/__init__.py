"""enc2gen: grow a text generator out of any pretrained multilingual encoder."""
