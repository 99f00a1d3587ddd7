"""The gated activation with GELU on a GPU: torch's two kernels, which a CUDA graph holds."""

from curkv.kernels.gelu_mul.reference import gelu_mul

__all__ = ["gelu_mul"]
