"""OpenAI-compatible inference server that keeps only the part of the KV cache that matters."""

import os

__version__ = "0.1.0"

# Threads of torch that wait sleep, as those of the CPU's kernels do, instead of taking a core from them and
# from other processes. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
