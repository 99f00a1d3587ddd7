"""Presses of the kvpress package as policies."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curkv.cache.policies.base import Policy, PooledPolicy, UnknownPolicy
from curkv.cache.view import CacheView

if TYPE_CHECKING:
    from curkv.kernels.dispatch import Kernels


@dataclass(frozen=True, kw_only=True)
class KVPress(PooledPolicy):
    """A score-based press of kvpress (https://github.com/NVIDIA/kvpress) that reads keys and values alone.

    Attributes:
        press: The press, with its own defaults; the name tells it.
    """

    press: Any = field(compare=False)

    def score_tokens(self, view: CacheView, kernels: Kernels) -> Tensor:
        """Score tokens head by head, each with its own length."""
        scores, lengths = torch.full_like(view.stored, -torch.inf, dtype=torch.float32), view.lengths.tolist()
        for layer in range(view.num_layers):
            keys, values = view.keys(layer), view.values(layer)
            for head, length in enumerate(lengths[layer]):
                if length:
                    own = slice(head, head + 1), slice(length)
                    scores[layer, head, :length] = _score(self.press, keys[own], values[own], layer)[0]
        return scores


def load_press(name: str) -> Policy:
    """Wrap a press by the name of its class.

    Raises:
        UnknownPolicy: kvpress is not installed, has no such press, or the press needs more than keys and
            values.
    """
    try:
        import kvpress
    except ImportError:
        raise UnknownPolicy(
            f"kvpress:{name[:40]} needs the kvpress package: pip install 'curkv[kvpress]'"
        ) from None
    kind = getattr(kvpress, name, None)
    if not isinstance(kind, type) or not issubclass(kind, kvpress.BasePress):
        raise UnknownPolicy(f"kvpress {name[:40]!r} is no press of the installed kvpress")
    if not issubclass(kind, kvpress.ScorerPress):
        raise UnknownPolicy(f"kvpress:{name} gives no scores; only presses that score tokens can be used")
    try:
        press = kind()
        keys, values = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
        _score(press, keys, values, 0)
    except Exception as error:
        raise UnknownPolicy(
            f"kvpress:{name} needs more than keys and values (hidden states, attention weights or a trained "
            f"model), which the adapter does not give: {str(error)[:80]}"
        ) from None
    return KVPress(name=f"kvpress:{name}", description=f"{name} of the kvpress package", press=press)


def _score(press: Any, keys: Tensor, values: Tensor, layer: int) -> Tensor:
    """A press's scores of [H, n, head_dim]: float32 [H, n]."""
    module = SimpleNamespace(layer_idx=layer, head_dim=keys.shape[2])
    scores: Tensor = press.score(module, None, keys[None].clone(), values[None].clone(), None, {})
    return scores[0].float()
