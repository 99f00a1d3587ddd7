"""Every implementation of an operation takes what its spec says, so that one can stand in for another."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import get_type_hints

import pytest
import torch

from curkv.kernels.dispatch import BACKENDS, Kernels, load, operations
from curkv.kernels.linear.formats import WEIGHT_FORMATS, WeightFormat
from curkv.kernels.linear.spec import Linear

BACKEND_NAMES = [backend.name for backend in BACKENDS]


def parameters(function: Callable[..., object]) -> list[tuple[str, object, object, object]]:
    """Name, kind, default and annotation of each, but for `self`."""
    every = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default, p.annotation) for p in every if p.name != "self"]


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("operation", operations())
def test_an_implementation_has_the_signature_of_its_spec(operation: str, backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    spec = get_type_hints(Kernels)[operation]
    assert parameters(load(operation, backend)) == parameters(spec.__call__)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("form", list(WEIGHT_FORMATS.values()))
def test_a_packed_layer_has_the_methods_of_a_linear_layer(form: WeightFormat, backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    layer = load("pack_linear", backend)(torch.ones(16, 32), None, form)
    for method in ("__call__", "after_rms_norm", "after_silu_mul"):
        assert parameters(getattr(type(layer), method)) == parameters(getattr(Linear, method))
    assert layer.nbytes > 0
