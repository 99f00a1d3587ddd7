"""The script for the first minutes on a GPU, on small shapes under Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu" / "first.py"

pytestmark = pytest.mark.triton


def first(out: Path, *phases: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--cpu", "--out", str(out), *phases]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_phases_report_as_they_go_and_every_kernel_is_right(tmp_path: Path) -> None:
    done = first(tmp_path, "env", "kernels", "decode")
    rows = [json.loads(line) for line in (tmp_path / "first.jsonl").read_text().splitlines()]
    ended = {row["name"]: row["ended"] for row in rows if row["phase"] == "phases"}
    assert ended == {"env": "done", "kernels": "done", "decode": "done"}, done.stdout + done.stderr
    checked = {row["operation"]: row["right"] for row in rows if "right" in row}
    assert len(checked) > 10
    assert all(checked.values())
    assert "## decode" in (tmp_path / "first.md").read_text()


def test_a_phase_that_fails_costs_itself_alone(tmp_path: Path) -> None:
    done = first(tmp_path, "sanitizer", "env")  # there is no compute-sanitizer
    assert done.returncode == 1
    assert "compute-sanitizer" in done.stdout
    assert '"name": "env", "seconds"' in done.stdout
