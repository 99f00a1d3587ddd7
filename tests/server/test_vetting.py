"""Schemas of strangers are compiled where they can do no harm, and once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import curkv.engine.structure
from curkv.engine.structure import Structures
from curkv.engine.types import InvalidRequest, Structure
from curkv.models.loading import load_tokenizer
from curkv.server.vetting import Vetting

CRASHES = {"type": "integer", "minimum": -(2**63) - 1, "maximum": -(2**63) - 1}
NEVER_ENDS = {"allOf": [{"type": "string", "pattern": f"^.*a.{{{i}}}b.*$"} for i in range(1, 60)]}
HARMLESS = {"type": "object", "properties": {"name": {"type": "string"}}}


@pytest.fixture
def structures(default_model_dir: Path) -> Structures:
    return Structures(load_tokenizer(default_model_dir), 49152, [2])


@pytest.fixture
async def vetting() -> AsyncIterator[Vetting]:
    vetting = Vetting(seconds=2.0)
    yield vetting
    await vetting.kill()


async def test_what_crashes_the_compiler_or_takes_too_long_is_refused(
    vetting: Vetting, structures: Structures
) -> None:
    for schema, message in ((CRASHES, "cannot be compiled"), (NEVER_ENDS, "longer than 2 s")):
        with pytest.raises(InvalidRequest, match=message) as error:
            await vetting.compile(Structure("json", schema, "guided_json"), structures)
        assert error.value.param == "guided_json"
        await vetting.compile(Structure("json", HARMLESS, "guided_json"), structures)
    assert structures.holds(Structure("json", HARMLESS, "response_format"))


async def test_a_structure_is_compiled_once_and_beside_the_event_loop(
    vetting: Vetting, structures: Structures, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    compile_grammar = curkv.engine.structure.compile_grammar

    def watched(*args: Any) -> Any:
        compiled.append(threading.current_thread().name)
        return compile_grammar(*args)

    monkeypatch.setattr(curkv.engine.structure, "compile_grammar", watched)
    asked = [vetting.compile(Structure("json", HARMLESS, f"field {i}"), structures) for i in range(3)]
    await asyncio.gather(*asked)
    for _ in range(3):
        structures.matcher(Structure("json", HARMLESS, "again"))
    assert len(compiled) == 1 and compiled[0].startswith("structures")


async def test_who_asks_for_an_ordinary_schema_does_not_wait_for_slow_ones(
    vetting: Vetting, structures: Structures
) -> None:
    await vetting.compile(Structure("json", HARMLESS, "p"), structures)
    slow = asyncio.create_task(vetting.compile(Structure("json", NEVER_ENDS, "p"), structures))
    await asyncio.sleep(0.01)
    await vetting.compile(Structure("regex", "a", "p"), structures)
    assert not slow.done()
    with pytest.raises(InvalidRequest, match="longer than 2 s"):
        await slow


async def test_a_schema_that_nobody_waits_for_is_not_compiled(
    vetting: Vetting, structures: Structures
) -> None:
    slow = asyncio.create_task(vetting.compile(Structure("json", NEVER_ENDS, "p"), structures))
    gone = asyncio.create_task(vetting.compile(Structure("regex", "gone", "p"), structures))
    await asyncio.sleep(0.01)
    gone.cancel()
    await vetting.compile(Structure("regex", "here", "p"), structures)
    assert not structures.holds(Structure("regex", "gone", "p"))
    with pytest.raises(InvalidRequest):
        await slow


async def test_a_compiler_that_was_killed_is_started_anew(vetting: Vetting, structures: Structures) -> None:
    await vetting.compile(Structure("regex", "a", "p"), structures)
    slow = asyncio.create_task(vetting.compile(Structure("json", NEVER_ENDS, "p"), structures))
    await asyncio.sleep(0.1)
    await vetting.kill()
    with pytest.raises(InvalidRequest, match="cannot be compiled"):
        await slow
    await vetting.compile(Structure("regex", "b", "p"), structures)


async def test_what_is_wrong_with_a_schema_is_said(vetting: Vetting, structures: Structures) -> None:
    with pytest.raises(InvalidRequest, match="thing"):
        await vetting.compile(Structure("json", {"type": "thing"}, "p"), structures)
    with pytest.raises(InvalidRequest, match="9007199254740993 has more digits"):
        await vetting.compile(Structure("json", {"const": 2**53 + 1}, "p"), structures)


def test_few_characters_are_held(structures: Structures, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curkv.engine.structure, "MAX_HELD", 30)
    wanted = [Structure("regex", letter * 12, "p") for letter in "abc"]
    for structure in wanted:
        structures.matcher(structure)
    assert [structures.holds(structure) for structure in wanted] == [False, True, True]
