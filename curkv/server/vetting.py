"""Structures of requests are tried in a process of their own before this one compiles them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
from typing import TYPE_CHECKING, Any

from curkv.engine.grammars import source_text
from curkv.engine.types import InvalidRequest, Structure
from curkv.server.workers import in_worker

if TYPE_CHECKING:
    from curkv.engine.structure import Structures

logger = logging.getLogger(__name__)

START_SECONDS = 60.0
"""Longest wait for the process to be ready."""


class Vetting:
    """Has a structure compiled where it can be stopped: by `curkv.engine.grammars`, one after the other.

    The process is started by the first structured request, takes about a hundred megabytes, and is started
    anew after it had to be killed.

    Args:
        seconds: longest that compiling one structure may take.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._turn = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None

    async def compile(self, structure: Structure, structures: Structures) -> None:
        """Compiles a structure, so that `structures` holds its matcher.

        Raises:
            InvalidRequest: it cannot be followed, takes too long, or crashes the compiler.
        """
        if structures.holds(structure):
            return
        async with self._turn:
            if structures.holds(structure):  # another request has brought it meanwhile
                return
            problem = await self._try(structure, structures)
            if problem is not None:
                raise InvalidRequest(problem, structure.param)
            await in_worker(lambda: structures.matcher(structure))

    async def _try(self, structure: Structure, structures: Structures) -> str | None:
        """What is wrong with a structure."""
        try:
            process = self._process or await self._start(structures)
            line = [structure.kind, source_text(structure.source)]
            problem: str | None = await self._ask(process, line, self.seconds)
            return problem
        except TimeoutError:
            await self.kill()
            return f"takes longer than {self.seconds:g} s to compile"
        except (EOFError, OSError):
            logger.warning("the compiler of structures died of a request's, or cannot read the tokenizer")
            await self._bury()
            return "cannot be compiled"
        except BaseException:  # cancelled: what the process answers would be taken for the next answer
            await self.kill()
            raise

    async def _start(self, structures: Structures) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "curkv.engine.grammars"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        self._process = process
        await self._ask(process, await in_worker(lambda: structures.vocabulary), START_SECONDS)
        return process

    @staticmethod
    async def _ask(process: asyncio.subprocess.Process, line: Any, seconds: float) -> Any:
        assert process.stdin is not None and process.stdout is not None
        async with asyncio.timeout(seconds):
            process.stdin.write(json.dumps(line).encode() + b"\n")
            await process.stdin.drain()
            if not (answer := await process.stdout.readline()):
                raise EOFError
            return json.loads(answer)

    async def kill(self) -> None:
        """Ends the process, if there is one."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._bury()

    async def _bury(self) -> None:
        if (process := self._process) is not None:
            self._process = None
            await process.wait()
