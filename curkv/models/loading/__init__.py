"""From what a user names (`--model`) to a directory, and from there to configuration and weights."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from curkv.models.config import ModelConfig, token_ids
from curkv.models.errors import ModelError, ModelNotFound, UnsupportedModel
from curkv.models.families import read_config
from curkv.models.loading.built_in import BUILT_IN, ensure_built_in
from curkv.models.loading.cache_directory import build_once
from curkv.models.loading.gguf import describe_gguf
from curkv.models.loading.gguf_file import split_pieces
from curkv.models.loading.json_file import read_json

PROVENANCE = "pruning.json"
"""The file that `curkv prune` writes beside the weights."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.safetensors", "*.json", "tokenizer*", "*.jinja"]
_HUB_IGNORED = ["consolidated*", "original/*", "onnx/*"]  # other copies of the same weights


def resolve_model(source: str) -> Path:
    """Returns the directory of a model, downloading it or describing a GGUF file if it has to.

    Args:
        source: A directory, a `.gguf` file, a built-in name or a Hub id, tried in this order.

    Raises:
        ModelNotFound: It is none of these, or cannot be reached.
        UnsupportedModel: A GGUF file whose model or tokenizer is not implemented.
    """
    path = Path(source).expanduser()
    if source and path.is_dir():
        return path
    if path.suffix.lower() == ".gguf":
        return _described(path)
    if source in BUILT_IN:
        return ensure_built_in(source)
    if _HUB_ID.fullmatch(source):
        return _from_hub(source)
    raise ModelNotFound(
        f"no model {source!r}: expected a directory, a .gguf file, a Hub id (owner/name) "
        f"or a built-in name ({', '.join(BUILT_IN)})"
    )


def load_config(directory: Path, text_only: bool = False) -> ModelConfig:
    """Reads config.json; the end tokens of generation_config.json come first, as in transformers.

    Args:
        directory: Of the model.
        text_only: Of a model that sees or hears besides, its text part is meant.

    Raises:
        ModelNotFound: The directory has no config.json.
        UnsupportedModel: See `read_config`.
    """
    raw = read_json(directory / "config.json")
    if raw is None:
        raise ModelNotFound(_without_config(directory))
    try:
        config = read_config(raw, text_only)
        generation = read_json(directory / "generation_config.json") or {}
        eos_token_ids = token_ids(generation, "eos_token_id") or config.eos_token_ids
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{directory}: {error}") from error
    return replace(config, eos_token_ids=eos_token_ids)


def _without_config(directory: Path) -> str:
    """Says what a directory without config.json is, and what to do."""
    adapter = read_json(directory / "adapter_config.json")
    if adapter is not None:
        base = adapter.get("base_model_name_or_path") or "its base model"
        return (
            f"{directory} holds a LoRA adapter, which is not served as it is: merge it into {base} "
            "(peft's `merge_and_unload`), save the result and name that directory"
        )
    ggufs = sorted(path for path in directory.iterdir() if path.suffix.lower() == ".gguf")
    if ggufs:
        return f"{directory} has no config.json, but a GGUF file: name the file itself, --model {ggufs[0]}"
    return f"{directory} has no config.json"


def load_pruning(directory: Path) -> dict[str, Any] | None:
    """Reads how a model came out of `curkv prune`, without the rows that it kept; None if it did not."""
    provenance = read_json(directory / PROVENANCE)
    return provenance and {key: value for key, value in provenance.items() if key != "kept_rows"}


def load_tokenizer(directory: Path) -> Tokenizer:
    """Returns the tokenizer; a `tokenizer.json` is taken as it is, whatever class the configuration names.

    Raises:
        ModelNotFound: The directory has no tokenizer.json.
        ModelError: It is damaged.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ModelNotFound(
            f"{directory} has no tokenizer.json; `AutoTokenizer.from_pretrained(...).save_pretrained(...)` "
            "of transformers makes one from older formats"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more special
        raise ModelError(f"{path} is no readable tokenizer: {str(error).splitlines()[0]}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _described(path: Path) -> Path:
    """Returns the directory made of a GGUF file; path, size and time stand for the content of its pieces."""
    if not path.is_file():
        raise ModelNotFound(f"no such file: {path}")
    digest = hashlib.sha256()
    for piece in split_pieces(path.resolve()):
        status = piece.stat()
        digest.update(f"{piece}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    name = f"{path.stem}-{digest.hexdigest()[:12]}"
    return build_once(name, lambda directory: describe_gguf(path.resolve(), directory))


def _from_hub(model_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model_id, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_IGNORED))
    except Exception as error:
        raise ModelNotFound(
            f"{model_id} could not be fetched from the Hugging Face Hub and is not in the local cache "
            f"({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from error
