"""The pruned checkpoint on disk: what transformers and vLLM load unchanged, written whole or not at all."""

from __future__ import annotations

import errno
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from curkv.models.loading import PROVENANCE
from curkv.models.loading.safetensors_file import TensorEntry, write_safetensors
from curkv.models.pruning.methods.base import DOWN, LayerCut
from curkv.models.pruning.plan import PruningError
from curkv.models.pruning.source import Source

WEIGHTS = "model.safetensors"
CARRIED = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja"),
    *("generation_config.json", "LICENSE*"),
)
NUMPY_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "uint16"}

_LAYER_TENSOR = re.compile(r"model\.layers\.(\d+)\.(.+)")
_CUT = re.compile(r"mlp\.(gate|up)_proj\.(weight|bias)")


@contextmanager
def new_directory(final: Path, force: bool) -> Iterator[Path]:
    """Yields an empty directory that becomes `final` if the block succeeds and disappears if it does not.

    Raises:
        PruningError: `final` cannot be written or may not be replaced, or the disk is full.
    """
    check_output(final, force)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".partial", dir=final.parent))
    except OSError as error:
        raise PruningError(f"{final} cannot be written: {error.strerror}") from error
    try:
        new = scratch / "new"
        new.mkdir()
        yield new
        if final.exists():
            final.rename(scratch / "replaced")
        new.rename(final)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise PruningError(f"the disk that holds {final.parent} is full; nothing was written") from error
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_output(final: Path, force: bool) -> None:
    """Raises PruningError if `final` exists, unless it is empty or `force` may replace an earlier result."""
    if not final.exists() or (final.is_dir() and not any(final.iterdir())):
        return
    if not force:
        raise PruningError(f"{final} exists; --force replaces an earlier result of pruning")
    if not (final / PROVENANCE).is_file():
        raise PruningError(f"{final} is no result of pruning (no {PROVENANCE}) and is not replaced")


def write_model(source: Source, directory: Path, kept: int, cut: Callable[[int], LayerCut]) -> None:
    """Writes weights, configuration, tokenizer and generation settings, one tensor in memory at a time.

    Args:
        source: The model that is pruned.
        directory: Where to; empty.
        kept: MLP rows of every layer of the result.
        cut: Decides about a layer; called once for each, in order.
    """
    entries = list(_entries(source, kept, _remember_last(cut)))
    _check_space(directory, sum(entry.nbytes for entry in entries))
    for pattern in CARRIED:
        for file in source.directory.glob(pattern):
            shutil.copyfile(file, directory / file.name)
    write_json(directory / "config.json", source.raw_config | {"intermediate_size": kept})
    write_safetensors(directory / WEIGHTS, entries, "Pruning")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes an object with one key per line; the lists in it stay on theirs."""
    fields = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
    path.write_text("{\n" + ",\n".join(fields) + "\n}\n", encoding="utf-8")


def _entries(source: Source, kept: int, cut: Callable[[int], LayerCut]) -> Iterator[TensorEntry]:
    for name in sorted(source.names, key=_layer_and_name):
        shape, code = source.shape(name), source.dtype_name(name)
        if code not in NUMPY_DTYPES:
            raise PruningError(f"{name} is stored as {code}; pruning reads {', '.join(NUMPY_DTYPES)}")
        match = _LAYER_TENSOR.fullmatch(name)
        read: Callable[[], Tensor] = partial(source.tensor, name)
        if match:
            layer, part = int(match[1]), match[2]
            shape = _cut_shape(part, shape, kept)
            read = partial(_read_cut, source, name, layer, part, cut)
        yield TensorEntry(name, shape, np.dtype(NUMPY_DTYPES[code]), partial(_as_numpy, read))


def _layer_and_name(name: str) -> tuple[int, str]:
    match = _LAYER_TENSOR.fullmatch(name)
    return (int(match[1]) if match else -1, name)


def _cut_shape(part: str, shape: tuple[int, ...], kept: int) -> tuple[int, ...]:
    if _CUT.fullmatch(part):
        return (kept, *shape[1:])
    return (shape[0], kept) if part == DOWN else shape


def _read_cut(source: Source, name: str, layer: int, part: str, cut: Callable[[int], LayerCut]) -> Tensor:
    decision = cut(layer)
    tensor = source.tensor(name)
    if part in decision.replaced:
        return decision.replaced[part].to(tensor.dtype)
    if _CUT.fullmatch(part):
        return tensor[decision.rows]
    return tensor[:, decision.rows] if part == DOWN else tensor


def _as_numpy(read: Callable[[], Tensor]) -> npt.NDArray[Any]:
    tensor = read().contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _remember_last(cut: Callable[[int], LayerCut]) -> Callable[[int], LayerCut]:
    """The tensors of a layer follow each other, so that one decision has to be kept."""
    last: list[tuple[int, LayerCut]] = []

    def remembered(layer: int) -> LayerCut:
        if not last or last[0][0] != layer:
            last[:] = [(layer, cut(layer))]
        return last[0][1]

    return remembered


def _check_space(directory: Path, wanted: int) -> None:
    free = shutil.disk_usage(directory).free
    if wanted > free:
        raise PruningError(
            f"the result needs {wanted / 1e6:.0f} MB and the disk that holds {directory.parent.parent} has "
            f"{free / 1e6:.0f} MB left; nothing was written"
        )
