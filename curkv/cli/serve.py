"""`curkv serve`."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from curkv.cli.failing import fail, fail_for_settings
from curkv.cli.options import Grouped, takes
from curkv.config import OPTIONS, Settings
from curkv.exits import Exit, StartupError

app = typer.Typer(rich_markup_mode=None)


@app.command(cls=Grouped)
@takes(OPTIONS, environment=True)
def serve(
    config: Annotated[
        Path | None, typer.Option(help="TOML file with the settings below (model = ...).")
    ] = None,
    **given: Any,
) -> None:
    """Serve a model over HTTP.

    An option wins over its environment variable (--kv-budget: CURKV_KV_BUDGET), which wins over the file.
    """
    for number in (signal.SIGTERM, signal.SIGINT):  # until the server is there to handle them
        signal.signal(number, lambda *_: sys.exit(Exit.DONE))
    settings = _load(config, given)
    from curkv.server.process import pause_collector

    pause_collector()
    from curkv.server.run import serve

    try:
        status = serve(settings)
    except StartupError as error:
        fail(str(error), error.exit)
    raise typer.Exit(status)


def _load(file: Path | None, given: dict[str, Any]) -> Settings:
    try:
        return Settings.load(file, **given)
    except ValidationError as error:
        fail_for_settings(error)
    except (OSError, ValueError) as error:
        fail(f"cannot read {file}: {error}", Exit.BAD_OPTION)
