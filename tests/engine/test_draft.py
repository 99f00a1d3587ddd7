"""What the first tokens of an answer look at decides what is kept, and the draft leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from curkv.cache.integrity import check_integrity
from curkv.cache.observations import Needs
from curkv.cache.parsing import parse_options
from curkv.cache.plan import resolve
from curkv.engine.draft import look_ahead
from curkv.engine.engine import Engine

from .conftest import Loaded, request, run, tokens

MakeEngine = Callable[..., Engine]
KV = {"policy": "snapcur", "budget": "25%"}


def test_a_draft_tells_the_most_that_the_answer_s_first_tokens_pay(
    make_engine: MakeEngine, loaded: Loaded
) -> None:
    text, engine, count = loaded.prompt(80), make_engine(), 5
    kv, runner = engine.kv, engine.runner
    slot = kv.add_sequence(Needs(queries=16))
    first = runner.run([slot], [text], [0]).argmax(-1)
    held, observed = kv.sequence_tokens(slot), kv.observed[slot].queries[0].clone()
    paid = look_ahead(runner, slot, first, len(text), count)
    assert kv.sequence_tokens(slot) == held and kv.observed[slot].queries[0].equal(observed)
    check_integrity(kv)

    answer = tokens(run(make_engine(), request(text, max_tokens=count))["r", 0])
    kv.observe(slot, Needs(queries=count))
    for i, token in enumerate(answer):
        runner.run([slot], [[token]], [len(text) + i])
    view = runner.attention.view(slot)
    keys = torch.stack([view.keys(layer) for layer in range(view.num_layers)])
    queries = view.queries(count).view(*keys.shape[:2], count, -1, keys.shape[-1])
    logits = torch.einsum("lhqgd,lhnd->lhgqn", queries, keys) * view.scale
    later = torch.arange(keys.shape[2]) > torch.arange(len(text), keys.shape[2])[:, None]
    weights = logits.masked_fill(later, -torch.inf).softmax(-1)
    expected = weights.amax((2, 3))[..., : len(text)]
    torch.testing.assert_close(paid, expected, atol=1e-3, rtol=1e-3)


def test_an_answer_is_drafted_where_the_prompt_ends_with_its_question(
    make_engine: MakeEngine, loaded: Loaded
) -> None:
    engine, text = make_engine(), loaded.prompt(80)

    def drafted(**kv: object) -> int:
        return engine.plan(request(text, kv=parse_options({**KV, **kv}))).eviction.draft_tokens

    assert (drafted(), drafted(draft=3), drafted(draft=0)) == (16, 3, 0)
    assert (drafted(draft_below=21), drafted(draft_below=20)) == (16, 0)  # tokens are kept
    assert drafted(context_tokens=60) == 0  # what is asked comes later
    assert drafted(policy="snapkv") == 0
    layout = engine.kv.layout
    few = parse_options({**KV, "budget": 100})
    assert resolve(few, range(layout.max_tokens - 2), layout).draft_tokens == 2


def test_who_is_preempted_drafts_the_same_again(make_engine: MakeEngine, loaded: Loaded) -> None:
    """With a temperature: what has been generated is no draft."""
    engine, kept = make_engine(), []
    asked = request(loaded.prompt(80), max_tokens=12, kv=parse_options(KV), temperature=5.0, seed=3)
    engine.add(engine.plan(asked))
    while engine.has_work:
        outputs = engine.step()
        kept += [eviction.head_budgets.tolist() for eviction in engine.last_stats.evictions]
        if len(kept) == 1 and outputs and len(engine.scheduler.running[0].output) == 4:
            engine.scheduler.preempt(engine.scheduler.running[0])
    assert len(kept) == 2 and kept[0] == kept[1]
    assert outputs[-1].kv.repeated_tokens == 16


def test_an_explanation_drafts_too(make_engine: MakeEngine, loaded: Loaded) -> None:
    engine, text, options = make_engine(), loaded.prompt(80), parse_options(KV)
    [output] = run(engine, replace(request(text, max_tokens=0), explain=(options,)))["r", 0]
    engine.add(engine.plan(request(text, kv=options)))
    engine.step()
    [eviction] = engine.last_stats.evictions
    assert output.explanations[0].kept.sum(-1).tolist() == eviction.head_budgets.tolist()


def test_a_prompt_that_has_room_is_not_refused_for_its_draft(make_engine: MakeEngine, loaded: Loaded) -> None:
    text, kv = loaded.prompt(120), parse_options(KV)
    engine = make_engine(num_pages=make_engine().kv.layout.sequence_pages(len(text)))
    planned = engine.plan(request(text, max_tokens=1, kv=kv))
    assert planned.eviction.draft_tokens == 0
    outputs = run(engine, request(text, max_tokens=1, kv=kv))["r", 0]
    assert outputs[-1].finish_reason == "length" and outputs[-1].kv.kept_tokens == 30
