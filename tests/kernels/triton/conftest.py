"""Marks this folder's tests and prints the relative RMS error of every kernel and dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.device import TEST_DEVICE
from tests.kernels.util import relative_rms

# A GPU's float32 products are three of tf32, and its exp2 is approximate.
TOLERANCE = {
    "float32": 3e-6 if TEST_DEVICE == "cpu" else 1e-5,
    "float16": 2e-3,
    "bfloat16": 1e-2,
    "fp8": 2e-3,
    "int8": 1e-2,
    "k8v4": 1e-2,
    "int4": 2e-3,
}
_worst: dict[tuple[str, str], float] = {}

Close = Callable[..., None]


@pytest.fixture(autouse=True)
def on_the_device() -> Iterator[None]:
    """Tensors are made there unless a test says otherwise."""
    with torch.device(TEST_DEVICE):
        yield


@pytest.fixture
def close(request: pytest.FixtureRequest) -> Close:
    """A function that asserts equal shapes, dtypes and NaNs or infinities and a small relative RMS error."""
    kernel = request.node.path.stem.removeprefix("test_")

    def assert_close(actual: Tensor, expected: Tensor, kind: str | torch.dtype = "float32") -> None:
        assert actual.shape == expected.shape
        assert actual.dtype == expected.dtype
        if actual.dtype == torch.float8_e4m3fn:  # for which torch has few operations
            actual, expected = actual.float(), expected.float()
        finite = expected.isfinite()
        assert torch.equal(actual[~finite].nan_to_num(7.0), expected[~finite].nan_to_num(7.0))
        error = relative_rms(actual[finite], expected[finite]) if bool(finite.any()) else 0.0
        key = kernel, str(kind).removeprefix("torch.")
        _worst[key] = max(_worst.get(key, 0.0), error)
        assert error <= TOLERANCE[key[1]], f"relative RMS error {error:.2e}"

    return assert_close


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.triton)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _worst:
        terminalreporter.section("largest relative RMS error, Triton interpreter against reference")
        for (kernel, dtype), error in sorted(_worst.items()):
            terminalreporter.write_line(f"{kernel:<24} {dtype:<9} {error:.1e}")
