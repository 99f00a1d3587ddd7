from __future__ import annotations

import pytest
import torch

from curkv.kernels.select import reference, triton
from tests.kernels.util import generator


def check(scores, lengths, keep, floor=None):
    """Assert the reference's choice, with NaN in everything past the lengths."""
    lengths, keep = (torch.tensor(x, dtype=torch.int32) for x in (lengths, keep))
    floor = None if floor is None else torch.tensor(floor, dtype=torch.int32)
    stored = torch.arange(scores.shape[-1]) < lengths[..., None]
    expected = reference.select(scores.masked_fill(~stored, -torch.inf), lengths, keep, floor)
    actual = triton.select(scores.masked_fill(~stored, torch.nan), lengths, keep, floor)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        assert torch.equal(a, e)


def scores_of(kind, *shape):
    draw = generator(3)
    if kind == "ties":
        return torch.randint(-2, 3, shape, generator=draw).float() / 4
    scores = torch.randn(shape, generator=draw)
    if kind == "protected":
        scores[..., :4] = torch.inf
        scores[..., 7] = -torch.inf
        scores[..., 8] = -0.0
        scores[..., 9] = 0.0
    return scores


@pytest.mark.parametrize("kind", ["random", "ties", "protected"])
def test_best_of_each_head(kind):
    check(scores_of(kind, 2, 3, 50), [[50, 0, 1], [17, 33, 16]], [[20, 5, 1], [17, 40, 0]])


@pytest.mark.parametrize("kind", ["random", "ties", "protected"])
def test_best_of_each_layer_with_floors(kind):
    scores, lengths = scores_of(kind, 2, 3, 50), [[50, 0, 12], [17, 33, 16]]
    check(scores, lengths, [[20, 5, 1], [10, 10, 10]], [[4, 1, 0], [2, 2, 2]])
    check(scores, lengths, [[0, 0, 0], [50, 50, 50]], [[0, 0, 0], [0, 0, 0]])


def test_rows_longer_than_a_block():
    check(scores_of("ties", 1, 2, 2500), [[2500, 2100]], [[2300, 100]])
    check(scores_of("ties", 1, 2, 2500), [[2500, 2100]], [[1300, 100]], [[50, 50]])


@pytest.mark.parametrize("kind", ["random", "ties"])
def test_rows_that_several_programs_count(kind):
    check(scores_of(kind, 1, 2, 9000), [[9000, 8300]], [[8500, 100]])
    check(scores_of(kind, 1, 2, 9000), [[9000, 8300]], [[5000, 100]], [[50, 50]])


def test_neighbouring_floats_are_told_apart():
    start = torch.tensor(0.1).view(torch.int32)
    check((start + torch.arange(40, dtype=torch.int32)).view(torch.float32)[None, None], [[40]], [[13]])


def test_minus_zero_ties_with_zero():
    check(torch.tensor([[[-1.0, -0.0, 0.0, -0.0, 0.0]]]), [[5]], [[1]])


def test_nothing_to_choose_from():
    indices, counts = triton.select(torch.empty(2, 0, 5), *torch.empty(2, 2, 0, dtype=torch.int32))
    assert indices.shape == (2, 0, 5)
    assert counts.shape == (2, 0)
