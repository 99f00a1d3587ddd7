"""How functions become kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
from numba.extending import intrinsic as _intrinsic

F = TypeVar("F", bound=Callable[..., Any])


def kernel(function: F) -> F:
    """Compile a function; C division, no GIL, cached on disk."""
    compiled: F = numba.njit(nogil=True, cache=True, error_model="numpy")(function)
    return compiled


def inlined(function: F) -> F:
    """Make a function part of the kernels that call it, instead of compiling it on its own."""
    compiled: F = numba.njit(inline="always", error_model="numpy")(function)
    return compiled


def intrinsic(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a Numba intrinsic whose plain integer arguments arrive as literal types."""
    made: Callable[..., Any] = _intrinsic(prefer_literal=True)(function)
    return made
