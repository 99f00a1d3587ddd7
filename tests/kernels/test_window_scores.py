from __future__ import annotations

import pytest
import torch

from curkv.kernels.window_scores import cpu, reference
from tests.kernels.util import assert_close, make_pool, rows_of


@pytest.mark.parametrize("reduction", ["mean", "max"])
@pytest.mark.parametrize(
    ("lengths", "window", "group", "head_dim", "page_size", "kv_dtype"),
    [
        ([[1]], 1, 1, 64, 16, "float32"),
        ([[50, 0, 3], [64, 65, 17]], 8, 3, 64, 16, "float32"),
        ([[1200, 513]], 5, 2, 64, 64, "float32"),
        ([[40, 80]], 32, 4, 96, 32, "float16"),
        ([[70, 131]], 7, 8, 128, 128, "bfloat16"),
        ([[33]], 2, 16, 256, 64, "bfloat16"),
        ([[70, 131]], 7, 3, 64, 64, "int8"),
        ([[70, 131]], 7, 3, 64, 64, "int4"),
    ],
)
def test_scores_like_the_reference(lengths, window, group, head_dim, page_size, kv_dtype, reduction):
    pool = make_pool(lengths, head_dim=head_dim, page_size=page_size, kv_dtype=kv_dtype)
    table, counts = rows_of(pool)
    queries = torch.randn(len(counts), window, group, head_dim)
    arguments = queries, pool.pages, table, counts, head_dim**-0.5, reduction
    assert_close(cpu.window_scores(*arguments), reference.window_scores(*arguments), 3e-6)


def test_queries_read_no_newer_position_even_where_tokens_were_evicted():
    pool = make_pool([[20]])
    table, counts = rows_of(pool)
    place = table[0, 18 // 16].long(), 18 % 16
    pool.pages.position[place] = 18
    pool.pages.position[table[0, 1].long(), 3] = 40
    queries = torch.randn(1, 8, 2, 64)
    scores = cpu.window_scores(queries, pool.pages, table, counts, 0.125)
    assert_close(scores, reference.window_scores(queries, pool.pages, table, counts, 0.125), 3e-6)
    assert float(scores[0, :19].sum()) > 0.8, "only the last query may read the last token"


@pytest.mark.parametrize("reduction", ["mean", "max"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(
    ("dtype", "head_dim", "tolerance"),
    [(torch.float32, 64, 3e-6), (torch.bfloat16, 64, 1e-2), (torch.bfloat16, 72, 3e-6)],
)
def test_a_chunk_behind_the_row_reads_all_of_it(dtype, head_dim, tolerance, softcap, reduction):
    """Queries of bfloat16 are multiplied in that where the machine can and channels come by 16."""
    pool = make_pool([[300, 0, 20]], head_dim=head_dim)
    table, counts = rows_of(pool)
    queries, lse = torch.randn(3, 9, 3, head_dim).to(dtype), 3 + torch.rand(3, 9, 3)
    arguments = queries, pool.pages, table, counts, 0.125, reduction, lse, None, softcap
    assert_close(cpu.window_scores(*arguments), reference.window_scores(*arguments), tolerance)


def test_no_rows():
    pool = make_pool([[3]])
    none = torch.empty(0, dtype=torch.int32)
    scores = cpu.window_scores(torch.empty(0, 2, 1, 64), pool.pages, pool.table[:0, 0], none, 1.0)
    assert scores.shape == (0, 0)


@pytest.mark.parametrize(
    "masks", [{"softcap": 2.0}, {"sinks": torch.tensor([[1.0, -2.0], [20.0, 0.0]])}], ids=str
)
def test_caps_and_sinks(masks):
    pool = make_pool([[70, 20]])
    table, counts = rows_of(pool)
    arguments = torch.randn(2, 8, 2, 64), pool.pages, table, counts, 0.4
    assert_close(cpu.window_scores(*arguments, **masks), reference.window_scores(*arguments, **masks), 6e-6)
