"""From what a user names (`--model`) to a directory, and from there to configuration and weights."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor

from curkv.models.cache_directory import build_once
from curkv.models.config import ModelConfig, token_ids
from curkv.models.default_model import BUILT_IN, ensure_built_in
from curkv.models.errors import ModelError, ModelNotFound
from curkv.models.gguf import convert_gguf

PROVENANCE = "pruning.json"
"""Written by `curkv prune` beside the weights."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.safetensors", "*.json", "tokenizer*", "*.jinja"]
_HUB_IGNORED = ["consolidated*", "original/*", "onnx/*"]  # other copies of the same weights


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Weights of one decoder layer, [out, in] like torch's Linear, in the dtype asked for.

    Attributes:
        input_norm: [hidden].
        qkv: [q_size + 2 kv_size, hidden]: query, key and value projections, one below the other.
        qkv_bias: [q_size + 2 kv_size] or None.
        q_norm: [head_dim] or None.
        k_norm: [head_dim] or None.
        o: [hidden, q_size].
        o_bias: [hidden] or None.
        post_attention_norm: [hidden].
        gate_up: [2 intermediate, hidden]: gate above up.
        gate_up_bias: [2 intermediate] or None.
        down: [hidden, intermediate].
        down_bias: [hidden] or None.
    """

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Tensor
    o_bias: Tensor | None
    post_attention_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


def resolve_model(source: str) -> Path:
    """Returns the directory of a model, downloading or converting it if it has to.

    Args:
        source: A directory, a `.gguf` file, a built-in name or a Hub id, tried in this order.

    Raises:
        ModelNotFound: It is none of these, or cannot be reached.
        UnsupportedModel: A GGUF file whose model or tokenizer is not implemented.
    """
    path = Path(source).expanduser()
    if source and path.is_dir():
        return path
    if path.suffix == ".gguf":
        return _converted(path)
    if source in BUILT_IN:
        return ensure_built_in(source)
    if _HUB_ID.fullmatch(source):
        return _from_hub(source)
    raise ModelNotFound(
        f"no model {source!r}: expected a directory, a .gguf file, a Hub id (owner/name) "
        f"or a built-in name ({', '.join(BUILT_IN)})"
    )


def load_config(directory: Path) -> ModelConfig:
    """Reads config.json; the end tokens of generation_config.json come first, as in transformers.

    Raises:
        ModelNotFound: The directory has no config.json.
        UnsupportedModel: See `ModelConfig.from_dict`.
    """
    raw = _read_json(directory / "config.json")
    if raw is None:
        raise ModelNotFound(f"{directory} has no config.json")
    config = ModelConfig.from_dict(raw)
    generation = _read_json(directory / "generation_config.json") or {}
    return replace(config, eos_token_ids=token_ids(generation.get("eos_token_id")) or config.eos_token_ids)


def load_pruning(directory: Path) -> dict[str, Any] | None:
    """Reads how a model came out of `curkv prune`, without the rows that it kept; None if it did not."""
    provenance = _read_json(directory / PROVENANCE)
    return provenance and {key: value for key, value in provenance.items() if key != "kept_rows"}


def load_tokenizer(directory: Path) -> Tokenizer:
    """Returns the tokenizer; a `tokenizer.json` is taken as it is, whatever class the configuration names.

    Raises:
        ModelNotFound: The directory has no tokenizer.json.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ModelNotFound(
            f"{directory} has no tokenizer.json; `AutoTokenizer.from_pretrained(...).save_pretrained(...)` "
            "of transformers makes one from older formats"
        )
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class Checkpoint:
    """The safetensors files of a model directory, memory-mapped.

    Weights are read when asked for, so that a caller which repacks them holds one layer twice, never the
    whole model. Those that are neither fused nor converted are views of the file, each with a mapping of its
    own: what was read of a file counts as memory of the process until its mapping is gone.
    """

    def __init__(
        self,
        directory: Path,
        config: ModelConfig,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ):
        self.config = config
        self.dtype = dtype
        self.device = device
        self._path_of_tensor = _tensor_paths(directory)

    @property
    def embedding(self) -> Tensor:
        """[vocab, hidden]."""
        return self._tensor("model.embed_tokens.weight")

    @property
    def final_norm(self) -> Tensor:
        """[hidden]."""
        return self._tensor("model.norm.weight")

    @property
    def head(self) -> Tensor:
        """[vocab, hidden]; the embedding if the model ties them."""
        return self.embedding if self.config.tie_embeddings else self._tensor("lm_head.weight")

    def layer(self, index: int) -> LayerWeights:
        """Reads one decoder layer and fuses its projections."""
        config = self.config
        prefix = f"model.layers.{index}"
        qkv = [f"{prefix}.self_attn.{name}_proj" for name in "qkv"]
        gate_up = [f"{prefix}.mlp.{name}_proj" for name in ("gate", "up")]
        o, down = f"{prefix}.self_attn.o_proj", f"{prefix}.mlp.down_proj"
        norms = f"{prefix}.self_attn"
        return LayerWeights(
            input_norm=self._tensor(f"{prefix}.input_layernorm.weight"),
            qkv=self._fused(qkv, "weight"),
            qkv_bias=self._fused(qkv, "bias") if config.qkv_bias else None,
            q_norm=self._tensor(f"{norms}.q_norm.weight") if config.qk_norm else None,
            k_norm=self._tensor(f"{norms}.k_norm.weight") if config.qk_norm else None,
            o=self._tensor(f"{o}.weight"),
            o_bias=self._tensor(f"{o}.bias") if config.o_bias else None,
            post_attention_norm=self._tensor(f"{prefix}.post_attention_layernorm.weight"),
            gate_up=self._fused(gate_up, "weight"),
            gate_up_bias=self._fused(gate_up, "bias") if config.mlp_bias else None,
            down=self._tensor(f"{down}.weight"),
            down_bias=self._tensor(f"{down}.bias") if config.mlp_bias else None,
        )

    def attention_output(self, index: int) -> Tensor:
        """[hidden, query heads * head_dim], the weight of a layer's output projection."""
        return self._tensor(f"model.layers.{index}.self_attn.o_proj.weight")

    def stored(self, name: str) -> Tensor:
        """Reads a tensor by its name, in the type that it is stored in."""
        path = self._path_of_tensor.get(name)
        if path is None:
            raise ModelError(f"the checkpoint has no tensor {name}")
        tensor: Tensor = _open(path).get_tensor(name)
        return tensor

    def _fused(self, names: list[str], kind: str) -> Tensor:
        return torch.cat([self._tensor(f"{name}.{kind}") for name in names])

    def _tensor(self, name: str) -> Tensor:
        return self.stored(name).to(self.device, self.dtype)


