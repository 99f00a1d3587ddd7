"""A long history compressed once, or once for each of its episodes, at the same total size.

    python benchmarks/episodes.py episodes.jsonl --seeds 0-7

The turns of a conversation are clustered by the model's own mean hidden states (k-means). For each cluster
its turns are said again behind the history, and what they look at is what its state keeps (EpiCache,
https://arxiv.org/abs/2509.17396); a question goes to the nearest cluster, or, as an upper bound, to that of
the turn that told the fact. Beside it: one state of all that the states hold together, and one of the size of
a single one, both by what the model looks at while it repeats everything (`kvzip`).
"""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from conversation import conversation_of, engine_of, facts_of, question_of
from numpy.typing import NDArray
from torch import Tensor

from curkv.bench.script import Model, script
from curkv.cache.eviction import Eviction, evict, select
from curkv.cache.parsing import parse_options
from curkv.cache.plan import resolve
from curkv.engine.engine import Engine
from curkv.engine.repetition import Repetition
from curkv.evaluation.statistics import proportion
from curkv.models.loading.built_in import DEFAULT_MODEL
from curkv.tables import head, line

Vectors = NDArray[np.float64]
WAYS = ("one state, total size", "one state, size of an episode's", "episodes, routed", "episodes, right one")


def episodes(
    output: Annotated[Path, typer.Argument(help="File of results, a JSON line each; goes on where it ends.")],
    model: Model = DEFAULT_MODEL,
    weights: str = "int8",
    tokens: Annotated[int, typer.Option(help="Of a conversation.")] = 1500,
    count: Annotated[int, typer.Option(help="Turns; all but the last tell a fact.")] = 15,
    clusters: int = 4,
    shares: Annotated[str, typer.Option(help="Of the history that all states hold together.")] = "0.5,0.25",
    seeds: str = "0-7",
    minutes: Annotated[float, typer.Option(help="Begins nothing more after so long.")] = 9,
) -> None:
    """Prints the share of facts answered, of those that the whole cache answers."""
    started, engine = time.monotonic(), engine_of(model, weights)
    lines = output.read_text().splitlines() if output.exists() else []
    found = {(row["seed"], row["share"]): row for row in map(json.loads, lines)}
    first, last = map(int, seeds.split("-"))
    with output.open("a") as file:
        for seed in range(first, last + 1):
            if any((seed, float(share)) not in found for share in shares.split(",")):
                if time.monotonic() - started > 60 * minutes:
                    break
                history = History(engine, tokens, count, clusters, seed)
                for share in map(float, shares.split(",")):
                    found[seed, share] = row = {"seed": seed, "share": share, **history.answered(share)}
                    file.write(json.dumps(row) + "\n")
                    file.flush()
                history.close()
    print(head(["together", *WAYS]))
    for share in dict.fromkeys(share for _, share in found):
        rows = [row for (_, other), row in found.items() if other == share]
        cells = []
        for way in WAYS:
            answers = [pair for row in rows for pair in zip(row[way], row["full"], strict=True)]
            estimate = proportion([right for right, can in answers if can])
            interval = f"[{100 * estimate.low:.0f}, {100 * estimate.high:.0f}]"
            cells.append(f"{estimate.mean:.0%} {interval} of {estimate.samples}")
        print(line([f"{share:.0%}", *cells]))


