"""What a device allows and prefers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from curkv.cache.layout import CacheLayout, full_attention
from curkv.engine import device
from curkv.engine.device import CPU, GPU, choose_device
from curkv.kernels.formats import get_format
from curkv.kernels.linear import WEIGHTS
from curkv.kernels.linear.formats import WEIGHT_CHOICES


def test_the_cache_takes_a_share_of_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "free_memory", lambda: 1000)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2000, 4000))
    assert (CPU.cache_bytes, GPU.cache_bytes) == (500, 1800)


def test_there_are_places_for_what_the_cache_of_a_gpu_holds() -> None:
    layout = CacheLayout(full_attention(32, 8), 128, 64, get_format("bfloat16"), 256, 131_072)
    pages = {gib: (gib << 30) // layout.page_bytes for gib in (2, 57, 120)}
    assert [GPU.sequences(count, layout) for count in pages.values()] == [64, 221, 256]
    assert [CPU.sequences(count, layout) for count in pages.values()] == [64, 64, 64]
    short = replace(layout, max_tokens=512)
    assert GPU.sequences(pages[57] // 4, short) == 221


def test_a_gpu_is_taken_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for available, chosen in ((False, CPU), (True, GPU)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert choose_device("auto") is chosen
        assert choose_device("cpu") is CPU


def test_formats_are_preferred_or_refused() -> None:
    assert (CPU.weight_format("auto").name, GPU.weight_format("auto").name) == ("published", "bfloat16")
    assert CPU.kv_format("auto", 64, CPU.weights).name == "int8"
    assert CPU.kv_format("auto", 64, CPU.weight_format("float32")).name == "float16"
    assert CPU.kv_format("auto", 40, CPU.weights).name == "float16"
    assert GPU.kv_format("auto", 64, GPU.weights).name == "bfloat16"
    assert CPU.weight_format("int4").name == "int4"
    with pytest.raises(ValueError, match="bfloat16 is for a GPU; weights on the CPU are float32, int8, int4"):
        CPU.weight_format("bfloat16")
    with pytest.raises(ValueError, match="a multiple of 16 channels; the model's have 40"):
        CPU.kv_format("int8", 40, CPU.weights)
    with pytest.raises(
        ValueError, match="k8v4 needs heads of a multiple of 64 channels; the model's have 80"
    ):
        CPU.kv_format("k8v4", 80, CPU.weights)


def test_8_bit_floats_are_refused_where_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="fp8 is for a GPU; on the CPU there are float32, bfloat16"):
        CPU.kv_format("fp8", 64, CPU.weights)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(ValueError, match="from Ada and Hopper on; A100 has none"):
        GPU.kv_format("fp8", 64, GPU.weights)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert GPU.kv_format("fp8", 64, GPU.weights).name == "fp8"


def test_the_command_line_offers_every_weight_format() -> None:
    assert {form.name for form in WEIGHT_CHOICES} == set(WEIGHTS)
