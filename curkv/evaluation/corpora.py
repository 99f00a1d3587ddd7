"""Real, varied, long text that needs no download from a data set host."""

from __future__ import annotations

import re
import struct
import zlib
from functools import cache
from importlib.metadata import distribution
from pathlib import Path

from curkv.bench.text import documentation_text
from curkv.models.loading.cache_directory import models_directory

NOVELS = ("emma", "mansfield-park", "northanger-abbey", "persuasion", "pride-prejudice", "sense-sensibility")
"""Jane Austen's novels in the order in which Debian's r-cran-janeaustenr stores them."""

_DATA = Path("usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")
_STRING_VECTOR, _STRING = 16, 9  # types of R's serialisation (R Internals, section 1.8)


class CorpusNotInstalled(RuntimeError):
    """A corpus has to be installed first; the message says how."""


def corpus_names() -> tuple[str, ...]:
    """The names that `load_corpus` knows: Python's documentation, licences, all novels, and each novel."""
    return ("documentation", "licences", "austen", *NOVELS)


@cache
def load_corpus(name: str) -> str:
    """Reads a text.

    Args:
        name: One of `corpus_names()`. "documentation" is CPython's language reference and comes with Python,
            "licences" are those of numpy and torch and what they contain, each paragraph once, and come with
            these; the novels need a Debian package.

    Returns:
        The text, 0.46 M characters of documentation, 0.4 to 0.9 M of a novel.

    Raises:
        CorpusNotInstalled: The novels are not on this machine.
        ValueError: The name is unknown.
    """
    if name not in corpus_names():
        raise ValueError(f"no corpus {name!r}; there are {', '.join(corpus_names())}")
    if name == "documentation":
        return documentation_text()
    if name == "licences":
        return _licences()
    if name == "austen":
        return "\n\n".join(_novels().values())
    return _novels()[name]


def _licences() -> str:
    """The paragraphs of prose in the licences of two packages."""
    files = [file for package in ("numpy", "torch") for file in distribution(package).files or ()]
    texts = [str(file.read_text()) for file in sorted(files) if "licenses" in file.parts and file.size]
    paragraphs = (" ".join(part.split()) for text in texts for part in re.split(r"\n\s*\n", text))
    return "\n\n".join(dict.fromkeys(part for part in paragraphs if len(part) > 200 and part[-1] == "."))


@cache
def _novels() -> dict[str, str]:
    unpacked = models_directory().with_name("corpora")
    found = [root / _DATA for root in (Path("/"), unpacked) if (root / _DATA).is_file()]
    if not found:
        raise CorpusNotInstalled(
            "Jane Austen's novels are not installed: `apt-get install r-cran-janeaustenr`, or without R "
            f"`apt-get download r-cran-janeaustenr && dpkg -x r-cran-janeaustenr_*.deb {unpacked}`"
        )
    return dict(zip(NOVELS, map(_text, _chunks(found[0].read_bytes())), strict=True))


def _chunks(data: bytes) -> list[bytes]:
    """Splits a lazy-load database of R: each object is its size, big-endian in 4 bytes, and a zlib stream."""
    chunks = []
    while data:
        stream = zlib.decompressobj()
        chunks.append(stream.decompress(data[4:]))
        data = stream.unused_data
    return chunks


def _text(serialised: bytes) -> str:
    """Joins the lines of a serialised character vector; empty ones part paragraphs."""
    encoding_length = struct.unpack_from(">i", serialised, 14)[0]
    offset = 18 + encoding_length
    kind, count = struct.unpack_from(">ii", serialised, offset)
    if kind & 255 != _STRING_VECTOR:
        raise ValueError(f"expected a character vector, found R type {kind & 255}")
    offset, lines = offset + 8, []
    for _ in range(count):
        kind, length = struct.unpack_from(">ii", serialised, offset)
        if kind & 255 != _STRING:
            raise ValueError(f"expected a string, found R type {kind & 255}")
        lines.append(serialised[offset + 8 : offset + 8 + length].decode())
        offset += 8 + length
    return "\n".join(lines)