class History:
    """A conversation that is computed whole, its episodes, and what each looks at."""

    def __init__(self, engine: Engine, tokens: int, count: int, clusters: int, seed: int) -> None:
        self._engine, self._runner, self._kv = engine, engine.runner, engine.kv
        told = list(conversation_of(engine, tokens, count, seed))
        self._facts, self._tokens = facts_of(count - 1, seed), told[-1]
        starts = [0, *map(len, told)]
        turns = [told[-1][start:end] for start, end in itertools.pairwise(starts)]
        self._slot, states = self._kv.add_sequence(), []
        for start in range(0, len(self._tokens), 512):
            piece = self._tokens[start : start + 512]
            states.append(self._runner.run_with_states([self._slot], [piece], [start])[1].clone())
        by_turn = torch.cat(states).split_with_sizes([len(turn) for turn in turns])
        means = np.stack([turn.mean(0).double().numpy() for turn in by_turn])
        self._middle = means.mean(0)
        self._episode_of, self._centres = _clustered(_unit(means - self._middle), clusters, seed)
        self._whole = self._paid(None)
        self._by_episode = [
            self._paid([t for i, turn in enumerate(turns) if self._episode_of[i] == episode for t in turn])
            for episode in range(clusters)
        ]
        self._full = [self._answer(self._slot, i) for i in range(len(self._facts))]

    def answered(self, share: float) -> dict[str, list[bool]]:
        """Which facts are answered, by how much is held together."""
        total, each = share, share / len(self._by_episode)
        slots = [self._compressed(self._whole, total), self._compressed(self._whole, each)]
        slots += [self._compressed(paid, each) for paid in self._by_episode]
        right: dict[str, list[bool]] = {"full": self._full, **{way: [] for way in WAYS}}
        for i in range(len(self._facts)):
            chosen = slots[0], slots[1], slots[2 + self._nearest(i)], slots[2 + int(self._episode_of[i])]
            for way, slot in zip(WAYS, chosen, strict=True):
                right[way].append(self._answer(slot, i))
        for slot in slots:
            self._kv.free(slot)
        return right

    def close(self) -> None:
        """Gives its pages back."""
        self._kv.free(self._slot)

    def _paid(self, said: list[int] | None) -> Tensor:
        """What the history's tokens are paid while something is said behind it; None: all of it again."""
        repetition = Repetition(self._tokens, self._engine.info)
        if said is not None:
            repetition._parts = [said]
        fork = self._kv.fork(self._slot)
        while not repetition.done:
            repetition.advance(self._runner, fork)
        self._kv.free(fork)
        return repetition.scores

    def _compressed(self, paid: Tensor, share: float) -> int:
        options = parse_options({"policy": "kvzip", "budget": share, "context_tokens": len(self._tokens)})
        plan = resolve(options, [*self._tokens, 0], self._kv.layout)
        fork = self._kv.fork(self._slot)
        view = replace(self._runner.attention.view(self._slot), repetition=paid)
        evict(self._kv, [Eviction(fork, view, plan, *select(view, plan, self._kv.kernels))])
        return fork

    def _nearest(self, fact: int) -> int:
        """The episode whose centre a question is nearest to."""
        slot = self._kv.add_sequence()
        states = self._runner.run_with_states([slot], [question_of(self._engine, self._facts[fact])], [0])[1]
        self._kv.free(slot)
        asked = _unit(states.mean(0).double().numpy() - self._middle)
        return int((self._centres @ asked).argmax())

    def _answer(self, slot: int, fact: int) -> bool:
        """Whether greedy decoding gives the answer within eight tokens."""
        fork, start = self._kv.fork(slot), len(self._tokens)
        piece, said = question_of(self._engine, self._facts[fact]), list[int]()
        for _ in range(8):
            logits = self._runner.run([fork], [piece], [start])
            start, piece = start + len(piece), [int(logits[-1].argmax())]
            said += piece
        self._kv.free(fork)
        return self._facts[fact].answer in self._engine.info.tokenizer.decode(said)


def _unit(x: Vectors) -> Vectors:
    scaled: Vectors = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return scaled


def _clustered(x: Vectors, clusters: int, seed: int) -> tuple[NDArray[np.int64], Vectors]:
    """Spherical k-means of unit vectors [n, d]: the cluster of each, and unit centres [clusters, d]."""
    draw = np.random.default_rng(seed)
    centres = x[draw.choice(len(x), clusters, replace=False)]
    for _ in range(20):
        of = (x @ centres.T).argmax(1)
        means = [x[of == c].mean(0) if (of == c).any() else centres[c] for c in range(clusters)]
        centres = _unit(np.stack(means))
    return of, centres


app = script(__doc__, episodes)

if __name__ == "__main__":
    app()
