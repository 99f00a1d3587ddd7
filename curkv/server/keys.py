"""API keys: who may ask, under which name, and whose what is."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

_LINE = re.compile(r"(?P<name>[A-Za-z0-9._-]{1,64})\s+(?:sha256:(?P<digest>[0-9a-fA-F]{64})|(?P<key>\S.*))")


class KeysError(ValueError):
    """The file of keys cannot be used; the message says why."""


class Keys:
    """Keys by name, of which only digests are kept.

    What a key's requests leave behind is found by its own later requests alone, if there are several keys.

    Args:
        given: keys; they are called key-1, key-2, ...
        file: lines `NAME KEY` or `NAME sha256:DIGEST` (hexadecimal); empty ones, and those that begin with #,
            are skipped.

    Raises:
        KeysError: the file cannot be read, a line has another form, or a name comes twice.
    """

    def __init__(self, given: Sequence[str] = (), file: Path | None = None):
        self._digests = [(f"key-{i}", _digest(key.encode())) for i, key in enumerate(given, 1)]
        if file is not None:
            self._digests += _read(file)
        names = Counter(name for name, _ in self._digests)
        if repeated := [name for name, count in names.items() if count > 1]:
            raise KeysError(f"two keys are called {repeated[0]}")
        self._drops: Counter[str] = Counter()

    def __bool__(self) -> bool:
        return bool(self._digests)

    @property
    def several(self) -> bool:
        """Whether what one key sees is to be kept from others."""
        return len(self._digests) > 1

    def name_of(self, presented: bytes) -> str | None:
        """The name of a key as it came in a header, in time that tells nothing; None: it is none of them.

        Clients write letters beyond ASCII in UTF-8 or Latin-1: either is the key.
        """
        digests = [_digest(presented), _digest(presented.decode("latin-1").encode())]
        found = None
        for name, known in self._digests:
            matches = [hmac.compare_digest(digest, known) for digest in digests]  # all of them: constant time
            if any(matches):
                found = name
        return found if presented else None

    def salt(self, name: str, salt: str) -> str:
        """Under which salt prefixes of a key's requests are cached."""
        return f"{name}\x00{self._drops[name]}\x00{salt}" if self.several else salt

    def tenant(self, name: str) -> str:
        """Stands for a key, whatever its name, where the cache outlives the process; "" if all share it."""
        return dict(self._digests)[name].hex() if self.several else ""

    def drop(self, name: str) -> None:
        """Has the prefixes of a key found no more, those in use and those to come of its running requests."""
        self._drops[name] += 1


def _read(file: Path) -> list[tuple[str, bytes]]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise KeysError(f"cannot read {file}: {error}") from error
    digests = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        if (match := _LINE.fullmatch(line.strip())) is None:
            raise KeysError(f"line {number} of {file} is not `NAME KEY` or `NAME sha256:DIGEST`")
        digest = bytes.fromhex(match["digest"]) if match["digest"] else _digest(match["key"].encode())
        digests.append((match["name"], digest))
    if not digests:
        raise KeysError(f"{file} has no keys")
    return digests


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
