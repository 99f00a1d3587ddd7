"""How a command ends that cannot do what it was asked to."""

from __future__ import annotations

from typing import NoReturn

import typer
from pydantic import ValidationError

from curkv.config import Settings
from curkv.exits import Exit


def fail(message: str, status: int = Exit.FAILED) -> NoReturn:
    """Says why in a line, and ends the process."""
    typer.echo(f"curkv: {message}", err=True)
    raise typer.Exit(status)


def fail_for_settings(error: ValidationError, status: int = Exit.BAD_OPTION) -> NoReturn:
    """Says which options are wrong, a line for each, and ends the process."""
    lines = []
    for problem in error.errors():
        message = problem["msg"]
        if problem["type"] == "literal_error":
            choices = problem["ctx"]["expected"].replace("'", "").replace(" or ", ", ")
            message = f"{problem['input']!r} is none of {choices}"
        names = [str(part) for part in problem["loc"] if part not in Settings.model_fields]
        lines.append(": ".join([*names[:1], message.removeprefix("Value error, ")]))
    fail("bad settings\n  " + "\n  ".join(lines), status)
