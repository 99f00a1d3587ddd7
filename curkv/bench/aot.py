"""Every Triton kernel, compiled ahead of time for real chips and real models; no GPU is needed.

The launchers themselves are called, on small stand-in tensors of the right dtype and strides, and what they
launch is recorded and compiled instead of run. So what is checked is what will run.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from curkv.kernels.dispatch import load, triton_cases
from curkv.kernels.spec import Case, Inputs, ModelShape, Phase, Workload


@dataclass(frozen=True)
class Target:
    """A chip, with the limits of one of its processors (streaming multiprocessor or compute unit).

    Attributes:
        name: As compilers call it.
        gpu: What Triton compiles for.
        processors: Processors of the chip.
        shared_per_program: Most bytes of shared memory that one program may use.
        shared: Bytes of shared memory of a processor.
        warps: Most warps on a processor.
    """

    name: str
    gpu: GPUTarget
    processors: int
    shared_per_program: int
    shared: int
    warps: int


TARGETS = (
    Target("sm_80", GPUTarget("cuda", 80, 32), 108, 163 << 10, 164 << 10, 64),
    Target("sm_90", GPUTarget("cuda", 90, 32), 132, 227 << 10, 228 << 10, 64),
    Target("sm_100", GPUTarget("cuda", 100, 32), 148, 227 << 10, 228 << 10, 64),
    Target("gfx942", GPUTarget("hip", "gfx942", 64), 304, 64 << 10, 64 << 10, 32),
)


KV_DTYPES = ("bfloat16", "fp8", "int8", "int4")
"""Formats of the cache that kernels are compiled for; what concerns no keys or values only for the first."""
WITHOUT_FP8 = ("sm_80",)
"""Chips that have no 8-bit floats."""


@dataclass(frozen=True)
class Launch:
    """A recorded launch: the kernel, its grid and what it was called with."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """Operation and kernel."""
        return f"{self.kernel.__module__.split('.')[-2]}.{self.kernel.__name__.lstrip('_')}"


@dataclass(frozen=True)
class Call:
    """A call of an operation.

    Attributes:
        name: Of the operation, and the case's label.
        shapes: For the formulas there.
        launches: What it launched.
        kv_dtype: Of the cache.
    """

    name: str
    shapes: dict[str, float]
    launches: list[Launch]
    kv_dtype: str = "bfloat16"

    @property
    def label(self) -> str:
        """What the call's kernels and costs are told apart by, besides their names."""
        return "" if self.kv_dtype == "bfloat16" else f", {self.kv_dtype}"


@dataclass(frozen=True)
class Report:
    """What a compiled kernel uses.

    Attributes:
        registers: Per thread.
        spills: Instructions that move registers to memory or back, on NVIDIA's those in innermost loops.
        shared: Bytes of shared memory per program.
        occupancy: Share of a processor's warps that can be resident, 0 to 1, by registers and shared memory.
        wide_loads: 16-byte loads from global memory in the code.
        narrow_loads: 2-byte loads from global memory in the code.
        tensor_ops: Tensor-core instructions with 16-bit operands in the code.
    """

    registers: int
    spills: int
    shared: int
    occupancy: float
    wide_loads: int
    narrow_loads: int
    tensor_ops: int


def cases_of(model: ModelShape, fp8: bool = True) -> Iterator[tuple[str, str, Case, Workload]]:
    """Every operation and how it is called with a model's shapes: its name, that of the case, case, workload.

    Those that read or write keys or values are called with caches of all `KV_DTYPES`; without 8-bit floats,
    what needs them is left out. Pages have 64 tokens, activations are bfloat16. Decode: 32 sequences with
    4,096 tokens each, and one with 32,768; prefill: a chunk of 2,048 tokens of 8,192; eviction: one sequence,
    8,192 tokens down to 2,048.
    """
    workloads: dict[Phase, list[Workload]] = {
        "decode": [Workload(model, 32, 4096), Workload(model, 1, 32768)],
        "prefill": [Workload(model, 1, 8192, chunk=2048)],
        "evict": [Workload(model, 1, 8192, kept=2048)],
    }
    for kv_dtype in KV_DTYPES if fp8 else (name for name in KV_DTYPES if name != "fp8"):
        for operation, name, case in triton_cases():
            if (case.reads_vectors or kv_dtype == "bfloat16") and (fp8 or not case.writes_fp8):
                for workload in workloads[case.phase][: 1 if case.label else None]:
                    yield operation, name, case, replace(workload, kv_dtype=kv_dtype)


def calls(model: ModelShape, target: Target) -> list[Call]:
    """Call every operation as `cases_of` says, those that launch nothing left out."""
    found = [_record(*how, target) for how in cases_of(model, fp8=target.name not in WITHOUT_FP8)]
    return [call for call in found if call.launches]


def compile_launch(launch: Launch, target: Target) -> Report:
    """Compile a recorded launch and read the machine code."""
    options = {key: launch.options[key] for key in ("num_warps", "num_stages") if key in launch.options}
    _pretend(target)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
        compiled = triton.compile(_source(launch), target=target.gpu, options=options)
    key = compiled.hash, target.name
    if key not in _reports:
        read = _read_cuda if target.gpu.backend == "cuda" else _read_hip
        _reports[key] = read(compiled, target)
    return _reports[key]


_reports: dict[tuple[str, str], Report] = {}
"""Reports by hash of the compiled kernel and target: models of the same shapes compile to the same code."""


