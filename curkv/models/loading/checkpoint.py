"""The weights of a model directory."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from curkv.kernels.linear.stored import StoredRows
from curkv.models.blocks import LayerWeights
from curkv.models.config import SUPPORTED_QUANTISATIONS, ModelConfig
from curkv.models.errors import ModelError, ModelNotFound
from curkv.models.families import family_of
from curkv.models.families.base import EMBEDDING, HEAD
from curkv.models.loading.gguf import GGUFTensors
from curkv.models.loading.json_file import read_json
from curkv.models.loading.pieces import PieceFiles
from curkv.models.loading.quantised import QuantisedFiles
from curkv.models.loading.tensors import TensorFiles, check_shapes, not_finite
from curkv.models.shards import shard, shard_of
from curkv.ranks import ALONE, Ranks

INDEX = "model.safetensors.index.json"
PREFIX = "model."


def tensor_files(directory: Path) -> TensorFiles:
    """Returns the tensors of a directory.

    Raises:
        ModelNotFound: A file is missing.
        ModelError: A file is damaged, or quantised in a way that is not implemented.
    """
    if (gguf := GGUFTensors.of(directory)) is not None:
        return gguf
    files = SafetensorsFiles(directory)
    settings = (read_json(directory / "config.json") or {}).get("quantization_config") or {}
    if settings.get("quant_method") in SUPPORTED_QUANTISATIONS:  # the rest is what a family has of its own
        return QuantisedFiles(files, settings)
    return files


class SafetensorsFiles:
    """Tensors in safetensors files, memory-mapped.

    Each that is read has a mapping of its own: what was read of a file counts as memory of the process until
    its mapping is gone.
    """

    mapped = True

    def __init__(self, directory: Path):
        self._directory = directory
        self._path_of = _paths(directory)

    @property
    def names(self) -> list[str]:
        """See `TensorFiles.names`."""
        return list(self._path_of)

    @property
    def paths(self) -> list[Path]:
        """See `TensorFiles.paths`."""
        return sorted(set(self._path_of.values()))

    def place(self, name: str) -> tuple[Path, str]:
        """See `TensorFiles.place`; the directory if no file holds the tensor."""
        return self._path_of.get(name, self._directory), name

    def read(self, name: str) -> Tensor:
        """See `TensorFiles.read`."""
        if name not in self._path_of:
            raise ModelError(f"{self._directory} has no tensor {name}")
        tensor: Tensor = _open(self._path_of[name]).get_tensor(name)
        return tensor

    def unread(self, name: str) -> Tensor:
        """See `TensorFiles.unread`: a view of the file."""
        return self.read(name)

    def headers(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """See `TensorFiles.headers`."""
        found = {}
        for path in dict.fromkeys(self._path_of.values()):
            file = _open(path)
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                found[name] = tuple(part.get_shape()), str(part.get_dtype())
        return found


class Checkpoint:
    """The weights of a model directory.

    They are read when asked for, so that a caller which repacks them holds one layer twice, never the whole
    model. Those that are neither fused nor converted are views of the file. One of several processes reads of
    each layer what it runs.

    Raises:
        ModelNotFound: A file is missing.
        ModelError: A file is damaged, a tensor is missing or has another shape than the configuration says.
            When a tensor is read: it holds NaN or infinity.
    """

    def __init__(
        self,
        directory: Path,
        config: ModelConfig,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        ranks: Ranks = ALONE,
        unread: bool = False,
    ):
        """Checks what there is, and reads nothing.

        Args:
            directory: Of the model.
            config: The model.
            dtype: Of what is read.
            device: Where that is to be.
            ranks: The processes that share it.
            unread: Weights may be `StoredRows`, for who packs them some rows at a time.
        """
        self.config = config
        self.dtype = dtype
        self.device = device
        self.files = PieceFiles(tensor_files(directory), config)
        self._take = self.files.unread if unread else self.files.read
        self._family = family_of(config)
        self._ranks, self._shard = ranks, shard_of(config, ranks)
        self._checked: set[str] = set()
        self._projections: dict[int, Tensor] = {}
        self._stored_as = _stored_names(self.files.names, config)
        shapes = {name: shape for name, (shape, _) in self.files.headers().items()}
        shapes |= {name: shapes[stored] for name, stored in self._stored_as.items()}
        check_shapes(shapes, self._family.tensors(config), self._place)

    @property
    def embedding(self) -> Tensor:
        """[vocab, hidden]."""
        return self._family.embedding(self._read, self.config)

    @property
    def final_norm(self) -> Tensor:
        """[hidden]."""
        return self._family.final_norm(self._read, self.config)

    @property
    def head(self) -> Tensor:
        """[vocab, hidden]; the embedding if the model ties them."""
        return self._family.head(self._read, self.config)

    def layer(self, index: int) -> LayerWeights:
        """Reads one decoder layer and fuses its projections."""
        return self._family.layer(self._read, self._shard, index)

    def attention_output(self, index: int) -> Tensor:
        """[hidden, query heads * head_dim], the weight of a layer's output projection; stays if mapped."""
        found = self._projections.get(index)
        if found is None:
            found = self._family.attention_output(
                self._stored, self._shard, f"model.layers.{index}.self_attn"
            )
            if self.files.mapped:
                self._projections[index] = found
        return found.to(self.device, self.dtype)

    def _read(self, name: str, *shape: int, parts: Sequence[int] = ()) -> Tensor:
        tensor = self._stored(name, *shape, parts=parts)
        if name not in self._checked:
            if not isinstance(tensor, StoredRows):  # which are looked at when there are values
                self._check_finite(name, tensor)
            self._checked.add(name)
        return tensor.to(self.device, self.dtype)

    def _stored(self, name: str, *shape: int, parts: Sequence[int] = ()) -> Tensor:
        return shard(self._take(self._stored_as.get(name, name)), shape, parts, self._ranks)

    def _place(self, name: str) -> tuple[Path, str]:
        return self.files.place(self._stored_as.get(name, name))

    def _check_finite(self, name: str, tensor: Tensor) -> None:
        """Looks for NaN and infinity by a sum, which is over as soon as memory is read."""
        if not tensor.sum(dtype=torch.float32).isfinite() and not tensor.isfinite().all():
            raise not_finite(*self._place(name))


