"""Every policy works at any length: a prompt of one token is evicted from, generates and is explained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import reduce
from operator import or_
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from curkv.cache.attention import PagedAttention
from curkv.cache.batch import Batch
from curkv.cache.catalogue import catalogue
from curkv.cache.declarations import Choice, options_of
from curkv.cache.eviction import Eviction, evict, protected, select
from curkv.cache.explain import NEEDS, explain
from curkv.cache.integrity import check_integrity
from curkv.cache.layout import full_attention
from curkv.cache.options import EvictionOptions, OptionError
from curkv.cache.parsing import parse_options
from curkv.cache.plan import EvictionPlan, resolve
from curkv.cache.policies import get_policy, policy_names
from curkv.cache.presets import PRESETS
from curkv.kernels.dispatch import get_kernels
from tests.cache.util import make_cache

LAYERS, HEADS, GROUP, DIM = 2, 2, 2, 8
EVICTING = [n for n in policy_names() if n != "full" and not get_policy(n).needs.repetition]
FACTORS = [name for name in EVICTING if get_policy(name).factor]


class Sequence:
    """One sequence in a cache of its own, driven as the engine drives it, with random vectors.

    What holds no token is NaN, so that nothing can be read that is not there.
    """

    def __init__(self, plan: EvictionPlan, candidates: tuple[EvictionPlan, ...] = ()) -> None:
        self.plan = plan
        self.kv = make_cache(
            num_pages=256, layers=full_attention(LAYERS, HEADS), head_dim=DIM, max_tokens=128
        )
        self.kv.kernels = get_kernels("reference")
        angles = torch.arange(128)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.01])
        weights = torch.randn(LAYERS, HEADS * GROUP, DIM, 16, generator=torch.Generator().manual_seed(1))
        self.attention = PagedAttention(
            self.kv, [(angles.cos(), angles.sin())] * len(self.kv.layout.layers), weights.__getitem__
        )
        needs = [NEEDS, *(candidate.needs for candidate in candidates)] if candidates else []
        self.slot = self.kv.add_sequence(reduce(or_, needs, plan.observed))
        self.generator = torch.Generator().manual_seed(0)
        self.computed = self.evictions = 0

    @property
    def held(self) -> float:
        """Tokens that a head holds, on average."""
        return self.kv.sequence_tokens(self.slot) / self.kv.layout.num_heads

    @property
    def unreserved(self) -> bool:
        """Whether, as in kvpress, layers of a pyramid may get fewer tokens than are protected."""
        allocation = self.plan.policy.allocation
        return allocation.name == "pyramid" and allocation.preset.like_kvpress

    def assert_held(self, budget: float) -> None:
        """The budget is met, or, if the slope turned since the last eviction, not exceeded."""
        if self.unreserved and self.evictions > 1:
            assert 0 < self.held <= budget
        else:
            assert self.held == pytest.approx(budget)

    def feed(self, count: int) -> None:
        """Compute the next tokens."""
        self.kv.extend([self.slot], [count])
        batch = Batch.build([self.slot], [[0] * count], [self.computed], observed=self.kv.observed)
        for layer in range(LAYERS):
            shapes = (HEADS * GROUP, HEADS, HEADS)
            q, k, v = (torch.randn(count, heads, DIM, generator=self.generator) for heads in shapes)
            self.attention.attend(layer, q, k, v, batch)
        self.attention.see_steps(batch.stepped, batch.seen)
        self.computed += count

    def evict(self, phase: Any) -> None:
        """Evict as the plan says, and see that all that has to be kept is."""
        view = self.attention.view(self.slot, self.plan.seed, phase, self.evictions)
        budget = self.plan.budget_tokens if phase == "prefill" else self.plan.decode_budget_tokens
        scored = self.plan.policy.judge(replace(view, budget=budget), self.kv.kernels)
        assert not scored.scores.isnan().any()
        indices, counts = select(view, self.plan, self.kv.kernels)
        always = protected(view, self.plan)
        kept = torch.zeros(*always.shape[:2], view.width + 1, dtype=torch.bool)
        kept = kept.scatter_(2, indices.long().masked_fill(indices < 0, view.width), True)[..., :-1]
        evict(self.kv, [Eviction(self.slot, view, self.plan, indices, counts)])
        self.evictions += 1
        self.assert_held(budget)
        if not self.unreserved:
            assert (kept | ~always).all()
        check_integrity(self.kv)

    def prefill(self) -> None:
        """Compute the prompt."""
        plan = self.plan
        while self.computed < plan.prompt_tokens:
            self.feed(min(plan.next_stop(self.computed) - self.computed, 24))
            if plan.prefill_due(self.computed, self.held):
                self.evict("prefill")

    def decode(self, count: int) -> None:
        """Generate tokens."""
        for generated in range(1, count + 1):
            self.feed(1)
            if self.plan.decode_due(generated, self.held):
                self.evict("decode")


def own_options(draw: st.DrawFn, names: list[str]) -> Iterator[tuple[str, Any]]:
    """Values for some of the options that policies and allocations have."""
    for name in draw(st.lists(st.sampled_from(names), max_size=3, unique=True)) if names else []:
        kind = catalogue()[name].kind
        if isinstance(kind, Choice):
            yield name, draw(st.sampled_from(kind.values))
        elif hasattr(kind, "odd"):
            low = kind.low
            yield (
                name,
                draw(st.integers(low, low + 80)) // 2 * 2 + 1
                if kind.odd
                else draw(st.integers(low, low + 80)),
            )
        else:
            yield name, draw(st.sampled_from([kind.low, (kind.low + 1) / 2 + 0.3, kind.high or 30.0]))


@st.composite
def requests(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """Options, and a length of the prompt."""
    length = draw(st.integers(1, 70))
    policy = draw(st.sampled_from(EVICTING))
    raw: dict[str, Any] = {"policy": policy, "preset": draw(st.sampled_from(list(PRESETS)))}
    budgets = st.one_of(st.integers(1, 80), st.sampled_from(["1%", "10%", "25%", "50%", "90%", "1B", "4KiB"]))
    which = draw(st.sampled_from(["budget", "both", "decode_budget"]))
    if which != "decode_budget":
        raw["budget"] = draw(budgets)
        if draw(st.booleans()):
            raw["context_tokens"] = draw(st.integers(1, length))
        if draw(st.booleans()):
            raw |= {"prefill": "streaming", "prefill_chunk": draw(st.integers(1, 40))}
    if which != "budget":
        raw |= {"decode_budget": draw(budgets), "decode_interval": draw(st.integers(1, 6))}
    allocation = draw(st.sampled_from([None, "uniform", "adaptive", "pyramid"]))
    if allocation:
        raw["allocation"] = allocation
    if draw(st.booleans()):
        raw |= dict(own_options(draw, sorted(options_of(type(get_policy(policy))))))
    for name in draw(st.lists(st.sampled_from(["sink_tokens", "recent_tokens"]), unique=True)):
        raw[name] = draw(st.integers(0, 12))
    if draw(st.booleans()):
        start = draw(st.integers(0, length - 1))
        raw["protect"] = [[start, draw(st.integers(start + 1, length))]]
    if policy in FACTORS and draw(st.integers(0, 3)) == 0:
        raw |= {"times": draw(st.sampled_from(FACTORS)), "times_pool": draw(st.sampled_from([1, 5]))}
    if draw(st.integers(0, 3)) == 0:
        raw |= {"merge": "nearest", "merge_threshold": 0.0}
    return raw, length


def planned(raw: dict[str, Any], length: int) -> EvictionPlan | None:
    """The plan of a request, if it is not refused."""
    kv = make_cache(layers=full_attention(LAYERS, HEADS), head_dim=DIM)
    try:
        return resolve(parse_options(raw), range(length), kv.layout)
    except OptionError:
        return None


@settings(max_examples=400, deadline=None)
@example(({"policy": "compactor", "budget": "50%"}, 2))
@given(requests())
def test_what_is_not_refused_is_evicted_to_its_budget(request: tuple[dict[str, Any], int]) -> None:
    raw, length = request
    plan = planned(raw, length)
    if plan is None:
        return
    sequence = Sequence(plan)
    sequence.prefill()
    sequence.assert_held(plan.kept_prompt_tokens)
    sequence.decode(12)


@settings(max_examples=200, deadline=None)
@example(({"policy": "compactor", "budget": "50%"}, 2))
@given(requests())
def test_whatever_is_evicted_can_be_explained(request: tuple[dict[str, Any], int]) -> None:
    raw, length = request
    plan = planned(
        {k: v for k, v in raw.items() if k not in ("context_tokens", "prefill", "prefill_chunk")}, length
    )
    if plan is None:
        return
    everything = resolve(EvictionOptions(), range(length), make_cache().layout)
    sequence = Sequence(everything, (plan,))
    sequence.prefill()
    found = explain(sequence.attention.view(sequence.slot), plan, sequence.kv.kernels, 1)
    assert found.kept.sum() == plan.budget_tokens * LAYERS * HEADS
    assert found.kept.shape == found.ranks.shape == (LAYERS, HEADS, length)


@pytest.mark.parametrize("policy", EVICTING)
def test_every_length_is_served_at_half_the_budget(policy: str) -> None:
    for length in (*range(1, 20), 33, 64, 70):
        for raw in ({"preset": "serving"}, {"preset": "kvpress"}):
            plan = planned({"policy": policy, "budget": "50%", **raw}, length)
            assert plan is not None
            sequence = Sequence(plan)
            sequence.prefill()
            assert sequence.held == max(1, length // 2)
