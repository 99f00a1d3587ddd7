"""Entries on disk: whole or not there, whatever happens to the directory."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from curkv.cache.store import STALE_SECONDS, Entry, Store

BIG = 1 << 30


def entry(number: int = 0, size: int = 100) -> Entry:
    generator = torch.Generator().manual_seed(number)
    tensors = {
        "k": torch.randn(size, 4, generator=generator).half(),
        "codes": torch.arange(size, dtype=torch.int8),
        "position": torch.arange(size, dtype=torch.int32),
    }
    return Entry(tensors, {"number": str(number)})


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path, "model", BIG)
    yield store
    store.close(5)


def written(store: Store) -> Store:
    """The store once all that waited is on disk; a new one over the same files."""
    store.close(5)
    assert not list(store._root.rglob("*.tmp"))
    return Store(store._root.parent, store._root.name.partition("-")[2], store._max_bytes)


def same(found: Entry | None, expected: Entry) -> bool:
    return (
        found is not None
        and found.facts == expected.facts
        and all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())
    )


def test_an_entry_comes_back_as_it_was(store: Store) -> None:
    for i in range(3):
        store.put(f"a/b/{i}", entry(i))
    store = written(store)
    assert all(same(store.load(f"a/b/{i}"), entry(i)) for i in range(3))
    assert store.load("a/b/3") is None and set(store.names("a/b")) == {f"a/b/{i}" for i in range(3)}
    store.close(5)
    assert store.knows("a/b/1") and store.stats.bytes > 3 * entry().num_bytes and store.stats.read_seconds > 0


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "foreign", "header"])
def test_a_damaged_entry_is_skipped_and_deleted(
    store: Store, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    store.put("a/one", entry())
    store = written(store)
    path = store._path("a/one")
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-10] ^= 1
    path.write_bytes(
        {"flip": data, "cut": data[:-7], "empty": b"", "foreign": b"x" * 500, "header": data[:40]}[damage]
    )
    with caplog.at_level(logging.WARNING):
        assert store.load("a/one") is None
    assert len(caplog.records) == 1 and "a/one" in caplog.text and not path.exists()
    assert store.stats.skipped == 1
    store.put("a/one", entry(1))
    assert same(written(store).load("a/one"), entry(1))


def test_other_models_and_versions_are_left_alone(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store.put("a/one", entry())
    written(store)
    with caplog.at_level(logging.INFO):
        other = Store(tmp_path, "another", BIG)
        assert other.load("a/one") is None
        other.close(5)
    assert "v1-model" in caplog.text and store._path("a/one").exists()


def test_what_is_least_recently_used_goes(tmp_path: Path) -> None:
    size = entry(size=10_000).num_bytes
    store = Store(tmp_path, "model", 4 * size)
    for i in range(3):
        store.put(f"a/{i}", entry(i, 10_000))
    store = written(store)
    for i in range(3):
        os.utime(store._path(f"a/{i}"), (i, i))
    assert store.load("a/0") is not None
    store.put("a/3", entry(3, 10_000))
    store = written(store)
    assert set(store.names("a")) == {"a/0", "a/2", "a/3"}


def test_of_a_folder_the_newest_stay(store: Store) -> None:
    for i in range(5):
        store.put(f"a/{i}", entry(i), newest_of_folder=2)
        time.sleep(0.01)
    assert set(written(store).names("a")) == {"a/3", "a/4"}


def test_a_folder_is_dropped_with_what_waits(store: Store) -> None:
    for i in range(3):
        store.put(f"a/b/{i}", entry(i))
        store.put(f"c/{i}", entry(i))
    assert store.knows_below("a")
    store.drop("a")
    store = written(store)
    assert store.names("a/b") == {} and len(store.names("c")) == 3 and not store.knows_below("a")


def test_a_store_that_is_gone_or_full_fails_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr("curkv.cache.store.save_file", full)
        for i in range(20):
            store.put(f"a/{i}", entry(i))
        store.close(5)
    assert store.stats.skipped == 20 and store.stats.written == 0 and len(caplog.records) == 1
    assert not store.knows("a/1") and store.load("a/1") is None
    gone = Store(store._root.parent, "gone", BIG)
    os.rename(gone._root, gone._root.with_name("away"))
    gone._root.write_text("a file where the directory was")
    gone.put("a/1", entry())
    gone.close(5)
    assert gone.load("a/1") is None and gone.names("a") == {} and gone.stats.skipped >= 1


def test_a_process_killed_while_it_writes_leaves_a_clean_start(tmp_path: Path) -> None:
    """Whatever is there under its name is whole; what was begun goes when it is old."""
    script = f"""
import torch
from pathlib import Path
from curkv.cache.store import Entry, Store
store = Store(Path({str(tmp_path)!r}), "model", 1 << 30)
print("ready", flush=True)
i = 0
while True:
    store.put(f"a/{{i}}", Entry({{"k": torch.full((1 << 20,), i, dtype=torch.int32)}}))
    i += store._queued < 1 << 26
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    deadline = time.monotonic() + 20
    while len(list(tmp_path.rglob("*.safetensors"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = tmp_path / "v1-model" / "a" / "99.safetensors.0.tmp"
    left.write_bytes(b"half")
    os.utime(left, (time.time() - 2 * STALE_SECONDS,) * 2)
    store = Store(tmp_path, "model", BIG)
    names = store.names("a")
    assert len(names) >= 5
    for name in names:
        found = store.load(name)
        assert found is not None and (found.tensors["k"] == int(name.rsplit("/", 1)[1])).all()
    store.close(5)
    assert not left.exists() and store.stats.skipped == 0
