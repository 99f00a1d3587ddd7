"""`curkv eval run` and `curkv eval report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from curkv.cli.failing import fail, fail_for_settings
from curkv.cli.options import takes
from curkv.config import EngineOptions
from curkv.exits import Exit

app = typer.Typer(help="What eviction costs in quality, on real text.", no_args_is_help=True)


def _many(help: str, *default: object) -> Any:
    """An option that can be repeated."""
    return typer.Option(help=f"{help}; repeatable. [{', '.join(map(str, default))}]", show_default=False)


@app.command("run")
@takes(("model", "weights", "kv_dtype", "kernels"))
def run(
    output: Annotated[Path, typer.Argument(help="JSON lines; what they hold already is not measured again.")],
    policy: Annotated[list[str] | None, _many("Policy and options, like 'curdkv preset=paper'")] = None,
    budget: Annotated[list[str] | None, _many("What each policy may keep", "50%", "25%")] = None,
    task: Annotated[list[str] | None, _many("Task, or real-text, questions, ruler, all", "real-text")] = None,
    length: Annotated[list[int] | None, _many("Tokens of context and question", 2000)] = None,
    protocol: Annotated[
        list[str] | None, _many("Whether the policy sees the question", "visible", "hidden")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples per task and length.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the first sample; the others follow.")] = 0,
    corpus: Annotated[
        list[str] | None,
        _many("Real text (documentation, licences, austen, a novel) or text to ask about", "documentation"),
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="OpenAI-compatible server to measure instead: exact match, visible.")
    ] = None,
    served_model_name: Annotated[str | None, typer.Option(help="The model's name there.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes; with --url, requests at a time.")] = 1,
    **given: Any,
) -> None:
    """Measure policies: exact match, likelihood of the right answer, divergence from the full cache.

    The full cache is always measured. Every result is a line in OUTPUT, and a run that was stopped goes on.
    With --url the tokenizer of --model counts tokens.
    """
    from curkv.evaluation.run import Plan, run_local, run_remote
    from curkv.evaluation.tasks import task_names
    from curkv.evaluation.variants import cross

    try:
        plan = Plan(
            tasks=task_names(task or ["real-text"]),
            lengths=length or [2000],
            seeds=range(seed, seed + samples),
            corpora=corpus or ["documentation"],
            protocols=_protocols(protocol, remote=url is not None),
            variants=cross(policy or [], budget or ["50%", "25%"]),
        )
        used = {name: value for name, value in given.items() if value is not None}
        options = EngineOptions(**used, prefix_cache_memory=0)
        if url is None:
            run_local(plan, options, output, workers)
        else:
            run_remote(plan, _remote(url, options.model, served_model_name), output, workers)
    except ValidationError as error:
        fail_for_settings(error, Exit.FAILED)
    except (ValueError, RuntimeError, ModuleNotFoundError) as error:
        fail(str(error))


@app.command("report")
def report(
    results: Annotated[list[Path], typer.Argument(help="Files that `curkv eval run` wrote.", exists=True)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for report.md and the plots.")] = (
        Path("report")
    ),
    policy: Annotated[list[str] | None, typer.Option(help="Plot this one only; repeatable.")] = None,
) -> None:
    """Make Markdown tables and plots: quality over budget for each policy, needle heat maps."""
    from curkv.evaluation.plots import write_plots
    from curkv.evaluation.records import read_records
    from curkv.evaluation.report import markdown

    try:
        by_key = {record.key: record for path in results for record in read_records(path)}
        records = list(by_key.values())
        output.mkdir(parents=True, exist_ok=True)
        plots = write_plots([r for r in records if not policy or r.policy in ("full", *policy)], output)
        (output / "report.md").write_text(markdown(records, plots), encoding="utf-8")
    except (ValueError, ModuleNotFoundError) as error:
        fail(str(error))
    typer.echo(output / "report.md")


def _protocols(names: list[str] | None, remote: bool) -> Any:
    """The protocols to measure; a server's ordinary request is "visible"."""
    unknown = set(names or []) - {"visible", "hidden"}
    if unknown:
        raise ValueError(f"unknown protocol {', '.join(sorted(unknown))}: visible or hidden")
    if remote and "hidden" in (names or []):
        raise ValueError("--protocol hidden cannot be measured with --url")
    return names or (["visible"] if remote else ["visible", "hidden"])


def _remote(url: str, model: str, served_model_name: str | None) -> Any:
    from curkv.evaluation.remote import RemoteEvaluator
    from curkv.models.loading import load_tokenizer, resolve_model

    return RemoteEvaluator(url, served_model_name or model, load_tokenizer(resolve_model(model)))
