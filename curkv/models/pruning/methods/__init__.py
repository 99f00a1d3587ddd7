"""The pruning methods by name, imported when asked for."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from curkv.models.pruning.methods.base import Method
from curkv.models.pruning.plan import PruningError

METHODS = {
    "random": "curkv.models.pruning.methods.random:Random",
    "magnitude": "curkv.models.pruning.methods.magnitude:Magnitude",
    "prunenet": "curkv.models.pruning.methods.prunenet:PruneNet",
    "self-calibrated": "curkv.models.pruning.methods.self_calibrated:SelfCalibrated",
}


def make_method(name: str, **settings: Any) -> Method:
    """Builds a method from its settings.

    Raises:
        PruningError: There is no such method.
    """
    if name not in METHODS:
        raise PruningError(f"no pruning method {name!r}; there are {', '.join(METHODS)}")
    module, attribute = METHODS[name].split(":")
    method: Method = getattr(import_module(module), attribute)(**settings)
    return method
