"""`curkv kernels check`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from curkv.cli.failing import fail

if TYPE_CHECKING:
    from curkv.bench.aot import Target
    from curkv.kernels.spec import ModelShape

    Named = TypeVar("Named", ModelShape, Target)

app = typer.Typer(no_args_is_help=True, help="The GPU kernels.")


@app.callback()
def _kernels() -> None:
    """Keep `check` a command of its own although it is the only one."""


@app.command("check")
def check_kernels(
    table: Annotated[
        bool, typer.Option(help="Print the three tables of docs/kernels.md, which explains them.")
    ] = True,
    model: Annotated[
        list[str] | None, typer.Option(help="Only this model's shapes; may be repeated. [all]")
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="Only this chip: sm_80, sm_90, sm_100 or gfx942; may be repeated. [all]"),
    ] = None,
) -> None:
    """Compile every Triton kernel for NVIDIA's A100, H100 and B200 and AMD's MI300; needs no GPU.

    The shapes are those of SmolLM2-135M, Llama-3.1-8B, Qwen3-8B and Mistral-7B. The tables tell what each
    kernel uses of a chip, what it moves and computes, and the least time that this takes on H100 and A100.

    Ends with status 1 if a gate breaks: spilled registers, more shared memory than the chip has, keys or
    values read in less than 16 bytes at once, prefill attention without tensor cores, or more than 1.1 times
    the bytes that any implementation must move.
    """
    os.environ.pop("TRITON_INTERPRET", None)
    try:
        from curkv.bench import aot, check
        from curkv.kernels.spec import MODELS
    except ModuleNotFoundError as error:
        fail(f"{error}; `pip install triton` (3.4 or newer, on Linux)")

    models = _chosen(MODELS, model, "--model")
    targets = _chosen(aot.TARGETS, target, "--target")
    entries = check.compile_all(models, targets)
    if table:
        tables = check.kernel_table(entries), check.cost_table(entries), check.formula_table()
        typer.echo("\n\n".join(tables))
    broken = [failure for entry in entries for failure in check.failures(entry)]
    for failure in broken:
        typer.echo(failure, err=True)
    typer.echo(
        f"{sum(len(e.reports) for e in entries)} kernels compiled, {len(broken)} gates broken", err=True
    )
    raise typer.Exit(1 if broken else 0)


def _chosen(known: tuple[Named, ...], names: list[str] | None, option: str) -> list[Named]:
    """Those of the known models or targets that were asked for; all if none were."""
    unknown = set(names or ()) - {x.name for x in known}
    if unknown:
        there_are = ", ".join(x.name for x in known)
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}; there are {there_are}", param_hint=option)
    return [x for x in known if not names or x.name in names]
