"""CUDA without a GPU: tensors with a device, a dtype and a shape but no data, and launches that do nothing.

Whatever mixes devices or dtypes raises as on a GPU. Every time the host waits for the device is noted, by the
name of the place in the code: results that are read back, and memory that is not pinned and is uploaded.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget

import curkv

DEVICE = "cuda:0"

_PACKAGE = Path(curkv.__file__).parent
_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>)
}
"""


def load_guard(directory: Path) -> None:
    """Lets a torch that was built without CUDA index tensors on "cuda"; skips the test if it cannot."""
    if torch.backends.cuda.is_built():
        return
    torch_directory = Path(torch.__file__).parent
    source, library = directory / "guard.cpp", directory / "guard.so"
    source.write_text(_GUARD)
    command = [
        "c++",
        "-shared",
        "-fPIC",
        "-O0",
        "-std=c++20",
        f"-I{torch_directory / 'include'}",
        str(source),
    ]
    command += ["-o", str(library), f"-L{torch_directory / 'lib'}", "-lc10"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        pytest.skip("fake CUDA tensors need a C++ compiler, and there is no c++ here")
    except subprocess.SubprocessError as error:
        output = getattr(error, "stderr", None) or str(error)
        pytest.skip(f"fake CUDA tensors need a device guard, which does not compile here: {output[-300:]}")
    torch.ops.load_library(str(library))


class FakeCuda:
    """What the host did while tensors were fake.

    What it reads of a tensor's data is made up: `integer` or `real` in every place, or zeros as a list.

    Attributes:
        waits: how often the host waited for the device, by the place, as "cache.page_manager.evict".
        launches: how often kernels were launched.
        variants: what Triton would have compiled: a kernel, and what of its arguments it specialises on.
    """

    integer, real = 10, 1.0

    def __init__(self) -> None:
        self.waits: Counter[str] = Counter()
        self.launches = 0
        self.variants: set[tuple[str, ...]] = set()

    def wait(self) -> None:
        """Notes that the innermost function of the package waits."""
        self.waits[_place()] += 1

    def launch(self, *_: Any, **__: Any) -> None:
        """Stands for the launch of a kernel."""
        self.launches += 1

    def note_variant(self, kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Notes the variant of a kernel that a launch needs, as `JITFunction` chooses it."""
        values = dict(zip(kernel.arg_names, arguments, strict=False)) | options
        key = [kernel.__module__, kernel.__name__]
        for parameter in kernel.params:
            value = values[parameter.name]
            if parameter.is_constexpr or value is None:
                key.append(f"{parameter.name}={value}")
                continue
            for part in value if isinstance(value, tuple) else (value,):
                key.append(f"{parameter.name}:{_specialised(parameter, part)}")
        self.variants.add(tuple(key))


def pretend_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets Triton believe that a GPU is there, where it is not interpreted."""
    driver = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)


@contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """Within it tensors are fake, and those on `DEVICE` behave as on a GPU."""
    cuda, numpy, tensor = FakeCuda(), Tensor.numpy, torch.tensor

    def fake_tolist(self: FakeTensor) -> Any:
        if self.device.type == "cuda":
            cuda.wait()
        return np.zeros(tuple(self.shape), dtype=int).tolist()

    def fake_numpy(self: Tensor, *, force: bool = False) -> Any:
        if not isinstance(self, FakeTensor):
            return numpy(self, force=force)
        if self.device.type == "cuda":
            assert force, "a CUDA tensor cannot be read by numpy"
            cuda.wait()
        dtype = str(self.dtype).removeprefix("torch.")
        return np.full(tuple(self.shape), cuda.integer, dtype=dtype)

    def counted_tensor(data: Any, *args: Any, **kwargs: Any) -> Tensor:
        if torch.device(kwargs.get("device") or "cpu").type == "cuda":
            cuda.wait()
        return tensor(data, *args, **kwargs)

    monkeypatch.setattr(FakeTensor, "tolist", fake_tolist)
    monkeypatch.setattr(Tensor, "numpy", fake_numpy)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch, "tensor", counted_tensor)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: cuda.wait())
    monkeypatch.setattr("curkv.cache.page_manager.PageManager._mirrored", True)
    for kernel in ("paged_decode_attention", "paged_prefill_attention", "window_scores"):
        monkeypatch.setattr(f"curkv.kernels.{kernel}.triton.num_processors", lambda _: 132)
    if triton.knobs.runtime.interpret:
        monkeypatch.setattr("triton.runtime.interpreter.GridExecutor.__call__", cuda.launch)
    else:

        def note(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
            cuda.launch()
            cuda.note_variant(kernel, arguments, options)

        monkeypatch.setattr(triton.JITFunction, "run", note)
    with FakeTensorMode(allow_non_fake_inputs=True), _Waits(cuda):
        yield cuda


def _specialised(parameter: Any, value: Any) -> str:
    """What Triton makes a variant for: type, and whether 16 divides it; of integers also whether it is 1."""
    if isinstance(value, Tensor):
        fixed = not parameter.do_not_specialize_on_alignment
        aligned = fixed and value.storage_offset() * value.element_size() % 16 == 0
        return f"{value.dtype}{' aligned' * aligned}"
    if isinstance(value, float) or parameter.do_not_specialize:
        return type(value).__name__
    return "1" if value == 1 else f"int{' of 16' * (value % 16 == 0)}"


class _Waits(TorchDispatchMode):
    """Notes operations for which the host waits, and makes up the data that they would read."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self._cuda = cuda

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name()
        special = _READS.get(name)
        return func(*args, **kwargs) if special is None else special(self._cuda, func, args, kwargs)


def _item(cuda: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    if args[0].device.type == "cuda":
        cuda.wait()
    elif not isinstance(args[0], FakeTensor) or args[0].constant is not None:
        return func(*args, **kwargs)
    return cuda.real if args[0].dtype.is_floating_point else cuda.integer


def _nonzero(cuda: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    cuda.wait()
    return torch.zeros(cuda.integer, args[0].ndim, dtype=torch.int64, device=args[0].device)


def _masked_select(cuda: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    cuda.wait()
    return args[0].new_zeros(cuda.integer)


def _index(cuda: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    """Indexing: by a mask the host reads how many there are, by an index on the host it uploads it."""
    x, indices, *rest = args
    if x.device.type == "cuda":
        for place, index in enumerate(indices):
            if index is None:
                continue
            if index.dtype == torch.bool:
                cuda.wait()
                chosen = [torch.zeros(cuda.integer, dtype=torch.int64, device=x.device)] * index.ndim
                indices = [*indices[:place], *chosen, *indices[place + 1 :]]
            elif index.device.type == "cpu":
                cuda.wait()
    return func(x, indices, *rest, **kwargs)


def _copy(cuda: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    """`to`: a download is waited for, an upload is unless its memory is pinned."""
    source = args[0].device.type
    target = torch.device(kwargs.get("device") or args[0].device).type
    pinned = bool(kwargs.get("non_blocking"))
    if source != target and not (target == "cuda" and pinned):
        cuda.wait()
    return func(*args, **kwargs)


def _copy_into(cuda: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    if args[0].device.type != args[1].device.type:
        cuda.wait()
    return func(*args, **kwargs)


_READS = {
    "aten::_local_scalar_dense": _item,
    "aten::nonzero": _nonzero,
    "aten::masked_select": _masked_select,
    "aten::index.Tensor": _index,
    "aten::index_put_": _index,
    "aten::_index_put_impl_": _index,
    "aten::_to_copy": _copy,
    "aten::copy_": _copy_into,
}


def _place() -> str:
    """Module and function of the innermost frame of the package, as "cache.page_manager.evict"."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if _PACKAGE in path.parents:
            name = frame.f_code.co_name
            if not name.startswith("<"):
                return ".".join([*path.relative_to(_PACKAGE).with_suffix("").parts, name])
        frame = frame.f_back
    return "outside"
