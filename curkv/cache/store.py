"""A directory of what was held: written behind the scenes, read after a restart or by another replica."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import shutil
import threading
import time
import uuid
import weakref
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

logger = logging.getLogger(__name__)

FORMAT = 1
SUFFIX = ".safetensors"
MAX_QUEUED_BYTES = 256 * 1024**2
"""What may wait to be written; more is not stored."""
MAX_READ_BYTES = 512 * 1024**2
"""What may have been read for requests that wait; beyond it nothing is found."""
COUNT_SECONDS = 60.0
"""Between two looks at how much all who share the directory have written."""
STALE_SECONDS = 600
"""Age of a file that was begun and is none of a running writer's any more."""
TRIM_SHARE = 0.9
"""Of the size limit, what is left when it was exceeded."""


@dataclass(frozen=True)
class Entry:
    """What one file holds.

    Attributes:
        tensors: by name, on the host.
        facts: by name.
    """

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True)
class StoreStats:
    """What the store has done since the start.

    Attributes:
        bytes: on disk, of this model.
        hits: entries read and taken.
        saved_tokens: prompt tokens that they stood for.
        read_seconds: spent on reading and checking.
        written: entries.
        skipped: entries that were damaged, and those that could not be written.
    """

    bytes: int = 0
    hits: int = 0
    saved_tokens: int = 0
    read_seconds: float = 0.0
    written: int = 0
    skipped: int = 0


