"""What this machine multiplies that not every one does."""

from __future__ import annotations

from llvmlite.binding import get_host_cpu_features

FEATURES = get_host_cpu_features()
"""LLVM's names of what this machine has, each true or false."""
MULTIPLIES_QUADS = bool(FEATURES.get("avxvnni") or (FEATURES.get("avx512vnni") and FEATURES.get("avx512vl")))
"""Whether the machine multiplies bytes in fours and adds them up in an int32 (x86's vpdpbusd)."""
MULTIPLIES_BFLOAT16 = bool(FEATURES.get("avx512bf16") and FEATURES.get("avx512vl"))
"""Whether the machine multiplies bfloat16 in pairs and adds them up in a float32 (x86's vdpbf16ps)."""
