"""Corpora are read as installed, or say how to install them."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from curkv.evaluation import corpora


@pytest.fixture(autouse=True)
def nothing_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(corpora, "_DATA", Path("curkv-test/Rdata.rdb"))
    for function in (corpora.load_corpus, corpora._novels):
        function.cache_clear()
    yield
    for function in (corpora.load_corpus, corpora._novels):
        function.cache_clear()


def lazy_load_object(lines: list[str]) -> bytes:
    """A character vector as R writes it into a package's database."""
    strings = b"".join(struct.pack(">ii", 0x40009, len(line.encode())) + line.encode() for line in lines)
    header = b"X\n" + struct.pack(">iiii", 3, 0x40201, 0x30500, 5) + b"UTF-8"
    serialised = header + struct.pack(">ii", 16, len(lines)) + strings
    return struct.pack(">i", len(serialised)) + zlib.compress(serialised)


def test_novels_are_read_from_the_package(tmp_path: Path) -> None:
    path = tmp_path / "curkv/corpora/curkv-test/Rdata.rdb"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"".join(lazy_load_object([name, "", "Chapter é"]) for name in corpora.NOVELS))
    assert corpora.load_corpus("persuasion") == "persuasion\n\nChapter é"
    assert corpora.load_corpus("austen").startswith("emma\n\nChapter é\n\nmansfield-park")


def test_a_missing_package_is_named() -> None:
    with pytest.raises(corpora.CorpusNotInstalled, match="apt-get install r-cran-janeaustenr"):
        corpora.load_corpus("emma")


def test_an_unknown_corpus_is_refused() -> None:
    with pytest.raises(ValueError, match="no corpus 'wikitext'"):
        corpora.load_corpus("wikitext")


def test_documentation_is_always_there() -> None:
    assert len(corpora.load_corpus("documentation")) > 400_000
