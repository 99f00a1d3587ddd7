"""The model that is pruned: its files, read tensor by tensor."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from curkv.models.errors import UnsupportedModel
from curkv.models.families import family_of
from curkv.models.loading import load_config, load_pruning
from curkv.models.loading.checkpoint import Checkpoint, tensor_files
from curkv.models.loading.json_file import read_json
from curkv.models.pruning.plan import check_gated

HASH_CHUNK = 1 << 24


class Source:
    """A model directory that can be pruned.

    Raises:
        ModelNotFound: It lacks its configuration or weights.
        UnsupportedModel: Its architecture or its MLP is not supported.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.raw_config = read_json(directory / "config.json") or {}
        self._files = tensor_files(directory)
        self._headers = self._files.headers()
        check_gated(self._headers)
        self.config = load_config(directory)
        if not family_of(self.config).prunable or self.config.activation not in ("silu", "swish"):
            raise UnsupportedModel(
                f"pruning of {self.config.architecture} is not supported; its layers differ from Llama's"
            )

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The weights in float32, layer by layer."""
        return Checkpoint(self.directory, self.config)

    @property
    def names(self) -> list[str]:
        """Every tensor of the checkpoint."""
        return list(self._headers)

    def tensor(self, name: str) -> Tensor:
        """Reads a tensor in the type of `dtype_name`."""
        tensor = self._files.read(name)
        return tensor.half() if self.dtype_name(name) == "F16" else tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape without reading it."""
        return self._headers[name][0]

    def dtype_name(self, name: str) -> str:
        """Returns a tensor's dtype in the words of the safetensors format, such as `BF16`."""
        return self._headers[name][1]

    @property
    def provenance(self) -> dict[str, Any] | None:
        """How the model itself came out of pruning, or None."""
        return load_pruning(self.directory)

    @property
    def bytes(self) -> int:
        """Size of the weight files."""
        return sum(path.stat().st_size for path in self._files.paths)

    def sha256(self) -> str:
        """Returns the hash of the weight files, one after another in the order of their names."""
        digest = hashlib.sha256()
        for path in self._files.paths:
            with path.open("rb") as file:
                while chunk := file.read(HASH_CHUNK):
                    digest.update(chunk)
        return digest.hexdigest()
