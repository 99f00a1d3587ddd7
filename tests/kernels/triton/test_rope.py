from __future__ import annotations

import pytest
import torch

from curkv.kernels.rope import reference, triton
from tests.kernels.util import rope_tables


@pytest.mark.parametrize(("tokens", "heads", "head_dim"), [(1, 1, 64), (5, 9, 64), (3, 3, 96), (2, 4, 256)])
def test_rotates_like_the_reference(close, tokens, heads, head_dim):
    qkv = torch.randn(tokens, 3 * heads, head_dim)
    positions = torch.tensor([4095, 0, 17, 17, 1], dtype=torch.int32)[:tokens]
    tables = rope_tables(head_dim)
    expected = qkv.clone()
    reference.rope(expected[:, heads : 2 * heads], *tables, positions)
    triton.rope(qkv[:, heads : 2 * heads], *tables, positions)
    close(qkv, expected)


def test_no_tokens():
    triton.rope(torch.empty(0, 2, 64), *rope_tables(64), torch.empty(0, dtype=torch.int32))


def test_bfloat16_queries(close):
    q = torch.randn(3, 4, 64).bfloat16()
    expected = q.clone()
    arguments = *rope_tables(64), torch.tensor([4, 0, 9], dtype=torch.int32)
    reference.rope(expected, *arguments)
    triton.rope(q, *arguments)
    close(q, expected, torch.bfloat16)
