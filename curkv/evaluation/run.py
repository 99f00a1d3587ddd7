"""Works through samples and variants, in several processes or threads, and keeps what is done."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from curkv.config import EngineOptions
from curkv.engine.build import build_engine
from curkv.engine.device import CPU
from curkv.evaluation.evaluator import Evaluator
from curkv.evaluation.measures import own_answers
from curkv.evaluation.records import Journal, ProtocolName, Record, SampleKey, read_records
from curkv.evaluation.remote import RemoteEvaluator
from curkv.evaluation.tasks import TASKS
from curkv.evaluation.tasks.base import Recipe
from curkv.evaluation.variants import Variant


@dataclass(frozen=True)
class Job:
    """One sample and what is still wanted of it."""

    recipe: Recipe
    wanted: dict[ProtocolName, list[Variant]]

    @property
    def size(self) -> int:
        """Records to come."""
        return sum(map(len, self.wanted.values()))


@dataclass(frozen=True)
class Plan:
    """What to measure: every variant on every sample under every protocol.

    Attributes:
        tasks: Names of tasks.
        lengths: Tokens of a sample.
        seeds: A sample of each task and length per seed.
        corpora: Of tasks over real text or texts of several kinds; the other tasks take none.
        protocols: "visible", "hidden" or both, of tasks that do not have a protocol of their own.
        variants: Eviction options at budgets.
    """

    tasks: Sequence[str]
    lengths: Sequence[int]
    seeds: Sequence[int]
    corpora: Sequence[str]
    protocols: Sequence[ProtocolName]
    variants: Sequence[Variant]

    def __post_init__(self) -> None:
        """See that every corpus is one of every task's.

        Raises:
            ValueError: A task cannot be made from a corpus.
        """
        for task in self.tasks:
            known = TASKS[task].corpora
            unknown = [corpus for corpus in self.corpora if known and corpus not in known]
            if unknown:
                raise ValueError(f"no text {unknown[0]!r} for {task}; there are {', '.join(known)}")

    def jobs(self, source: str, done: Iterable[Record]) -> list[Job]:
        """What is not done yet, seed after seed, so that an interrupted run is even over tasks."""
        by_sample = defaultdict[SampleKey, list[Record]](list)
        for record in done:
            if record.source == source:
                by_sample[record.sample].append(record)
        jobs = [self._job(recipe, by_sample[recipe.key]) for recipe in self._recipes()]
        return [job for job in jobs if job.wanted]

    def _recipes(self) -> Iterator[Recipe]:
        for seed in self.seeds:
            for length in self.lengths:
                for task in self.tasks:
                    for corpus in self.corpora if TASKS[task].corpora else self.corpora[:1]:
                        yield Recipe(task, length, seed, corpus)

    def _job(self, recipe: Recipe, done: Sequence[Record]) -> Job:
        """A sample's questions are measured together; those that the full cache fails are asked it alone."""
        own = TASKS[recipe.task].protocol
        protocols: Sequence[ProtocolName] = self.protocols if own is None else [own]
        found = {(r.protocol, r.question, r.policy, r.budget) for r in done}
        missing = {}
        for protocol in protocols:
            asked = {r.question for r in done if r.protocol == protocol and not r.budget}
            failed = {r.question for r in done if not r.budget and own_answers(r) and not r.score}
            missing[protocol] = [
                variant
                for variant in self.variants
                if not asked
                or any(
                    (protocol, question, variant.policy, variant.budget) not in found
                    for question in asked - failed
                )
            ]
        return Job(recipe, {protocol: variants for protocol, variants in missing.items() if variants})


def run_local(plan: Plan, options: EngineOptions, path: Path, workers: int) -> None:
    """Measures on this machine's own engine.

    Args:
        plan: What to measure.
        options: Of the engine that each worker builds; the threads and the cache are shared out among them.
        path: JSON lines; what they hold already is not measured again.
        workers: Processes.
    """
    source = f"{options.model}, weights {options.weights}, KV {options.kv_dtype}"
    jobs = plan.jobs(source, read_records(path) if path.exists() else [])
    if workers == 1:
        evaluator = Evaluator(build_engine(options), source)
        with ThreadPoolExecutor(1) as executor:
            _work(jobs, lambda job: evaluator.evaluate(job.recipe, job.wanted), executor, path)
        return
    share = {
        "threads": max(1, (options.threads or os.cpu_count() or 1) // workers),
        "kv_cache_memory": (options.kv_cache_memory or CPU.cache_bytes) // workers,
    }
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers, context, _start_worker, (options.model_copy(update=share), source)
    ) as executor:
        _work(jobs, _run_in_worker, executor, path)


def run_remote(plan: Plan, evaluator: RemoteEvaluator, path: Path, workers: int) -> None:
    """Measures a server, `workers` requests at a time."""
    jobs = plan.jobs(evaluator.source, read_records(path) if path.exists() else [])
    with ThreadPoolExecutor(workers) as executor:
        _work(jobs, lambda job: evaluator.evaluate(job.recipe, job.wanted), executor, path)


def _work(jobs: list[Job], run: Callable[[Job], list[Record]], executor: Executor, path: Path) -> None:
    """Runs jobs and writes each one's records as soon as it is done."""
    sizes = {executor.submit(run, job): job.size for job in jobs}
    bar = tqdm(total=sum(sizes.values()), unit="answer", smoothing=0.05)
    with Journal.open(path) as journal, bar:
        try:
            for future in as_completed(sizes):
                journal.append(future.result())
                bar.update(sizes[future])
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise


_worker: Evaluator


def _start_worker(options: EngineOptions, source: str) -> None:
    global _worker
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = Evaluator(build_engine(options), source)


def _end_with_parent() -> None:
    """Ends this worker when its parent is killed, which would else leave it at work for nobody."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run_in_worker(job: Job) -> list[Record]:
    return _worker.evaluate(job.recipe, job.wanted)
