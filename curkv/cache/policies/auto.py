"""The policy that is recommended for a request, by how it is formed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from curkv.cache.policies.base import Policy
from curkv.cache.view import CacheView

if TYPE_CHECKING:
    from curkv.cache.options import EvictionOptions
    from curkv.kernels.dispatch import Kernels

ORDINARY = "snapcur"
"""For a prompt that contains its question, and while generating."""

CONTEXT = "kvzip"
"""For a context that is compressed before its question is known, and for sessions: later turns ask too."""

LONG_CONTEXT = "adacompactor"
"""The same, if it cannot be repeated."""


@dataclass(frozen=True, kw_only=True)
class Auto(Policy):
    """Stands for another policy until it is known how a request is formed (measured in docs/quality.md)."""

    name: str = "auto"
    description: str = f"{ORDINARY}, or {CONTEXT} for what is compressed before its question, as in sessions"

    def chosen(self, options: EvictionOptions, repeats: bool, session: bool) -> str:
        """The name of the policy that a request gets.

        Args:
            options: Of the request.
            repeats: Whether the model has room to repeat the context.
            session: Whether it goes on from what is left of a conversation.
        """
        if options.decode_budget is not None or (options.context_tokens is None and not session):
            return ORDINARY
        return CONTEXT if repeats and options.prefill == "exact" else LONG_CONTEXT

    def score(self, view: CacheView, kernels: Kernels) -> Tensor:
        """Never called: plans have the chosen policy."""
        raise NotImplementedError
