"""A GGUF file as a model directory: what transformers calls config and tokenizer beside the file itself.

Tensors stay in the file, from which `GGUFTensors` reads them; `TABLE` says where each lies, so that the
vocabulary inside a GGUF file, which has to be read to get past it, is read once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from curkv.kernels.linear.stored import Bytes, Grids, StoredRows, Stretch
from curkv.models.config import ModelConfig
from curkv.models.errors import ModelError, ModelNotFound, UnsupportedModel
from curkv.models.families import family_of, family_of_gguf, read_config
from curkv.models.families.gguf_names import FLOAT32_LIMIT, ROPE_TENSORS, ROW_TENSORS
from curkv.models.loading.gguf_blocks import FOUR_BITS, Floats, dequantise, grids_of
from curkv.models.loading.gguf_file import GGUFFile, GGUFTensor
from curkv.models.loading.gguf_tokenizer import write_tokenizer
from curkv.models.loading.json_file import read_json
from curkv.models.loading.pieces import PieceFiles
from curkv.models.loading.tensors import check_shapes, not_finite

TABLE = "gguf.json"
"""Names the tensors of the GGUF files in the directory: kind, shape, file and offset of each."""


def describe_gguf(source: Path, directory: Path) -> None:
    """Makes a model directory of a GGUF file: files that transformers reads too, and links to the file.

    Args:
        source: The file, or a piece of a split one. It may lie in the directory.
        directory: Where to write.

    Raises:
        UnsupportedModel: The architecture, its settings or its tokenizer are not implemented.
        ModelNotFound: A piece is missing.
        ModelError: The file is damaged, or its tensors are not what its metadata says.
    """
    gguf = GGUFFile(source)
    with _naming(gguf.path):
        _refuse_what_is_no_model(gguf)
        config = family_of_gguf(gguf.architecture, bool(gguf.setting("expert_count"))).config_of_gguf(gguf)
        parsed = read_config(config)
        tensors = GGUFTensors(gguf.tensors.values(), parsed)
        shapes = {name: shape for name, (shape, _) in PieceFiles(tensors, parsed).headers().items()}
        check_shapes(shapes, family_of(parsed).tensors(parsed), tensors.place)
        write_tokenizer(gguf.get, directory, parsed.max_positions)
        words = len(gguf.get("tokenizer.ggml.tokens"))
        if words > parsed.vocab_size:
            raise ModelError(
                f"tokenizer.ggml.tokens has {words} tokens, token_embd.weight only {parsed.vocab_size} rows"
            )
    _write_json(directory / "config.json", config)
    eos = (gguf.get("tokenizer.ggml.eos_token_id"), gguf.get("tokenizer.ggml.eot_token_id"))
    _write_json(
        directory / "generation_config.json",
        {
            "bos_token_id": config["bos_token_id"],
            "eos_token_id": list(dict.fromkeys(id for id in eos if id is not None)),
            "pad_token_id": config["pad_token_id"],
        },
    )
    table = {
        tensor.name: [tensor.kind.name, tensor.shape, tensor.path.name, tensor.offset]
        for tensor in gguf.tensors.values()
    }
    (directory / TABLE).write_text(json.dumps(table), encoding="utf-8")
    for path in gguf.paths:
        if path.parent != directory:
            (directory / path.name).symlink_to(path)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Names the file in errors that do not."""
    try:
        yield
    except ModelError as error:
        if str(path) in str(error):
            raise
        raise type(error)(f"{path}: {error}") from error


def _refuse_what_is_no_model(gguf: GGUFFile) -> None:
    kind = gguf.get("general.type", "model")
    if kind == "adapter":
        raise UnsupportedModel(
            "it holds a LoRA adapter (general.type), which is not served as it is: merge it into its base "
            "model (llama.cpp's llama-export-lora) and name the result"
        )
    if kind == "mmproj" or gguf.architecture == "clip":
        raise UnsupportedModel(
            "it holds the vision or audio tower of a model (general.type); name the text model"
        )


