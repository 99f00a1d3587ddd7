from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from curkv.cache.budgets import Budget
from curkv.cache.catalogue import catalogue
from curkv.cache.declarations import options_of
from curkv.cache.layout import CacheLayout, full_attention
from curkv.cache.options import EvictionOptions, OptionError
from curkv.cache.parsing import parse_options
from curkv.cache.plan import content_seed, resolve
from curkv.cache.policies import get_policy, policy_descriptions, policy_names
from curkv.cache.tables import common_table, own_table
from curkv.kernels.formats import get_format

LAYOUT = CacheLayout(full_attention(30, 3), 64, 64, get_format("float32"), max_sequences=8, max_tokens=8192)
PROMPT = list(range(1000))


def plan(prompt=PROMPT, /, **raw):
    return resolve(parse_options(raw), prompt, LAYOUT)


def refused(prompt=PROMPT, /, **raw) -> OptionError:
    with pytest.raises(OptionError) as caught:
        plan(prompt, **raw)
    return caught.value


def test_headers_and_json_say_the_same():
    header = {
        "policy": "AdaCurDKV", "budget": "25%", "decode_budget": "512", "sink_tokens": "8",
        "recent_tokens": "32", "protect": "0-16, 100-128", "seed": "-7", "leverage": "sketch", "rank": "10",
        "pool": "7", "alpha": "0.3",
    }  # fmt: skip
    body = {
        "policy": "adacurdkv", "budget": 0.25, "decode_budget": 512, "sink_tokens": 8,
        "recent_tokens": 32, "protect": [[100, 128], [0, 16]], "seed": -7, "leverage": "sketch", "rank": 10,
        "pool": 7, "alpha": 0.3,
    }  # fmt: skip
    expected = EvictionOptions(
        policy="adacurdkv", budget=Budget("ratio", 0.25), decode_budget=Budget("tokens", 512),
        sink_tokens=8, recent_tokens=32, protect=((0, 16), (100, 128)), seed=-7,
        own={"leverage": "sketch", "rank": 10, "pool": 7, "alpha": 0.3},
    )  # fmt: skip
    assert parse_options(header) == parse_options(body) == expected


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("policy", "h2o?"), ("policy", 3), ("policy", ""),
        *(("budget", x) for x in ("0", "-1", "101%", "abc", "1e999", -1, True)),
        ("decode_budget", "0"), ("preset", "best"),
        ("sink_tokens", "-1"), ("sink_tokens", 1.5), ("sink_tokens", True), ("sink_tokens", "four"),
        ("recent_tokens", "9" * 30), ("recent_tokens", [1]), ("seed", "x"), ("seed", 2**63), ("seed", 1e300),
        *(("protect", x) for x in ("5", "9-3", "4-4", "0-1-2", "-3", "a-b", "", "0-5,", 7, {"a": 1})),
        *(("protect", x) for x in ([[1]], [[3, 1]], [[-1, 4]], [[0, True]], [0, 5])),
        ("leverage", "exact?"), ("rank", 0), ("window", 0), ("combine", "sum"), ("pool", 4), ("pool", 0),
        ("pool_kind", "median"), ("alpha", 1.1), ("alpha", -0.1), ("alpha", "nan"), ("decode_interval", 0),
        ("budgets", "25%"), ("budget", "auto"), ("allocation", "fair"), ("beta", 0.5),
        ("reduction", "sum"), ("times", "nobody"), ("scorer", "h2o"), ("merge", "all"), ("prefill", "fast"),
        ("context_tokens", 0), ("policy", "kvpress:"),
    ],
)  # fmt: skip
def test_a_bad_value_is_refused_by_its_field(field, value):
    raw = {"policy": "curdkv", "budget": "50%", field: value}
    with pytest.raises(OptionError) as caught:
        parse_options(raw)
    assert caught.value.field == field
    assert len(str(caught.value)) < 300


def test_overlapping_spans_are_merged():
    assert parse_options({"protect": "10-20,0-5,15-30,30-31"}).protect == ((0, 5), (10, 31))


