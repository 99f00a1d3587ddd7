"""Quantised checkpoints: AWQ, GPTQ, FP8 and compressed-tensors, read as the values that they stand for.

Layouts of a linear layer's weight [out, in]:

- awq (gemm): `qweight` int32 [in, out / 8] and `qzeros` int32 [in / group, out / 8], nibbles in the order
  0 2 4 6 1 3 5 7; `scales` [in / group, out].
- gptq: `qweight` int32 [in bits / 32, out]; `qzeros` int32 [groups, out bits / 32], one less than they are
  but in `gptq_v2`; `scales` [groups, out]; `g_idx` [in].
- fp8: `weight` in 8 bits; `weight_scale_inv` or `weight_scale` of blocks, of rows or of all.
- compressed-tensors: `weight_packed` int32 [out, in bits / 32], half the range added, or `weight` in 8 bits;
  `weight_scale` and `weight_zero_point` of groups, of rows or of all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from curkv.models.errors import ModelError, UnsupportedModel
from curkv.models.loading.tensors import TensorFiles

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which nibble of an int32 belongs to each of eight columns."""
PACKED_BITS = (2, 4, 8)
COMPRESSED_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")


class QuantisedFiles:
    """Tensors of a quantised checkpoint under the names, and with the values, of one that is not.

    Args:
        files: As they are stored.
        settings: `quantization_config` of config.json.

    Raises:
        UnsupportedModel: A setting is not implemented.
    """

    mapped = False

    def __init__(self, files: TensorFiles, settings: Mapping[str, Any]):
        self._files, self._settings = files, settings
        self._headers = files.headers()
        self._method = _METHODS[_checked(settings)]
        self._stored = self._method(self)

    @property
    def names(self) -> list[str]:
        """See `TensorFiles.names`."""
        return list(self.headers())

    @property
    def paths(self) -> list[Path]:
        """See `TensorFiles.paths`."""
        return self._files.paths

    def place(self, name: str) -> tuple[Path, str]:
        """See `TensorFiles.place`; of a quantised weight its main tensor."""
        return self._files.place(self._stored[name][0] if name in self._stored else name)

    def headers(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """See `TensorFiles.headers`."""
        hidden = {f"{module(name)}.{part}" for name in self._stored for part in _PARTS}
        plain = {name: header for name, header in self._headers.items() if name not in hidden}
        return plain | {name: (shape, "F32") for name, (_, shape, _) in self._stored.items()}

    def read(self, name: str) -> Tensor:
        """See `TensorFiles.read`."""
        if name not in self._stored:
            return self._files.read(name)
        main, shape, decode = self._stored[name]
        try:
            values = decode()
        except (RuntimeError, IndexError, ValueError) as error:
            path, there = self._files.place(main)
            raise ModelError(f"{path}: what belongs to {there} does not fit together: {error}") from error
        return values.reshape(shape)

    def unread(self, name: str) -> Tensor:
        """See `TensorFiles.unread`."""
        return self.read(name)

    def modules(self, main: str) -> list[str]:
        """Returns the modules that have a tensor of a name."""
        return [module(name) for name in self._headers if name.endswith(f".{main}")]

    def setting(self, key: str, default: Any = None) -> Any:
        """Returns a setting."""
        return self._settings.get(key, default)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor as it is stored."""
        return self._headers[name][0]

    def dtype(self, name: str) -> str:
        """Returns the dtype of a tensor as it is stored, in the words of safetensors."""
        return self._headers[name][1]

    def part(self, module: str, part: str) -> Tensor | None:
        """Reads a tensor of a module as it is stored, if there is one."""
        name = f"{module}.{part}"
        return self._files.read(name) if name in self._headers else None

    def needed(self, owner: str, part: str) -> Tensor:
        """Reads a tensor of a module as it is stored.

        Raises:
            ModelError: There is none.
        """
        found = self.part(owner, part)
        if found is None:
            beside = next(name for name in self._headers if module(name) == owner)
            raise ModelError(f"{self._files.place(beside)[0]} has no tensor {owner}.{part}")
        return found


Stored = dict[str, tuple[str, tuple[int, ...], Callable[[], Tensor]]]
"""By the name of a weight: its main tensor, its shape, and what reads it."""
_PARTS = (
    *(
        "qweight",
        "qzeros",
        "scales",
        "g_idx",
        "weight_scale",
        "weight_scale_inv",
        "weight_packed",
        "weight_shape",
    ),
    *("weight_zero_point", "weight_g_idx", "input_scale", "activation_scale"),
)


def module(name: str) -> str:
    """Returns the module that a tensor belongs to."""
    return name.rpartition(".")[0]


def _checked(settings: Mapping[str, Any]) -> str:
    """Returns the method, if its settings are implemented."""
    method = str(settings.get("quant_method"))
    bits = settings.get("bits", 4)
    if method == "awq" and (settings.get("version", "gemm").lower() != "gemm" or bits != 4):
        raise UnsupportedModel(
            f"AWQ weights are read in 4 bits, version gemm; here {_named(settings, 'bits', 'version')}"
        )
    if method == "gptq" and bits not in PACKED_BITS:
        raise UnsupportedModel(
            f"GPTQ weights are read in {', '.join(map(str, PACKED_BITS))} bits; here {bits}"
        )
    if method == "compressed-tensors" and settings.get("format") not in COMPRESSED_FORMATS:
        raise UnsupportedModel(
            f"compressed-tensors are read in the formats {', '.join(COMPRESSED_FORMATS)}; "
            f"here {settings.get('format')!r}"
        )
    return method


def _named(settings: Mapping[str, Any], *keys: str) -> str:
    return ", ".join(f"{key} = {settings.get(key)!r}" for key in keys)


def unpacked(packed: Tensor, bits: int, dim: int) -> Tensor:
    """Returns the integers, without sign, of which an int32 holds several: int32, longer in one dimension."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    shape = [1] * (packed.dim() + 1)
    shape[dim + 1] = len(shifts)
    found = (packed.unsqueeze(dim + 1) >> shifts.view(shape)) & (1 << bits) - 1
    return found.flatten(dim, dim + 1)


def _awq(files: QuantisedFiles) -> Stored:
    def columns(packed: Tensor) -> Tensor:
        return unpacked(packed, 4, 1).view(len(packed), -1, 8)[..., list(AWQ_ORDER)].flatten(1)

    def read(module: str) -> Tensor:
        scales = files.needed(module, "scales").float()
        weight, zeros = (columns(files.needed(module, part)) for part in ("qweight", "qzeros"))
        group = len(weight) // len(scales)
        centred = weight.view(-1, group, weight.shape[1]) - zeros[:, None]
        return (centred * scales[:, None]).flatten(0, 1).T.contiguous()

    found: Stored = {}
    for name in files.modules("qweight"):
        rows, columns_packed = files.shape(f"{name}.qweight")
        found[f"{name}.weight"] = f"{name}.qweight", (8 * columns_packed, rows), _later(read, name)
    return found


def _gptq(files: QuantisedFiles) -> Stored:
    bits = files.setting("bits", 4)
    less = 0 if files.setting("checkpoint_format") == "gptq_v2" else 1

    def read(module: str) -> Tensor:
        weight = unpacked(files.needed(module, "qweight"), bits, 0)
        zeros = (unpacked(files.needed(module, "qzeros"), bits, 1) + less) & (1 << bits) - 1
        scales, order = files.needed(module, "scales").float(), files.part(module, "g_idx")
        group = torch.arange(len(weight)) // (len(weight) // len(scales)) if order is None else order.long()
        values: Tensor = (weight - zeros[group]) * scales[group]
        return values.T.contiguous()

    found: Stored = {}
    for name in files.modules("qweight"):
        rows, columns = files.shape(f"{name}.qweight")
        found[f"{name}.weight"] = f"{name}.qweight", (columns, rows * 32 // bits), _later(read, name)
    return found


def _scaled(files: QuantisedFiles) -> Stored:
    """Weights of a byte each, with or without a zero point."""
    block = files.setting("weight_block_size")

    def read(module: str) -> Tensor:
        weight = files.needed(module, "weight").float()
        scale = files.part(module, "weight_scale_inv")
        scale = files.needed(module, "weight_scale") if scale is None else scale
        zero = files.part(module, "weight_zero_point")
        if zero is not None:
            weight = weight - _spread(zero.float(), weight, block)
        return weight * _spread(scale.float(), weight, block)

    return {
        f"{name}.weight": (f"{name}.weight", files.shape(f"{name}.weight"), _later(read, name))
        for name in files.modules("weight")
        if files.dtype(f"{name}.weight") in ("F8_E4M3", "F8_E5M2", "I8")
    }


def _spread(scale: Tensor, weight: Tensor, block: Sequence[int] | None) -> Tensor:
    """Repeats scales of all, of rows, of groups of columns or of blocks to the shape of a weight."""
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    scale = scale.view(len(scale), -1)
    sizes = block or [-(-size // count) for size, count in zip(weight.shape, scale.shape, strict=True)]
    spread = scale.repeat_interleave(sizes[0], 0).repeat_interleave(sizes[1], 1)
    return spread[: weight.shape[0], : weight.shape[1]]


def _compressed(files: QuantisedFiles) -> Stored:
    def read(module: str) -> Tensor:
        rows, columns = files.needed(module, "weight_shape").tolist()
        packed = files.needed(module, "weight_packed")
        bits = 32 // -(-columns // packed.shape[1])
        half = 1 << bits - 1
        weight = (unpacked(packed, bits, 1)[:, :columns] - half).float()
        scale, order = files.needed(module, "weight_scale").float(), files.part(module, "weight_g_idx")
        groups = scale.shape[1] if scale.dim() > 1 else 1
        group = torch.arange(columns) // -(-columns // groups) if order is None else order.long()
        zero = files.part(module, "weight_zero_point")
        if zero is not None:
            if zero.dtype is torch.int32:
                zero = unpacked(zero, bits, 0)[:rows] - half
            weight = weight - zero.float()[:, group]
        values: Tensor = weight * scale.view(-1, groups).expand(rows, groups)[:, group]
        return values

    found: Stored = {}
    for name in files.modules("weight_packed"):
        shape = tuple(files.needed(name, "weight_shape").tolist())
        found[f"{name}.weight"] = f"{name}.weight_packed", shape, _later(read, name)
    return found | _scaled(files)


def _later(read: Callable[[str], Tensor], module: str) -> Callable[[], Tensor]:
    return lambda: read(module)


_METHODS: dict[str, Callable[[QuantisedFiles], Stored]] = {
    "awq": _awq,
    "gptq": _gptq,
    "fp8": _scaled,
    "compressed-tensors": _compressed,
}
