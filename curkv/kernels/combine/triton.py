"""What the experts of each token have made of it, added up on a GPU: torch's kernels."""

from curkv.kernels.combine.reference import combine

__all__ = ["combine"]
