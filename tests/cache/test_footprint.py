"""What a plan is said to need against what a sequence that lives by it really takes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from curkv.cache.footprint import footprint
from curkv.cache.layout import CacheLayout, LayerSpec, full_attention
from curkv.cache.options import OptionError
from curkv.cache.page_manager import PageManager
from curkv.cache.parsing import parse_options
from curkv.cache.plan import EvictionPlan, resolve
from curkv.kernels.formats import get_format
from tests.cache.util import make_cache

PAGE, MAX_STEP = 4, 24
WINDOWS = (LayerSpec(2, window=9), LayerSpec(2, window=5))
MIXED = (LayerSpec(2), LayerSpec(2, window=7), LayerSpec(0), LayerSpec(2, window=1), LayerSpec(2))


@st.composite
def plans(draw: st.DrawFn, cache: PageManager) -> EvictionPlan:
    """Any allocation, context, way of prefill and decode budget that go together."""
    prompt = draw(st.integers(1, 60))
    options: dict[str, object] = {"policy": "knorm", "sink_tokens": 0, "recent_tokens": 0}
    options["budget"] = draw(st.integers(1, 60))
    options["allocation"] = draw(st.sampled_from(["uniform", "adaptive", "pyramid"]))
    if draw(st.booleans()):
        options["context_tokens"] = draw(st.integers(1, prompt))
    if draw(st.booleans()):
        options |= {"prefill": "streaming", "prefill_chunk": draw(st.integers(16, 30))}
    if draw(st.booleans()):
        options |= {"decode_budget": draw(st.integers(1, 60)), "decode_interval": draw(st.integers(1, 9))}
    try:
        return resolve(parse_options(options), range(prompt), cache.layout)
    except OptionError:
        assume(False)
        raise


def split(data: st.DataObject, lengths: torch.Tensor, tokens: int) -> torch.Tensor:
    """Any number of tokens for each head, `tokens` in all, often one more than fills pages."""
    counts, left, flat = torch.zeros_like(lengths).flatten(), tokens, lengths.flatten().tolist()
    for head in data.draw(st.permutations(range(len(flat)))):
        counts[head] = min(left, flat[head], data.draw(st.sampled_from([1, PAGE + 1, 2 * PAGE + 1, 60])))
        left -= int(counts[head])
    for head in range(len(flat)):
        more = min(left, flat[head] - int(counts[head]))
        counts[head] += more
        left -= more
    return counts.view_as(lengths)


def evict(cache: PageManager, slot: int, plan: EvictionPlan, budget: int, data: st.DataObject) -> None:
    cache.trim([slot])
    lengths = cache.lengths[slot][list(cache.layout.evicted_rows)]
    counts = lengths.clamp(max=budget)
    if plan.ragged:
        counts = split(data, lengths, min(budget * lengths.numel(), int(lengths.sum())))
    indices = torch.arange(int(counts.max()), dtype=torch.int32).expand(*counts.shape, -1)
    cache.evict(slot, indices.where(indices < counts[..., None], -1), counts)


def pages_taken(cache: PageManager, plan: EvictionPlan, generated: int, data: st.DataObject) -> int:
    """The most pages that a sequence ever held, run as the engine runs it."""
    slot, computed, peak, prompt = cache.add_sequence(), 0, 0, plan.prompt_tokens
    while computed < prompt + generated:
        left = plan.next_stop(computed) - computed if computed < prompt else 1
        chunk = min(left, data.draw(st.sampled_from([1, 5, MAX_STEP])))
        cache.extend([slot], [chunk])
        computed, peak = computed + chunk, max(peak, cache.used_pages)
        held, decoded = cache.held_tokens(slot), computed - prompt
        if decoded <= 0 and plan.prefill_due(computed, held):
            evict(cache, slot, plan, plan.budget_tokens, data)
        elif decoded > 0 and plan.decode_due(decoded, held):
            evict(cache, slot, plan, plan.decode_budget_tokens or 0, data)
        cache.trim([slot])
    return peak


@pytest.mark.parametrize("layers", [full_attention(2, 2), MIXED, WINDOWS], ids=["full", "mixed", "windows"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_footprint_is_never_too_small_and_exact_where_heads_are_alike(
    layers: tuple[LayerSpec, ...], data: st.DataObject
) -> None:
    cache = make_cache(800, layers=layers, max_tokens=200, max_step_tokens=MAX_STEP)
    plan, generated = data.draw(plans(cache)), data.draw(st.integers(0, 40))
    taken = pages_taken(cache, plan, generated, data)
    assert taken <= footprint(cache, plan, generated)
    alike = not plan.ragged and not plan.streaming and plan.decode_budget_tokens is None
    if alike and layers == full_attention(2, 2):
        assert taken == footprint(cache, plan, generated)


def test_heads_that_part_after_the_prompt_may_need_more_than_the_prompt_did() -> None:
    """16 tokens a head in 2 pages each; then 13 and 3 of which one has 4 more: 5 pages for 4."""
    cache = make_cache(layers=full_attention(1, 2))
    options = {"policy": "knorm", "budget": 5, "allocation": "adaptive", "recent_tokens": 0, "sink_tokens": 0}
    plan = resolve(parse_options(options), range(8), cache.layout)
    assert cache.layout.sequence_pages(8) == 4
    assert footprint(cache, plan, generated=3) == 5


@given(st.integers(0, 400), st.booleans(), st.sampled_from([full_attention(3, 2), MIXED, WINDOWS]))
def test_tokens_for_pages_is_the_inverse_of_pages_for_tokens(
    pages: int, ragged: bool, layers: tuple[LayerSpec, ...]
) -> None:
    layout = CacheLayout(layers, 4, PAGE, get_format("float32"), 2, max_tokens=120, max_step_tokens=MAX_STEP)
    tokens = layout.sequence_tokens(pages, ragged=ragged)
    if tokens >= 1:
        assert layout.sequence_pages(tokens, ragged=ragged, seen=120) <= pages


@pytest.mark.parametrize("summed", [False, True], ids=["partial pages copied", "all pages copied"])
def test_a_prefix_can_be_taken_over_where_its_footprint_fits(summed: bool) -> None:
    """While its last pages are copied they are there twice, which is more than the sequence needs later."""
    cache = make_cache(16, layers=full_attention(1, 2), max_prefix_pages=8)
    slot = cache.add_sequence()
    cache.extend([slot], [6])
    cache.keep(slot, "context", tokens=6, evictions=1)
    cache.free(slot)
    prefix = cache.prefixes.find("context")
    assert prefix is not None and cache.used_pages == 0
    options = {"policy": "h2o" if summed else "knorm", "decode_budget": 8, "budget": 6, "context_tokens": 6}
    plan = resolve(parse_options({**options, "recent_tokens": 0, "sink_tokens": 0}), range(8), cache.layout)
    needed = footprint(cache, plan, 0, prefix)
    assert needed == (8 if summed else 6) > cache.layout.sequence_pages(8)
    other = cache.add_sequence()
    cache.extend([other], [4 * ((16 - needed) // 2)])
    assert cache.free_pages == needed
    assert cache.page_counts[cache.adopt(prefix, plan.observed)].sum() == 4
