"""How keys and values lie in memory.

A format is a module: its arrays, and encoding and decoding in torch, which is what the reference kernels use.
What Numba's kernels need of it is in the module of its name in `cpu/`, and `triton.py` knows all formats.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from curkv.kernels.formats.base import KVFormat

_MODULES = {
    "float32": "plain",
    "bfloat16": "plain",
    "float16": "plain",
    "fp8": "fp8",
    "int8": "int8",
    "k8v4": "int4",
    "int4": "int4",
}
KV_FORMATS = tuple(_MODULES)
"""Every format by name, as `--kv-dtype` takes it."""


def get_format(name: str) -> KVFormat:
    """Imports a format.

    Args:
        name: one of `KV_FORMATS`.

    Returns:
        The format.

    Raises:
        ValueError: there is no such format.
    """
    if name not in _MODULES:
        raise ValueError(f"there is no KV format {name!r}; choose one of {', '.join(KV_FORMATS)}")
    found: KVFormat = import_module(f"curkv.kernels.formats.{_MODULES[name]}").FORMATS[name]
    return found
