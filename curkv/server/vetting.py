"""Structures of requests are tried in a process of their own before this one compiles them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from curkv.engine.types import InvalidRequest, Structure
from curkv.server.workers import in_worker

if TYPE_CHECKING:
    from curkv.engine.structure import Structures

logger = logging.getLogger(__name__)

START_SECONDS = 60.0
"""Longest wait for the process to be ready, and for an answer that is overdue."""
QUICK_SECONDS = 0.25
"""What takes no longer does not wait for what does; an ordinary schema takes a few milliseconds."""


class Vetting:
    """Has a structure compiled where it can be stopped, by a process of `curkv.engine.grammars`.

    The process is started by the first structured request and takes about a hundred megabytes. Structures
    that are quick pass one after the other; one that proves not to be is tried anew in a second lane, among
    its like, so that no other waits for it longer than a moment. One that nobody waits for any more is not
    tried.

    Args:
        seconds: longest that compiling one structure may take.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._lanes = [_Lane(min(QUICK_SECONDS, seconds), "quick"), _Lane(seconds, "slow")]
        self._jobs: dict[tuple[str, str], _Job] = {}
        self._starting = asyncio.Lock()
        self._compiler: _Compiler | None = None

    async def compile(self, structure: Structure, structures: Structures) -> None:
        """Compiles a structure, so that `structures` holds its matcher.

        Raises:
            InvalidRequest: it cannot be followed, takes too long, or crashes the compiler.
        """
        if structures.holds(structure):
            return
        key = structures.key(structure)
        if (job := self._jobs.get(key)) is None:
            job = self._jobs[key] = _Job()
            job.task = asyncio.create_task(self._compile(job, key, structure, structures))
        job.wanted += 1
        try:
            problem = await asyncio.shield(job.task)
        finally:
            job.wanted -= 1
        if problem is not None:
            raise InvalidRequest(problem, structure.param)

    async def _compile(
        self, job: _Job, key: tuple[str, str], structure: Structure, structures: Structures
    ) -> str | None:
        """What is wrong with a structure."""
        try:
            for lane in self._lanes:
                async with lane.turn:
                    if not job.wanted:
                        return "nobody waits for it"
                    with contextlib.suppress(_TakesLonger):
                        problem = await self._try(key, lane.seconds, structures)
                        if problem is None:
                            await lane.run(structures, structure)
                        return problem
            return f"takes longer than {self.seconds:g} s to compile"
        except InvalidRequest as error:
            return error.message
        finally:
            del self._jobs[key]

    async def _try(self, key: tuple[str, str], seconds: float, structures: Structures) -> str | None:
        """What is wrong with a structure.

        Raises:
            _TakesLonger: it takes longer than the seconds to find out.
        """
        compiler: _Compiler | None = None
        try:
            async with self._starting:
                if self._compiler is None or self._compiler.ended:
                    self._compiler = await _Compiler.start(structures)
                compiler = self._compiler
            outcome = await compiler.ask(seconds, *key)
        except (EOFError, OSError, TimeoutError):
            logger.warning("the compiler of structures died, or cannot read the tokenizer")
            if compiler is not None:
                await compiler.kill()
            return "cannot be compiled"
        if outcome is False:
            raise _TakesLonger
        if outcome == "":
            logger.warning("a request's structure crashed the compiler: %.200s", key[1])
            return "cannot be compiled"
        return None if outcome is None else str(outcome)

    async def kill(self) -> None:
        """Ends the process and its forks, if there is one."""
        compiler, self._compiler = self._compiler, None
        if compiler is not None:
            await compiler.kill()


class _TakesLonger(Exception):
    """A structure was not compiled in its time."""


@dataclass
class _Job:
    """A structure that is being compiled, or waits for it.

    Attributes:
        wanted: requests that wait for it.
        task: ends with what is wrong with it.
    """

    wanted: int = 0
    task: asyncio.Task[str | None] = field(init=False)


class _Lane:
    """Structures that are compiled one after the other, each within some seconds."""

    def __init__(self, seconds: float, name: str) -> None:
        self.seconds = seconds
        self.turn = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"structures {name}")

    async def run(self, structures: Structures, structure: Structure) -> None:
        """Compiles for this process what has been found harmless, beside those that work on texts."""
        await asyncio.get_running_loop().run_in_executor(self._thread, structures.matcher, structure)


class _Compiler:
    """A process of `curkv.engine.grammars`, asked many things at once."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._numbers = itertools.count()
        self._awaited: dict[int, asyncio.Future[Any]] = {}
        self._reading: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, structures: Structures) -> _Compiler:
        """Starts the process and waits until it has read the tokenizer.

        Raises:
            EOFError: it ended instead.
            TimeoutError: it takes too long.
        """
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "curkv.engine.grammars"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            process_group=0,
        )
        compiler = cls(process)
        try:
            vocabulary = await in_worker(lambda: json.dumps(structures.vocabulary))
            async with asyncio.timeout(START_SECONDS):
                await compiler._write(vocabulary)
                await compiler._read()
        except BaseException:
            await compiler.kill()
            raise
        compiler._reading = asyncio.create_task(compiler._hand_out())
        return compiler

    @property
    def ended(self) -> bool:
        """Whether it answers no more."""
        return self._reading is None or self._reading.done()

    async def ask(self, seconds: float, kind: str, source: str) -> Any:
        """What becomes of a structure, see `curkv.engine.grammars.main`.

        Raises:
            EOFError: the process ended.
            TimeoutError: it does not answer.
        """
        number, answer = next(self._numbers), asyncio.get_running_loop().create_future()
        self._awaited[number] = answer
        try:
            async with asyncio.timeout(seconds + START_SECONDS):
                await self._write(json.dumps([number, seconds, kind, source]))
                return await answer
        finally:
            del self._awaited[number]

    async def kill(self) -> None:
        """Ends the process and its forks; who waits for an answer gets an `EOFError`."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()

    async def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        await self._process.stdin.drain()

    async def _read(self) -> Any:
        assert self._process.stdout is not None
        if not (line := await self._process.stdout.readline()):
            raise EOFError
        return json.loads(line)

    async def _hand_out(self) -> None:
        """Hands out answers until there are no more."""
        try:
            while True:
                number, outcome = await self._read()
                if number in self._awaited and not self._awaited[number].done():
                    self._awaited[number].set_result(outcome)
        except EOFError:
            for answer in self._awaited.values():
                if not answer.done():
                    answer.set_exception(EOFError())
