from __future__ import annotations

import pytest
import torch

from curkv.kernels.silu_mul import reference, triton
from tests.kernels.util import DTYPES


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(0, 5), (1, 1), (3, 1536), (2, 1025)])
def test_multiplies_like_the_reference(close, rows, size, dtype):
    gate_up = (8 * torch.randn(rows, 2 * size)).to(dtype)
    close(triton.silu_mul(gate_up), reference.silu_mul(gate_up), dtype)
