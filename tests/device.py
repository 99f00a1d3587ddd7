"""Where the tests of Triton's kernels run."""

from __future__ import annotations

import os

TEST_DEVICE = os.environ.get("CURKV_TEST_DEVICE", "cpu")
"""Either "cpu", under Triton's interpreter, or "cuda"."""

# Settled when triton is first imported, by whichever test.
os.environ.setdefault("TRITON_INTERPRET", "1" if TEST_DEVICE == "cpu" else "0")
