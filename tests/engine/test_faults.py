"""Whatever raises in a step, once or for ever: those at fault end, the others never notice, nothing leaks."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from curkv.cache.attention import PagedAttention
from curkv.cache.batch import Batch
from curkv.cache.layout import CacheLayout, full_attention
from curkv.cache.page_manager import PageManager
from curkv.cache.page_pool import OutOfPages
from curkv.cache.parsing import parse_options
from curkv.engine import engine as engine_module
from curkv.engine import evictions as evictions_module
from curkv.engine.client import EngineClient, EngineUnavailable
from curkv.engine.engine import Engine
from curkv.engine.faults import MAX_FAILED_STEPS, EngineBroken
from curkv.engine.recorded_launches import RecordedLaunches
from curkv.engine.replay import Replay
from curkv.engine.reporting import StepReport
from curkv.engine.runner import Runner
from curkv.engine.types import EngineFault, Output, Request, Structure
from curkv.kernels.dispatch import get_kernels
from curkv.kernels.formats import get_format
from curkv.models.decoder import Decoder
from curkv.models.info import ModelInfo
from curkv.models.rope import rope_tables

from .conftest import request
from .small_model import CONFIG as SMALL
from .small_model import random_checkpoint

CONFIG = replace(SMALL, vocab_size=257, eos_token_ids=(256,), max_positions=512)
Told = tuple[list[int], list[float], str]


@functools.cache
def model() -> Decoder:
    checkpoint = random_checkpoint()
    generator = torch.Generator().manual_seed(2)
    for name in ("embedding", "head"):
        setattr(checkpoint, name, torch.randn(CONFIG.vocab_size, CONFIG.hidden_size, generator=generator))
    return Decoder(CONFIG, checkpoint, get_kernels("cpu"))


@functools.cache
def tokenizer() -> Tokenizer:
    """A token for each byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    bytewise.add_special_tokens(["<end>"])
    return bytewise


def make_engine(num_pages: int = 400) -> Engine:
    layout = CacheLayout(
        full_attention(CONFIG.num_layers, CONFIG.num_kv_heads),
        CONFIG.head_dim,
        16,
        get_format("float16"),
        8,
        CONFIG.max_positions,
    )
    kv = PageManager(layout, num_pages, get_kernels("cpu"), max_prefix_pages=200)
    attention = PagedAttention(kv, rope_tables(CONFIG, CONFIG.max_positions))
    runner = Runner(model(), attention, Replay(model(), attention, RecordedLaunches()))
    return Engine(runner, ModelInfo(tokenizer()), 128, CONFIG.max_positions)


def requests() -> list[Request]:
    """All kinds at once, some with the beginning of their prompts in common."""
    generator = torch.Generator().manual_seed(3)
    text = torch.randint(256, (200,), generator=generator).tolist()
    decode = {"decode_budget": "40", "decode_interval": "5", "recent_tokens": "8"}
    return [
        request(text[:90], 12, "full", logprobs=0),
        request(text[:150], 14, "snapcur", parse_options({"policy": "snapcur", "budget": "25%", **decode})),
        request(text[:120], 9, "curdkv", parse_options({"policy": "curdkv", "budget": "30%"}), logprobs=0),
        request(text[:70], 9, "h2o", parse_options({"policy": "h2o", "budget": "50%", **decode})),
        request(text[:70], 8, "choices", n=2, temperature=0.9, seed=5),
        request(text[:30], 8, "structured", structure=Structure("regex", "[a-f]{6,}", "regex")),
        request(text[50:90], 4, "judged", prompt_logprobs=1),
        replace(
            request(text[60:120], 0, "explained"),
            explain=tuple(parse_options({"policy": name, "budget": "50%"}) for name in ("knorm", "h2o")),
        ),
    ]


def told(outputs: list[Output]) -> Told:
    """What a client is told of one choice."""
    chosen = [token for output in outputs for token in output.token_ids]
    judged = [e.logprob for o in outputs for e in (*(o.logprobs or ()), *(o.prompt_logprobs or ()))]
    return chosen, judged, "".join(output.text for output in outputs)


class Served:
    """What became of requests, by request and choice: what each was told, and the fault it ended with."""

    def __init__(self, engine: Engine, items: list[Request]):
        self.broken = False
        news: dict[tuple[str, int], list[Output]] = {
            (item.id, index): [] for item in items for index in range(item.sampling.n)
        }
        self.untaken = []
        for item in items:
            try:
                engine.add(engine.plan(item))
            except Breakdown:
                self.untaken.append(item.id)
        try:
            for _ in range(400):
                if not engine.has_work:
                    break
                for output in engine.step():
                    news[output.request_id, output.index].append(output)
                engine.check_faults()
        except EngineBroken:
            self.broken = True
        else:
            assert not engine.has_work
        self.told = {key: told(outputs) for key, outputs in news.items()}
        self.faults = {
            key: outputs[-1].problem.phase
            for key, outputs in news.items()
            if outputs and isinstance(outputs[-1].problem, EngineFault)
        }
        ends = [sum(o.finish_reason is not None for o in outputs) for outputs in news.values()]
        assert max(ends) <= 1, "a choice ended twice"
        self.unfinished = [
            key for key, outputs in news.items() if not outputs or outputs[-1].finish_reason is None
        ]


