"""`curkv bench kernels` and `curkv bench serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from curkv.cli.failing import fail
from curkv.config import OPTIONS
from curkv.exits import Exit

app = typer.Typer(help="Measurements on this machine.", no_args_is_help=True)


@app.command("kernels")
def bench_kernels() -> None:
    """Measure each kernel's share of this machine's memory bandwidth."""
    from curkv.bench import kernels

    typer.echo(kernels.table(kernels.run()))


@app.command("serve")
def bench_serve(
    model: Annotated[str, typer.Option(help=OPTIONS["model"].description)] = OPTIONS["model"].default,
    url: Annotated[str | None, typer.Option(help="A running server; without it one is started.")] = None,
    workload: Annotated[
        list[str] | None,
        typer.Option(
            help="one-stream: a request of 128 tokens, 128 new ones; long: eight requests of 2,000 tokens at "
            "once, 64 new ones each; longer: of 4,000; document: 8 questions in turn about 3,500 tokens; or "
            "a load like 4x1000+32. Repeatable. [all four]",
            show_default=False,
        ),
    ] = None,
    policy: Annotated[str, typer.Option(help="Eviction policy compared with the full cache.")] = "curdkv",
    budget: Annotated[str, typer.Option(help="Its budget.")] = "25%",
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each; medians are reported.")] = 3,
    baseline: Annotated[bool, typer.Option(help="Measure transformers too.")] = True,
    plot: Annotated[Path | None, typer.Option(help="Image to draw the figures into.")] = None,
) -> None:
    """Measure TTFT, inter-token latency and throughput: full cache, a policy, and transformers.

    With --url, of any OpenAI-compatible server that takes prompts as token ids. Ratios are to the full cache.
    """
    from curkv.bench import report
    from curkv.bench.serve import run
    from curkv.bench.workload import WORKLOADS, parse_workload

    try:
        workloads = [parse_workload(text) for text in workload or WORKLOADS]
    except ValueError as error:
        fail(str(error), Exit.BAD_OPTION)
    results = run(model, url, workloads, policy, budget, repeats, baseline)
    typer.echo(report.table(results, references=["full"]))
    if plot is not None:
        report.plot(results, plot)
