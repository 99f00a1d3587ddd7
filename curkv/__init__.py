"""OpenAI-compatible inference server that keeps only the part of the KV cache that matters."""

__version__ = "0.1.0"
