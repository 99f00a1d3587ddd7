"""Checkpoints in the layouts of AWQ, GPTQ, FP8 and compressed-tensors, written here and read back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from curkv.kernels.linear.formats import on_int4_grid
from curkv.models.errors import ModelError, UnsupportedModel
from curkv.models.loading import load_config
from curkv.models.loading.checkpoint import Checkpoint
from tests.models.test_llama import SHAPE

GROUP = 16
WIDE = SHAPE | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
Tensors = dict[str, Tensor]
Encode = Callable[[Tensor], tuple[Tensors, Tensor]]
"""From a weight to what is stored of it, and the values that stands for."""


def packed(integers: Tensor, bits: int, dim: int) -> Tensor:
    """Integers without sign, several in an int32, the first in the lowest bits."""
    parts = integers.long().unflatten(dim, (-1, 32 // bits)).movedim(dim + 1, -1)
    return sum(parts[..., i] << bits * i for i in range(32 // bits)).to(torch.int32)  # type: ignore[union-attr]


def rounded(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Integers [out, in], zeros and scales [out, groups]."""
    groups = weight.view(len(weight), -1, GROUP)
    low, high = groups.amin(-1), groups.amax(-1)
    scales = ((high - low) / (2**bits - 1)).half()
    zeros = (-low / scales.float()).round().clamp(1, 2**bits - 1)
    integers = (groups / scales.float()[..., None] + zeros[..., None]).round().clamp(0, 2**bits - 1)
    return integers.flatten(1), zeros, scales


