"""Rotary position embedding: the CPU kernel against the reference and against transformers."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from curkv.kernels.rope import cpu, reference
from tests.kernels.util import assert_close, rope_tables


@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim"), [(1, 9, 64), (7, 1, 72), (100, 3, 128), (17, 2, 8), (0, 1, 16)]
)
def test_matches_reference(tokens: int, heads: int, head_dim: int) -> None:
    cos, sin = rope_tables(head_dim)
    positions = torch.randint(0, 4096, (tokens,), dtype=torch.int32)
    wide = torch.randn(tokens, heads + 2, head_dim)
    actual, expected = wide.clone(), wide.clone()
    cpu.rope(actual[:, 1:-1], cos, sin, positions)
    reference.rope(expected[:, 1:-1], cos, sin, positions)
    assert_close(actual, expected, 1e-6)
    assert torch.equal(actual[:, [0, -1]], wide[:, [0, -1]]), "heads beside the slice were touched"


def test_follows_the_convention_of_transformers() -> None:
    cos, sin = rope_tables(64)
    q = torch.randn(5, 3, 64)
    positions = torch.tensor([0, 1, 2, 900, 4095], dtype=torch.int32)
    full_cos, full_sin = (torch.cat([table, table], dim=-1)[positions.long()][None] for table in (cos, sin))
    expected, _ = apply_rotary_pos_emb(q.transpose(0, 1)[None], q.transpose(0, 1)[None], full_cos, full_sin)
    cpu.rope(q, cos, sin, positions)
    assert_close(q, expected[0].transpose(0, 1), 1e-6)
