"""`curkv prune MODEL` and `curkv prune report BASE PRUNED`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from tqdm import tqdm
from typer.core import TyperGroup

from curkv.cli.failing import fail

if TYPE_CHECKING:
    from curkv.models.pruning.prune import PruneResult


class _ModelOrSubcommand(TyperGroup):
    """Takes a first word that is no subcommand as the beginning of the main command's arguments."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        named = bool(args) and args[0] in self.commands
        return super().parse_args(ctx, args if named else ["main", *args])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return "" if name == "main" else name, command, rest


class MethodName(StrEnum):
    """Values of `--method`."""

    self_calibrated = "self-calibrated"
    prunenet = "prunenet"
    magnitude = "magnitude"
    random = "random"


app = typer.Typer(
    cls=_ModelOrSubcommand, rich_markup_mode=None, help="Make a model smaller, and measure what it costs."
)


@app.command("main", hidden=True, epilog="`curkv prune report BASE PRUNED` measures the result.")
def main(
    model: Annotated[str, typer.Argument(help="Directory, Hub id, GGUF file or built-in name.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of the pruned model.")],
    ratio: Annotated[float, typer.Option(help="Share of each MLP's rows to remove, up to 0.9.")] = 0.25,
    method: Annotated[MethodName, typer.Option(help="How the rows are chosen.")] = MethodName.self_calibrated,
    seed: Annotated[int, typer.Option(help="Of everything drawn at random.")] = 0,
    align: Annotated[
        int | None, typer.Option(min=1, help="Keep a multiple of this many rows; 128, or 64 in small models.")
    ] = None,
    policy: Annotated[Path | None, typer.Option(help="Reuse a trained policy (prunenet).")] = None,
    text: Annotated[
        Path | None, typer.Option(help="Reuse the text of an earlier run (self-calibrated).")
    ] = None,
    sequences: Annotated[
        int | None,
        typer.Option(min=2, help="Texts of 256 tokens to write: more is better (self-calibrated; 256)."),
    ] = None,
    compensate: Annotated[
        bool | None,
        typer.Option(help="Let the remaining weights make up for the removed rows (self-calibrated; on)."),
    ] = None,
    distil_steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Then train what is left for so many steps to predict that text as the whole model does: "
            "better, but seconds a step, and memory for the weights in float32 four times over "
            "(self-calibrated; none).",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier result in the output.")] = False,
) -> None:
    """Remove rows from every MLP of a model and save the rest as an ordinary checkpoint.

    Nothing but the model is needed. The default method takes 6 to 10 minutes for 135 M parameters on two
    cores; random and magnitude take seconds. Layers are read and written one by one: beside the weights,
    memory is needed for one layer in float32 and, by the default method, for its activations and for up to
    4 GiB of keys and values while text is written.
    """
    from curkv.models.errors import ModelError
    from curkv.models.loading import resolve_model
    from curkv.models.pruning.prune import PruneOptions, prune
    from curkv.models.pruning.source import Source

    settings = _settings(method, policy, text, sequences, compensate, distil_steps)
    options = PruneOptions(method, ratio, seed, align, settings)
    try:
        source = Source(resolve_model(model))
        if source.provenance:
            _say_already_pruned(model, source.provenance)
        with _unwinding_on_sigterm(), _Bars() as bars:
            result = prune(source, model, output, options, bars.show, force)
    except ModelError as error:
        fail(str(error))
    _say_result(result, output)


@app.command("report")
def report(
    base: Annotated[str, typer.Argument(help="The model before, named as for `prune`.")],
    pruned: Annotated[str, typer.Argument(help="The model after.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for report.md and its plot.")] = (
        Path("report")
    ),
    corpus: Annotated[
        list[str] | None, typer.Option(help="Held-out text, repeatable: documentation, austen or a novel.")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of 512 tokens of each text.")] = 8,
    samples: Annotated[int, typer.Option(min=1, help="Samples of each task.")] = 4,
    seed: Annotated[int, typer.Option(help="Of windows, samples and the random rows.")] = 0,
) -> None:
    """Measure a pruned model beside its base and beside as many rows chosen at random."""
    from curkv.evaluation.corpora import CorpusNotInstalled
    from curkv.evaluation.pruning import ReportOptions, measure
    from curkv.evaluation.pruning_report import write_report
    from curkv.models.errors import ModelError
    from curkv.models.loading import resolve_model

    options = ReportOptions(corpus or ("documentation",), windows, samples=samples, seed=seed)
    try:
        found = measure(resolve_model(base), resolve_model(pruned), options)
    except (ModelError, CorpusNotInstalled) as error:
        fail(str(error))
    typer.echo(write_report(found, output))


@contextmanager
def _unwinding_on_sigterm() -> Iterator[None]:
    """Lets SIGTERM end the block as an exception does, so that what it has begun is cleaned up."""
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _settings(
    method: MethodName,
    policy: Path | None,
    text: Path | None,
    sequences: int | None,
    compensate: bool | None,
    distil_steps: int | None,
) -> dict[str, Any]:
    """Returns the options that are the method's own; those of another method are refused."""
    given = {
        "policy": policy,
        "text": text,
        "sequences": sequences,
        "compensate": compensate,
        "distil_steps": distil_steps,
    }
    own = dict.fromkeys(given, MethodName.self_calibrated) | {"policy": MethodName.prunenet}
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    for name in settings:
        if own[name] != method:
            fail(f"--{name.replace('_', '-')} belongs to --method {own[name].value}")
    if text and sequences:
        fail("--text is text written before: --sequences has nothing to say about it")
    if "sequences" in settings:
        from curkv.models.pruning.self_text import Writing

        settings["writing"] = Writing(settings.pop("sequences"))
    return settings


def _say_already_pruned(model: str, provenance: dict[str, Any]) -> None:
    typer.echo(
        f"{model} is already pruned ({provenance['method']}, {provenance['removed']:.1%} of its MLP rows); "
        "the ratio applies to what is left",
        err=True,
    )


def _say_result(result: PruneResult, output: Path) -> None:
    typer.echo(
        f"{output}: {result.kept} of {result.rows} MLP rows per layer kept "
        f"({1 - result.kept / result.rows:.1%} removed), "
        f"{result.base_bytes / 1e6:.0f} MB -> {result.bytes / 1e6:.0f} MB, "
        f"in {result.seconds:.0f} s, peak memory {result.peak_bytes / 1e6:.0f} MB"
    )


class _Bars:
    """One progress bar after another, each for what is being done."""

    def __enter__(self) -> _Bars:
        self._bar: tqdm[NoReturn] | None = None
        return self

    def show(self, task: str, done: int, total: int) -> None:
        """Moves the bar of a task, replacing that of the last one."""
        if self._bar is None or self._bar.desc != f"{task}: ":
            self.__exit__()
            self._bar = tqdm(total=total, desc=task, leave=False)
        self._bar.update(done - self._bar.n)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
