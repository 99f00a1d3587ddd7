"""The command line: a file for each command.

Heavy modules are imported by the commands that need them, so that --help is instant.
"""

from __future__ import annotations

from typing import Annotated

import typer

import curkv
from curkv.cli import bench, chat, eval, kernels, model, prune, serve

app = typer.Typer(
    help="An OpenAI-compatible server that keeps only the part of the KV cache that matters.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(serve.app)
app.add_typer(chat.app)
app.add_typer(model.app, name="model")
app.add_typer(bench.app, name="bench")
app.add_typer(eval.app, name="eval")
app.add_typer(kernels.app, name="kernels")
app.add_typer(prune.app, name="prune")


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    """An OpenAI-compatible server that keeps only the part of the KV cache that matters."""
    if version:
        typer.echo(f"curkv {curkv.__version__}")
        raise typer.Exit
