"""Operations on tensors: each in torch (the reference), Numba (CPUs) and Triton (GPUs)."""

from typing import Literal

from curkv.kernels import compile_cache

KernelsName = Literal["auto", "cpu", "triton", "reference"]
"""Backends by name, as `--kernels` takes them; what each can do is declared in `dispatch.py`."""

compile_cache.configure()
