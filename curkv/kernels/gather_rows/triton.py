"""Picking rows on a GPU: torch's indexing is one kernel and needs no other."""

from curkv.kernels.gather_rows.reference import gather_rows

__all__ = ["gather_rows"]
