"""A conversation of many turns: what each turn waits for and what is held, and which facts are still known.

    for mode in anew prompts answers session; do
        python benchmarks/conversation.py turns chat.jsonl $mode; done
    for mode in anew prompts answers session; do
        python benchmarks/conversation.py turns agent.jsonl $mode --agent; done
    benchmarks/peers/llama.sh serve 8001 & python benchmarks/conversation.py served chat.jsonl llama.cpp \\
        --url http://127.0.0.1:8001
    python benchmarks/conversation.py table chat.jsonl --plot chat.png
    python benchmarks/conversation.py restart
    python benchmarks/conversation.py rounding --weights int8
    python benchmarks/conversation.py facts facts.jsonl --policies snapkv,curdkv --seeds 0-3

`turns` lets a conversation grow by 40 turns in an engine that computes everything again, that caches
prompts, that caches answers too, or with a session at a budget; `served` does so on any server. `restart`
ends the engine before the last turn and goes on from its prefix store. `rounding` says what an answer that is
reused changes in the next one. `facts` tells a fact in each turn and asks for all of them in the end: of a
session, and of the same policy that is given the whole conversation, with the question and without it.
"""

from __future__ import annotations

import itertools
import json
import random
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from curkv.bench.script import Model, script
from curkv.bench.text import documentation_text
from curkv.cache.parsing import parse_options
from curkv.cache.prefixes import common_length
from curkv.config import EngineOptions
from curkv.engine.build import build_engine
from curkv.engine.engine import Engine
from curkv.engine.types import Output, Request, SamplingParams
from curkv.evaluation.statistics import proportion
from curkv.models.loading import load_tokenizer, resolve_model
from curkv.models.loading.built_in import DEFAULT_MODEL
from curkv.sse import event_of
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

    def ask_at_once(self, prompts: list[list[int]], max_tokens: int) -> list[str]:
        """Runs several requests together; of a session all go on from its newest state."""
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        for i, prompt in enumerate(prompts):
            request = Request(str(i), prompt, sampling, parse_options(self.kv), session=self.session)
            self.engine.add(self.engine.plan(request))
        texts = [""] * len(prompts)
        while self.engine.has_work:
            for output in self.engine.step():
                texts[int(output.request_id)] += output.text
                anew = output.finish_reason and output.cached_tokens < len(prompts[0]) // 2
                if self.session and anew:
                    raise SystemExit("a request did not go on from the session")
        return texts

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


ONE_EACH = httpx.Limits(max_keepalive_connections=0)
"""A connection for each request: there are servers that close one after the first."""

_MODES: dict[str, dict[str, Any]] = {
    "anew": {"prefix_cache_memory": 0},
    "prompts": {"prefix_cache": "exact"},
    "answers": {},
    "session": {},
}


def turns(
    output: Annotated[Path, typer.Argument(help="File of results, a JSON line each; `table` prints it.")],
    mode: Annotated[str, typer.Argument(help=f"{', '.join(_MODES)}.")],
    model: Model = DEFAULT_MODEL,
    weights: str = "int8",
    tokens: Annotated[int, typer.Option(help="Of the conversation in the end.")] = 8000,
    count: Annotated[int, typer.Option(help="Turns.")] = 40,
    answer: Annotated[int, typer.Option(help="Tokens of an answer; the rest of a turn is told.")] = 180,
    agent: Annotated[bool, typer.Option(help="20 tokens are answered, the others come from tools.")] = False,
    policy: Annotated[str, typer.Option(help="Of a session.")] = "auto",
    budget: Annotated[str, typer.Option(help="Of a session.")] = "25%",
) -> None:
    """Lets a conversation grow in one way of serving it; where nothing is cached, only some turns are run."""
    name = f"session, {policy}, {budget}" if mode == "session" else mode
    kv = {"policy": policy, "budget": budget} if mode == "session" else {}
    way = Way(engine_of(model, weights, **_MODES[mode]), kv, "chat" if mode == "session" else "")
    answer = 20 if agent else answer
    told, text = tokens // count - answer, _encode(way.engine, documentation_text()[: 8 * tokens])
    grown: list[int] = []
    with output.open("a") as file:
        for turn in range(1, count + 1):
            grown += text[len(grown) :][:told]
            if mode != "anew" or turn in _shown(count):
                said = _tokens(way.ask(list(grown), answer if mode != "anew" else 1))
                cost = {**asdict(way.turns[-1]), "sessions": sum(s.bytes for s in way.engine.sessions(""))}
                file.write(json.dumps({"name": name, "turn": turn, **cost}) + "\n")
                file.flush()
            grown += said if mode != "anew" else text[len(grown) :][:answer]


