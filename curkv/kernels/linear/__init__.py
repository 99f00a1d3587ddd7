"""Linear layers over weights packed once at load."""

WEIGHTS = ("float32", "bfloat16", "fp8", "int8", "int4", "published")
"""Every format by name, as `--weights` takes it; what each is stands in `formats.py`."""
