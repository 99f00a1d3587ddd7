"""Packed weights in the cache directory: rounded once, mapped by every process that serves them.

A directory holds `weights.bin`, the arrays one after the other, and `index.json`: their checksum, types,
shapes and places in the order in which a decoder's blocks ask for them. Blocks are made of those
without any weight being read. Only rounded weights are kept: others are as quickly made as read.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from curkv.kernels.cpu.cores import usable_cores
from curkv.kernels.dispatch import Kernels
from curkv.kernels.linear.formats import WEIGHT_FORMATS, WeightFormat
from curkv.kernels.linear.spec import PANEL_ROWS, Linear, Packed
from curkv.models.blocks import LayerWeights, Packer
from curkv.models.config import ModelConfig
from curkv.models.decoder import Decoder, blocks
from curkv.models.errors import ModelUnreachable
from curkv.models.families import family_of
from curkv.models.loading.cache_directory import build_once, cache_directory
from curkv.models.loading.checkpoint import Checkpoint, tensor_files
from curkv.models.loading.fingerprint import fingerprint
from curkv.models.shards import shard_of
from curkv.ranks import ALONE, Ranks

logger = logging.getLogger(__name__)

VERSION = 3
"""Of the files, and of what is packed: raise it when either changes, so that old ones are not used."""
MOST_BYTES = 32 << 30
"""Of all that is kept: when more is there, what has not been used for longest is dropped."""
WEIGHTS, INDEX = "weights.bin", "index.json"
ALIGNMENT = 64
"""Bytes; a cache line and a register."""
VALUES = 1 << 20
"""Of a weight that are packed at a time: as float32 they stay in a second-level cache."""


def load_decoder(
    directory: Path,
    config: ModelConfig,
    kernels: Kernels,
    form: WeightFormat,
    device: torch.device,
    ranks: Ranks = ALONE,
) -> Decoder:
    """Returns the decoder of a model directory; rounded weights on a CPU come from the cache directory.

    Raises:
        ModelError: See `Checkpoint`.
    """
    if kernels.backend.name == "cpu" and form.rounds:
        try:
            pack = KeptPacker(keep(directory, config, kernels, form, ranks), kernels, form, ranks)
            return Decoder(config, Outline(directory, config, ranks), kernels, form, pack)
        except ModelUnreachable as error:
            logger.warning("weights are packed again at each start: %s", error)
    weights = Checkpoint(directory, config, form.dtype, device, ranks)
    return Decoder(config, weights, kernels, form, Packer(kernels, form, ranks))


def packed_directory() -> Path:
    """Returns where packed weights are kept, `~/.cache/curkv/packed` by default."""
    return cache_directory() / "packed"


def keep(
    directory: Path, config: ModelConfig, kernels: Kernels, form: WeightFormat, ranks: Ranks = ALONE
) -> Path:
    """Returns the directory of a model's packed weights, packing them if they are not there, or damaged.

    Each of several processes has its own: rows and columns that it has a share of are rounded by themselves.

    Raises:
        ModelUnreachable: The cache directory cannot be written, or has no room.
        ModelError: See `Checkpoint`.
    """
    part = f"-{ranks.rank + 1}-of-{ranks.size}" if ranks.size > 1 else ""
    name = f"{directory.resolve().name}-{form.name}{part}-{_key(directory, config, form)}"

    def build(new: Path) -> None:
        logger.info("rounding the weights, once: later starts read them as they are")
        with (new / WEIGHTS).open("wb") as file:
            with KeepingPacker(file, kernels, form, ranks) as pack:
                for _ in blocks(config, Checkpoint(directory, config, ranks=ranks, unread=True), pack):
                    pass  # a block is gone when the next one is made
            file.write(bytes(-file.tell() % ALIGNMENT))
        index = {"sum": _sum(_mapped(new)), "records": [asdict(record) for record in pack.records]}
        (new / INDEX).write_text(json.dumps(index))

    found = build_once(name, build, packed_directory())
    if not _is_right(found):
        logger.warning("%s is damaged: it is made anew", found)
        shutil.rmtree(found, ignore_errors=True)
        found = build_once(name, build, packed_directory())
    with suppress(OSError):  # of a cache directory that can be read only
        os.utime(found)
    _drop_unused(found)
    return found


def _is_right(directory: Path) -> bool:
    with suppress(ValueError, LookupError, TypeError):
        return bool(json.loads((directory / INDEX).read_text())["sum"] == _sum(_mapped(directory)))
    return False


def _mapped(directory: Path) -> Tensor:
    """The bytes of the arrays, uint8, in memory that processes share."""
    path = directory / WEIGHTS
    return torch.from_file(str(path), False, path.stat().st_size, dtype=torch.uint8)


def _sum(arrays: Tensor) -> int:
    """Of the bytes as int64, modulo 2^64: as fast as they are read, which the first token would do anyway."""
    return int(arrays.view(torch.int64).sum())


def kept() -> list[tuple[Path, int]]:
    """Returns the directories of packed weights and their bytes, the most recently used first."""
    found = [path for path in packed_directory().glob("[!.]*") if path.is_dir()]
    found.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    return [(path, sum(file.stat().st_size for file in path.iterdir())) for path in found]


def _drop_unused(used: Path) -> None:
    total = 0
    for path, size in kept():
        total += size
        if total > MOST_BYTES and path != used:
            logger.info("dropping %s (%.2f GiB), not used for longest", path, size / 2**30)
            shutil.rmtree(path, ignore_errors=True)


def _key(directory: Path, config: ModelConfig, form: WeightFormat) -> str:
    """Stands for all that packed weights follow from: files, configuration, format, machine, code."""
    from curkv.kernels.linear.cpu import layout

    layouts = [layout(other) for other in WEIGHT_FORMATS.values() if other.rounds]
    times = [path.stat().st_mtime_ns for path in tensor_files(directory).paths]
    return fingerprint(directory, VERSION, config, form.name, layouts, times)[:16]


Entry = tuple[str, Sequence[int], int]
"""Type, shape and place of an array in the file."""


@dataclass(frozen=True)
class Record:
    """A weight or a tensor in the file.

    Attributes:
        form: Name of the format of a linear layer's weight; None: it is kept as it is.
        shape: Rows, depth and columns of a packed weight, see `Packed`.
        arrays: Panels, scales and bias; None: there is none.
    """

    form: str | None
    shape: Sequence[int]
    arrays: Sequence[Entry | None]


class KeepingPacker(Packer):
    """Writes what it packs to a file, some rows at a time, of which each core has its own in its cache."""

    def __init__(self, file: IO[bytes], kernels: Kernels, form: WeightFormat, ranks: Ranks = ALONE):
        super().__init__(kernels, form, ranks)
        self._file = file
        self._threads = ThreadPoolExecutor(usable_cores())
        self.records: list[Record] = []

    def __enter__(self) -> KeepingPacker:
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends its threads."""
        self._threads.shutdown(cancel_futures=True)

    def linear(self, kind: str, weight: Tensor, bias: Tensor | None = None, exact: bool = False) -> Linear:
        """See `Packer.linear`; the layer has the last of the rows, since nothing is to run."""
        form = self.form_of(kind, weight, exact)
        count = max(1, VALUES // weight.shape[1] // PANEL_ROWS) * PANEL_ROWS

        def packed(start: int) -> Packed:
            found = self.kernels.pack_linear(weight[start : start + count], None, form).packed
            assert found is not None
            return found

        place, panels, scales = self._aligned(), 0, []
        for part in self._threads.map(packed, range(0, len(weight), count)):
            self._file.write(_bytes(part.panels))
            panels += len(part.panels)
            if part.scales is not None:
                scales.append(part.scales)
        arrays: list[Entry | None] = [_entry(part.panels, (panels, *part.panels.shape[1:]), place)]
        arrays += [self._written(array) for array in (torch.cat(scales) if scales else None, bias)]
        self.records.append(Record(form.name, (len(weight), part.depth, part.columns), arrays))
        return self.kernels.pack_linear(part, None, form)

    def keep(self, kind: str, weight: Tensor) -> Tensor:
        """See `Packer.keep`."""
        self.records.append(Record(None, (), [self._written(weight)]))
        return weight

    def _written(self, array: Tensor | None) -> Entry | None:
        if array is None:
            return None
        place = self._aligned()
        self._file.write(_bytes(array))
        return _entry(array, array.shape, place)

    def _aligned(self) -> int:
        """Where the next array begins."""
        self._file.write(bytes(-self._file.tell() % ALIGNMENT))
        return self._file.tell()


def _bytes(array: Tensor) -> memoryview:
    found: memoryview = array.contiguous().view(torch.uint8).numpy().data
    return found


def _entry(array: Tensor, shape: Sequence[int], place: int) -> Entry:
    return str(array.dtype).removeprefix("torch."), tuple(shape), place


class KeptPacker(Packer):
    """Takes what was packed before, in the same order, and looks at no weight that it is given."""

    def __init__(self, directory: Path, kernels: Kernels, form: WeightFormat, ranks: Ranks = ALONE):
        super().__init__(kernels, form, ranks)
        self._bytes, index = _mapped(directory), json.loads((directory / INDEX).read_text())
        self._records = iter([Record(**record) for record in index["records"]])

    def linear(self, kind: str, weight: Tensor, bias: Tensor | None = None, exact: bool = False) -> Linear:
        """See `Packer.linear`."""
        record = next(self._records)
        assert record.form is not None
        panels, scales, bias = (self._array(array) for array in record.arrays)
        assert panels is not None
        form = WEIGHT_FORMATS[record.form]
        rows, depth, columns = record.shape
        packed = Packed(rows, depth, columns, panels, scales)
        return self.noted(kind, self.kernels.pack_linear(packed, bias, form), form)

    def keep(self, kind: str, weight: Tensor) -> Tensor:
        """See `Packer.keep`."""
        (array,) = next(self._records).arrays
        found = self._array(array)
        assert found is not None
        return super().keep(kind, found)

    def _array(self, array: Any) -> Tensor | None:
        if array is None:
            return None
        name, shape, place = array
        dtype: torch.dtype = getattr(torch, name)
        size = torch.Size(shape).numel() * dtype.itemsize
        return self._bytes[place : place + size].view(dtype).view(shape)


class Outline:
    """Weights without rows: all that blocks need to know that get theirs from somewhere else."""

    def __init__(self, directory: Path, config: ModelConfig, ranks: Ranks = ALONE):
        self._directory, self._config, self._family = directory, config, family_of(config)
        self._ranks, self._shard = ranks, shard_of(config, ranks)

    @property
    def embedding(self) -> Tensor:
        """See `Checkpoint.embedding`."""
        return self._family.embedding(_no_rows, self._config)

    @property
    def final_norm(self) -> Tensor:
        """See `Checkpoint.final_norm`."""
        return self._family.final_norm(_no_rows, self._config)

    @property
    def head(self) -> Tensor:
        """See `Checkpoint.head`."""
        return self._family.head(_no_rows, self._config)

    def layer(self, index: int) -> LayerWeights:
        """See `Checkpoint.layer`."""
        return self._family.layer(_no_rows, self._shard, index)

    @cached_property
    def _checkpoint(self) -> Checkpoint:
        return Checkpoint(self._directory, self._config, ranks=self._ranks)

    def attention_output(self, index: int) -> Tensor:
        """See `Checkpoint.attention_output`: what a policy asks for is read when it does."""
        return self._checkpoint.attention_output(index)


def _no_rows(name: str, *shape: int, parts: Sequence[int] = ()) -> Tensor:
    return torch.empty(0, *shape[1:])
