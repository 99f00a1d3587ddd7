from __future__ import annotations

import pytest

from curkv.kernels.dispatch import get_kernels


def test_an_unknown_name_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="name 'cuda'; choose one of auto, cpu, reference"):
        get_kernels("cuda")  # type: ignore[arg-type]


def test_auto_refuses_a_device_without_kernels() -> None:
    with pytest.raises(ValueError, match="no kernels for device 'meta'"):
        get_kernels("auto", device="meta")
