"""The ahead-of-time gates; compiled in a process of its own, since this one's kernels are interpreted."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from curkv.kernels.costs import COSTS, evaluate


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_kernel_passes_every_gate(target):
    models = ["--model", "SmolLM2-135M", "--model", "Llama-3.1-8B"]
    command = [
        sys.executable,
        "-m",
        "curkv.kernels.check",
        "check",
        "--no-table",
        "--target",
        target,
        *models,
    ]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_an_unknown_target_is_refused():
    command = [sys.executable, "-m", "curkv.kernels.check", "check", "--target", "sm_1"]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "gfx942" in done.stderr


@pytest.mark.parametrize("name", COSTS)
def test_formulas_evaluate(name):
    shapes = dict.fromkeys("BTcnkLHQGDPwrdIsaS", 2)
    cost = COSTS[name]
    assert evaluate(cost.moved, shapes) >= evaluate(cost.minimum, shapes) > 0
    assert evaluate(cost.flops, shapes) >= 0