@pytest.mark.parametrize(
    ("raw", "fields"),
    [
        ({"policy": "full", "budget": "25%"}, {"budget", "policy"}),
        ({"policy": "full", "decode_budget": 100}, {"decode_budget", "policy"}),
        ({"policy": "curdkv"}, {"budget", "policy"}),
        ({"policy": "knorm", "budget": 100, "leverage": "sketch"}, {"leverage", "policy"}),
        ({"policy": "streaming-llm", "budget": 100, "pool": 7}, {"pool", "policy"}),
        ({"policy": "curdkv", "budget": 100, "alpha": 0.5}, {"alpha", "allocation"}),
        ({"policy": "curdkv", "budget": 100, "rank": 8}, {"rank", "leverage"}),
        ({"policy": "curdkv", "budget": 100, "leverage": "sketch", "window": 8}, {"window", "leverage"}),
        ({"policy": "curdkv", "budget": 100, "pool_kind": "mean"}, {"pool_kind", "pool"}),
        ({"policy": "curdkv", "budget": 100, "sink_tokens": 101}, {"budget", "sink_tokens"}),
        ({"policy": "curdkv", "budget": 100, "sink_tokens": 60, "recent_tokens": 60},
         {"budget", "sink_tokens", "recent_tokens"}),
        ({"policy": "curdkv", "budget": "10%", "protect": "100-201"}, {"budget", "protect"}),
        ({"policy": "curdkv", "decode_budget": 68}, {"decode_budget", "sink_tokens", "recent_tokens"}),
        ({"policy": "curdkv", "decode_budget": 100, "protect": "10-50"},
         {"decode_budget", "sink_tokens", "recent_tokens", "protect"}),
        ({"policy": "snapkv", "budget": 100, "beta": 5}, {"beta", "allocation"}),
        ({"policy": "snapkv", "budget": 100, "merge_threshold": 0.1}, {"merge_threshold", "merge"}),
        ({"policy": "snapkv", "budget": 100, "prefill_chunk": 64}, {"prefill_chunk", "prefill"}),
        ({"policy": "snapkv", "budget": 100, "times_pool": 7}, {"times_pool", "times"}),
        ({"policy": "snapkv", "budget": 100, "observation": 200}, {"observation", "budget"}),
        ({"policy": "snapkv", "decode_budget": 100, "context_tokens": 50}, {"context_tokens", "budget"}),
        ({"policy": "tova", "budget": 100, "allocation": "adaptive"}, {"allocation", "policy"}),
        ({"policy": "snapkv", "budget": 100, "times": "keydiff"}, {"times", "policy"}),
        ({"policy": "full", "merge": "nearest"}, {"merge", "policy"}),
    ],
)  # fmt: skip
def test_a_contradiction_names_all_its_fields(raw, fields):
    error = refused(**raw)
    assert {error.field, *error.others} == fields
    assert all(field in str(error) for field in fields)


def test_spans_must_lie_in_the_prompt():
    assert plan(policy="curdkv", budget=500, protect="990-1000").protect == ((990, 1000),)
    assert refused(policy="curdkv", budget=500, protect="990-1001").field == "protect"


def test_a_byte_budget_below_a_page_per_head_is_refused():
    assert refused(policy="curdkv", budget="1MiB").field == "budget"


def test_serving_defaults():
    resolved = plan(policy="curdkv", budget="50%")
    assert (resolved.budget_tokens, resolved.sink_tokens, resolved.recent_tokens) == (500, 4, 64)
    policy = resolved.policy
    assert (policy.leverage, policy.preset.partial_window) == ("window", "corrected")
    assert (policy.combine, policy.window, policy.pool) == ("product", 16, 1)
    assert resolved.decode_budget_tokens is None


@pytest.mark.parametrize(
    ("preset", "leverage", "partial"),
    [("paper", "sketch", None), ("authors", "window", "left"), ("kvpress", "window", "right")],
)
def test_published_presets_protect_the_sinks_only(preset, leverage, partial):
    resolved = plan(policy="curdkv", budget="50%", preset=preset)
    assert (resolved.sink_tokens, resolved.recent_tokens, resolved.policy.leverage) == (4, 0, leverage)
    assert partial in (None, resolved.policy.preset.partial_window)
    assert plan(policy="knorm", budget="50%", preset=preset).sink_tokens == 0


@pytest.mark.parametrize(
    ("k", "sinks", "recent"), [(1, 1, 0), (3, 3, 0), (8, 4, 2), (100, 4, 25), (256, 4, 64)]
)
def test_defaults_adapt_to_small_budgets(k, sinks, recent):
    resolved = plan(policy="curdkv", budget=k)
    assert (resolved.sink_tokens, resolved.recent_tokens) == (sinks, recent)


def test_defaults_give_way_to_what_is_asked_for():
    resolved = plan(policy="curdkv", budget=100, protect="200-299")
    assert (resolved.sink_tokens, resolved.recent_tokens) == (1, 0)
    assert plan(policy="curdkv", budget=100, sink_tokens=90).recent_tokens == 10


def test_a_budget_of_the_whole_prompt_evicts_nothing():
    for budget in ("100%", 1000, 5000, "1GiB"):
        resolved = plan(policy="curdkv", budget=budget)
        assert (resolved.evicts_prompt, resolved.budget_tokens) == (False, 1000)
    assert not plan().evicts_prompt


def test_decode_evictions_are_due_every_interval_above_the_budget():
    resolved = plan(policy="curdkv", decode_budget=200)
    assert resolved.decode_recent_tokens == 64
    assert resolved.decode_due(64, 201)
    assert not resolved.decode_due(64, 200)
    assert not resolved.decode_due(63, 500)
    assert not plan(policy="curdkv", budget=200).decode_due(64, 5000)
    assert plan(policy="curdkv", decode_budget=40, recent_tokens=16).decode_recent_tokens == 16


