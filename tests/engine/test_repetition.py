"""What a model looks at while it repeats a text decides what is kept, and the repetition leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from curkv.cache.footprint import footprint
from curkv.cache.observations import Needs
from curkv.cache.parsing import parse_options
from curkv.cache.plan import INSTRUCTION_TOKENS
from curkv.engine import repetition as repetition_module
from curkv.engine.engine import Engine
from curkv.engine.repetition import Repetition
from curkv.engine.types import InvalidRequest
from curkv.models.info import ModelInfo

from .conftest import Loaded, request, run, tokens

MakeEngine = Callable[..., Engine]
KVZIP = parse_options({"policy": "kvzip", "budget": "50%", "context_tokens": 120})


def test_scores_are_the_most_attention_that_the_repetition_pays(
    make_engine: MakeEngine, loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repetition_module, "_STEP", 50)
    text, engine = loaded.prompt(80), make_engine()
    kv, runner = engine.kv, engine.runner
    slot = kv.add_sequence()
    runner.run([slot], [text], [0])
    held, repetition, pieces = kv.sequence_tokens(slot), Repetition(text, ModelInfo(loaded.tokenizer)), 0
    while not repetition.done:
        repetition.advance(runner, slot)
        pieces += 1
    assert pieces == 2 and kv.sequence_tokens(slot) == held
    engine.kv.free(slot)

    said = loaded.tokenizer.encode("\n\nRepeat the previous context exactly.\n\n").ids + text
    slot = kv.add_sequence(Needs(queries=len(said)))
    runner.run([slot], [[*text, *said]], [0])
    view = runner.attention.view(slot)
    keys = torch.stack([view.keys(layer) for layer in range(view.num_layers)])
    queries = view.queries(len(said)).view(*keys.shape[:2], len(said), -1, keys.shape[-1])
    logits = torch.einsum("lhqgd,lhnd->lhgqn", queries, keys) * view.scale
    later = torch.arange(keys.shape[2]) > torch.arange(len(text), keys.shape[2])[:, None]
    expected = logits.masked_fill(later, -torch.inf).softmax(-1).amax((2, 3))[..., : len(text)]
    torch.testing.assert_close(repetition.scores, expected, atol=1e-3, rtol=1e-3)


def test_a_long_text_is_repeated_in_parts_that_say_where_they_start(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repetition_module, "REPEATED_TOKENS", 64)
    text = loaded.prompt(150)
    parts = Repetition(text, ModelInfo(loaded.tokenizer))._parts
    assert [part[-9:] for part in parts] == [text[55:64], text[119:128], text[141:150]]
    assert parts[1][-72:-64] == text[56:64]
    assert all(len(part) <= 64 + INSTRUCTION_TOKENS for part in parts)


def test_of_a_text_that_goes_on_what_is_new_is_repeated(make_engine: MakeEngine, loaded: Loaded) -> None:
    """What was kept has its score of before or a better one; without any room nothing is said."""
    text, engine, info = loaded.prompt(80), make_engine(), ModelInfo(loaded.tokenizer)
    kv, runner = engine.kv, engine.runner
    slot = kv.add_sequence()
    runner.run([slot], [text], [0])
    shape = tuple(kv.lengths[slot].shape)
    before = torch.full((*shape, 50), 2.0)
    before[:, 0, 30:], before[:, 1, 5] = -torch.inf, 0.0
    goes_on = Repetition(text, info, evicted_at=50, before=before)
    assert [part[-30:] for part in goes_on._parts] == [text[50:]] and len(goes_on._parts[0]) < 80
    while not goes_on.done:
        goes_on.advance(runner, slot)
    assert goes_on.scores[:, 1, :5].eq(2).all() and 0 < goes_on.scores[:, 1, 5].max() < 1
    assert goes_on.scores[:, 0, 30:].min() > 0 and goes_on.scores[..., 50:].max() < 1
    silent = Repetition(text, info, room=INSTRUCTION_TOKENS, evicted_at=50, before=before)
    silent.advance(runner, slot)
    assert silent.done and silent.scores[..., 50:].eq(-torch.inf).all()
    assert silent.scores[:, 1, 5].eq(0).all()
    engine.kv.free(slot)


def test_a_context_is_compressed_once_and_others_generate_meanwhile(
    make_engine: MakeEngine, loaded: Loaded
) -> None:
    def make() -> Engine:
        engine = make_engine()
        engine.kv.prefixes.max_pages = 4000
        return engine

    first = request(loaded.prompt(140), 4, kv=KVZIP)
    other = request(loaded.prompt(30, start=500), 20, "other")
    alone = {item.id: tokens(run_all(make(), item)[item.id]) for item in (first, other)}
    engine = make()
    together = run_all(engine, first, other)
    assert {id: tokens(outputs) for id, outputs in together.items()} == alone
    report = together["r"][-1].kv
    assert report is not None and (report.budget_tokens, report.kept_tokens) == (80, 80)
    said = loaded.tokenizer.encode("\n\nRepeat the previous context exactly.\n\n").ids
    assert report.repeated_tokens == 120 + len(said)
    again = run_all(engine, request(loaded.prompt(120) + loaded.prompt(9, start=900), 4, "again", kv=KVZIP))
    report = again["again"][-1].kv
    assert again["again"][-1].cached_tokens == 120 and report is not None and report.kept_tokens == 69
    assert report.repeated_tokens == 0


def run_all(engine: Engine, *items: object) -> dict[str, list]:  # type: ignore[type-arg]
    """As `run`, with prefixes that stay."""
    outputs: dict[str, list] = {}  # type: ignore[type-arg]
    for item in items:
        engine.add(engine.plan(item))  # type: ignore[arg-type]
    while engine.has_work:
        for output in engine.step():
            assert output.finish_reason != "error"
            outputs.setdefault(output.request_id, []).append(output)
        engine.check_integrity()
    return outputs


def test_an_ordinary_request_keeps_its_last_token_and_starts_from_it(
    make_engine: MakeEngine, loaded: Loaded
) -> None:
    kv = parse_options({"policy": "kvzip", "budget": 40})
    outputs = run(make_engine(), request(loaded.prompt(100), 3, kv=kv))["r", 0]
    report = outputs[-1].kv
    assert report is not None and report.kept_tokens == 41 and len(tokens(outputs)) == 3


def test_a_request_that_ends_while_its_text_is_repeated_leaves_nothing(
    make_engine: MakeEngine, loaded: Loaded
) -> None:
    engine = make_engine()
    engine.add(engine.plan(request(loaded.prompt(140), 4, kv=KVZIP)))
    while not any(sequence.repeating for sequence in engine.scheduler.running):
        engine.step()
    engine.abort("r")
    assert not engine.has_work and engine.kv.used_pages == 0
    engine.check_integrity()


def test_what_cannot_be_repeated_is_refused(make_engine: MakeEngine, loaded: Loaded) -> None:
    for more in ({"decode_budget": 90}, {"prefill": "streaming"}):
        with pytest.raises(ValueError, match="repeat the context, once"):
            parse_options({"policy": "kvzip", "budget": 40, **more})
    with pytest.raises(ValueError, match="repeats the context"):
        make_engine(max_model_len=200).plan(request(loaded.prompt(140), 4, kv=KVZIP))


@pytest.mark.parametrize("explained", [False, True])
def test_a_text_that_cannot_be_repeated_in_the_pool_is_refused(
    make_engine: MakeEngine, loaded: Loaded, explained: bool
) -> None:
    """It was admitted, had no room behind itself, and was computed anew for ever."""
    text, kv = loaded.prompt(120), parse_options({"policy": "kvzip", "budget": "25%"})
    asked = request(text, max_tokens=1, kv=kv)
    if explained:
        asked = replace(request(text, max_tokens=0), explain=(kv,))
    needed = footprint(make_engine().kv, make_engine().plan(asked).eviction, 0)
    with pytest.raises(InvalidRequest, match="pages of KV cache at its peak"):
        make_engine(num_pages=needed - 1).plan(asked)
    [*_, last] = run(make_engine(num_pages=needed), asked)["r", 0]
    if explained:
        assert last.explanations[0].kept.sum() == 90 * 29  # of the context, which ends before the last token
    else:
        assert last.kv.kept_tokens == 30
