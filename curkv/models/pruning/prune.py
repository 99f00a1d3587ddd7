"""One run of pruning, from a model directory to a smaller one."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from curkv import __version__
from curkv.models.loading import PROVENANCE
from curkv.models.pruning.export import WEIGHTS, check_output, new_directory, write_json, write_model
from curkv.models.pruning.methods import make_method
from curkv.models.pruning.methods.base import LayerCut, Method, Progress
from curkv.models.pruning.plan import PruningError, kept_rows
from curkv.models.pruning.source import Source


@dataclass(frozen=True, slots=True)
class PruneOptions:
    """What to do.

    Attributes:
        method: A key of `methods.METHODS`.
        ratio: Share of the MLP rows to remove, in (0, 0.9].
        seed: Of whatever the method draws.
        align: The kept rows are a multiple of this; None chooses by the model's width.
        settings: Further arguments of the method.
    """

    method: str
    ratio: float
    seed: int = 0
    align: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PruneResult:
    """What a run did.

    Attributes:
        rows: MLP rows of a layer before.
        kept: MLP rows of a layer after.
        base_bytes: Size of the weight files before.
        bytes: Size of the weight file after.
        seconds: Wall-clock time.
        peak_bytes: Most memory that the process has held so far, mapped files included.
    """

    rows: int
    kept: int
    base_bytes: int
    bytes: int
    seconds: float
    peak_bytes: int


def prune(
    source: Source, name: str, output: Path, options: PruneOptions, progress: Progress, force: bool = False
) -> PruneResult:
    """Prunes a model and writes the result.

    Args:
        source: The model.
        name: What the user calls it; recorded.
        output: Directory of the result.
        options: What to do.
        progress: Told how far the preparation is.
        force: Replace an earlier result.

    Raises:
        PruningError: The options do not fit the model, or the result cannot be written.
    """
    started = time.perf_counter()
    kept = kept_rows(source.config.intermediate_size, options.ratio, options.align)
    method = _method(options)
    check_output(output, force)
    if output.resolve() == source.directory.resolve():
        raise PruningError(f"{output} is the model itself")
    rows: list[Tensor] = []
    with new_directory(output, force) as directory:
        method.prepare(source, kept, progress)
        write_model(source, directory, kept, _recording(method, source, kept, rows))
        method.save(directory)
        seconds = time.perf_counter() - started
        write_json(directory / PROVENANCE, _provenance(source, name, options, kept, rows, method, seconds))
    return PruneResult(
        rows=source.config.intermediate_size,
        kept=kept,
        base_bytes=source.bytes,
        bytes=(output / WEIGHTS).stat().st_size,
        seconds=seconds,
        peak_bytes=peak_memory(),
    )


def peak_memory() -> int:
    """Returns the most bytes that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _method(options: PruneOptions) -> Method:
    seed = {} if options.method == "magnitude" else {"seed": options.seed}
    return make_method(options.method, **seed, **options.settings)


def _recording(method: Method, source: Source, kept: int, rows: list[Tensor]) -> Callable[[int], LayerCut]:
    def cut(layer: int) -> LayerCut:
        decision = method.cut(layer, source.checkpoint.layer(layer), kept)
        rows.append(decision.rows)
        return decision

    return cut


def _provenance(
    source: Source,
    name: str,
    options: PruneOptions,
    kept: int,
    rows: list[Tensor],
    method: Method,
    seconds: float,
) -> dict[str, Any]:
    width = source.config.intermediate_size
    return {
        "curkv": __version__,
        "method": options.method,
        "ratio": options.ratio,
        "removed": 1 - kept / width,
        "seed": options.seed,
        "intermediate_size": {"base": width, "pruned": kept},
        "base": {"name": name, "sha256": source.sha256(), "pruning": source.provenance},
        "seconds": round(seconds, 1),
        "details": method.provenance(),
        "kept_rows": [layer.tolist() for layer in rows],
    }
