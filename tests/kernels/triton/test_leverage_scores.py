from __future__ import annotations

import pytest
import torch

from curkv.kernels.leverage_scores import reference, triton
from tests.kernels.triton.test_window_scores import rows_of
from tests.kernels.util import make_pool


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"partial": "left", "combine": "key"},
        {"partial": "right", "combine": "value"},
        {"normalization": "head", "combine": "mean"},
        {"window": 5},
        {"window": 20, "partial": "left"},
    ],
)
def test_norms_score_like_the_reference(close, options):
    pool = make_pool([[50, 0, 1], [64, 65, 17]], page_size=32)
    arguments = pool.pages, *rows_of(pool)
    close(triton.leverage_scores(*arguments, **options), reference.leverage_scores(*arguments, **options))


def test_rows_longer_than_a_block(close):
    pool = make_pool([[2100, 10]], page_size=128)
    arguments = pool.pages, *rows_of(pool)
    close(triton.leverage_scores(*arguments), reference.leverage_scores(*arguments))


def test_zero_energies_score_zero():
    pool = make_pool([[40]])
    pool.pages.k_sq.zero_()
    scores = triton.leverage_scores(pool.pages, *rows_of(pool))
    assert torch.equal(scores, torch.zeros(1, 40))


@pytest.mark.parametrize(
    ("head_dim", "page_size", "kv_dtype", "rank"),
    [
        (64, 16, "float32", 20),
        (96, 64, "float16", 16),
        (128, 128, "bfloat16", 20),
        (256, 32, "bfloat16", 1),
        (64, 64, "fp8", 20),
        (64, 64, "int8", 20),
        (192, 64, "int4", 20),
    ],
)
def test_sketches_score_like_the_reference(close, head_dim, page_size, kv_dtype, rank):
    torch.manual_seed(0)
    pool = make_pool([[50, 0, 1], [64, 65, 17]], head_dim=head_dim, page_size=page_size, kv_dtype=kv_dtype)
    options = {"normalization": "head", "sketch": torch.randn(head_dim, rank) / rank**0.5}
    arguments = pool.pages, *rows_of(pool)
    scores, expected = (x.leverage_scores(*arguments, **options) for x in (triton, reference))
    close(scores, expected, "int4" if kv_dtype == "int4" else "float32")
