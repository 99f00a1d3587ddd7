"""What a device allows and prefers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from curkv.cache.layout import CacheLayout
from curkv.cache.sizing import free_memory
from curkv.config import DeviceName
from curkv.kernels.formats import KV_FORMATS, get_format
from curkv.kernels.formats.base import KVFormat
from curkv.kernels.linear.formats import AS_PUBLISHED, BFLOAT16, WEIGHT_CHOICES, WeightFormat

MEMORY_SHARE = 0.5
"""Share of the free memory that the cache takes by default on a CPU.

The other half is for activations and logits of a prefill chunk, allocator slack and the other programs of the
machine. Pages are touched only when used, so the share is a ceiling and not what an idle server occupies.
"""

GPU_MEMORY_SHARE = 0.9
"""Share of a GPU's free memory that the cache takes by default.

The rest is for activations and logits of the largest step and for CUDA graphs. A GPU is rarely shared.
"""

FEWEST_SEQUENCES = 64
"""Sequences in flight, if nobody says otherwise, however small the cache is."""

USUAL_TOKENS = 2048
"""Tokens that a sequence is taken to hold: a prompt of 8,192, of which a quarter is kept."""

WITH_FP8 = (8, 9)
"""First compute capability with 8-bit floats."""

_CALLED = {"cpu": "the CPU", "cuda": "a GPU"}


@dataclass(frozen=True)
class Device:
    """A kind of device, asked for what an engine on it is built from.

    Attributes:
        kind: as torch names it; "cuda" is any GPU that torch knows, AMD's included.
        weights: the weight format that it prefers.
        kv_dtypes: names of the KV formats that it prefers, of which the first is taken that holds the heads;
            the last one where nothing else is rounded to 8 bits.
        memory_share: of the memory that is free after loading, what the KV cache takes.
        max_step_tokens: tokens of a step that it prefers.
        most_sequences: sequences in flight for which it prefers to have places at most.
        dense_prompts: see `PagedAttention`.
    """

    kind: Literal["cpu", "cuda"]
    weights: WeightFormat
    kv_dtypes: tuple[str, ...]
    memory_share: float
    max_step_tokens: int
    most_sequences: int
    dense_prompts: bool

    @property
    def torch(self) -> torch.device:
        """The device as torch takes it."""
        return torch.device(self.kind)

    @property
    def free_memory(self) -> int:
        """Bytes that are free now."""
        if self.kind == "cpu":
            return free_memory()
        free, _ = torch.cuda.mem_get_info(self.torch)
        return int(free)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the KV cache if nobody says; to be asked after the weights are loaded."""
        return int(self.free_memory * self.memory_share)

    def sequences(self, num_pages: int, layout: CacheLayout) -> int:
        """Sequences in flight if nobody says: as many as the cache holds at their usual size, in bounds."""
        tokens = min(USUAL_TOKENS, layout.max_tokens)
        held = num_pages // layout.sequence_pages(tokens)
        return max(FEWEST_SEQUENCES, min(self.most_sequences, held))

    def weight_format(self, wanted: str) -> WeightFormat:
        """The weight format of a name, or the preferred one for "auto".

        Raises:
            ValueError: another kind of device has it, or this GPU has not.
        """
        if wanted == "auto":
            return self.weights
        there = {form.name: form for form in WEIGHT_CHOICES if form.device == self.kind}
        if wanted not in there:
            other = next(form.device for form in WEIGHT_CHOICES if form.name == wanted)
            raise ValueError(
                f"--weights {wanted} is for {_CALLED[other]}; "
                f"weights on {_CALLED[self.kind]} are {', '.join(there)}"
            )
        if wanted == "fp8":
            if torch.version.hip:
                raise ValueError("--weights fp8 is for NVIDIA's GPUs; on AMD's there are bfloat16 and int8")
            _require_fp8("--weights fp8")
        return there[wanted]

    def kv_format(self, wanted: str, head_dim: int, weights: WeightFormat) -> KVFormat:
        """The KV format of a name, or the one preferred for heads of this many channels for "auto".

        Who asks for weights that are not rounded wants answers that are not either.

        Raises:
            ValueError: it cannot hold heads of this many channels, or the device does not have it.
        """
        if wanted == "auto":
            preferred = map(get_format, self.kv_dtypes if weights.rounds else self.kv_dtypes[-1:])
            return next(form for form in preferred if head_dim % form.multiple == 0)
        form = get_format(wanted)
        if self.kind not in form.devices:
            there = ", ".join(name for name in KV_FORMATS if self.kind in get_format(name).devices)
            called = " and ".join(_CALLED[kind] for kind in form.devices)
            raise ValueError(
                f"--kv-dtype {wanted} is for {called}; on {_CALLED[self.kind]} there are {there}"
            )
        if form.name == "fp8" and not torch.version.hip:  # AMD's make it of several instructions
            _require_fp8(f"--kv-dtype {wanted}")
        if head_dim % form.multiple:
            raise ValueError(
                f"--kv-dtype {wanted} needs heads of a multiple of {form.multiple} channels; "
                f"the model's have {head_dim}"
            )
        return form


CPU = Device(
    "cpu", AS_PUBLISHED, ("int8", "float16"), MEMORY_SHARE, 512, FEWEST_SEQUENCES, dense_prompts=False
)
"""Weights as published: the fastest ones that cost less than 1 % of perplexity. int8: the fewest bytes that
cost less than 0.2 %, and no slower than float16. That is for heads that int8 cannot hold and beside float32
weights, and has three bits more than bfloat16 (docs/benchmarks.md)."""

GPU = Device("cuda", BFLOAT16, ("bfloat16",), GPU_MEMORY_SHARE, 2048, 256, dense_prompts=True)
"""bfloat16: the type of the weights, of which every key and value is a product. For the size of steps see
docs/benchmarks.md, "On a GPU"."""


def _require_fp8(option: str) -> None:
    """Checks that an NVIDIA GPU has instructions for 8-bit floats.

    Raises:
        ValueError: it has not.
    """
    if torch.cuda.get_device_capability() < WITH_FP8:
        name = torch.cuda.get_device_name()
        raise ValueError(
            f"{option} needs 8-bit floats, which GPUs have from Ada and Hopper on; {name} has none"
        )


def choose_device(wanted: DeviceName) -> Device:
    """The device of a name, or a GPU if there is one for "auto".

    Raises:
        ValueError: a GPU is wanted and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch sees no GPU; use --device cpu, or install a build of torch for your GPU")
    return GPU if wanted != "cpu" and torch.cuda.is_available() else CPU
