from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import kvpress
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvpress.utils import compute_n_kept
from torch import Tensor

from curkv.cache.eviction import select
from curkv.cache.integrity import check_integrity
from curkv.cache.layout import CacheLayout, full_attention
from curkv.cache.observations import Needs, Observations
from curkv.cache.parsing import parse_options
from curkv.cache.plan import EvictionPlan, resolve
from curkv.cache.policies.base import pooled
from curkv.cache.policies.curdkv import leverage
from curkv.cache.view import CacheView
from curkv.kernels.formats import get_format
from curkv.kernels.formats.base import Store, VectorFormat
from curkv.kernels.leverage_scores import cpu as leverage_cpu
from curkv.kernels.leverage_scores import reference as leverage_reference
from curkv.kernels.pages import Pages
from curkv.kernels.select import cpu as select_cpu
from curkv.kernels.select import reference as select_reference
from curkv.kernels.window_scores import reference as window_scores_reference
from tests.cache.util import make_cache, step, view_of

CPU = SimpleNamespace(leverage_scores=leverage_cpu.leverage_scores, select=select_cpu.select)
REFERENCE = SimpleNamespace(
    leverage_scores=leverage_reference.leverage_scores,
    select=select_reference.select,
    window_scores=window_scores_reference.window_scores,
)
FLOAT32 = get_format("float32")
EVICTING = ["curdkv", "adacurdkv", "streaming-llm", "knorm", "random"]