def _stored_names(found: Collection[str], config: ModelConfig) -> dict[str, str]:
    """Returns under which other names tensors lie in the files.

    A model saved without its head has no prefix, and the text part of a larger one has more of it. A model
    that ties its head may name only that; where there is no head, the embedding is it.
    """
    embeddings = [name for name in found if name.endswith(EMBEDDING.removeprefix(PREFIX))]
    if not embeddings and config.tie_embeddings and HEAD in found:
        return {EMBEDDING: HEAD}
    if len(embeddings) != 1:
        return {}
    prefix = embeddings[0].removesuffix(EMBEDDING.removeprefix(PREFIX))
    stored = {}
    if prefix != PREFIX:
        stored = {PREFIX + name.removeprefix(prefix): name for name in found if name.startswith(prefix)}
    heads = [name for name in found if name.endswith(HEAD)]
    return stored | {HEAD: heads[0] if heads else embeddings[0]}


def _paths(directory: Path) -> dict[str, Path]:
    """Returns the file that holds each tensor."""
    index, names = read_json(directory / INDEX), ["model.safetensors"]
    if index is not None:
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{directory / INDEX} has no weight_map")
        names = sorted(set(map(str, weight_map.values())))
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        named = f", which {INDEX} names" if index else ""
        raise ModelNotFound(
            f"{directory} has no {', '.join(missing)}{named}; weights are read from safetensors files"
        )
    paths = [directory / name for name in names]
    return {tensor: path for path in paths for tensor in _open(path).keys()}  # noqa: SIM118


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"the safetensors file {path} is damaged: {error}") from error