def served(
    output: Annotated[Path, typer.Argument(help="File of results, as of `turns`.")],
    name: Annotated[str, typer.Argument(help="What serves, as the table is to name it.")],
    url: str = "http://127.0.0.1:8000",
    tokens: Annotated[int, typer.Option(help="Of the conversation in the end.")] = 4000,
    count: Annotated[int, typer.Option(help="Turns.")] = 20,
    answer: Annotated[int, typer.Option(help="Tokens of an answer; the rest of a turn is told.")] = 180,
    kv: Annotated[str, typer.Option(help="Eviction controls, JSON, of a curkv.")] = "",
) -> None:
    """Lets a conversation grow on any server; what it computed, curkv and llama.cpp tell."""
    tokenizer = load_tokenizer(resolve_model(DEFAULT_MODEL))
    told, text = tokens // count - answer, tokenizer.encode(documentation_text()[: 8 * tokens]).ids
    body: dict[str, Any] = {"max_tokens": answer, "temperature": 0, "ignore_eos": True, "stream": True}
    body |= {"stream_options": {"include_usage": True}, **({"kv": json.loads(kv)} if kv else {})}
    body["cache_salt"] = uuid.uuid4().hex  # nothing is reused of another run
    grown: list[int] = []
    with output.open("a") as file, httpx.Client(base_url=url, timeout=None, limits=ONE_EACH) as http:
        body["model"] = http.get("/v1/models").json()["data"][0]["id"]
        for turn in range(1, count + 1):
            grown += text[len(grown) :][:told]
            started, first, said, known = time.perf_counter(), 0.0, "", 0
            with http.stream("POST", "/v1/completions", json={**body, "prompt": grown}) as response:
                for event in filter(None, map(event_of, response.iter_lines())):
                    said += "".join(choice["text"] for choice in event["choices"])
                    first = first or (time.perf_counter() - started if said else 0.0)
                    details = (event.get("usage") or {}).get("prompt_tokens_details") or {}
                    known = details.get("cached_tokens") or event.get("timings", {}).get("cache_n") or known
            cost = asdict(Turn(len(grown), len(grown) - known, first, 0))
            file.write(json.dumps({"name": name, "turn": turn, **cost, "sessions": 0}) + "\n")
            file.flush()
            grown += tokenizer.encode(said, add_special_tokens=False).ids


