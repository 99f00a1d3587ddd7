"""Llama-family models: configuration, checkpoints, tokenizers and the forward pass."""