def make_view(
    keys: Tensor,
    values: Tensor,
    positions: Tensor | None = None,
    lengths: Tensor | None = None,
    page_size: int = 16,
) -> CacheView:
    """Put keys and values [L, H, n, D] on shuffled pages; what holds no token is NaN."""
    layers, heads, n, _ = keys.shape
    count = -(-n // page_size)
    table = torch.randperm(layers * heads * count, generator=torch.Generator().manual_seed(0))
    table = table.to(torch.int32).view(layers, heads, count)
    lengths = torch.full((layers, heads), n, dtype=torch.int32) if lengths is None else lengths
    positions = torch.arange(n).expand(layers, heads, n) if positions is None else positions
    stored = torch.arange(n) < lengths[..., None]

    def paged(tokens: Tensor, empty: float) -> Tensor:
        padded = tokens.new_full((layers, heads, count * page_size, *tokens.shape[3:]), empty)
        padded[:, :, :n] = torch.where(stored.view(*stored.shape, *[1] * (tokens.dim() - 3)), tokens, empty)
        memory = padded.view(-1, page_size, *tokens.shape[3:])
        memory[table.flatten().long()] = memory.clone()
        return memory

    nan = float("nan")
    pages = Pages(
        k=Store(FLOAT32.keys, keys.shape[-1], {"vectors": paged(keys, nan)}),
        v=Store(FLOAT32.values, keys.shape[-1], {"vectors": paged(values, nan)}),
        position=paged(positions.to(torch.int32), -1),
        k_sq=paged(keys.float().square().sum(-1), nan),
        v_sq=paged(values.float().square().sum(-1), nan),
        attention=paged(torch.zeros(layers, heads, n), nan),
    )
    return CacheView(pages, table, lengths, int(lengths.max()))


def rounded(view: CacheView, kv_dtype: str) -> CacheView:
    """The same sequence in a cache of another format; the norms are those of the float32 vectors."""
    pages, format = view.pages, get_format(kv_dtype)

    def encoded(store: Store, vectors: VectorFormat) -> Store:
        arrays = vectors.encode(store.read().nan_to_num(1e4))
        for array in arrays.values():
            if array.is_floating_point():
                array[pages.k_sq.isnan()] = torch.nan
        return Store(vectors, store.head_dim, arrays)

    k, v = encoded(pages.k, format.keys), encoded(pages.v, format.values)
    return replace(view, pages=replace(pages, k=k, v=v))


def random_view(layers=2, heads=3, n=100, dim=8, seed=0, **more) -> CacheView:
    generator = torch.Generator().manual_seed(seed)
    # Energies as spread out as those of real heads.
    scale = torch.randn(2, layers, heads, n, 1, generator=generator).exp()
    return make_view(*(torch.randn(2, layers, heads, n, dim, generator=generator) * scale), **more)


def make_plan(view: CacheView, /, prompt: int | None = None, **raw) -> EvictionPlan:
    layout = CacheLayout(
        full_attention(*view.lengths.shape),
        view.pages.head_dim,
        view.pages.page_size,
        FLOAT32,
        1,
        9999,
    )
    return resolve(parse_options(raw), range(prompt or view.width), layout)


def kept_positions(view: CacheView, chosen: tuple[Tensor, Tensor]) -> list[list[list[int]]]:
    position = view.gather(view.pages.position, -1)
    return [
        [
            position[layer, head, chosen[0][layer, head, :count].long()].tolist()
            for head, count in enumerate(counts)
        ]
        for layer, counts in enumerate(chosen[1].tolist())
    ]


# Against kvpress


def assert_same_kept(ours: Tensor, theirs: Tensor, scores: Tensor) -> None:
    """Assert that both keep the same tokens, up to scores that differ by float32 rounding only.

    Real text repeats tokens: in the first layer these have equal values and keys of equal norm, so that some
    cuts fall between equal scores.

    Args:
        ours: bool [..., n], what we keep.
        theirs: bool [..., n], what kvpress keeps; every row has one cut.
        scores: float32 [..., n], kvpress's.
    """
    ours, theirs, scores = (x.reshape(-1, x.shape[-1]) for x in (ours, theirs, scores))
    assert torch.equal(ours.sum(1), theirs.sum(1))
    assert (ours & theirs).sum() >= 0.999 * theirs.sum()
    for row in (ours != theirs).any(1).nonzero().flatten().tolist():
        disputed = scores[row][ours[row] != theirs[row]]
        torch.testing.assert_close(disputed, disputed[:1].expand_as(disputed), rtol=1e-6, atol=0)


def as_mask(indices: Tensor, counts: Tensor, n: int) -> Tensor:
    """bool [L, H, n], the chosen tokens."""
    mask = torch.zeros(*counts.shape, n + 1, dtype=torch.bool)
    return mask.scatter_(2, indices.long().masked_fill(indices < 0, n), True)[..., :n]


def kvpress_scores(press: kvpress.ScorerPress, keys: Tensor, values: Tensor) -> Tensor:
    return press.score(None, None, keys.clone(), values.clone(), None, {})


def kvpress_kept(press: kvpress.ScorerPress, keys: Tensor, values: Tensor) -> Tensor:
    """Mask [L, H, n] of what a score-based press keeps."""
    scores = kvpress_scores(press, keys, values)
    top = scores.topk(compute_n_kept(keys.shape[2], press.compression_ratio), dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(2, top, True)


def kvpress_adaptive_kept(press: kvpress.AdaKVPress, keys: Tensor, values: Tensor) -> Tensor:
    kept = torch.ones(keys.shape[:3], dtype=torch.bool)
    for layer in range(len(keys)):
        module = SimpleNamespace(config=SimpleNamespace(_attn_implementation="sdpa"))
        press.compress(module, None, *(x[layer : layer + 1].clone() for x in (keys, values)), None, {})
        _, head, index = module.masked_key_indices
        kept[layer, head, index] = False
    return kept


@pytest.fixture(params=["random", "real"])
def kv(request) -> tuple[Tensor, Tensor]:
    if request.param == "real":
        return request.getfixturevalue("real_kv")
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(2, 2, 3, 1031, 64, generator=generator))


PRESSES = {
    "curdkv": kvpress.CURPress,
    "adacurdkv": kvpress.CURPress,
    "knorm": kvpress.KnormPress,
    "streaming-llm": kvpress.StreamingLLMPress,
}


@pytest.mark.parametrize("n", [1024, 1031, 777])
@pytest.mark.parametrize("ratio", [0.5, 0.75, 0.9])
@pytest.mark.parametrize("policy", PRESSES)
def test_kept_sets_equal_those_of_kvpress(kv, n, ratio, policy):
    keys, values = (x[:, :, :n] for x in kv)
    press = PRESSES[policy](ratio)
    view = make_view(keys, values, page_size=64)
    plan = make_plan(view, policy=policy, budget=compute_n_kept(n, ratio), preset="kvpress")
    kept = as_mask(*select(view, plan, CPU), n)
    scores = kvpress_scores(press, keys, values)
    if policy == "adacurdkv":
        expected = kvpress_adaptive_kept(kvpress.AdaKVPress(press), keys, values)
        assert_same_kept(kept.flatten(1), expected.flatten(1), scores.flatten(1))
    else:
        assert_same_kept(kept, kvpress_kept(press, keys, values), scores)


@pytest.mark.parametrize("n", [1024, 777])
@pytest.mark.parametrize(("combine", "theirs"), [("key", "key"), ("value", "value"), ("mean", "kv_avg")])
def test_combinations_equal_those_of_kvpress(kv, n, combine, theirs):
    keys, values = (x[:, :, :n] for x in kv)
    press = kvpress.CURPress(0.75, leverage_type=theirs)
    view = make_view(keys, values)
    plan = make_plan(view, budget=n // 4, policy="curdkv", combine=combine, preset="kvpress")
    expected = kvpress_kept(press, keys, values)
    kept = as_mask(*select(view, plan, CPU), n)
    assert_same_kept(kept, expected, kvpress_scores(press, keys, values))


@pytest.mark.parametrize("n", [1024, 1031])
def test_the_authors_preset_pads_on_the_left(kv, n):
    """On the reversed text kvpress's padding is the authors'; without sinks the kept sets mirror."""
    reverse = [x[:, :, :n].flip(2) for x in kv]
    press = kvpress.CURPress(0.75, num_sinks=0)
    view = make_view(*(x[:, :, :n] for x in kv))
    plan = make_plan(view, policy="curdkv", budget=n // 4, preset="authors", sink_tokens=0)
    expected, scores = kvpress_kept(press, *reverse).flip(2), kvpress_scores(press, *reverse).flip(2)
    assert_same_kept(as_mask(*select(view, plan, CPU), n), expected, scores)


# Invariants


@st.composite
def requests(draw) -> tuple[CacheView, dict]:
    n, k = draw(st.integers(30, 90)), draw(st.integers(10, 90))
    policy = draw(st.sampled_from(EVICTING))
    raw = {
        "policy": policy,
        "budget": k,
        "preset": draw(st.sampled_from(["serving", "paper", "authors", "kvpress"])),
    }
    if policy in ("curdkv", "adacurdkv", "knorm"):
        raw |= {"pool": draw(st.sampled_from([1, 3, 7]))}
    if draw(st.booleans()):
        raw |= {"sink_tokens": draw(st.integers(0, 3)), "recent_tokens": draw(st.integers(0, 3))}
    if draw(st.booleans()):
        start = draw(st.integers(0, n - 4))
        raw |= {"protect": f"{start}-{start + draw(st.integers(1, 4))}"}
    return random_view(n=n, seed=draw(st.integers(0, 99))), raw


@settings(max_examples=150, deadline=None)
@given(request=requests())
def test_budgets_are_met_exactly_and_protected_tokens_kept(request):
    view, raw = request
    plan = make_plan(view, **raw)
    chosen = select(view, plan, CPU)
    indices, counts = chosen
    k = plan.budget_tokens
    assert k == min(raw["budget"], view.width)
    assert counts.sum(1).eq(k * counts.shape[1]).all()
    if plan.policy.allocation.name == "uniform":
        assert counts.eq(k).all()
    assert counts.ge(int(0.2 * k)).all()
    n = view.width
    always = {*range(plan.sink_tokens), *range(n - plan.recent_tokens, n)}
    always |= {i for span in plan.protect for i in range(*span)}
    for head in (head for layer in kept_positions(view, chosen) for head in layer):
        assert always <= set(head)
        assert head == sorted(set(head))
    again = select(view, plan, CPU)
    assert torch.equal(again[0], indices)
    expected = select(view, plan, REFERENCE)
    if getattr(plan.policy, "leverage", "window") == "window":
        assert torch.equal(expected[1], counts)
        assert torch.equal(expected[0], indices)


@settings(max_examples=50, deadline=None)
@given(request=requests())
def test_kept_tokens_are_the_top_scores(request):
    view, raw = request
    plan = make_plan(view, **(raw | {"sink_tokens": 0, "recent_tokens": 0, "protect": None, "alpha": None}))
    if plan.policy.allocation.name == "adaptive":
        plan = make_plan(view, **(raw | {"sink_tokens": 0, "recent_tokens": 0, "protect": None, "alpha": 0}))
    indices, counts = select(view, plan, CPU)
    scores = plan.policy.score(CacheView(view.pages, view.table, view.lengths, view.width, plan.seed), CPU)
    kept = as_mask(indices, counts, scores.shape[2])
    dim = (1, 2) if plan.policy.allocation.name == "adaptive" else 2
    worst_kept = scores.masked_fill(~kept, torch.inf).amin(dim)
    best_dropped = scores.masked_fill(kept, -torch.inf).amax(dim)
    assert worst_kept.ge(best_dropped).all()


@pytest.mark.parametrize("kv_dtype", ["float32", "int8", "k8v4"])
@pytest.mark.parametrize("policy", EVICTING)
def test_scoring_reads_no_unused_memory_and_writes_nothing(policy, kv_dtype):
    lengths = torch.tensor([[1, 50, 100], [17, 16, 0]], dtype=torch.int32)
    view = random_view(lengths=lengths, dim=64 if kv_dtype == "k8v4" else 8)
    if kv_dtype != "float32":
        view = rounded(view, kv_dtype)
    before = {name: array.clone() for name, array in view.pages.arrays.items()}
    scoring = make_plan(view, policy=policy, budget=20).policy
    for kernels in (CPU, REFERENCE):
        scores = scoring.score(view, kernels)
        assert scores.dtype == torch.float32
        assert scores.shape == (2, 3, 100)
        assert torch.equal(scores == -torch.inf, ~view.stored)
        assert not scores.isnan().any()
    for name, array in view.pages.arrays.items():
        assert torch.equal(array.nan_to_num(-7), before[name].nan_to_num(-7))


@pytest.mark.parametrize("kv_dtype", ["int8", "k8v4", "int4"])
@pytest.mark.parametrize("policy", ["curdkv", "adacurdkv", "knorm"])
def test_norms_decide_alike_whatever_the_cache_rounds_to(policy, kv_dtype):
    view = random_view(dim=64)
    plan = make_plan(view, policy=policy, budget=20)
    kept = [select(x, plan, CPU)[0] for x in (view, rounded(view, kv_dtype))]
    assert torch.equal(*kept)


@pytest.mark.parametrize("policy", EVICTING)
def test_a_head_shorter_than_the_budget_keeps_all_of_it(policy):
    view = random_view(lengths=torch.tensor([[1, 50, 100], [17, 16, 30]], dtype=torch.int32))
    counts = select(view, make_plan(view, policy=policy, budget=40), CPU)[1]
    if policy == "adacurdkv":
        assert counts.sum(1).tolist() == [120, 63]
    else:
        assert counts.tolist() == [[1, 40, 40], [17, 16, 30]]


@pytest.mark.parametrize("leverage", ["window", "sketch"])
@pytest.mark.parametrize("policy", ["curdkv", "adacurdkv", "random"])
def test_what_is_drawn_depends_on_seed_and_round_alone(policy, leverage):
    view = random_view(n=300)
    raw = {"policy": policy, "decode_budget": 100, "seed": 3}
    raw |= {"leverage": leverage} if policy != "random" else {}

    def kept(round, **more):
        decode = CacheView(view.pages, view.table, view.lengths, view.width, phase="decode", round=round)
        return kept_positions(decode, select(decode, make_plan(view, **(raw | more)), CPU))

    drawn = policy == "random" or leverage == "sketch"
    assert kept(1) == kept(1)
    assert (kept(1) != kept(2)) == drawn
    assert (kept(1) != kept(1, seed=4)) == drawn


def test_protection_goes_by_position_after_earlier_evictions():
    """Heads hold different tokens of the text; sinks, spans and newest tokens are found in each."""
    generator = torch.Generator().manual_seed(0)
    held = [
        [0, 1, 2, 3, *range(40 + h, 52 + h), *range(100 + 3 * h, 400, 3), *range(400, 464)] for h in range(3)
    ]
    n = max(map(len, held))
    lengths = torch.tensor([[len(head) for head in held]], dtype=torch.int32)
    positions = torch.tensor([[head + [-1] * (n - len(head)) for head in held]])
    view = make_view(*torch.randn(2, 1, 3, n, 8, generator=generator), positions=positions, lengths=lengths)
    view = CacheView(view.pages, view.table, view.lengths, view.width, phase="decode", round=1)
    plan = make_plan(view, prompt=300, policy="curdkv", decode_budget=100, protect="44-50")
    for head, tokens in enumerate(kept_positions(view, select(view, plan, CPU))[0]):
        assert len(tokens) == 100
        assert set(tokens) <= set(held[head])
        assert {0, 1, 2, 3, *range(44, 50), *range(400, 464)} & set(held[head]) <= set(tokens)


@pytest.mark.parametrize("policy", EVICTING)
def test_the_cache_gives_back_all_pages_that_the_plan_empties(policy):
    cache = make_cache(num_pages=400, head_dim=8, max_tokens=200, num_kv_heads=3)
    slot = cache.add_sequence()
    step(cache, {slot: 150}, {slot: 0}, torch.Generator().manual_seed(0))
    raw = {"policy": policy, "budget": "25%", "decode_budget": 30, "recent_tokens": 5}
    plan = resolve(parse_options(raw), range(150), cache.layout)
    cache.evict(slot, *select(view_of(cache, slot), plan, CPU))
    check_integrity(cache)
    lengths = cache.lengths[slot]
    assert lengths.sum(1).eq(37 * 3).all()
    assert cache.used_pages == int((-(-lengths // cache.layout.page_size)).sum())
    assert cache.evict(slot, *select(view_of(cache, slot), plan, CPU)) == 0
    for round in (1, 2):
        step(cache, {slot: 8}, {slot: 142 + 8 * round}, torch.Generator().manual_seed(round))
        cache.evict(slot, *select(view_of(cache, slot, phase="decode", round=round), plan, CPU))
        check_integrity(cache)
        assert cache.lengths[slot].sum(1).eq(30 * 3).all()
    cache.free(slot)
    assert cache.used_pages == 0


@pytest.mark.parametrize(("frame", "passage"), [(0, range(2, 9)), (10, range(62, 69))])
def test_the_frame_of_a_conversation_is_no_passage_however_much_it_draws(frame, passage):
    keys, values = torch.zeros(1, 1, 100, 8), torch.ones(1, 1, 100, 8)
    keys[0, 0, 5, 0], keys[0, 0, 65, 0] = 20, 18
    observations = Observations(Needs(queries=4))
    observations.queries[0] = torch.ones(4, 1, 8)
    view = make_view(keys, values)
    raw = {"policy": "snapcur", "observation": 4, "chunk": 7, "first_stage": 1, "sink_tokens": 0}
    plan = replace(make_plan(view, **raw, budget=11), frame_tokens=frame)
    chosen = select(replace(view, observations=observations), plan, REFERENCE)
    assert kept_positions(view, chosen) == [[[*passage, *range(96, 100)]]]


def test_pooling_keeps_neighbours_and_stays_inside_a_head():
    scores = torch.tensor([[[0.0, 9, 0, 0, 0, 3], [8, 0, 2, -torch.inf, -torch.inf, -torch.inf]]])
    stored = scores > -torch.inf
    inf = torch.inf
    assert pooled(scores, stored, 3, "max").tolist() == [[[9, 9, 9, 0, 3, 3], [8, 8, 2, -inf, -inf, -inf]]]
    mean = [[[4.5, 3, 3, 0, 1, 1.5], [4, 10 / 3, 1, -inf, -inf, -inf]]]
    torch.testing.assert_close(pooled(scores, stored, 3, "mean"), torch.tensor(mean))
    assert pooled(scores, stored, 1, "max") is scores


@pytest.mark.parametrize("tokens", [1, 2, 7, 30])
def test_leverage_of_fewer_tokens_than_channels_is_that_of_what_they_span(tokens):
    """Rounding leaves some of their Gram matrices indefinite."""
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(2, tokens, 128, generator=generator) * torch.logspace(0, seed % 4, 128)
        found = leverage(x, torch.ones(2, tokens, dtype=torch.bool))
        assert found.isfinite().all() and found.max() <= 1.02
        assert (found.sum(-1) - (tokens - 1)).abs().max() < 0.05 * tokens
