"""Conversion of a GGUF file to the directory of a Hugging Face model: config, safetensors and tokenizer."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader, dequantize

from curkv.models.config import ModelConfig
from curkv.models.errors import ModelError
from curkv.models.families import family_of_gguf, read_config
from curkv.models.families.base import Family
from curkv.models.families.gguf_names import ROPE_TENSORS
from curkv.models.loading.gguf_tokenizer import write_tokenizer
from curkv.models.loading.safetensors_file import TensorEntry, write_safetensors
from curkv.models.loading.tensors import check_shapes, not_finite


class GGUFFile:
    """A GGUF file: metadata by key, and tensors by name."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._reader = GGUFReader(path)
        except (ValueError, IndexError, KeyError, OverflowError, struct.error) as error:
            raise ModelError(f"{path} is no readable GGUF file: {error}") from error
        self.architecture = str(self.get("general.architecture"))
        self.tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    @property
    def keys(self) -> set[str]:
        """All keys under the architecture's prefix, without it."""
        prefix = f"{self.architecture}."
        return {key.removeprefix(prefix) for key in self._reader.fields if key.startswith(prefix)}

    def get(self, key: str, default: Any = None) -> Any:
        """Returns the value of a metadata key."""
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def setting(self, key: str, default: Any = None) -> Any:
        """Returns the value of a key under the architecture's prefix."""
        return self.get(f"{self.architecture}.{key}", default)


def convert_gguf(source: Path, directory: Path) -> None:
    """Writes the model in `source` to `directory`, in the files that transformers reads as well.

    Raises:
        UnsupportedModel: The architecture, its settings or its tokenizer are not implemented.
        ModelError: The file is damaged, or its tensors are not what its metadata says.
    """
    gguf = GGUFFile(source)
    family = family_of_gguf(gguf.architecture)
    config = family.config_of_gguf(gguf)
    parsed = read_config(config)
    dtype = np.dtype("float32" if config["dtype"] == "float32" else "float16")
    entries = list(_entries(gguf, family, parsed, dtype))
    check_shapes({entry.name: entry.shape for entry in entries}, family.tensors(parsed), lambda _: source)
    write_tokenizer(gguf.get, directory, parsed.max_positions)
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
    write_safetensors(directory / "model.safetensors", entries)


def _entries(
    gguf: GGUFFile, family: Family, config: ModelConfig, dtype: np.dtype[Any]
) -> Iterator[TensorEntry]:
    for tensor in gguf.tensors.values():
        if tensor.name in ROPE_TENSORS:
            continue
        name = family.tensor_of_gguf(tensor.name)
        shape = tuple(int(size) for size in reversed(tensor.shape))

        def read(name: str = name, tensor: Any = tensor, shape: tuple[int, ...] = shape) -> npt.NDArray[Any]:
            values = dequantize(tensor.data, tensor.tensor_type).reshape(shape)
            if not np.isfinite(values.sum(dtype=np.float64)):
                raise not_finite(gguf.path, tensor.name)
            values = family.values_of_gguf(name, values, config)
            return values.astype(dtype, copy=False)

        yield TensorEntry(name, shape, dtype, read)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
