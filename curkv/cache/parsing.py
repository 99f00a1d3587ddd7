"""Options as headers and JSON give them: read, completed, and checked against each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from curkv.cache.allocation import ALLOCATIONS
from curkv.cache.budgets import Budget
from curkv.cache.catalogue import Entry, catalogue
from curkv.cache.declarations import Configurable, options_of
from curkv.cache.options import EvictionOptions, OptionError, SettledOptions
from curkv.cache.policies import get_policy
from curkv.cache.policies.auto import Auto
from curkv.cache.policies.base import Policy
from curkv.cache.policies.product import Product
from curkv.cache.presets import PRESETS

_BUDGETS = ("budget", "decode_budget")


def parse_options(raw: Mapping[str, object], defaults: EvictionOptions | None = None) -> EvictionOptions:
    """Read options from headers or a JSON object.

    Args:
        raw: Value of each field that was given: a string, or what JSON has for it. A None counts as not
            given.
        defaults: Of fields that were not given; those that the given ones leave without effect, such as a
            budget with policy "full", are left out.

    Returns:
        The options; they agree with each other as far as can be told without the prompt.

    Raises:
        OptionError: a value is wrong, a field unknown, or two fields contradict each other.
    """
    given = {field: _parse(field, value) for field, value in raw.items() if value is not None}
    defaults = defaults or EvictionOptions()
    if given.get("policy") == "full" != defaults.policy:
        defaults = EvictionOptions()
    common = {field: value for field, value in given.items() if catalogue()[field].common}
    own = {field: value for field, value in given.items() if field not in common}
    options = replace(
        defaults, **common, own={**defaults.own, **own}, bending=defaults.bending.difference(given)
    )
    unread = {field for field, _, _ in _without_effect(options) if field not in given}
    unset: dict[str, Any] = {field: catalogue()[field].default for field in unread - options.own.keys()}
    options = replace(
        options, **unset, own={field: v for field, v in options.own.items() if field not in unread}
    )
    check_options(options)
    return options


def _parse(field: str, value: object) -> Any:
    known = catalogue()
    if field not in known:
        near = " or ".join(get_close_matches(field, known, n=2))
        raise OptionError(field, f"unknown option{f', perhaps {near}' if near else ''}; see docs/api.md")
    try:
        return known[field].kind.parse(value)
    except ValueError as error:
        raise OptionError(field, str(error)) from None


def check_options(options: EvictionOptions) -> None:
    """Refuse options that contradict each other whatever the prompt.

    Raises:
        OptionError: naming both.
    """
    budgets = [field for field in _BUDGETS if getattr(options, field) is not None]
    if options.policy == "full" and budgets:
        message = f"policy 'full' keeps everything; choose a policy that evicts, or leave {budgets[0]} out"
        raise OptionError(budgets[0], message, ("policy",))
    if options.policy != "full" and not budgets:
        message = f"policy {options.policy!r} needs a budget or decode_budget to evict to; 'full' needs none"
        raise OptionError("budget", message, ("policy",))
    for field, other, value in _without_effect(options):
        shown = str(value) if isinstance(value, Budget) else repr(value)
        raise OptionError(field, f"has no effect with {other} {shown}", (other,))
    _check_combination(options)


def _check_combination(options: EvictionOptions) -> None:
    """Refuse options of which each is fine alone."""
    policy = get_policy(options.policy)
    if options.allocation and ALLOCATIONS[options.allocation].by_score and not policy.heads_compete:
        message = (
            f"policy {policy.name!r} scores all heads alike; {options.allocation!r} cannot tell them apart"
        )
        raise OptionError("allocation", message, ("policy",))
    idle = {"decode_budget": options.decode_budget is not None, "prefill": options.prefill == "streaming"}
    for field in (field for field, asked in idle.items() if asked and policy.needs.repetition):
        message = f"policy {policy.name!r} has the model repeat the context, once"
        raise OptionError(field, message, ("policy",))
    if options.times is None:
        return
    for first, second in ((policy, options.times), (get_policy(options.times), options.policy)):
        if not first.factor:
            message = (
                f"scores of policy {first.name!r} are no shares and cannot be multiplied with {second!r}'s"
            )
            raise OptionError("times", message, ("policy",))


def _without_effect(options: EvictionOptions) -> Iterator[tuple[str, str, object]]:
    """Options that say something and do nothing, each with the option, and its value, that makes it so."""
    policies = _policies(options)
    present = (*policies, policies[0].allocation)
    for name, value in options.own.items():
        entry = catalogue()[name]
        if value == entry.default:
            continue
        owners = [x for x in present if name in options_of(type(x))]
        reasons = [_idle(name, owner) for owner in owners] or [_absent(entry, policies[0])]
        if all(reasons) and reasons[0] is not None:
            yield name, *reasons[0]
    for name, declared in options_of(EvictionOptions).items():
        condition = declared.effective
        says = getattr(options, name) != catalogue()[name].default
        if says and condition is not None and not condition.holds(options):
            yield name, condition.option, getattr(options, condition.option)


def _idle(name: str, owner: Configurable) -> tuple[str, object] | None:
    """The option of an owner that leaves another one of it without effect, and its value, if there is one."""
    condition = options_of(type(owner))[name].effective
    if condition is None or condition.holds(owner):
        return None
    return condition.option, getattr(owner, condition.option)


def _absent(entry: Entry, policy: Policy) -> tuple[str, object]:
    """The choice that leaves an option without anybody who has it."""
    if entry.owners[0].field == "allocation":
        return "allocation", policy.allocation.name
    return "policy", policy.name


def _policies(options: EvictionOptions) -> list[Policy]:
    """The policies that a request names, one or two, with their options and the allocation."""
    preset, prototype = PRESETS[options.preset], get_policy(options.policy)
    second = None if options.times is None else get_policy(options.times)
    allocation = ALLOCATIONS[options.allocation] if options.allocation else prototype.allocation
    first = replace(
        prototype.configured(options.own, preset, second),
        allocation=allocation.configured(options.own, preset),
    )
    if second is None:
        return [first]
    # What both have is one option; only pooling is the second one's own affair.
    shared = options_of(type(first)).keys() & options_of(type(second)).keys()
    values = {**options.own, **{name: getattr(first, name) for name in shared}}
    values |= {"pool": 1 if options.times_pool is None else options.times_pool, "pool_kind": "max"}
    return [first, second.configured(values, preset)]


def settle(options: EvictionOptions, repeats: bool = True, session: bool = False) -> SettledOptions:
    """Fill in what the preset and the policies say where the request does not.

    Args:
        options: Of the request.
        repeats: Whether the model has room to repeat the context, which decides what "auto" is.
        session: Whether it goes on from what is left of a conversation, which does too.
    """
    asked = get_policy(options.policy)
    if isinstance(asked, Auto):
        options = replace(options, policy=asked.chosen(options, repeats, session))
    policies = _policies(options)
    policy = policies[0] if len(policies) == 1 else Product.of(*policies)
    return SettledOptions(
        policy=policy,
        preset=PRESETS[options.preset],
        budget=options.budget,
        decode_budget=options.decode_budget,
        sink_tokens=options.sink_tokens,
        recent_tokens=options.recent_tokens,
        protect=options.protect,
        seed=options.seed,
        decode_interval=policy.decode_interval
        if options.decode_interval is None
        else options.decode_interval,
        merge_threshold=None if options.merge == "none" else options.merge_threshold,
        context_tokens=options.context_tokens,
        prefill_chunk=options.prefill_chunk if options.prefill == "streaming" else None,
    )
