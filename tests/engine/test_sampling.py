"""Sampling: truncation, penalties, and randomness that depends on the request alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from curkv.engine.sampling import _adjust, _draw, choice_seed, sample, uniform
from curkv.engine.types import SamplingParams

NO_STOP: frozenset[int] = frozenset()


def sequence(seed: int = 0, prompt: tuple[int, ...] = (), output: tuple[int, ...] = (), **params: Any) -> Any:
    request = SimpleNamespace(sampling=SamplingParams(**params))
    return SimpleNamespace(request=request, seed=seed, prompt=list(prompt), output=list(output), matcher=None)


def draws(logits: list[float], count: int = 4000, **params: Any) -> torch.Tensor:
    rows = torch.tensor(logits).repeat(count, 1)
    tokens = sample(rows, [sequence(seed=i, **params) for i in range(count)], NO_STOP).token_ids
    return torch.bincount(torch.tensor(tokens), minlength=len(logits)) / count


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e-6, 1e-5])
def test_temperature_zero_or_next_to_it_takes_the_likeliest(temperature: float) -> None:
    logits = torch.tensor([[0.0, 30.0, 29.0]])
    assert sample(logits, [sequence(temperature=temperature)], NO_STOP).token_ids == [1]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_softmax(temperature: float) -> None:
    logits = [0.0, 1.0, 2.0, -1.0]
    expected = torch.softmax(torch.tensor(logits) / temperature, -1)
    assert torch.allclose(draws(logits, temperature=temperature), expected, atol=0.03)


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        ({"top_k": 2}, {1, 2}),
        ({"top_p": 0.6}, {2}),
        ({"top_p": 0.7}, {1, 2}),
        ({"min_p": 0.3}, {1, 2}),
        ({"top_k": 3, "top_p": 0.1}, {2}),
    ],
)
def test_truncation_leaves_out_what_it_should(params: dict[str, Any], allowed: set[int]) -> None:
    # probabilities 0.087, 0.237, 0.644, 0.032
    frequencies = draws([0.0, 1.0, 2.0, -1.0], **params)
    assert set(frequencies.nonzero().flatten().tolist()) == allowed


def test_a_draw_depends_on_seed_and_place_and_not_on_the_batch() -> None:
    logits = torch.randn(3, 50)
    group = [sequence(seed=s, output=(0,) * s) for s in (1, 2, 3)]
    together = sample(logits.clone(), group, NO_STOP).token_ids
    alone = [
        sample(row[None].clone(), [s], NO_STOP).token_ids[0] for row, s in zip(logits, group, strict=True)
    ]
    assert together == alone


def test_uniform_numbers_look_uniform_and_unrelated() -> None:
    grid = uniform([s for s in range(100) for _ in range(100)], list(range(100)) * 100).reshape(100, 100)
    assert 0 <= grid.min() < 0.001 and 0.999 < grid.max() < 1
    assert abs(grid.mean() - 0.5) < 0.01
    assert abs((grid[:-1] * grid[1:]).mean() - 0.25) < 0.01
    assert len({choice_seed(7, i) for i in range(100)}) == 100


def test_penalties_push_down_what_was_said() -> None:
    logits = torch.tensor([[2.0, 1.9, -1.0, 0.0]])
    assert sample(
        logits.clone(), [sequence(temperature=0.0, output=(0,), presence_penalty=0.2)], NO_STOP
    ).token_ids == [1]
    assert sample(
        logits.clone(), [sequence(temperature=0.0, output=(0, 0), frequency_penalty=0.1)], NO_STOP
    ).token_ids == [1]
    assert sample(
        logits.clone(), [sequence(temperature=0.0, prompt=(0,), repetition_penalty=1.1)], NO_STOP
    ).token_ids == [1]
    assert sample(logits.clone(), [sequence(temperature=0.0, logit_bias={3: 5.0})], NO_STOP).token_ids == [3]


def test_min_tokens_holds_back_every_kind_of_stop() -> None:
    held = sequence(temperature=0.0, min_tokens=1, stop_token_ids=(1,))
    assert sample(torch.tensor([[3.0, 2.0, 1.0]]), [held], frozenset({0})).token_ids == [2]
    free = sequence(temperature=0.0, min_tokens=1, output=(2,))
    assert sample(torch.tensor([[3.0, 2.0, 1.0]]), [free], frozenset({0})).token_ids == [0]


def test_only_allowed_tokens_are_chosen() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    assert sample(logits, [sequence(temperature=0, allowed_token_ids=(0, 1))], NO_STOP).token_ids == [1]


def test_bad_words_are_not_finished() -> None:
    row = torch.tensor([0.0, 1.0, 2.0, 3.0])
    for output, chosen in (((), 2), ((1,), 2), ((2,), 1), ((0, 2), 1), ((2, 0), 2)):
        words = ((3,), (2, 2))
        group = [sequence(output=output, temperature=0, bad_words=words)]
        assert sample(row[None].clone(), group, NO_STOP).token_ids == [chosen]


def test_logprobs_are_those_of_the_model_before_any_change() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    expected = torch.log_softmax(logits[0], -1)
    (entry,) = sample(
        logits.clone(), [sequence(temperature=0.0, logprobs=2, logit_bias={0: 9.0})], NO_STOP
    ).logprobs
    assert entry is not None and entry.token_id == 0
    assert entry.logprob == pytest.approx(expected[0].item())
    assert [i for i, _ in entry.top] == [2, 1]


def test_all_that_is_as_wide_as_the_vocabulary_stays_on_the_device_of_the_logits() -> None:
    """Meta tensors have no data and mix with no other device's."""
    chosen = {"top_k": 5, "top_p": 0.9, "min_p": 0.1, "temperature": 0.7, "min_tokens": 9}
    penalties = {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.5}
    one = sequence(prompt=(1, 2), output=(2, 5), logit_bias={3: 1.0}, **chosen, **penalties)
    logits = torch.empty(2, 50, device="meta")
    for row in logits:
        _adjust(row, one, frozenset({4}))
    assert _draw(logits, [one, one]).device.type == "meta"
