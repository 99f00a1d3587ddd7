"""Presses of the kvpress package as policies of a request."""

from __future__ import annotations

import sys

import pytest
import torch

from curkv.cache.eviction import select
from curkv.cache.options import OptionError
from curkv.cache.parsing import parse_options
from curkv.cache.plan import resolve
from curkv.cache.policies import get_policy
from curkv.kernels.dispatch import get_kernels
from tests.cache.util import make_cache, step, view_of


def test_a_press_keeps_what_our_own_policy_keeps() -> None:
    cache = make_cache(num_pages=128, max_tokens=64)
    slot = cache.add_sequence()
    step(cache, {slot: 50}, {slot: 0}, torch.Generator().manual_seed(6))
    found = []
    for policy in ("knorm", "kvpress:KnormPress"):
        options = parse_options({"policy": policy, "budget": 20, "preset": "kvpress"})
        plan = resolve(options, list(range(50)), cache.layout)
        found.append(select(view_of(cache, slot), plan, get_kernels("reference"))[0])
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("NoSuchPress", "no press"),
        ("AdaKVPress", "no scores"),
        ("SnapKVPress", "needs more than keys and values"),
        ("torch", "no press"),
    ],
)
def test_what_cannot_be_wrapped_is_refused_by_name(name: str, reason: str) -> None:
    with pytest.raises(OptionError, match=reason) as caught:
        parse_options({"policy": f"kvpress:{name}", "budget": "50%"})
    assert caught.value.field == "policy" and name in str(caught.value)


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kvpress", None)
    get_policy.cache_clear()
    with pytest.raises(OptionError, match=r"pip install 'curkv\[kvpress\]'"):
        parse_options({"policy": "kvpress:KnormPress", "budget": "50%"})
