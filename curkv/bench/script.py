"""What the scripts of benchmarks/ have in common: a command line, and requests to an engine of their own."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from curkv.cache.options import EvictionOptions
    from curkv.engine.engine import Engine
    from curkv.engine.types import SamplingParams

Model = Annotated[str, typer.Option(help="Built-in name, directory, Hub id or GGUF file.")]


def script(about: str | None, *commands: Callable[..., None]) -> typer.Typer:
    """A command line of one command, or of several by their names.

    Args:
        about: what `--help` shows, as a rule the module's docstring; indented lines stay as they are.
        commands: functions whose parameters are the options.
    """
    text = re.sub(r"(?m)^((?:    .*\n?)+)", r"\b\n\1", about or "")
    app = typer.Typer(help=text, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    for command in commands:
        app.command(help=text if len(commands) == 1 else None)(command)
    return app


def submit(
    engine: Engine, request_id: str, prompt: list[int], sampling: SamplingParams, eviction: EvictionOptions
) -> None:
    """Hands a request to an engine, which works on it in the steps that follow."""
    from curkv.engine.types import Request

    request = Request(request_id, prompt, sampling, eviction)
    engine.add(engine.plan(request))


def prompt_logits(engine: Engine) -> Callable[[Tensor], Tensor]:
    """A function from a prompt's ids, int64 [T], to its logits, float32 [T, vocab_size], all in one chunk."""

    def logits(ids: Tensor) -> Tensor:
        slot = engine.kv.add_sequence()
        found = engine.runner.run([slot], [ids.tolist()], [0], [len(ids)])
        engine.kv.free(slot)
        return found

    return logits