def tensor_files(directory: Path) -> dict[str, Any]:
    """Returns the open file that holds each tensor."""
    paths = _tensor_paths(directory)
    files = {path: _open(path) for path in set(paths.values())}
    return {name: files[path] for name, path in paths.items()}


def _tensor_paths(directory: Path) -> dict[str, Path]:
    index = _read_json(directory / "model.safetensors.index.json")
    names = sorted(set(index["weight_map"].values())) if index else ["model.safetensors"]
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise ModelNotFound(f"{directory} has no {missing[0]}; weights are read from safetensors files")
    paths = [directory / name for name in names]
    return {tensor: path for path in paths for tensor in _open(path).keys()}  # noqa: SIM118


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ModelError(f"the safetensors file {path} is damaged: {error}") from error


def _converted(path: Path) -> Path:
    """Returns the conversion of a GGUF file; the file's path, size and time stand for its content."""
    if not path.is_file():
        raise ModelNotFound(f"no such file: {path}")
    path = path.resolve()
    status = path.stat()
    key = f"{path}\0{status.st_size}\0{status.st_mtime_ns}"
    name = f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    return build_once(name, lambda directory: convert_gguf(path, directory))


def _from_hub(model_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model_id, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_IGNORED))
    except Exception as error:
        raise ModelNotFound(
            f"{model_id} could not be fetched from the Hugging Face Hub and is not in the local cache "
            f"({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from error


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ModelError(f"{path} is no valid JSON: {error}") from error
    return content
