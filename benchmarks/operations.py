"""Where a step's time goes: every operation of prefill and decode, and decode steps run as one call.

python benchmarks/operations.py --weights int8
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

import typer

from curkv.bench.script import Model, script, submit
from curkv.bench.text import token_spans
from curkv.cache.parsing import parse_options
from curkv.config import EngineOptions, KVDtype, Weights
from curkv.engine.build import build_engine
from curkv.engine.engine import Engine
from curkv.engine.types import SamplingParams
from curkv.kernels.cpu import workers
from curkv.models.loading.built_in import DEFAULT_MODEL
from curkv.server.process import keep_freed_memory
from curkv.tables import head, line

NAMES = {"linear.cpu": "products of linear layers", "linear.rounded_rows": "rms_norm, silu_mul and rounding"}


def main(
    model: Model = DEFAULT_MODEL,
    weights: Weights = "int8",
    kv_dtype: KVDtype = "auto",
    concurrency: Annotated[int, typer.Option(help="Requests at once.")] = 8,
    prompt_tokens: int = 2000,
    new_tokens: Annotated[int, typer.Option(help="As many as keep all running together.")] = 96,
    policy: str = "full",
    budget: str | None = None,
) -> None:
    """Runs the requests with a clock around each launch and prints a table; then runs decode recorded."""
    keep_freed_memory()  # as a server does
    kv = {"policy": policy} | ({"budget": budget} if budget is not None else {})
    load = Load(concurrency, prompt_tokens, new_tokens, kv)
    options = EngineOptions(
        model=model, weights=weights, kv_dtype=kv_dtype, kv_cache_memory=2**31, prefix_cache_memory=0
    )
    recorded, engine = build_engine(options), build_engine(options)
    engine.runner.replay = None
    seconds_of = {}
    for phase, label in (("prefill", "token"), ("decode", "step")):
        load.run(engine, phase)  # the first time kernels are loaded
        with Clock.running() as clock:
            seconds, steps = load.run(engine, phase, clock)
        unit = steps if phase == "decode" else concurrency * prompt_tokens
        seconds_of[phase] = seconds / unit
        print(f"\n{phase}, kernel by kernel: {1e3 * seconds / unit:.2f} ms a {label}\n")
        print(head(["operation", f"ms a {label}", "share"]))
        most_first = sorted(clock.spent.items(), key=lambda item: -item[1])
        for name, used in [*most_first, ("everything else", seconds - sum(clock.spent.values()))]:
            print(line([name, f"{1e3 * used / unit:.3f}", f"{used / seconds:.1%}"]))
    load.run(recorded, "decode")
    seconds, steps = load.run(recorded, "decode")
    print(f"\ndecode, recorded: {1e3 * seconds / steps:.2f} ms a step", end="")
    print(f", {seconds_of['decode'] * steps / seconds:.2f}x as fast")


class Clock:
    """Adds up the seconds of launches by operation.

    Attributes:
        spent: seconds.
    """

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    @classmethod
    @contextmanager
    def running(cls) -> Iterator[Clock]:
        """A clock of the launches made inside."""
        clock = cls()
        with workers.timing(clock.note):
            yield clock

    def note(self, worker: Callable[[int, int], None], seconds: float) -> None:
        """Adds a launch."""
        module = worker.__module__.removeprefix("curkv.kernels.")
        name = NAMES.get(module, module.split(".")[0])
        self.spent[name] = self.spent.get(name, 0.0) + seconds


@dataclass(frozen=True)
class Load:
    """Requests that arrive together.

    Attributes:
        requests: how many.
        prompt_tokens: of each.
        new_tokens: of each.
        kv: their eviction controls.
    """

    requests: int
    prompt_tokens: int
    new_tokens: int
    kv: dict[str, str]

    def run(self, engine: Engine, phase: str, clock: Clock | None = None) -> tuple[float, int]:
        """Serves the requests; returns the seconds that steps of the phase took, and how many those were.

        Decode steps count while all requests decode; their median is taken for all. The clock is left with
        what was spent in the phase alone.
        """
        sampling = SamplingParams(self.new_tokens, temperature=0.0, ignore_eos=True)
        prompts = token_spans(engine.info.tokenizer, self.requests, self.prompt_tokens, seed=0)
        for i, prompt in enumerate(prompts):
            submit(engine, str(i), prompt, sampling, parse_options(self.kv))
        times = []
        while engine.has_work:
            before = clock.spent.copy() if clock else {}
            decoding = sum(not sequence.prefilling for sequence in engine.scheduler.running)
            prefills = decoding < len(engine.scheduler.running) or engine.scheduler.num_waiting > 0
            counts = prefills if phase == "prefill" else not prefills and decoding == self.requests
            started = time.perf_counter()
            engine.step()
            if counts:
                times.append(time.perf_counter() - started)
            elif clock:
                clock.spent = before
        seconds = statistics.median(times) * len(times) if phase == "decode" else sum(times)
        return seconds, len(times)


app = script(__doc__, main)

if __name__ == "__main__":
    app()
