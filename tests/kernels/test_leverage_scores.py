from __future__ import annotations

import itertools

import pytest
import torch

from curkv.kernels.leverage_scores import cpu, reference
from tests.kernels.util import UNMIXED, Pool, assert_close, fitting, make_pool

RAGGED = [[0, 1, 15], [16, 17, 100], [333, 64, 31]]


def rows(pool: Pool) -> tuple[torch.Tensor, torch.Tensor]:
    return pool.table[pool.slots.long()].flatten(0, 1), pool.lengths[pool.slots.long()].flatten()


def plain_scores(k_sq, v_sq, *, window, left, corrected):
    """The authors' formula for one head, written as it reads."""
    n = len(k_sq)
    first = n % window if left else 0
    edges = sorted({0, first, *range(first, n, window), n})
    shares = []
    for energy in (k_sq, v_sq):
        share = torch.empty(n, dtype=torch.float64)
        for start, end in itertools.pairwise(edges):
            total = energy[start:end].double().sum() * (window / (end - start) if corrected else 1)
            share[start:end] = energy[start:end].double() / total
        shares.append(share)
    product = shares[0] * shares[1]
    return (product / product.sum()).float()


@pytest.mark.parametrize("implementation", [reference, cpu])
@pytest.mark.parametrize("partial", ["corrected", "left", "right"])
@pytest.mark.parametrize("window", [16, 7])
def test_windowed_shares_are_those_of_the_formula(implementation, partial, window):
    pool = make_pool(RAGGED)
    table, lengths = rows(pool)
    scores = implementation.leverage_scores(pool.pages, table, lengths, window=window, partial=partial)
    assert scores.shape == (9, 333)
    for row, length in enumerate(lengths.tolist()):
        pages = table[row, : -(-length // 16)].long()
        side = (x[pages].flatten()[:length] for x in (pool.pages.k_sq, pool.pages.v_sq))
        expected = plain_scores(
            *side, window=window, left=partial == "left", corrected=partial == "corrected"
        )
        assert_close(scores[row, :length], expected, 1e-6)
        assert scores[row, length:].eq(-torch.inf).all()


@pytest.mark.parametrize("combine", ["product", "mean", "key", "value"])
@pytest.mark.parametrize("normalization", ["window", "head"])
@pytest.mark.parametrize("partial", ["corrected", "left", "right"])
@pytest.mark.parametrize("page_size", [16, 64])
def test_cpu_agrees_with_the_reference(combine, normalization, partial, page_size):
    pool = make_pool(RAGGED, page_size=page_size)
    settings = {"combine": combine, "normalization": normalization, "partial": partial}
    actual, expected = (x.leverage_scores(pool.pages, *rows(pool), **settings) for x in (cpu, reference))
    assert torch.equal(actual == -torch.inf, expected == -torch.inf)
    assert_close(actual.clamp_min(0), expected.clamp_min(0), 1e-6)


@pytest.mark.parametrize("kv_dtype", UNMIXED)
@pytest.mark.parametrize(
    ("head_dim", "rank", "page_size"), [(64, 20, 16), (96, 3, 32), (128, 21, 64), (256, 20, 128)]
)
def test_sketched_energies_agree_with_the_reference(kv_dtype, head_dim, rank, page_size):
    head_dim = fitting(head_dim, kv_dtype)
    pool = make_pool(RAGGED, head_dim=head_dim, page_size=page_size, kv_dtype=kv_dtype)
    sketch = torch.randn(head_dim, rank, generator=torch.Generator().manual_seed(1)) / rank**0.5
    settings = {"normalization": "head", "sketch": sketch}
    actual, expected = (x.leverage_scores(pool.pages, *rows(pool), **settings) for x in (cpu, reference))
    assert torch.equal(actual == -torch.inf, expected == -torch.inf)
    assert_close(actual.clamp_min(0), expected.clamp_min(0), 1e-5)


@pytest.mark.parametrize("implementation", [reference, cpu])
def test_zero_energies_score_zero_and_never_nan(implementation):
    pool = make_pool([[40, 16]])
    table, lengths = rows(pool)
    pool.pages.k_sq[table[0, 0].long()] = 0
    pool.pages.v_sq[table[1, 0].long()] = 0
    scores = implementation.leverage_scores(pool.pages, table, lengths)
    assert not scores.isnan().any()
    assert scores[0, :16].eq(0).all()
    assert scores[0, 16:].sum() == pytest.approx(1, abs=1e-5)
    assert scores[1, :16].eq(0).all()


@pytest.mark.parametrize("implementation", [reference, cpu])
def test_nothing_stored(implementation):
    pool = make_pool([[0, 0]])
    assert implementation.leverage_scores(pool.pages, *rows(pool)).shape == (2, 0)