def test_a_byte_budget_holds_what_is_generated_between_two_decode_evictions():
    resolved = plan(policy="curdkv", decode_budget="32MiB")
    held = resolved.decode_budget_tokens + resolved.options.decode_interval
    assert LAYOUT.sequence_pages(held) * LAYOUT.page_bytes <= 32 * 2**20


def test_the_seed_comes_from_the_prompt_unless_given():
    assert plan(policy="random", budget=10).seed == content_seed(PROMPT) == content_seed(tuple(PROMPT))
    assert content_seed(PROMPT) != content_seed(PROMPT[::-1])
    assert content_seed([1, 2, 3]) == 6520558355739401531
    assert plan(policy="random", budget=10, seed="5").seed == 5
    assert plan(policy="random", budget=10, seed=-1).seed >= 0


def test_requests_override_the_servers_defaults():
    defaults = parse_options({"policy": "curdkv", "budget": "25%", "decode_budget": 512, "pool": 7})
    assert parse_options({}, defaults) == defaults
    assert parse_options({"budget": "50%", "seed": None}, defaults).budget == Budget("ratio", 0.5)
    assert parse_options({"policy": "full"}, defaults) == EvictionOptions()
    assert "pool" not in parse_options({"policy": "streaming-llm"}, defaults).own
    with pytest.raises(OptionError, match="pool"):
        parse_options({"policy": "streaming-llm", "pool": 7}, defaults)


def test_every_policy_can_be_loaded_and_described():
    assert set(policy_descriptions()) == set(policy_names())
    for name in policy_names():
        assert get_policy(name).name == name


SERVER = replace(
    parse_options({"policy": "curdkv", "budget": "25%", "decode_budget": "50%"}),
    bending=frozenset({"budget", "decode_budget"}),
)


def test_the_servers_budgets_bend_to_what_a_short_prompt_allows():
    resolved = resolve(parse_options({}, SERVER), range(36), LAYOUT)
    assert (resolved.budget_tokens, resolved.decode_budget_tokens) == (9, 4 + 64 + 1)
    assert resolve(parse_options({}, SERVER), range(1000), LAYOUT).decode_budget_tokens == 500


@pytest.mark.parametrize(
    ("raw", "budget"),
    [({"sink_tokens": 12, "recent_tokens": 8}, 20), ({"protect": "0-30"}, 30), ({"sink_tokens": 50}, 36)],
)
def test_the_servers_budget_bends_to_what_a_request_keeps(raw, budget):
    assert resolve(parse_options(raw, SERVER), range(36), LAYOUT).budget_tokens == budget


def test_a_byte_budget_of_the_server_bends_to_a_token_per_head():
    options = replace(SERVER, budget=Budget("bytes", 1), decode_budget=Budget("bytes", 1))
    resolved = resolve(parse_options({}, options), range(36), LAYOUT)
    assert (resolved.budget_tokens, resolved.decode_budget_tokens) == (1, 1 + 64 + 1)


@pytest.mark.parametrize("raw", [{"decode_budget": "50%"}, {"budget": 10, "sink_tokens": 20}])
def test_what_a_request_asks_for_itself_is_refused_and_does_not_bend(raw):
    with pytest.raises(OptionError):
        resolve(parse_options(raw, SERVER), range(36), LAYOUT)


@pytest.mark.parametrize(
    ("file", "table"), [("api.md", common_table), ("policies.md", common_table), ("policies.md", own_table)]
)
def test_docs_have_the_tables_of_options(file, table):
    """To renew them: `curkv model policies --markdown`."""
    assert "\n".join(table()) in (Path(__file__).parents[2] / "docs" / file).read_text()


def test_an_option_means_the_same_wherever_it_is_declared():
    """A name is read before it is known whose option it is."""
    kinds: dict[str, set[object]] = {}
    for name in policy_names():
        for option, declared in options_of(type(get_policy(name))).items():
            kinds.setdefault(option, set()).add(declared.kind)
    assert all(len(found) == 1 for found in kinds.values())
    assert not kinds.keys() & {name for name, entry in catalogue().items() if entry.common}


def test_the_schema_has_the_ranges_of_the_parser():
    rank, alpha = (catalogue()[name].schema["anyOf"][0] for name in ("rank", "alpha"))
    assert (rank["minimum"], rank["maximum"]) == (1, 1024)
    assert (alpha["minimum"], alpha["maximum"]) == (0, 1)
    assert catalogue()["rank"].schema["default"] == 20


def test_an_option_of_two_multiplied_policies_is_one():
    """The first policy's opinion counts, or the second one's where the first has none."""
    product = plan(policy="snapkv", budget="50%", times="defensivekv").policy
    assert (product.first.reduction, product.second.reduction) == ("max", "max")
    product = plan(policy="cur-exact", budget="50%", times="curdkv", times_pool=3).policy
    assert (product.second.leverage, product.second.pool, product.first.pool) == ("exact", 3, 7)
    assert plan(policy="h2o", budget="50%", times="tova").options.decode_interval == 1
