"""The ahead-of-time gates; compiled in a process of its own, since this one's kernels are interpreted."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from curkv import kernels
from curkv.bench import aot
from curkv.bench.check import COSTS, Entry, failures, kernel_table
from curkv.kernels.costs import Cost, evaluate
from curkv.kernels.dispatch import load
from curkv.kernels.spec import MODELS, Inputs

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@pytest.fixture(scope="module")
def checks(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, tuple[subprocess.Popen[bytes], Path]]]:
    """A check for each chip and what it says, side by side: each takes a core for minutes."""
    models = ["--model", "SmolLM2-135M", "--model", "Llama-3.1-8B"]
    command = [sys.executable, "-m", "curkv.cli", "kernels", "check", "--no-table", *models]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    folder, started = tmp_path_factory.mktemp("checks"), {}
    for target in TARGETS:
        with (folder / target).open("wb") as said:
            process = subprocess.Popen(
                [*command, "--target", target], env=environment, stdout=said, stderr=said
            )
        started[target] = process, folder / target
    yield started
    for process, _ in started.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_passes_every_gate(
    target: str, checks: dict[str, tuple[subprocess.Popen[bytes], Path]]
) -> None:
    process, said = checks[target]
    assert process.wait() == 0, said.read_text()[-2000:]


def test_an_unknown_target_is_refused():
    command = [sys.executable, "-m", "curkv.cli", "kernels", "check", "--target", "sm_1"]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "gfx942" in done.stderr


@pytest.mark.parametrize("name", COSTS)
def test_formulas_evaluate(name):
    shapes = dict.fromkeys("BTcnkLHQGDPwrdIseaSp", 2)
    cost = COSTS[name]
    assert evaluate(cost.moved, shapes) >= evaluate(cost.minimum, shapes) > 0
    assert evaluate(cost.flops, shapes) >= 0


@pytest.mark.parametrize(
    ("change", "failure"),
    [
        ({}, None),
        ({"spills": 1}, "1 spills"),
        ({"shared": 200 << 10}, "bytes of shared memory"),
        ({"wide_loads": 3}, "3 16-byte"),
        ({"narrow_loads": 2}, "2 2-byte"),
        ({"tensor_ops": 0}, "no tensor-core"),
    ],
)
def test_each_gate_breaks(monkeypatch, change, failure):
    monkeypatch.setattr(aot, "smallest_wide_loads", lambda launch: 4)
    report = aot.Report(
        registers=64, spills=0, shared=1024, occupancy=1, wide_loads=4, narrow_loads=0, tensor_ops=1
    )
    shapes = dict.fromkeys("BTHLQGdIseap", 1) | {"D": 64, "P": 64, "c": 64, "n": 4096}
    call = aot.Call("paged_prefill_attention", shapes, [])
    launch = SimpleNamespace(name="paged_prefill_attention.attend")
    entry = Entry("model", aot.TARGETS[0], call, [(launch, replace(report, **change))])
    found = list(failures(entry))
    assert len(found) == (failure is not None)
    assert failure is None or failure in found[0]


def test_spills_are_counted_where_they_are_paid_for_again_and_again():
    inner = ".L_x_1:\nb\n@P0 BRA `(.L_x_1)"
    code = f"a\n.L_x_0:\nSTL\n{inner}\nLDL\n@P0 BRA `(.L_x_0)\nSTL\nBRA `(.L_x_3)\n.L_x_3:"
    assert aot._hot(code).splitlines() == inner.splitlines()
    assert aot._hot("STL\nc").splitlines() == ["STL", "c"]


def test_moving_more_than_one_must_breaks_a_gate(monkeypatch):
    monkeypatch.setitem(COSTS, "rope", Cost("100", "111", "0"))
    entry = Entry("model", aot.TARGETS[0], aot.Call("rope", {}, []), [])
    assert list(failures(entry)) == ["model, rope: moves 1.11 times the bytes it must"]


def launched_in(source: Path) -> set[str]:
    """Names of the functions that a module launches: kernel[grid](...)."""
    calls = (node for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.Call))
    subscripts = (call.func.value for call in calls if isinstance(call.func, ast.Subscript))
    return {f"{source.parent.name}.{name.id}" for name in subscripts if isinstance(name, ast.Name)}


def test_every_kernel_of_the_package_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[str] = set()

    def note(launch: Any, *_: Any, **__: Any) -> None:
        seen.add(f"{launch.fn.__module__.split('.')[-2]}.{launch.fn.__name__}")

    monkeypatch.setattr("triton.runtime.interpreter.GridExecutor.__call__", note)
    monkeypatch.setattr("curkv.kernels.paged_prefill_attention.triton.num_processors", lambda _: 132)
    for operation, _, case, workload in aot.cases_of(MODELS[0]):
        case.call(Inputs(workload, stand_in=True)).run(load(operation, "triton"))
    there = set().union(*map(launched_in, Path(kernels.__file__).parent.rglob("triton.py")))
    assert len(there) > 15
    assert there <= seen


def test_a_kernel_that_a_chip_has_no_use_for_leaves_its_cell_empty() -> None:
    report = aot.Report(32, 0, 1024, 0.5, 4, 0, 0)

    def entry(chip: str, kernel: str) -> Any:
        call, launch = SimpleNamespace(label=""), SimpleNamespace(name=kernel)
        return SimpleNamespace(
            model="m", target=SimpleNamespace(name=chip), call=call, reports=[(launch, report)]
        )

    *_, second = kernel_table([entry("a", "x"), entry("b", "x"), entry("b", "y")]).strip().splitlines()
    assert [cell.strip() for cell in second.split("|")][1:4] == ["y", "m", ""]
