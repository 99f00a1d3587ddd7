from __future__ import annotations

import pytest
import torch

from curkv.kernels.rms_norm import reference, triton
from tests.kernels.util import DTYPES


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 64), (7, 576), (3, 1000)])
def test_normalises_like_the_reference(close, rows, size, dtype):
    x, residual = torch.randn(2, rows, 2 * size).to(dtype)[..., :size]
    weight = torch.randn(size).to(dtype)
    close(triton.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5), dtype)
    actual, expected = (m.rms_norm(x, weight, 1e-5, residual) for m in (triton, reference))
    close(actual[0], expected[0], dtype)
    assert torch.equal(actual[1], expected[1])


def test_heads_of_a_split_product_are_read_where_they_lie(close, monkeypatch):
    q = torch.randn(5, 9, 64)[:, 2:6]
    weight = torch.randn(64)
    monkeypatch.setattr(torch.Tensor, "reshape", lambda *_: pytest.fail("copied"))
    found = triton.rms_norm(q, weight, 1e-5)
    assert found.is_contiguous()
    close(found, reference.rms_norm(q, weight, 1e-5))