def smallest_wide_loads(launch: Launch) -> int:
    """16-byte loads that a kernel needs at least for one block of K, or of K and V; 0 if it reads neither.

    A block of 4 bits a channel may have less for each thread of AMD's warps: none is asked for then.
    """
    values = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False)) | launch.options
    stores = [values[name] for name in ("pages_k", "pages_v") if name in values and "BLOCK_N" in values]
    warp = 64
    threads = warp * launch.options["num_warps"]
    return sum(
        max(int(x.dtype != torch.uint8), values["BLOCK_N"] * x.shape[2] * x.element_size() // (16 * threads))
        for x, *_ in stores
    )


class _Driver:
    """What Triton and the launchers ask the driver of a device, answered for a chip that is not there."""

    def __init__(self, target: Target):
        self._target = target

    @property
    def utils(self) -> _Driver:
        return self

    def get_current_target(self) -> GPUTarget:
        return self._target.gpu

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"multiprocessor_count": self._target.processors}


def _pretend(target: Target) -> None:
    """Let Triton believe, from now on, that a device of this kind is there."""
    driver.set_active(_Driver(target))


@contextmanager
def _noting_launches() -> Iterator[list[Launch]]:
    """Launches made inside are noted and not run."""
    launches: list[Launch] = []

    def note(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append(Launch(kernel, grid, arguments, options))

    run, JITFunction.run = JITFunction.run, note
    try:
        yield launches
    finally:
        JITFunction.run = run


def _record(operation: str, name: str, case: Case, workload: Workload, target: Target) -> Call:
    call = case.call(Inputs(workload, stand_in=True, layer=1))  # whose slices are aligned as most layers'
    _pretend(target)
    with _noting_launches() as launches:
        call.run(load(operation, "triton"))
    programs, *_, splits = (*launches[0].grid, 1, 1)[:3] if launches else (1, 1)
    letters = workload.letters(case.phase) | {"S": splits, "p": programs}
    return Call(name, letters, launches, workload.kv_dtype)


_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}


def _source(launch: Launch) -> ASTSource:
    """The launch's kernel, specialised to its arguments as `JITFunction` does it."""
    kernel = launch.kernel
    values = dict(zip(kernel.arg_names, launch.arguments, strict=False)) | launch.options
    signature: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        fixed = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (fixed and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, tuple):
            signature[parameter.name] = tuple("*" + _TYPES[part.dtype] for part in value)
            for j, part in enumerate(value):
                if part.data_ptr() % 16 == 0:
                    attributes[i, j] = [["tt.divisibility", 16]]
            continue
        if isinstance(value, Tensor):
            signature[parameter.name] = "*" + _TYPES[value.dtype]
            aligned = value.data_ptr() % 16 == 0
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            aligned = fixed and value % 16 == 0
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def _read_cuda(compiled: Any, target: Target) -> Report:
    binaries = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = os.path.join(folder, "kernel.cubin")
        Path(cubin).write_bytes(compiled.asm["cubin"])
        usage, code = (
            subprocess.run([*command, cubin], capture_output=True, text=True, check=True).stdout
            for command in ((binaries / "cuobjdump", "-res-usage"), (binaries / "nvdisasm",))
        )
    registers = int(_first(r"REG:(\d+)", usage))
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    per_warp = -(-registers * 32 // 256) * 256
    programs = min(65536 // (per_warp * warps), target.shared // (shared + 1024), target.warps // warps, 32)
    ptx = compiled.asm["ptx"]
    return Report(
        registers=registers,
        spills=_count(r"\b(?:STL|LDL)\b", _hot(code)),
        shared=shared,
        occupancy=programs * warps / target.warps,
        wide_loads=_count(r"ld\.global[\w.:]*\.v4\.[buf]32|cp\.async\.c[ag]\.shared\.global[^;]*0x10,", ptx)
        + _count(r"ld\.global[\w.:]*\.v2\.[buf]64", ptx),
        narrow_loads=_count(r"ld\.global[\w.:]*\.[buf]16\b", ptx),
        tensor_ops=_count(r"\b(?:mma\.sync|wgmma\.mma_async)\S*\.b?f16\b|tcgen05\.mma\S*kind::f16", ptx),
    )


def _hot(code: str) -> str:
    """What of a disassembled kernel runs most often: its innermost loops, or all of it if it has none."""
    lines = code.splitlines()
    labels = {line.strip()[:-1]: at for at, line in enumerate(lines) if re.match(r"\s*\.L_x_\d+:$", line)}
    jumps = ((at, re.search(r"\bBRA\b.*\((\.L_x_\d+)\)", line)) for at, line in enumerate(lines))
    loops = {(labels[jump[1]], at) for at, jump in jumps if jump and labels[jump[1]] < at}
    inner = [
        (start, end)
        for start, end in sorted(loops)
        if not any(start <= a and b <= end and (a, b) != (start, end) for a, b in loops)
    ]
    return "\n".join("\n".join(lines[start : end + 1]) for start, end in inner or [(0, len(lines))])


def _read_hip(compiled: Any, target: Target) -> Report:
    code = compiled.asm["amdgcn"]
    registers = int(_first(r"\.vgpr_count:\s+(\d+)", code))
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    resident = min(8, 512 // (-(-registers // 8) * 8)) * 4 // warps
    programs = min(resident, target.shared // shared if shared else resident)
    return Report(
        registers=registers,
        spills=int(_first(r"\.vgpr_spill_count:\s+(\d+)", code)),
        shared=shared,
        occupancy=programs * warps / target.warps,
        wide_loads=_count(r"(?:global|buffer)_load_dwordx4", code),
        narrow_loads=_count(r"(?:global|buffer)_load_(?:ushort|short)", code),
        tensor_ops=_count(r"\bv_mfma_f32_\w*_b?f16", code),
    )


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"no {pattern!r} in the compiler's output")
    return found[1]
