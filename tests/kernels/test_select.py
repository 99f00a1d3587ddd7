from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curkv.kernels.select import cpu, reference

IMPLEMENTATIONS = [reference, cpu]


def int32(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def best(candidates, count):
    """Of (score, index, head) the `count` first by falling score, then index, then head."""
    return sorted(candidates, key=lambda c: (-c[0], c[1], c[2]))[: max(0, count)]


def oracle(scores, lengths, keep, floor=None) -> list[list[list[int]]]:
    kept = []
    for layer, layer_lengths in enumerate(lengths):
        heads = [[(scores[layer][h][i], i, h) for i in range(n)] for h, n in enumerate(layer_lengths)]
        if floor is None:
            chosen = [c for h, head in enumerate(heads) for c in best(head, keep[layer][h])]
        else:
            sure = [c for h, head in enumerate(heads) for c in best(head, floor[layer][h])]
            rest = [c for head in heads for c in head if c not in sure]
            chosen = sure + best(rest, sum(keep[layer]) - len(sure))
        kept.append([sorted(i for _, i, head in chosen if head == h) for h in range(len(heads))])
    return kept


def as_lists(indices: torch.Tensor, counts: torch.Tensor) -> list[list[list[int]]]:
    assert indices.dtype == counts.dtype == torch.int32
    assert indices.shape[2] >= int(counts.max())
    past = torch.arange(indices.shape[2]) >= counts[..., None]
    assert indices[past].eq(-1).all()
    return [
        [row[:n].tolist() for row, n in zip(*layer, strict=True)]
        for layer in zip(indices, counts.tolist(), strict=True)
    ]


@st.composite
def cases(draw):
    layers, heads, width = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 40))
    # Few different values: most cuts fall between equal scores.
    value = st.sampled_from([0.0, -0.0, 1.0, -1.5, 1e-38, 1e-45, float("inf"), 3e38, 0.5, 0.50000006])
    shape = layers, heads

    def grid(elements):
        row = st.lists(elements, min_size=shape[1], max_size=shape[1])
        return draw(st.lists(row, min_size=shape[0], max_size=shape[0]))

    lengths = grid(st.integers(0, width))
    keep = grid(st.integers(0, width + 3))
    scores = np.full((*shape, width), np.nan, dtype=np.float32)
    for layer, head in np.ndindex(shape):
        n = lengths[layer][head]
        scores[layer, head, :n] = draw(st.lists(value, min_size=n, max_size=n))
    floor = None
    if draw(st.booleans()):
        floor = [[draw(st.integers(0, k)) for k in row] for row in keep]
    return scores, lengths, keep, floor


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=200, deadline=None)
@given(case=cases())
def test_agrees_with_sorting_in_python(implementation, case):
    scores, lengths, keep, floor = case
    chosen = implementation.select(
        torch.from_numpy(scores), int32(lengths), int32(keep), None if floor is None else int32(floor)
    )
    assert as_lists(*chosen) == oracle(scores.tolist(), lengths, keep, floor)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 777), (30, 3, 1031), (2, 8, 5000)])
@pytest.mark.parametrize("adaptive", [False, True])
def test_implementations_agree_on_large_rows(shape, adaptive):
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(shape, generator=generator) ** 8
    scores[..., : shape[2] // 3] = scores[..., : shape[2] // 3].round(decimals=2)
    lengths = torch.randint(0, shape[2] + 1, shape[:2], generator=generator, dtype=torch.int32)
    scores.masked_fill_(torch.arange(shape[2]) >= lengths[..., None], -torch.inf)
    keep = torch.full(shape[:2], max(1, shape[2] // 4), dtype=torch.int32)
    floor = (keep * 0.2).int() if adaptive else None
    actual, expected = (x.select(scores, lengths, keep, floor) for x in (cpu, reference))
    assert as_lists(*actual) == as_lists(*expected)
    again = cpu.select(scores, lengths, keep, floor)
    assert torch.equal(actual[0], again[0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_ties_go_to_the_lower_position_and_then_to_the_lower_head(implementation):
    scores, lengths = torch.zeros(1, 3, 5), int32([[5, 5, 5]])
    indices, counts = implementation.select(scores, lengths, int32([[2, 0, 3]]))
    assert as_lists(indices, counts) == [[[0, 1], [], [0, 1, 2]]]
    indices, counts = implementation.select(scores, lengths, int32([[2, 2, 1]]), int32([[0, 0, 0]]))
    assert as_lists(indices, counts) == [[[0, 1], [0, 1], [0]]]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_floor_outranks_better_tokens_of_other_heads(implementation):
    scores = torch.tensor([[[9.0, 8, 7, 6], [1, 4, 2, 3]]])
    chosen = implementation.select(scores, int32([[4, 4]]), int32([[2, 2]]), int32([[1, 1]]))
    assert as_lists(*chosen) == [[[0, 1, 2], [1]]]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_stored(implementation):
    indices, counts = implementation.select(torch.empty(2, 3, 0), int32([[0] * 3] * 2), int32([[4] * 3] * 2))
    assert indices.shape == (2, 3, 0)
    assert counts.eq(0).all()
