"""Every script of benchmarks/ starts, and those that are cheap on a tiny model run on one."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ELSEWHERE = {"peers/openvino_server.py"}
"""Run in an environment that has nothing of curkv."""
SCRIPTS = sorted(
    str(path.relative_to(BENCHMARKS))
    for path in BENCHMARKS.rglob("*.py")
    if str(path.relative_to(BENCHMARKS)) not in ELSEWHERE
)


def app_of(name: str) -> typer.Typer:
    app: typer.Typer = import_module(f"benchmarks.{name.removesuffix('.py').replace('/', '.')}").app
    return app


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_says_what_it_is_for(name: str) -> None:
    result = CliRunner().invoke(app_of(name), ["--help"])
    assert result.exit_code == 0, result.output
    assert "Usage" in result.output and f"benchmarks/{name}" in result.output


def test_an_unknown_option_is_refused() -> None:
    result = CliRunner().invoke(app_of("soak.py"), ["--no-such-option"])
    assert result.exit_code == 2
