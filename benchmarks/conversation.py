"""A conversation of many turns: what each turn waits for and what is held, and which facts are still known.

    python benchmarks/conversation.py turns
    python benchmarks/conversation.py turns --agent
    python benchmarks/conversation.py restart
    python benchmarks/conversation.py rounding --weights int8
    python benchmarks/conversation.py facts --policies snapkv,curdkv --conversations 3

`turns` lets the same conversation grow by 40 turns in engines that compute everything again, that cache
prompts, that cache answers too, and with a session at a budget. `restart` ends the engine before the last
turn and goes on from its prefix store. `rounding` says what an answer that is reused changes in the next one.
`facts` tells a fact in each turn and asks for all of them in the end:
of a session, and of the same policy that is given the whole conversation, with the question and without it.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from curkv.bench.script import Model, script
from curkv.bench.text import documentation_text
from curkv.cache.parsing import parse_options
from curkv.cache.prefixes import common_length
from curkv.config import EngineOptions
from curkv.engine.build import build_engine
from curkv.engine.engine import Engine
from curkv.engine.types import Output, Request, SamplingParams
from curkv.models.loading.built_in import DEFAULT_MODEL
from curkv.tables import head, line

MIB = 2**20
POOL = 2**30
KV = dict[str, str]


@dataclass
class Turn:
    """What a turn of a conversation cost.

    Attributes:
        prompt: tokens of its prompt.
        computed: of these, tokens that were computed.
        ttft: seconds to the first token.
        held: bytes of the pages that its sequence held at the end.
    """

    prompt: int
    computed: int
    ttft: float
    held: int


@dataclass
class Way:
    """One way to serve a conversation.

    Attributes:
        engine: what serves it.
        kv: its options.
        session: its name; "": it has none.
        turns: what each turn cost.
    """

    engine: Engine
    kv: KV = field(default_factory=dict)
    session: str = ""
    turns: list[Turn] = field(default_factory=list)

    def ask(self, prompt: list[int], max_tokens: int, logprobs: int | None = None) -> list[Output]:
        """Runs one request to its end, and notes what it cost."""
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, logprobs=logprobs)
        request = Request("turn", prompt, sampling, parse_options(self.kv), session=self.session)
        started, first = time.perf_counter(), 0.0
        self.engine.add(self.engine.plan(request))
        outputs: list[Output] = []
        while self.engine.has_work:
            outputs += self.engine.step()
            first = first or (time.perf_counter() - started if outputs else 0.0)
        cached, kv = outputs[-1].cached_tokens, outputs[-1].kv
        self.turns.append(Turn(len(prompt), len(prompt) - cached, first, kv.bytes if kv is not None else 0))
        return outputs


def turns(
    model: Model = DEFAULT_MODEL,
    weights: str = "int8",
    tokens: Annotated[int, typer.Option(help="Of the conversation in the end.")] = 8000,
    count: Annotated[int, typer.Option(help="Turns.")] = 40,
    policy: str = "snapkv",
    agent: Annotated[bool, typer.Option(help="Few tokens are answered and many come from tools.")] = False,
) -> None:
    """Prints a line for some of the turns of each way."""
    answer = 20 if agent else max(8, min(200, tokens // count - 20))
    told = tokens // count - answer
    share, budget = {"policy": policy, "budget": "25%"}, {"policy": policy, "budget": f"{tokens // 4}tok"}
    ways = {
        "computed anew": Way(_engine(model, weights, prefix_cache_memory=0)),
        "prompts cached": Way(_engine(model, weights, prefix_cache="exact")),
        "answers cached": Way(_engine(model, weights)),
        "session, 25%": Way(_engine(model, weights), share, "chat"),
        f"session, {tokens // 4} tokens": Way(_engine(model, weights), budget, "chat"),
    }
    encode = ways["computed anew"].engine.info.tokenizer.encode
    text = encode(documentation_text()[: 8 * tokens]).ids
    grown: list[int] = []
    for turn in range(count):
        grown += text[turn * told : (turn + 1) * told]
        answers = [_tokens(way.ask(list(grown), answer)) for way in ways.values()]
        grown += answers[0]  # all ways go on with the same text
    print(head(["", "turn", "prompt tokens", "computed", "TTFT s", "held MiB", "all sessions MiB"]))
    for name, way in ways.items():
        for number in sorted({1, 2, 5, count // 2, count}):
            cost = way.turns[number - 1]
            sessions = sum(s.bytes for s in way.engine.sessions("")) / MIB if number == count else 0
            print(
                line(
                    [
                        name,
                        str(number),
                        str(cost.prompt),
                        str(cost.computed),
                        f"{cost.ttft:.3f}",
                        f"{cost.held / MIB:.1f}",
                        f"{sessions:.1f}" if sessions else "",
                    ]
                )
            )


def rounding(
    model: Model = DEFAULT_MODEL,
    weights: str = "float32",
    conversations: int = 20,
    tokens: Annotated[int, typer.Option(help="Of prompt and of answer, 200 each by default.")] = 200,
) -> None:
    """Prints how far second answers are from those for which the first answer was computed as a prompt."""
    ways = {
        "exact": Way(_engine(model, weights, prefix_cache="exact")),
        "reused": Way(_engine(model, weights)),
    }
    text = ways["exact"].engine.info.tokenizer.encode(documentation_text()[: 40 * tokens * conversations]).ids
    same, first_same, distances = 0, 0, list[float]()
    for i in range(conversations):
        prompt = text[2 * i * tokens : (2 * i + 1) * tokens]
        answer = _tokens(ways["exact"].ask(prompt, tokens))
        if answer != _tokens(ways["reused"].ask(prompt, tokens)):
            raise SystemExit("a first answer differs")
        more = [*prompt, *answer, *text[(2 * i + 1) * tokens :][:30]]
        found = {name: way.ask(more, 40, logprobs=0) for name, way in ways.items()}
        tokens_of = {name: _tokens(outputs) for name, outputs in found.items()}
        common = common_length(tokens_of["exact"], tokens_of["reused"])
        same += common == 40
        first_same += common > 0
        for a, b in list(zip(found["exact"], found["reused"], strict=True))[: common + 1]:
            if a.logprobs and b.logprobs and a.token_ids == b.token_ids:
                distances.append(abs(a.logprobs[0].logprob - b.logprobs[0].logprob))
    print(
        head(
            ["weights", "answers of 40 equal", "first tokens equal", "log-probability: mean, largest change"]
        )
    )
    change = f"{sum(distances) / len(distances):.2g}, {max(distances):.2g}"
    print(line([weights, f"{same} of {conversations}", f"{first_same} of {conversations}", change]))


def restart(
    model: Model = DEFAULT_MODEL,
    weights: str = "int8",
    tokens: Annotated[int, typer.Option(help="Of the conversation.")] = 8000,
    count: Annotated[int, typer.Option(help="Turns.")] = 8,
    policy: str = "snapkv",
) -> None:
    """Prints what the turn behind a restart waits for, with a prefix store and without."""
    ways: dict[str, KV] = {"full": {}, "25%": {"policy": policy, "budget": "25%"}}
    times = "TTFT before s", "TTFT after s", "computed", "computed anew s"
    print(head(["", *times, "on disk MiB", "read s", "after / anew"]))
    for name, kv in ways.items():
        with tempfile.TemporaryDirectory() as directory:
            engine = _engine(model, weights, prefix_store=directory)
            text = engine.info.tokenizer.encode(documentation_text()[: 8 * tokens]).ids
            way, step, grown = Way(engine, kv, "chat"), tokens // count, list[int]()
            for turn in range(count):
                grown += text[turn * step :][: step if turn < count - 1 else 30]
                grown += _tokens(way.ask(list(grown), 8))
            before = way.turns[-1]
            engine.close(60)
            way.engine = engine = _engine(model, weights, prefix_store=directory)
            grown += text[-30:]
            way.ask(grown, 2)
            after = way.turns[-1]
            engine.close(60)
            engine.step()
            store = engine.last_stats.store
            read, size = store.read_seconds, store.bytes / MIB
        anew = Way(_engine(model, weights, prefix_cache_memory=0), kv)
        anew.ask(grown, 2)
        whole = anew.turns[-1].ttft
        cells = f"{before.ttft:.3f}", f"{after.ttft:.3f}", str(after.computed), f"{whole:.2f}"
        print(line([name, *cells, f"{size:.1f}", f"{read:.3f}", f"{after.ttft / whole:.3f}"]), flush=True)


@dataclass(frozen=True)
class Fact:
    """Something told in a turn: how it is said, how it is asked, and the answer."""

    said: str
    asked: str
    begun: str
    answer: str


_THINGS = ("door", "chest", "locker", "bicycle", "garage", "cabin", "boat", "tower", "cellar", "archive")
_COLOURS = ("red", "blue", "green", "white", "black", "yellow", "brown", "silver")
_NAMES = ("Anna", "Bert", "Clara", "David", "Emma", "Frank", "Greta", "Henry", "Ida", "Jonas", "Karla", "Leo")
_TOWNS = ("Lisbon", "Oslo", "Vienna", "Dublin", "Prague", "Athens", "Zurich", "Madrid", "Warsaw", "Helsinki")
_PETS = ("cat", "horse", "parrot", "turtle", "rabbit", "goat", "hamster", "donkey")


def facts_of(count: int, seed: int) -> list[Fact]:
    """Different facts of three kinds."""
    draw = random.Random(seed)
    things = draw.sample([f"{c} {t}" for c in _COLOURS for t in _THINGS], count)
    people = draw.sample([f"{a} {b}son" for a in _NAMES for b in _NAMES if a != b], 2 * count)
    facts = []
    for i in range(count):
        thing, number = things[i], str(draw.randrange(1000, 10000))
        person, other = people[2 * i], people[2 * i + 1]
        town, pet = draw.choice(_TOWNS), draw.choice(_PETS)
        facts.append(
            [
                Fact(f"The code of the {thing} is {number}.", f"What is the code of the {thing}?",
                     f"The code of the {thing} is", number),
                Fact(f"My friend {person} lives in {town}.", f"Where does {person} live?",
                     f"Your friend {person} lives in", town),
                Fact(f"My neighbour {other} has a {pet}.", f"Which animal does {other} have?",
                     f"Your neighbour {other} has a", pet),
            ][i % 3]
        )  # fmt: skip
    return facts


def facts(
    model: Model = DEFAULT_MODEL,
    weights: str = "int8",
    tokens: Annotated[int, typer.Option(help="Of a conversation.")] = 4000,
    conversations: Annotated[int, typer.Option(help="Each with facts, texts and seeds of its own.")] = 3,
    count: Annotated[int, typer.Option(help="Turns of a conversation; all but the last tell a fact.")] = 40,
    policies: str = "snapkv,snapcur,curdkv,adacurdkv,streaming-llm",
    budgets: str = "50%,25%",
) -> None:
    """Prints the share of facts still answered, of all that are asked."""
    engine = _engine(model, weights)
    ways = [("full", "")] + [(p, b) for p in policies.split(",") for b in budgets.split(",")]
    right: dict[tuple[str, str, str], list[bool]] = {}
    for seed in range(conversations):
        told, known = list(_conversation(engine, tokens, count, seed)), facts_of(count - 1, seed)
        questions = [_question(engine, fact) for fact in known]
        for policy, budget in ways:
            kv = {"policy": policy, **({"budget": budget} if budget else {})}
            session = Way(engine, kv, "chat")
            for prompt in told:
                session.ask(prompt, 0)
            behind = {**kv, "context_tokens": str(len(told[-1]))} if budget else kv
            for name, way in (
                ("session", session),
                ("again, question seen", Way(engine, kv)),
                ("again, question hidden", Way(engine, behind)),
            ):
                found = right.setdefault((policy, budget, name), [])
                for fact, question in zip(known, questions, strict=True):
                    outputs = way.ask([*told[-1], *question], 8)
                    found.append(fact.answer in "".join(output.text for output in outputs))
            engine.drop_session("", "chat")
            counts = {n: sum(found) for (p, b, n), found in right.items() if (p, b) == (policy, budget)}
            print(seed, policy, budget, counts, flush=True)
    names = ("session", "again, question hidden", "again, question seen")
    print(head(["policy", "budget", *names]))
    for policy, budget in ways:
        shares = [right[policy, budget, name] for name in names]
        print(line([policy, budget, *(f"{sum(r) / len(r):.0%} of {len(r)}" for r in shares)]))


def _conversation(engine: Engine, tokens: int, count: int, seed: int) -> Iterator[list[int]]:
    """The conversation at the end of each of its turns, which tell facts among other text."""
    draw, text, encode = random.Random(1000 + seed), documentation_text(), engine.info.tokenizer.encode
    grown: list[int] = []
    for fact in facts_of(count - 1, seed):
        start = draw.randrange(len(text) - 10_000)
        filler = encode(text[start : start + 4000]).ids
        turn = f"<|im_start|>user\nBy the way: {fact.said} And this is from my notes:"
        end = encode("<|im_end|>\n<|im_start|>assistant\nThank you, I have noted all of it.<|im_end|>\n").ids
        ids = encode(turn).ids
        grown += [*ids, *filler[: max(0, tokens // count - len(ids) - len(end))], *end]
        yield list(grown)


def _question(engine: Engine, fact: Fact) -> list[int]:
    text = f"<|im_start|>user\n{fact.asked}<|im_end|>\n<|im_start|>assistant\n{fact.begun}"
    ids: list[int] = engine.info.tokenizer.encode(text).ids
    return ids


def _tokens(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def _engine(model: str, weights: str, **options: Any) -> Engine:
    memory = {"kv_cache_memory": POOL, "prefix_cache_memory": POOL // 2, **options}
    return build_engine(EngineOptions(model=model, weights=weights, **memory))


app = script(__doc__, turns, rounding, restart, facts)

if __name__ == "__main__":
    app()
