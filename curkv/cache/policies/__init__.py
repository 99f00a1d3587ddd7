"""Eviction policies by name, each imported when it is first asked for."""

from __future__ import annotations

from difflib import get_close_matches
from functools import cache
from importlib import import_module

from curkv.cache.policies.base import Policy, UnknownPolicy

_POLICIES = {
    "full": ("full", "Full"),
    "auto": ("auto", "Auto"),
    "curdkv": ("curdkv", "CurDKV"),
    "adacurdkv": ("curdkv", "ADA_CURDKV"),
    "cur-exact": ("cur_exact", "CurExact"),
    "snapcur": ("snapcur", "SnapCur"),
    "snapkv": ("snapkv", "SnapKV"),
    "adasnapkv": ("snapkv", "ADA_SNAPKV"),
    "pyramidkv": ("snapkv", "PYRAMIDKV"),
    "lava": ("lava", "Lava"),
    "cake": ("cake", "Cake"),
    "chunkkv": ("chunkkv", "ChunkKV"),
    "criticalkv": ("criticalkv", "CriticalKV"),
    "defensivekv": ("defensivekv", "DefensiveKV"),
    "layer-defensivekv": ("defensivekv", "LAYER_DEFENSIVEKV"),
    "restkv": ("restkv", "RestKV"),
    "h2o": ("h2o", "H2O"),
    "tova": ("tova", "TOVA"),
    "r-kv": ("rkv", "RKV"),
    "triattention": ("triattention", "TriAttention"),
    "dapq": ("dapq", "DapQ"),
    "expected-attention": ("expected_attention", "ExpectedAttention"),
    "capkv": ("capkv", "CapKV"),
    "compactor": ("compactor", "Compactor"),
    "adacompactor": ("compactor", "ADA_COMPACTOR"),
    "kvzip": ("kvzip", "KVzip"),
    "keydiff": ("keydiff", "KeyDiff"),
    "knorm": ("knorm", "Knorm"),
    "streaming-llm": ("streaming_llm", "StreamingLLM"),
    "lacache": ("lacache", "LaCache"),
    "random": ("random", "Random"),
}
KVPRESS_PREFIX = "kvpress:"
"""What the name of a press of the kvpress package begins with."""


def policy_names() -> tuple[str, ...]:
    """The names that `get_policy` knows, beside `kvpress:<PressName>`."""
    return tuple(_POLICIES)


@cache
def get_policy(name: str) -> Policy:
    """Import a policy.

    Args:
        name: One of `policy_names()`, or `kvpress:` and the name of one of that package's presses.

    Returns:
        The policy with its defaults; it holds no state.

    Raises:
        UnknownPolicy: the name is unknown, or the press cannot be used.
    """
    if name.startswith(KVPRESS_PREFIX):
        from curkv.cache.policies.kvpress import load_press

        return load_press(name.removeprefix(KVPRESS_PREFIX))
    if name not in _POLICIES:
        near = " or ".join(get_close_matches(name, _POLICIES, n=2))
        guess = f", perhaps {near}" if near else ""
        raise UnknownPolicy(
            f"no policy {name[:40]!r}{guess}; `curkv model policies` lists them, beside kvpress:<PressName>"
        )
    module, attribute = _POLICIES[name]
    found = getattr(import_module(f"curkv.cache.policies.{module}"), attribute)
    policy: Policy = found() if isinstance(found, type) else found
    return policy


def policy_descriptions() -> dict[str, str]:
    """One line about each policy."""
    return {name: get_policy(name).description for name in _POLICIES}
