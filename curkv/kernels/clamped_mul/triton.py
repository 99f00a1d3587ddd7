"""The clamped gated activation on a GPU: torch's kernels."""

from curkv.kernels.clamped_mul.reference import clamped_mul

__all__ = ["clamped_mul"]
