from __future__ import annotations

import sys

import numpy as np
import pytest

from curkv.kernels.dispatch import get_kernels


def test_an_unknown_name_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="name 'cuda'; choose one of auto, cpu, triton, reference"):
        get_kernels("cuda")  # type: ignore[arg-type]


def test_auto_refuses_a_device_without_kernels() -> None:
    with pytest.raises(ValueError, match="no kernels for device 'meta'"):
        get_kernels("auto", device="meta")


def test_triton_that_is_not_installed_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ValueError, match="need the package triton"):
        get_kernels("triton")


@pytest.mark.triton
def test_a_triton_that_is_too_old_is_an_error_that_says_which_would_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", "3.3.1")
    with pytest.raises(ValueError, match=r"need triton 3\.4 or newer; 3\.3\.1 is installed"):
        get_kernels("triton")


@pytest.mark.triton
def test_an_interpreter_that_is_too_old_for_numpy_is_an_error_that_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    monkeypatch.setattr(np, "__version__", "2.4.6")
    with pytest.raises(ValueError, match=r"numpy below 2\.4 or triton 3\.7 or newer; triton 3\.6\.0 and"):
        get_kernels("triton")


@pytest.mark.triton
def test_triton_on_a_cpu_needs_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match="need a GPU; TRITON_INTERPRET=1"):
        get_kernels("triton")


def test_the_cpus_kernels_refuse_memory_that_they_cannot_reach() -> None:
    with pytest.raises(ValueError, match="'cpu' do not run on device 'cuda'"):
        get_kernels("cpu", device="cuda")


def test_a_backend_declares_how_its_decode_steps_are_noted() -> None:
    assert get_kernels("cpu").backend.replay == "launches"
    assert get_kernels("reference").backend.replay is None
