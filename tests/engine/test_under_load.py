"""What a request gets when others crowd it: the answer that it has alone, to the last bit."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from curkv.bench.small_model import write_small_model
from curkv.bench.text import documentation_text
from curkv.cache.parsing import parse_options
from curkv.cache.policies import policy_names
from curkv.config import EngineOptions
from curkv.engine.build import build_engine
from curkv.engine.client import EngineClient
from curkv.engine.engine import Engine
from curkv.engine.types import Output, Request, SamplingParams, Structure, TokenLogprob

COUNT, AT_ONCE, GONE = 120, 14, 0.3
ENGINE = EngineOptions(
    page_size=16, max_step_tokens=64, max_sequences=12, max_model_len=512, kv_dtype="float16"
)
ROOMY, TIGHT = 16 << 20, 500 << 10


@dataclass
class Answer:
    """What a choice was told."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    kept: list[object] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, output: Output) -> None:
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs or []
        self.prompt_logprobs += output.prompt_logprobs or []
        self.kept += [(item.kept.tolist(), item.errors.tolist()) for item in output.explanations]
        self.finish_reason = output.finish_reason


Answers = dict[int, Answer]
"""By choice."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_small_model(path)
    return path


def mixed(tokenizer: Tokenizer) -> Iterator[Request]:
    """Every policy, and every way in which a request can be more than a prompt; documents come again."""
    draw, ids = random.Random(7), tokenizer.encode(documentation_text()[:20_000]).ids
    documents = [ids[1000 * i :][:200] for i in range(4)]
    for i in range(COUNT):
        kv: dict[str, object] = {"policy": policy_names()[i % len(policy_names())]}
        document = draw.choice(documents)[: draw.choice((20, 33, 33, 64, 200))]
        prompt = document + ids[draw.randrange(9000) :][: draw.randint(2, 60)]
        if kv["policy"] != "full":
            kv |= {
                "budget": draw.choice(("25%", "50%")),
                "sink_tokens": 1,
                "recent_tokens": draw.choice((0, 4)),
            }
            more = draw.choice(({}, {"decode_budget": 60, "decode_interval": 8}, {}))
            ways = {"context_tokens": len(document)}, {"prefill": "streaming", "prefill_chunk": 48}, {}, {}
            more |= draw.choice(ways)
            once = kv["policy"] == "kvzip"  # and neither in pieces nor while generating
            kv |= {"context_tokens": len(document)} if once else more
        length = draw.choice((4, 20, 80))
        sampling = SamplingParams(max_tokens=length, temperature=0.0, logprobs=2, ignore_eos=True)
        request = Request(f"{i}", prompt, sampling, parse_options(kv))
        match i % 9:
            case 0:
                sampling = replace(sampling, n=3, temperature=0.8, seed=i)
            case 1:
                sampling = replace(sampling, prompt_logprobs=1)
            case 2:
                sampling = replace(sampling, structure=Structure("regex", "[a-z ]{5,30}[.]", "guided_regex"))
            case 3 if not {"context_tokens", "prefill"} & kv.keys():
                sampling = replace(sampling, max_tokens=0, logprobs=None)
                request = replace(request, explain=(request.eviction,), eviction=parse_options({}))
        yield replace(request, sampling=sampling)


def alone(engine: Engine, request: Request) -> Answers:
    """A request's answers if nobody else is there."""
    answers: Answers = defaultdict(Answer)
    engine.add(engine.plan(request))
    while engine.has_work:
        for output in engine.step():
            answers[output.index].add(output)
    return answers


async def ask(client: EngineClient, request: Request, patience: int | None) -> Answers | None:
    """A request's answers; None if it went away after so many pieces of news."""
    answers: Answers = defaultdict(Answer)
    async with aclosing(client.generate(client.plan(request))) as stream:
        async for output in stream:
            answers[output.index].add(output)
            if patience is not None and (patience := patience - 1) < 0:
                return None
    return answers


async def crowd(client: EngineClient, requests: list[Request]) -> list[Answers | None]:
    """Many at once, of which some go away in the midst of their answers."""
    draw, room = random.Random(3), asyncio.Semaphore(AT_ONCE)

    async def one(request: Request, patience: int | None) -> Answers | None:
        async with room:
            return await ask(client, request, patience)

    lengths = [request.sampling.max_tokens or 0 for request in requests]
    patience = [draw.randint(0, length) if draw.random() < GONE else None for length in lengths]
    return list(await asyncio.gather(*map(one, requests, patience)))


@pytest.mark.parametrize("weights", ["float32", "int8"])
async def test_every_answer_is_the_one_that_it_has_alone(directory: Path, weights: str) -> None:
    options = ENGINE.model_copy(update={"model": str(directory), "weights": weights})
    roomy = build_engine(options.model_copy(update={"kv_cache_memory": ROOMY, "prefix_cache_memory": 0}))
    engine = build_engine(options.model_copy(update={"kv_cache_memory": TIGHT}))
    requests = list(mixed(engine.info.tokenizer))
    expected = [alone(roomy, request) for request in requests]
    client, seen = EngineClient.start(engine), Counter[str]()
    client.add_sink(lambda stats: seen.update(preempted=stats.preemptions, hits=stats.prefix_hits))
    try:
        found = await crowd(client, requests)
        await client.drop_prefixes()
    finally:
        client.stop()
    differing = [
        (request.id, request.eviction)
        for request, answer, other in zip(requests, found, expected, strict=True)
        if answer is not None and answer != other
    ]
    assert not differing
    assert seen["preempted"] > 5 and seen["hits"] > 300 and COUNT // 5 < found.count(None) < COUNT // 2
    assert not engine.has_work and not engine.kv.used_pages and not engine.kv.prefixes.held_pages
    assert engine.kv.pool.num_free == engine.kv.num_pages and not engine.kv.active_slots
    engine.check_integrity()
