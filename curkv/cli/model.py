"""`curkv model list`, `fetch`, `clear` and `policies`."""

from __future__ import annotations

from typing import Annotated

import typer

from curkv.cli.failing import fail

app = typer.Typer(help="Models and eviction policies.", no_args_is_help=True)


@app.command("list")
def list_models() -> None:
    """List the built-in models, those ready on disk, and packed weights."""
    from curkv.models.loading.built_in import BUILT_IN
    from curkv.models.loading.cache_directory import models_directory
    from curkv.models.loading.packed import kept

    for name, model in BUILT_IN.items():
        typer.echo(f"{name}  built in, {model.megabytes} MB to fetch ({model.licence})")
    directory = models_directory()
    for path in sorted(directory.glob("[!.]*")):
        typer.echo(f"{path}  ready on disk")
    for path, size in kept():
        typer.echo(f"{path}  packed weights, {size / 2**20:.0f} MiB")
    typer.echo("Any directory, Hub id or GGUF file of a supported model works too.")


@app.command("fetch")
def fetch_model(
    model: Annotated[
        str | None, typer.Argument(help="Built-in name, Hub id or GGUF file; absent: the default model.")
    ] = None,
) -> None:
    """Fetch and convert a model, so that serving it later needs no network."""
    from curkv.models.errors import ModelError
    from curkv.models.loading import resolve_model
    from curkv.models.loading.built_in import DEFAULT_MODEL

    try:
        typer.echo(resolve_model(model or DEFAULT_MODEL))
    except ModelError as error:
        fail(str(error))


@app.command("clear")
def clear_packed() -> None:
    """Remove all packed weights; the next start of a model packs its own again."""
    import shutil

    from curkv.models.loading.packed import packed_directory

    shutil.rmtree(packed_directory(), ignore_errors=True)


@app.command("policies")
def list_policies(
    verbose: Annotated[bool, typer.Option(help="With the options that each has of its own.")] = False,
    markdown: Annotated[bool, typer.Option(help="All options as the tables of the documentation.")] = False,
) -> None:
    """List the eviction policies that a request can name."""
    from curkv.cache.policies import policy_descriptions
    from curkv.cache.tables import common_table, options_of_policy, own_table

    if markdown:
        typer.echo("\n".join((*common_table(), "", *own_table())))
        return
    descriptions = policy_descriptions()
    width = max(map(len, descriptions))
    for name, description in descriptions.items():
        typer.echo(f"{name:<{width}}  {description}")
        for line in options_of_policy(name) if verbose else ():
            typer.echo(f"{'':<{width}}    {line}")