def values(integers: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
    spread = (x.float().repeat_interleave(GROUP, 1) for x in (zeros, scales))
    zero, scale = spread
    return (integers - zero) * scale


def awq(weight: Tensor) -> tuple[Tensors, Tensor]:
    integers, zeros, scales = rounded(weight, 4)
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def laid(x: Tensor) -> Tensor:
        return packed(x.T.unflatten(1, (-1, 8))[..., order].flatten(1), 4, 1)

    stored = {"qweight": laid(integers), "qzeros": laid(zeros), "scales": scales.T}
    return stored, values(integers, zeros, scales)


def gptq(bits: int, less: int = 1) -> Encode:
    def encode(weight: Tensor) -> tuple[Tensors, Tensor]:
        integers, zeros, scales = rounded(weight, bits)
        stored = {
            "qweight": packed(integers.T, bits, 0),
            "qzeros": packed(zeros.T - less, bits, 1),
            "scales": scales.T,
            "g_idx": (torch.arange(weight.shape[1]) // GROUP).int(),
        }
        return stored, values(integers, zeros, scales)

    return encode


def blocks(weight: Tensor) -> tuple[Tensors, Tensor]:
    out, columns = (-(-size // 32) for size in weight.shape)
    scale = torch.rand(out, columns) + 0.5
    spread = scale.repeat_interleave(32, 0).repeat_interleave(32, 1)[: len(weight), : weight.shape[1]]
    eight = (weight / spread).to(torch.float8_e4m3fn)
    return {"weight": eight, "weight_scale_inv": scale}, eight.float() * spread


def of_all(weight: Tensor) -> tuple[Tensors, Tensor]:
    eight = weight.to(torch.float8_e4m3fn)
    return {
        "weight": eight,
        "weight_scale": torch.tensor(0.5),
        "input_scale": torch.tensor(1.0),
    }, eight.float() / 2


def of_rows(weight: Tensor) -> tuple[Tensors, Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 127
    integers = (weight / scale).round().to(torch.int8)
    return {"weight": integers, "weight_scale": scale}, integers * scale


def pack_quantised(weight: Tensor) -> tuple[Tensors, Tensor]:
    integers, zeros, scales = rounded(weight, 4)
    zeros[:] = 8
    stored = {
        "weight_packed": packed(integers, 4, 1),
        "weight_scale": scales,
        "weight_shape": torch.tensor(weight.shape),
    }
    return stored, values(integers, zeros, scales)


def pack_with_zeros(weight: Tensor) -> tuple[Tensors, Tensor]:
    stored, _ = pack_quantised(weight)
    integers, zeros, scales = rounded(weight, 4)
    if len(weight) % 8:
        zeros[:] = 8
        return stored, values(integers, zeros, scales)
    return stored | {"weight_zero_point": packed(zeros, 4, 0)}, values(integers, zeros, scales)


COMPRESSED = {"quant_method": "compressed-tensors"}
LAYOUTS: dict[str, tuple[Encode, dict[str, Any]]] = {
    "awq": (awq, {"quant_method": "awq", "bits": 4, "version": "gemm"}),
    "gptq": (gptq(4), {"quant_method": "gptq", "bits": 4}),
    "gptq-8": (gptq(8), {"quant_method": "gptq", "bits": 8}),
    "gptq-v2": (gptq(4, 0), {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}),
    "fp8-blocks": (blocks, {"quant_method": "fp8", "weight_block_size": [32, 32]}),
    "fp8": (of_all, {"quant_method": "fp8"}),
    "compressed-int4": (pack_quantised, COMPRESSED | {"format": "pack-quantized"}),
    "compressed-int4-zeros": (pack_with_zeros, COMPRESSED | {"format": "pack-quantized"}),
    "compressed-int8": (of_rows, COMPRESSED | {"format": "int-quantized"}),
    "compressed-fp8": (of_all, COMPRESSED | {"format": "float-quantized"}),
}


def written(directory: Path, encode: Encode, settings: dict[str, Any]) -> Tensors:
    """Writes a small model in a layout; returns the values of its weights."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**WIDE)).save_pretrained(directory)
    tensors: Tensors = {}
    expected = load_file(directory / "model.safetensors")
    for name, weight in list(expected.items()):
        if name.endswith("_proj.weight"):
            stored, expected[name] = encode(torch.randn_like(weight))
            prefix = name.removesuffix("weight")
            tensors |= {prefix + part: tensor.contiguous() for part, tensor in stored.items()}
        else:
            tensors[name] = weight
    save_file(tensors, directory / "model.safetensors")
    configured(directory, quantization_config=settings)
    return expected


def configured(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", LAYOUTS)
def test_weights_have_the_values_that_they_stand_for(name: str, tmp_path: Path) -> None:
    expected = written(tmp_path, *LAYOUTS[name])
    layer = Checkpoint(tmp_path, load_config(tmp_path)).layer(1)
    prefix = "model.layers.1"
    q, k, v = (expected[f"{prefix}.self_attn.{part}_proj.weight"] for part in "qkv")
    assert torch.allclose(layer.attention.qkv, torch.cat([q, k, v]), rtol=1e-6, atol=1e-7)
    assert torch.allclose(layer.mlp.down, expected[f"{prefix}.mlp.down_proj.weight"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["awq", "gptq", "compressed-int4"])
def test_what_was_published_in_4_bits_stays_in_them(name: str, tmp_path: Path) -> None:
    encode, _ = LAYOUTS[name]
    _, value = encode(torch.randn(64, 96))
    assert on_int4_grid(value.view(64, -1, GROUP).repeat_interleave(2, 1).flatten(1)), "32 of a group"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version = 'gemv'"),
        ({"quant_method": "gptq", "bits": 3}, "here 3"),
        (COMPRESSED | {"format": "nvfp4-pack-quantized"}, "here 'nvfp4-pack-quantized'"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes; supported: awq"),
    ],
)
def test_layouts_that_are_not_read_say_so(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    written(tmp_path, awq, settings)
    with pytest.raises(UnsupportedModel, match=words):
        Checkpoint(tmp_path, load_config(tmp_path))


def test_parts_that_are_missing_or_do_not_fit_are_named(tmp_path: Path) -> None:
    written(tmp_path, *LAYOUTS["awq"])
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.scales"
    save_file(tensors | {name: tensors[name][:, :3].contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"down_proj\.qweight does not fit together"):
        Checkpoint(tmp_path, load_config(tmp_path)).layer(1)
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        ModelError, match=r"safetensors has no tensor model\.layers\.1\.mlp\.down_proj\.scales"
    ):
        Checkpoint(tmp_path, load_config(tmp_path)).layer(1)