@functools.cache
def alone() -> dict[tuple[str, int], Told]:
    """What each request is told by an engine of its own."""
    found: dict[tuple[str, int], Told] = {}
    for item in requests():
        served = Served(make_engine(), [item])
        assert not served.faults and not served.unfinished
        found |= served.told
    return found


class Breakdown(RuntimeError):
    """What is injected."""


@dataclass(frozen=True)
class Point:
    """A place where something can raise.

    Attributes:
        phase: what it is told to be part of.
        owner: gives what holds the function.
        name: the function's.
        involved: tells from its arguments what it works on: slots, sequences, prompts or plans; None: it
            cannot be told, and no test is made for a single sequence.
        victim: request that it is to strike if it strikes one.
        late: it raises after its work, not before.
        lasting: it ends its sequence although it raises once only.
        harmless: nobody ends, however often it raises.
    """

    phase: str
    owner: Callable[[Engine], Any]
    name: str
    involved: Callable[..., list[Any]] | None
    victim: str = "snapcur"
    late: bool = False
    lasting: bool = False
    harmless: bool = False


def module(_: Engine) -> Any:
    return engine_module


def evictions(_: Engine) -> Any:
    return evictions_module


POINTS = {
    "add": Point("add", module, "Detokenizer", lambda _, prompt, *__: [tuple(prompt)], lasting=True),
    "schedule": Point("schedule", lambda e: e.scheduler, "_plan_chunk", lambda step, one, *_: [one]),
    "start": Point("start", lambda e: e._reuse, "find", lambda keys, prompt, *_: [tuple(prompt)]),
    "start, half": Point("start", lambda e: e.kv, "add_sequence", None, late=True),
    "extend, half": Point("forward", lambda e: e.kv, "_append_pages", lambda slots, *_: slots, late=True),
    "forward": Point("forward", lambda e: e.runner.model, "forward", lambda batch, _: batch.slots.tolist()),
    "forward, half": Point(
        "forward",
        lambda e: e.runner.attention,
        "attend",
        lambda layer, q, k, v, batch: batch.slots.tolist() if layer else [],
        late=True,
    ),
    "forward, half, summing": Point(
        "forward",
        lambda e: e.runner.attention,
        "attend",
        lambda layer, q, k, v, batch: batch.slots.tolist() if layer else [],
        victim="h2o",
        late=True,
    ),
    "prompt_logprobs": Point(
        "prompt_logprobs", module, "token_logprobs", lambda logits, tokens, *_: ["judged"], "judged"
    ),
    "prefix": Point("prefix", lambda e: e.kv, "keep_blocks", lambda slot, *_: [slot], "judged", late=True),
    "draft": Point("evict", evictions, "look_ahead", lambda runner, slot, *_: [slot]),
    "evict": Point("evict", evictions, "select", lambda view, plan, _: [plan]),
    "evict, half": Point("evict", lambda e: e.kv, "_move", None, late=True),
    "trim": Point("trim", lambda e: e.kv, "trim", None),
    "fork": Point("fork", lambda e: e.kv, "fork", lambda slot, *_: [slot], "choices", harmless=True),
    "fork, half": Point("fork", lambda e: e.kv, "_copy_pages", None, late=True, harmless=True),
    "sample": Point("sample", module, "sample", lambda logits, sequences, *_: sequences),
    "detokenize": Point("detokenize", module, "stop_after", lambda one, *_: [one], late=True, lasting=True),
    "report": Point("report", module, "token_output", lambda one, *_: [one], lasting=True),
    "explain": Point("explain", module, "explain", lambda *_: ["explained"], "explained"),
    "statistics": Point("report", lambda e: StepReport, "stats", None, harmless=True),
    "free": Point("free", lambda e: e.kv, "free", None, harmless=True),
    "free, half": Point("free", lambda e: e.kv.pool, "release", None, late=True, harmless=True),
}


