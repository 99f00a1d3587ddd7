"""On the inputs of its spec, an implementation of an operation gives and writes what the reference does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from curkv.kernels.dispatch import cases, load
from curkv.kernels.spec import Case, Inputs, ModelShape, Workload
from tests.kernels.util import assert_close

MODEL = ModelShape("small", layers=2, query_heads=6, kv_heads=2, head_dim=64, hidden=96, intermediate=160)
WORKLOAD = Workload(MODEL, 3, 150, chunk=40, kept=50, window=8, page_size=16, dtype=torch.float32)
CASES = {name: (operation, case) for operation, name, case in cases()}
TOLERANCE = {"float32": 1e-5, "int8": 2e-2}


def results(operation: str, case: Case, backend: str, kv_dtype: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    inputs = Inputs(replace(WORKLOAD, kv_dtype=kv_dtype))
    return case.call(inputs).run(load(operation, backend))


@pytest.mark.parametrize("kv_dtype", list(TOLERANCE))
@pytest.mark.parametrize("backend", ["cpu", pytest.param("triton", marks=pytest.mark.triton)])
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_reference(name: str, backend: str, kv_dtype: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    operation, case = CASES[name]
    if kv_dtype == "int8" and not case.reads_vectors:
        pytest.skip("reads and writes no keys or values")
    expected = results(operation, case, "reference", kv_dtype)
    actual = results(operation, case, backend, kv_dtype)
    assert len(actual) == len(expected) > 0
    for a, e in zip(actual, expected, strict=True):
        assert_close(a.float(), e.float(), TOLERANCE[kv_dtype])


@pytest.mark.parametrize("name", CASES)
def test_what_stands_in_for_inputs_looks_like_them(name: str) -> None:
    _, case = CASES[name]
    real, stand_in = (case.call(Inputs(WORKLOAD, stand_in=stand_in)) for stand_in in (False, True))
    for a, b in zip(real.arguments, stand_in.arguments, strict=True):
        if isinstance(a, torch.Tensor):
            assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
