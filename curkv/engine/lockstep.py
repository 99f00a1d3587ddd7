"""An engine in each of several processes, all taking the same steps: what rank 0 is asked for, all do.

Every process keeps the books of all (`PageManager`) and decides by them alone, so that all decide alike. What
they cannot know by themselves comes with each order of rank 0: requests, the time, what its steps have taken.
"""

from __future__ import annotations

import logging
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Self

from curkv.cache.sessions import SessionStats
from curkv.config import EngineOptions
from curkv.engine.engine import Engine, drawn_seed
from curkv.engine.faults import EngineBroken
from curkv.engine.pace import Pace
from curkv.engine.types import Output, Planned, Request

logger = logging.getLogger(__name__)

END_SECONDS = 10.0
"""Time that a process has to end by itself."""


@dataclass(frozen=True)
class Start:
    """What a process needs to become one of several.

    Attributes:
        options: of the engine.
        rank: its number.
        meeting: the file by which they find each other, see `curkv.ranks.Group`.
    """

    options: EngineOptions
    rank: int
    meeting: Path


@dataclass(frozen=True)
class Order:
    """What rank 0 is about to do.

    Attributes:
        act: a method of `Engine`.
        args: its arguments; of `add` the request, which each process plans.
        now: the time by which all decide, in seconds.
        pace: what rank 0 has learned of how long steps take.
        books: how things stand before; where they do not, processes have come apart.
    """

    act: str
    args: tuple[Any, ...]
    now: float
    pace: Pace
    books: tuple[int, ...]

    def prepare(self, engine: Engine) -> None:
        """Makes an engine decide by this order's time and pace."""
        engine.kv.prefixes.clock = lambda: self.now
        engine.scheduler.pace = self.pace


def _books(engine: Engine) -> tuple[int, ...]:
    scheduler = engine.scheduler
    known = sum(sequence.num_tokens for sequence in scheduler.running)
    return engine.kv.pool.num_free, len(scheduler.running), scheduler.num_waiting, known


@dataclass
class Followers:
    """The other processes, as rank 0 sees them; each runs `curkv.engine.follower`."""

    _processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _ending: bool = False

    @classmethod
    def start(cls, options: EngineOptions, meeting: Path) -> Self:
        """Starts them, and waits until they are about to join.

        Raises:
            EngineBroken: one has ended instead.
        """
        followers = cls()
        for rank in range(1, options.tensor_parallel):
            process = subprocess.Popen(
                (sys.executable, "-m", "curkv.engine.follower"), stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            followers._processes.append(process)
            followers._send(rank, Start(options, rank, meeting))
        for rank, process in enumerate(followers._processes, 1):
            assert process.stdout is not None
            if not process.stdout.read(1):
                followers.end()
                raise EngineBroken(f"the process of rank {rank} did not start")
        return followers

    def tell(self, order: Order) -> None:
        """Hands an order to all of them.

        Raises:
            EngineBroken: one has ended.
        """
        for rank in range(1, len(self._processes) + 1):
            self._send(rank, order)

    def _send(self, rank: int, message: Start | Order) -> None:
        stream = self._processes[rank - 1].stdin
        assert stream is not None
        try:
            pickle.dump(message, stream, pickle.HIGHEST_PROTOCOL)
            stream.flush()
        except OSError as error:
            raise EngineBroken(f"the process of rank {rank} has ended") from error

    def watch(self, lost: Callable[[EngineBroken], object]) -> None:
        """Calls `lost`, from a thread, when one of them ends that was not told to."""

        def wait(rank: int, process: subprocess.Popen[bytes]) -> None:
            status = process.wait()
            if not self._ending:
                error = EngineBroken(f"the process of rank {rank} has ended with status {status}")
                logger.critical("%s", error)
                lost(error)

        for rank, process in enumerate(self._processes, 1):
            threading.Thread(target=wait, args=(rank, process), name=f"rank {rank}", daemon=True).start()

    def end(self) -> None:
        """Ends them: they do when they are told nothing more."""
        self._ending = True
        for process in self._processes:
            assert process.stdin is not None
            try:
                process.stdin.close()
            except OSError:
                continue  # it has ended
        for process in self._processes:
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class LeadingEngine(Engine):
    """The engine of rank 0, which tells the others what it does before it does it."""

    def __init__(self, followers: Followers, *args: Any, **settings: Any) -> None:
        """Takes the other processes, and what `Engine` takes."""
        super().__init__(*args, **settings)
        self._followers = followers

    def _lead(self, act: str, *args: Any) -> None:
        order = Order(act, args, time.monotonic(), self.scheduler.pace, _books(self))
        order.prepare(self)
        self._followers.tell(order)

    def add(self, planned: Planned) -> None:
        """See `Engine.add`; a seed that was not given is drawn here."""
        request = planned.request
        if request.sampling.seed is None:
            request = replace(request, sampling=replace(request.sampling, seed=drawn_seed()))
        self._lead("add", request)
        super().add(replace(planned, request=request))

    def step(self) -> list[Output]:
        """See `Engine.step`."""
        self._lead("step")
        return super().step()

    def abort(self, request_id: str) -> None:
        """See `Engine.abort`."""
        self._lead("abort", request_id)
        super().abort(request_id)

    def drop_prefixes(self, tenant: str = "") -> int:
        """See `Engine.drop_prefixes`."""
        self._lead("drop_prefixes", tenant)
        return super().drop_prefixes(tenant)

    def sessions(self, owner: str) -> list[SessionStats]:
        """See `Engine.sessions`; those that are too old are dropped."""
        self._lead("sessions", owner)
        return super().sessions(owner)

    def drop_session(self, owner: str, name: str, tenant: str = "") -> int | None:
        """See `Engine.drop_session`."""
        self._lead("drop_session", owner, name, tenant)
        return super().drop_session(owner, name, tenant)

    def check_integrity(self) -> None:
        """See `Engine.check_integrity`; each process checks its own."""
        self._lead("check_integrity")
        super().check_integrity()

    def watch(self, lost: Callable[[EngineBroken], object]) -> None:
        """See `Engine.watch`."""
        self._followers.watch(lost)

    def close(self, timeout: float) -> None:
        """See `Engine.close`; the other processes end."""
        super().close(timeout)
        self._followers.end()
        self.kv.ranks.leave()


def follow(engine: Engine, orders: IO[bytes]) -> None:
    """Does what rank 0 does, until that has nothing more to tell.

    Raises:
        EngineBroken: the engine has failed, or its books differ from those of rank 0.
        IntegrityError: they contradict themselves.
    """
    while True:
        try:
            order: Order = pickle.load(orders)
        except EOFError:
            return
        if order.books != _books(engine):
            raise EngineBroken(f"the books are {_books(engine)} and those of rank 0 {order.books}")
        order.prepare(engine)
        if order.act == "add":
            _add(engine, *order.args)
        else:
            getattr(engine, order.act)(*order.args)


def _add(engine: Engine, request: Request) -> None:
    try:
        engine.add(engine.plan(request))
    except Exception:  # rank 0 goes on without it too; if it has it, the books will tell
        logger.exception("a request was not taken")


def meeting_place() -> tempfile.TemporaryDirectory[str]:
    """An empty directory for `Start.meeting`."""
    return tempfile.TemporaryDirectory(prefix="curkv-ranks-")