def inject(
    patch: pytest.MonkeyPatch, engine: Engine, point: Point, times: float, victim: Request | None
) -> list[int]:
    """Has a function raise so many times; with a victim, only where it works on that one.

    Returns:
        An element per time that it raised.
    """
    original, raised = getattr(point.owner(engine), point.name), []

    def hit(args: tuple[Any, ...]) -> bool:
        if victim is None or point.involved is None:
            return True
        its = [s for s in engine.scheduler.running if s.request.id == victim.id]
        known = [*its, *(s.slot for s in its), *(s.plan for s in its)]
        known += [victim.id, tuple(victim.prompt_token_ids)]
        return any(x in known for x in point.involved(*args))

    def breaking(*args: Any, **named: Any) -> Any:
        breaks = len(raised) < times and hit(args)
        result = original(*args, **named) if point.late or not breaks else None
        if breaks:
            raised.append(1)
            raise Breakdown(point.name)
        return result

    patch.setattr(point.owner(engine), point.name, breaking)
    return raised


def assert_nothing_is_left(engine: Engine) -> None:
    assert not engine.has_work
    engine.drop_prefixes()
    engine.check_integrity()
    assert engine.kv.active_slots == [] and not engine.kv.observed
    assert engine.kv.pool.num_free == engine.kv.num_pages
    engine.step()
    stats = engine.last_stats
    assert (stats.running, stats.waiting, stats.used_pages, stats.sequences) == (0, 0, 0, [])


def test_load_gets_what_each_gets_alone() -> None:
    engine = make_engine()
    served = Served(engine, requests())
    assert served.told == alone()
    assert_nothing_is_left(engine)


def assert_untouched(served: Served) -> None:
    """Whoever was not ended got what it gets alone."""
    for key, answer in served.told.items():
        if key not in (*served.faults, *served.unfinished):
            assert answer == alone()[key], key


@pytest.mark.parametrize("name", POINTS)
def test_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, point = make_engine(), POINTS[name]
    with monkeypatch.context() as patch:
        raised = inject(patch, engine, point, 1, None)
        served = Served(engine, requests())
    assert raised and not served.broken
    ended = [*served.faults, *served.untaken]
    assert len(ended) == (1 if point.lasting else 0), served.faults
    assert_untouched(served)
    assert_nothing_is_left(engine)


@pytest.mark.parametrize("name", [name for name, point in POINTS.items() if point.involved is not None])
def test_for_ever_for_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, point, items = make_engine(), POINTS[name], requests()
    victim = next(item for item in items if item.id == point.victim)
    with monkeypatch.context() as patch:
        raised = inject(patch, engine, point, float("inf"), victim)
        served = Served(engine, items)
    assert raised and not served.broken
    assert served.untaken == ([victim.id] if point.phase == "add" else [])
    if point.phase != "add":
        assert served.unfinished == []
        assert served.faults == ({} if point.harmless else {(victim.id, 0): point.phase})
    assert_untouched(served)
    assert_nothing_is_left(engine)


