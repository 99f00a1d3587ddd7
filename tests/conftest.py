"""Triton kernels run in its interpreter; that is settled when triton is first imported, by whichever test."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
