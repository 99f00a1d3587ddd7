"""Eviction policies by name, each imported when it is first asked for."""

from __future__ import annotations

from functools import cache
from importlib import import_module

from curkv.cache.policies.base import Policy

_POLICIES = {
    "full": ("full", "Full"),
    "curdkv": ("curdkv", "CurDKV"),
    "adacurdkv": ("adacurdkv", "AdaCurDKV"),
    "streaming-llm": ("streaming_llm", "StreamingLLM"),
    "knorm": ("knorm", "Knorm"),
    "random": ("random", "Random"),
}


def policy_names() -> tuple[str, ...]:
    """The names that `get_policy` knows."""
    return tuple(_POLICIES)


@cache
def get_policy(name: str) -> Policy:
    """Import a policy.

    Args:
        name: One of `policy_names()`.

    Returns:
        The policy; it holds no state.

    Raises:
        KeyError: the name is unknown.
    """
    module, attribute = _POLICIES[name]
    policy: Policy = getattr(import_module(f"curkv.cache.policies.{module}"), attribute)()
    return policy


def policy_descriptions() -> dict[str, str]:
    """One line about each policy."""
    return {name: get_policy(name).description for name in _POLICIES}