class Store:
    """Entries by name, a file each, below a folder that a version and a digest of the model name.

    A file appears whole or not at all: it is written under another name and renamed. Several processes may
    share the directory. What cannot be written or read is told in the log and is as if it were not there.

    Args:
        directory: where; made if need be.
        model: stands for everything that decides what a token's keys and values are.
        max_bytes: of all entries of the model; the least recently used go.

    Raises:
        OSError: the directory cannot be used.
    """

    def __init__(self, directory: Path, model: str, max_bytes: int) -> None:
        self._root = directory / f"v{FORMAT}-{model}"
        self._root.mkdir(parents=True, exist_ok=True)
        self._max_bytes = max_bytes
        self._lock = threading.RLock()  # what is read may be forgotten anywhere
        self._known: set[str] = set()
        self._stats = StoreStats()
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._queued = 0
        self._read = 0
        self._told = 0.0
        self._counted = 0.0
        self._tasks.put(lambda: self._scan(directory))
        self._writer = threading.Thread(target=self._work, name="prefix-store", daemon=True)
        self._writer.start()

    @property
    def stats(self) -> StoreStats:
        """What it has done."""
        with self._lock:
            return self._stats

    def knows(self, name: str) -> bool:
        """Whether an entry was there when this process last heard of it; asks no disk."""
        with self._lock:
            return name in self._known

    def knows_below(self, folder: str) -> bool:
        """Whether there was any entry in a folder."""
        with self._lock:
            return any(name.startswith(folder + "/") for name in self._known)

    def has(self, name: str) -> bool:
        """Whether an entry is there."""
        return self._path(name).exists()

    def names(self, folder: str) -> dict[str, float]:
        """The entries of a folder, and when each was last used, Unix time in seconds."""
        try:
            with os.scandir(self._root / folder) as files:
                found = [file for file in files if file.name.endswith(SUFFIX)]
            return {f"{folder}/{file.name.removesuffix(SUFFIX)}": file.stat().st_mtime for file in found}
        except OSError:
            return {}

    def load(self, name: str) -> Entry | None:
        """Reads an entry by a memory map and checks it.

        Returns:
            The entry, copied out of the map; None: it is not there, or too much is read already, or it is
            damaged, and then it is deleted.
        """
        started, path = time.perf_counter(), self._path(name)
        try:
            with self._lock:
                if self._read and self._read + path.stat().st_size > MAX_READ_BYTES:
                    return None
            with safe_open(path, "pt") as file:
                facts = dict(file.metadata() or {})
                tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            self._forget(name)
            return None
        except (OSError, SafetensorError, ValueError, RuntimeError) as error:
            self._skip(name, str(error))
            return None
        if facts.pop("checksum", "") != _checksum(tensors):
            self._skip(name, "its checksum is another one")
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        with self._lock:
            self._known.add(name)
            seconds = self._stats.read_seconds + time.perf_counter() - started
            self._stats = replace(self._stats, read_seconds=seconds)
        entry = Entry(tensors, facts)
        self._lend(entry.num_bytes)
        weakref.finalize(entry, self._lend, -entry.num_bytes)
        return entry

    def _lend(self, num_bytes: int) -> None:
        """Counts what of entries that were read is in memory."""
        with self._lock:
            self._read += num_bytes

    def took(self, tokens: int) -> None:
        """Counts an entry that was read and serves."""
        with self._lock:
            self._stats = replace(
                self._stats, hits=self._stats.hits + 1, saved_tokens=self._stats.saved_tokens + tokens
            )

    def put(self, name: str, entry: Entry, newest_of_folder: int | None = None) -> None:
        """Has an entry written.

        Args:
            name: folders and a file name.
            entry: its tensors are not changed any more.
            newest_of_folder: of its folder only so many entries stay.
        """
        with self._lock:
            if name in self._known:
                return
            if self._queued + entry.num_bytes > MAX_QUEUED_BYTES:
                self._stats = replace(self._stats, skipped=self._stats.skipped + 1)
                return
            self._queued += entry.num_bytes
            self._known.add(name)
        self._tasks.put(lambda: self._write(name, entry, newest_of_folder))

    def drop(self, folder: str) -> None:
        """Has all entries below a folder deleted, those that wait to be written among them."""
        with self._lock:
            self._known = {name for name in self._known if not name.startswith(folder + "/")}
        self._tasks.put(lambda: self._delete(folder))

    def close(self, timeout: float) -> None:
        """Writes what waits, for so many seconds at most, and ends."""
        self._tasks.put(None)
        self._writer.join(timeout)

    def _path(self, name: str) -> Path:
        return self._root / (name + SUFFIX)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                task()
            except Exception as error:
                self._tell(f"the prefix store cannot be written: {error}")

    def _scan(self, directory: Path) -> None:
        """Learns what is there, and deletes what was begun and never finished."""
        others = [path.name for path in directory.iterdir() if path.is_dir() and path != self._root]
        if others:
            logger.info("prefix store: skipped what is of other models or versions: %s", ", ".join(others))
        for path in self._root.rglob("*.tmp"):
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < time.time() - STALE_SECONDS:
                    path.unlink()
        files = self._files()
        with self._lock:
            self._known |= {str(path.relative_to(self._root))[: -len(SUFFIX)] for _, _, path in files}
        self._count_bytes(files)
        logger.info("prefix store: %d entries in %s", len(files), self._root)

    def _write(self, name: str, entry: Entry, newest_of_folder: int | None) -> None:
        path = self._path(name)
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            if not self.knows(name):  # dropped meanwhile
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            facts = {**entry.facts, "checksum": _checksum(entry.tensors)}
            save_file(dict(entry.tensors), temporary, facts)
            os.replace(temporary, path)
            with self._lock:
                size = self._stats.bytes + path.stat().st_size
                self._stats = replace(self._stats, written=self._stats.written + 1, bytes=size)
        except (OSError, SafetensorError) as error:
            self._skip(name, f"cannot be written: {error}", delete=False)
        finally:
            with self._lock:
                self._queued -= entry.num_bytes
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        if newest_of_folder is not None:
            there = sorted(self.names(str(Path(name).parent)).items(), key=lambda item: item[1])
            for old, _ in there[:-newest_of_folder]:
                self._unlink(old)
        if time.monotonic() > self._counted + COUNT_SECONDS:
            self._count_bytes(self._files())
        if self.stats.bytes > self._max_bytes:
            self._trim()

    def _trim(self) -> None:
        """Deletes the least recently used entries."""
        files = sorted(self._files())
        left = sum(size for _, size, _ in files)
        for _, size, path in files:
            if left <= TRIM_SHARE * self._max_bytes:
                break
            self._unlink(str(path.relative_to(self._root))[: -len(SUFFIX)])
            left -= size
        self._count_bytes(self._files())

    def _delete(self, folder: str) -> None:
        shutil.rmtree(self._root / folder, ignore_errors=True)
        self._count_bytes(self._files())

    def _files(self) -> list[tuple[float, int, Path]]:
        """When each entry was last used, its size and its path."""
        found = []
        for path in self._root.rglob("*" + SUFFIX):
            with contextlib.suppress(OSError):
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        return found

    def _count_bytes(self, files: list[tuple[float, int, Path]]) -> None:
        self._counted = time.monotonic()
        with self._lock:
            self._stats = replace(self._stats, bytes=sum(size for _, size, _ in files))

    def _unlink(self, name: str) -> None:
        path = self._path(name)
        with contextlib.suppress(OSError):
            size = path.stat().st_size
            path.unlink()
            with self._lock:
                self._stats = replace(self._stats, bytes=self._stats.bytes - size)
        self._forget(name)

    def _forget(self, name: str) -> None:
        with self._lock:
            self._known.discard(name)

    def _skip(self, name: str, why: str, delete: bool = True) -> None:
        with self._lock:
            self._stats = replace(self._stats, skipped=self._stats.skipped + 1)
        self._tell(f"prefix store: skipped {name}: {why}")
        if delete:
            self._unlink(name)
        self._forget(name)

    def _tell(self, message: str) -> None:
        """Logs a line, one a second at most: a disk that is full would say it for every entry."""
        if time.monotonic() - self._told > 1:
            self._told = time.monotonic()
            logger.warning("%s", message)


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """CRC-32 over all tensors, in the order of their names, and over their names and types."""
    value = 0
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        if tensor.numel():
            value = zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().data, value)
    return f"{value:08x}"