def _shown(count: int) -> list[int]:
    """The turns of a conversation that tables show."""
    return sorted({1, count // 8, count // 4, count // 2, 3 * count // 4, count} - {0})


def table(
    results: Annotated[Path, typer.Argument(help="What `turns` has written.")],
    plot: Annotated[Path | None, typer.Option(help="Image to draw.")] = None,
) -> None:
    """Prints some turns of each way, and how much longer the last one waits than that after an eighth."""
    ways: dict[str, dict[int, dict[str, Any]]] = {}
    for cost in map(json.loads, results.read_text().splitlines()):
        ways.setdefault(cost["name"], {})[cost["turn"]] = cost
    last = max(turn for costs in ways.values() for turn in costs)
    shown = _shown(last)
    for title, key, unit in (("Tokens computed", "computed", 1), ("TTFT s", "ttft", 1), ("MiB", "held", MIB)):
        print(head([title, *(f"turn {turn}" for turn in shown), f"{last} / {shown[1]}"]))
        for name, costs in ways.items():
            values = [costs[turn][key] / unit if turn in costs else float("nan") for turn in shown]
            cells = [f"{value:.3g}" if key != "computed" else f"{value:.0f}" for value in values]
            if any(values):  # of other servers it is not known what they hold
                print(line([name, *cells, f"{values[-1] / values[1]:.2f}"]))
        print()
    for name, costs in ways.items():
        if costs[last]["sessions"]:
            print(f"{name}: all states of the session in the end: {costs[last]['sessions'] / MIB:.1f} MiB")
    if plot is not None:
        _draw(ways, plot)


def _draw(ways: dict[str, dict[int, dict[str, Any]]], path: Path) -> None:
    """Tokens computed, time to the first token and bytes held over the turns."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.5), layout="constrained")
    panels = ("computed", "tokens computed", 1), ("ttft", "first token, s", 1), ("held", "held, MiB", MIB)
    for axes, (key, title, unit) in zip(figure.subplots(1, 3), panels, strict=True):
        for name, costs in ways.items():
            axes.plot(list(costs), [cost[key] / unit for cost in costs.values()], label=name, marker=".")
        axes.set(xlabel="turn", title=title, ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120)


def rounding(
    model: Model = DEFAULT_MODEL,
    weights: str = "float32",
    conversations: int = 20,
    tokens: Annotated[int, typer.Option(help="Of prompt and of answer, 200 each by default.")] = 200,
) -> None:
    """Prints how far second answers are from those for which the first answer was computed as a prompt."""
    ways = {
        "exact": Way(engine_of(model, weights, prefix_cache="exact")),
        "reused": Way(engine_of(model, weights)),
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
            engine = engine_of(model, weights, prefix_store=directory)
            text = engine.info.tokenizer.encode(documentation_text()[: 8 * tokens]).ids
            way, step, grown = Way(engine, kv, "chat"), tokens // count, list[int]()
            for turn in range(count):
                grown += text[turn * step :][: step if turn < count - 1 else 30]
                grown += _tokens(way.ask(list(grown), 8))
            before = way.turns[-1]
            engine.close(60)
            way.engine = engine = engine_of(model, weights, prefix_store=directory)
            grown += text[-30:]
            way.ask(grown, 2)
            after = way.turns[-1]
            engine.close(60)
            engine.step()
            store = engine.last_stats.store
            read, size = store.read_seconds, store.bytes / MIB
        anew = Way(engine_of(model, weights, prefix_cache_memory=0), kv)
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
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_DISHES = ("pancakes", "dumplings", "risotto", "lasagna", "goulash", "tacos", "pizza", "soup")


def facts_of(count: int, seed: int) -> list[Fact]:
    """Different facts of five kinds."""
    draw = random.Random(seed)
    things = draw.sample([f"{c} {t}" for c in _COLOURS for t in _THINGS], count)
    people = draw.sample([f"{a} {b}son" for a in _NAMES for b in _NAMES if a != b], count)
    facts = []
    for i, (thing, person) in enumerate(zip(things, people, strict=True)):
        number, town, pet = str(draw.randrange(1000, 10000)), draw.choice(_TOWNS), draw.choice(_PETS)
        day, dish = draw.choice(_DAYS), draw.choice(_DISHES)
        facts.append(
            [
                Fact(f"The code of the {thing} is {number}.", f"What is the code of the {thing}?",
                     f"The code of the {thing} is", number),
                Fact(f"My friend {person} lives in {town}.", f"Where does {person} live?",
                     f"Your friend {person} lives in", town),
                Fact(f"My neighbour {person} has a {pet}.", f"Which animal does {person} have?",
                     f"Your neighbour {person} has a", pet),
                Fact(f"I meet {person} on {day}.", f"On which day do I meet {person}?",
                     f"You meet {person} on", day),
                Fact(f"My cousin {person} likes to cook {dish}.", f"What does {person} like to cook?",
                     f"Your cousin {person} likes to cook", dish),
            ][i % 5]
        )  # fmt: skip
    return facts


_ASKED = ("session", "again, question hidden", "again, question seen")


def facts(
    output: Annotated[Path, typer.Argument(help="File of results, a JSON line each; goes on where it ends.")],
    model: Model = DEFAULT_MODEL,
    weights: str = "int8",
    tokens: Annotated[int, typer.Option(help="Of a conversation.")] = 1000,
    seeds: Annotated[str, typer.Option(help="A conversation each, of its own facts and texts.")] = "0-15",
    count: Annotated[int, typer.Option(help="Turns of a conversation; all but the last tell a fact.")] = 10,
    policies: str = "auto,kvzip,adacompactor,snapcur,snapkv,expected-attention",
    budgets: str = "50%,25%",
    again: Annotated[bool, typer.Option(help="Also of the whole conversation, given anew.")] = True,
    minutes: Annotated[float, typer.Option(help="Begins nothing more after so long.")] = 9,
) -> None:
    """Prints the share of facts still answered, of those that the full cache answers."""
    started, engine = time.monotonic(), engine_of(model, weights, kv_cache_memory=4 * POOL)
    lines = output.read_text().splitlines() if output.exists() else []
    right: dict[tuple[int, str, str, str], list[bool]] = {}
    for found in map(json.loads, lines):
        right[found["seed"], found["policy"], found["budget"], found["asked"]] = found["right"]
    first, last = map(int, seeds.split("-"))
    ways = [("full", "")] + [(p, b) for p in policies.split(",") for b in budgets.split(",")]
    with output.open("a") as file:
        for seed, (policy, budget) in itertools.product(range(first, last + 1), ways):
            if time.monotonic() - started > 60 * minutes:
                break
            asked = _asked_of(policy) if again else _ASKED[:1]
            if all((seed, policy, budget, name) in right for name in asked):
                continue
            told, known = list(conversation_of(engine, tokens, count, seed)), facts_of(count - 1, seed)
            for name, answers in _ask_all(engine, policy, budget, told, known, asked).items():
                right[seed, policy, budget, name] = answers
                key = {"seed": seed, "policy": policy, "budget": budget, "asked": name}
                file.write(json.dumps({**key, "right": answers}) + "\n")
            file.flush()
    _print_facts(right)


def _asked_of(policy: str) -> tuple[str, ...]:
    """How facts are asked for. The full cache is the same in any case; a repetition sees no question."""
    return {"full": _ASKED[:1], "kvzip": _ASKED[:2]}.get(policy, _ASKED)


def _ask_all(
    engine: Engine, policy: str, budget: str, told: list[list[int]], known: list[Fact], asked: tuple[str, ...]
) -> dict[str, list[bool]]:
    """Which of the facts are answered, by how they are asked for, each behind the end of the conversation."""
    kv = {"policy": policy, **({"budget": budget} if budget else {})}
    session = Way(engine, kv, "chat")
    for prompt in told:
        session.ask(prompt, 0)
    behind = Way(engine, {**kv, "context_tokens": str(len(told[-1]))})
    ways = dict(zip(_ASKED, (session, behind, Way(engine, kv)), strict=True))
    questions = [[*told[-1], *question_of(engine, fact)] for fact in known]
    right: dict[str, list[bool]] = {}
    for name in asked:
        answers = ways[name].ask_at_once(questions, 8)
        right[name] = [fact.answer in text for fact, text in zip(known, answers, strict=True)]
    engine.drop_session("", "chat")
    return right


def _print_facts(right: dict[tuple[int, str, str, str], list[bool]]) -> None:
    """A line for each policy and budget, of the facts that the full cache answers."""
    full = {seed: answers for (seed, policy, _, _), answers in right.items() if policy == "full"}
    asked = sum(map(len, full.values()))
    print(f"full cache: {sum(map(sum, full.values()))} of {asked} in {len(full)} conversations\n")
    print(head(["policy", "budget", *_ASKED]))
    for policy, budget in dict.fromkeys((p, b) for _, p, b, _ in right if p != "full"):
        cells = []
        for name in _ASKED:
            answers = [
                answer
                for seed, possible in full.items()
                for answer, can in zip(right.get((seed, policy, budget, name), []), possible, strict=False)
                if can
            ]
            cells.append("")
            if answers:
                share = proportion(answers)
                interval = f"[{100 * share.low:.0f}, {100 * share.high:.0f}]"
                cells[-1] = f"{share.mean:.0%} {interval} of {len(answers)}"
        print(line([policy, budget, *cells]))


def conversation_of(engine: Engine, tokens: int, count: int, seed: int) -> Iterator[list[int]]:
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


def question_of(engine: Engine, fact: Fact) -> list[int]:
    text = f"<|im_start|>user\n{fact.asked}<|im_end|>\n<|im_start|>assistant\n{fact.begun}"
    ids: list[int] = engine.info.tokenizer.encode(text).ids
    return ids


def _encode(engine: Engine, text: str) -> list[int]:
    ids: list[int] = engine.info.tokenizer.encode(text).ids
    return ids


def _tokens(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def engine_of(model: str, weights: str, **options: Any) -> Engine:
    memory = {"kv_cache_memory": POOL, "prefix_cache_memory": POOL // 2, **options}
    return build_engine(EngineOptions(model=model, weights=weights, **memory))


app = script(__doc__, turns, served, table, rounding, restart, facts)

if __name__ == "__main__":
    app()
