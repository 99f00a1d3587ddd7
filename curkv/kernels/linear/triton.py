"""Linear layers on a GPU: the vendor's matrix product is the fastest one, there is nothing to write."""

from curkv.kernels.linear.reference import pack_linear, pack_linear_int4, pack_linear_int8

__all__ = ["pack_linear", "pack_linear_int4", "pack_linear_int8"]