@pytest.mark.parametrize("name", POINTS)
def test_for_ever_for_all(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, point, items = make_engine(), POINTS[name], requests()
    with monkeypatch.context() as patch:
        raised = inject(patch, engine, point, float("inf"), None)
        served = Served(engine, items)
    assert raised
    if point.involved is not None:
        assert set(served.faults.values()) <= {point.phase}
    assert_untouched(served)
    if not served.broken:
        assert {id for id, _ in served.unfinished} == set(served.untaken)
        assert_nothing_is_left(engine)
        again = Served(engine, items)
        assert again.told == alone() and not again.broken


@pytest.mark.parametrize("name", ["forward", "schedule", "sample"])
def test_an_engine_that_fails_all_the_time_is_given_up(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    inject(monkeypatch, engine, POINTS[name], float("inf"), None)
    for _ in range(MAX_FAILED_STEPS - 1):
        assert not Served(engine, requests()[:1]).broken
    assert Served(engine, requests()[:1]).broken


@pytest.mark.parametrize("name", ["evict", "judged", "forward"])
def test_a_run_of_poisoned_requests_ends_nobody_else(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, items = make_engine(), {item.id: item for item in requests()}
    point = POINTS["prompt_logprobs" if name == "judged" else name]
    victim = items[point.victim]
    inject(monkeypatch, engine, point, float("inf"), victim)
    for _ in range(3 * MAX_FAILED_STEPS):
        served = Served(engine, [victim])
        assert served.faults == {(victim.id, 0): point.phase} and not served.broken
    assert Served(engine, [items["full"]]).told[("full", 0)] == alone()[("full", 0)]
    assert_nothing_is_left(engine)


def test_steps_that_fail_only_together_are_the_engines_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, forward = make_engine(), Decoder.forward

    def only_alone(self: Decoder, batch: Batch, attention: PagedAttention) -> torch.Tensor:
        if len(batch.slots) > 1:
            raise Breakdown
        return forward(self, batch, attention)

    monkeypatch.setattr(Decoder, "forward", only_alone)
    served = Served(engine, requests())
    assert served.broken and not served.faults


def test_a_lost_device_ends_the_engine_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()

    def lost(*_: Any) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(engine.runner.model, "forward", lost)
    for item in requests():
        engine.add(engine.plan(item))
    with pytest.raises(EngineBroken, match="illegal memory access"):
        engine.step()


def test_lack_of_memory_ends_who_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, forward = make_engine(), Decoder.forward

    def small(self: Decoder, batch: Batch, attention: PagedAttention) -> torch.Tensor:
        if len(batch.token_ids) > 60:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, batch, attention)

    monkeypatch.setattr(Decoder, "forward", small)
    served = Served(engine, requests())
    assert not served.broken
    ended = {id for id, _ in served.faults}
    assert ended >= {"snapcur", "curdkv"} and ended.isdisjoint({"structured", "judged"})
    assert_untouched(served)
    assert_nothing_is_left(engine)


def test_who_finds_no_pages_after_all_waits_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, run, short = make_engine(), Runner.run, [0]

    def sometimes(self: Runner, *arguments: Any) -> torch.Tensor:
        short[0] += 1
        if 3 <= short[0] <= 5 and len(engine.scheduler.running) > 1:
            raise OutOfPages(8, 6)
        return run(self, *arguments)

    monkeypatch.setattr(Runner, "run", sometimes)
    served = Served(engine, requests())
    assert short[0] > 5 and not served.broken and not served.faults
    assert served.told == alone()
    assert_nothing_is_left(engine)


def test_statistics_of_a_failed_step_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    inject(monkeypatch, engine, POINTS["sample"], 2, None)
    engine.add(engine.plan(requests()[2]))
    finished = []
    while engine.has_work:
        engine.step()
        finished += [stats.finish_reason for stats in engine.last_stats.finished]
    engine.step()
    assert finished == ["error"] and engine.last_stats.finished == []
    assert engine.last_stats.running == 0 and engine.last_stats.sequences == []


async def heard(client: EngineClient, item: Request) -> dict[int, Told] | Exception:
    """What a client gets: what each choice is told, or the error that its request ends with."""
    news: dict[int, list[Output]] = {index: [] for index in range(item.sampling.n)}
    try:
        async for output in client.generate(client.plan(item)):
            if output.problem is not None:
                return output.problem
            news[output.index].append(output)
    except (EngineFault, EngineUnavailable) as error:
        return error
    return {index: told(outputs) for index, outputs in news.items()}


async def hear(client: EngineClient) -> dict[str, dict[int, Told] | Exception]:
    items = requests()
    async with asyncio.timeout(20):
        answers = await asyncio.gather(*(heard(client, item) for item in items))
    return {item.id: answer for item, answer in zip(items, answers, strict=True)}


def answer_alone(item: Request) -> dict[int, Told]:
    return {index: alone()[item.id, index] for index in range(item.sampling.n)}


@pytest.mark.parametrize("name", ["add", "start", "forward, half", "evict", "sample", "detokenize"])
async def test_clients_hear_of_the_fault_of_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    point, engine = POINTS[name], make_engine()
    inject(monkeypatch, engine, point, float("inf"), {item.id: item for item in requests()}[point.victim])
    client = EngineClient.start(engine)
    answers = await hear(client)
    fault = answers.pop(point.victim)
    assert isinstance(fault, EngineFault) and point.phase in str(fault) and client.healthy
    assert answers == {item.id: answer_alone(item) for item in requests() if item.id != point.victim}
    client.stop()
    monkeypatch.undo()
    assert_nothing_is_left(engine)


@pytest.mark.parametrize(
    "name", ["add", "schedule", "forward", "evict", "sample", "detokenize", "free, half"]
)
async def test_every_client_gets_an_answer_whatever_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, ended = make_engine(), []
    inject(monkeypatch, engine, POINTS[name], float("inf"), None)
    client = EngineClient.start(engine)
    client.on_death(lambda: ended.append(1))
    for _ in range(MAX_FAILED_STEPS):
        for item, answer in zip(requests(), (await hear(client)).values(), strict=True):
            assert isinstance(answer, EngineFault | EngineUnavailable) or answer == answer_alone(item)
    dead = not client.healthy
    client.stop()
    assert ended == [1] * dead
    if name in ("schedule", "forward"):  # the others let through who only asks for an explanation
        assert dead
    with pytest.raises(EngineUnavailable):
        await client.drop_prefixes()


async def test_a_lost_device_ends_the_client_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, ended = make_engine(), []

    def lost(*_: Any) -> None:
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(engine.runner.model, "forward", lost)
    client = EngineClient.start(engine)
    client.on_death(lambda: ended.append(1))
    assert all(isinstance(answer, EngineUnavailable) for answer in (await hear(client)).values())
    assert not client.healthy
    client.stop()
    client.on_death(lambda: ended.append(2))
    assert ended == [1, 2] and client.state == "dead"
