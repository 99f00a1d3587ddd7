"""Which experts each token runs through on a GPU: torch's kernels."""

from curkv.kernels.route.reference import route

__all__ = ["route"]
