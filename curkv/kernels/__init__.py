"""Cache operations on tensors: a torch reference and a Numba CPU kernel for each."""

from curkv.kernels import compile_cache

compile_cache.configure()