class GGUFTensors:
    """The tensors of GGUF files under their names in safetensors; see `checkpoint.TensorFiles`."""

    mapped = False

    def __init__(self, tensors: Iterable[GGUFTensor], config: ModelConfig):
        self._config, self._family = config, family_of(config)
        self._tensors = {
            name: one
            for tensor in tensors
            if tensor.name not in ROPE_TENSORS
            for name, one in _parts(self._family.tensor_of_gguf(tensor.name), tensor)
        }

    @classmethod
    def of(cls, directory: Path) -> GGUFTensors | None:
        """Returns those of a directory that `describe_gguf` made; None if it is another.

        Raises:
            ModelNotFound: The GGUF file is not where it was.
            ModelError: The table is damaged.
        """
        table = read_json(directory / TABLE)
        if table is None:
            return None
        try:
            tensors = [
                GGUFTensor(name, directory / file, GGMLQuantizationType[kind], tuple(shape), int(offset))
                for name, (kind, shape, file, offset) in table.items()
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{directory / TABLE} is damaged: {error}") from error
        for path in {tensor.path for tensor in tensors}:
            if not path.is_file():
                raise ModelNotFound(f"{path.readlink() if path.is_symlink() else path} is gone")
        return cls(tensors, read_config(read_json(directory / "config.json") or {}))

    @property
    def names(self) -> list[str]:
        """Every tensor."""
        return list(self._tensors)

    @property
    def paths(self) -> list[Path]:
        """The files."""
        return sorted({tensor.path for tensor in self._tensors.values()})

    def place(self, name: str) -> tuple[Path, str]:
        """Returns the file that holds a tensor, or should, and the tensor's name in it."""
        if name in self._tensors:
            return self._tensors[name].path.resolve(), self._tensors[name].name
        return self.paths[0].resolve(), self._family.name_in_gguf(name)

    def read(self, name: str) -> Tensor:
        """Returns the values of a tensor, float32."""
        values = self._tensors[name].read()
        return torch.from_numpy(self._family.values_of_gguf(name, values, self._config))

    def unread(self, name: str) -> Tensor:
        """See `TensorFiles.unread`."""
        tensor = self._tensors[name]
        if len(tensor.shape) != 2:
            return self.read(name)

        def finite(made: Floats) -> Tensor:
            if not np.isfinite(made.sum(dtype=np.float32)) and not np.isfinite(made).all():
                raise not_finite(*self.place(name))
            return torch.from_numpy(made)

        def decode(rows: Bytes) -> Tensor:
            return finite(dequantise(rows, tensor.kind, (len(rows), tensor.shape[1])))

        def grids(rows: Bytes) -> Grids:
            integers, *sides = grids_of(rows, tensor.kind)
            return Grids(torch.from_numpy(integers), *map(finite, sides))

        stored = self._family.values_of_gguf(name, tensor.blocks(), self._config)
        stretch = Stretch(stored, decode, grids if tensor.kind in FOUR_BITS else None)
        return StoredRows([stretch], tensor.shape[1])

    def headers(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Returns the shape of each tensor, and the type in which what is made of it is written."""
        bytes_ = 4 * sum(tensor.n_elements for tensor in self._tensors.values())
        dtype = "F32" if bytes_ <= FLOAT32_LIMIT else "F16"
        return {name: (tensor.shape, dtype) for name, tensor in self._tensors.items()}


def _parts(name: str, tensor: GGUFTensor) -> Iterator[tuple[str, GGUFTensor]]:
    """The tensors that one of a file holds under the names that are made of `name`, which may have braces."""
    if tensor.name.split(".")[-2] in ROW_TENSORS:
        tensor = replace(tensor, shape=(1, *tensor.shape))
    if "{}" not in name:
        yield name, tensor
        return
    count, *shape = tensor.shape
    for number in range(count):
        offset = tensor.offset + number * tensor.nbytes // count
        yield name.format(number), replace(tensor, shape=tuple(shape), offset=offset)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
