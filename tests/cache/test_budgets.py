from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curkv.cache.budgets import Budget, parse_budget
from curkv.cache.layout import CacheLayout, full_attention
from curkv.kernels.formats import KV_FORMATS, get_format


def layout(page_size: int = 64, heads: int = 3, kv_dtype: str = "float32") -> CacheLayout:
    return CacheLayout(
        full_attention(30, heads), 64, page_size, get_format(kv_dtype), max_sequences=8, max_tokens=8192
    )


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("25%", Budget("ratio", 0.25)),
        ("0.25", Budget("ratio", 0.25)),
        (0.25, Budget("ratio", 0.25)),
        ("12.5 %", Budget("ratio", 0.125)),
        ("100%", Budget("ratio", 1.0)),
        ("1.0", Budget("ratio", 1.0)),
        (1.0, Budget("ratio", 1.0)),
        ("1", Budget("tokens", 1)),
        (1, Budget("tokens", 1)),
        (" 512 ", Budget("tokens", 512)),
        (512, Budget("tokens", 512)),
        ("512tok", Budget("tokens", 512)),
        ("512 Tokens", Budget("tokens", 512)),
        ("8MiB", Budget("bytes", 8 * 2**20)),
        ("0.5GiB", Budget("bytes", 2**29)),
        ("8mb", Budget("bytes", 8_000_000)),
        ("4096B", Budget("bytes", 4096)),
    ],
)
def test_forms(value, expected):
    assert parse_budget(value) == expected
    assert parse_budget(str(expected)) == expected


@pytest.mark.parametrize(
    "value",
    [
        *("0", "0%", "0.0", "0B", "0.1B", "-1", "-5%", "101%", "1.5", "abc", "25%%", "%", "", " ", "5 5"),
        *("1e999", "1e2", "nan", "inf", "512.5tok", "8TiB", "1,5", "0x10", "½", "٣", "9" * 5000),
        *(0, -1, 0.0, 1.5, 512.0, 1e999, float("nan"), True, None, [1], {}),
    ],
)
def test_refused(value):
    with pytest.raises(ValueError, match="25%"):
        parse_budget(value)


@pytest.mark.parametrize(
    ("ratio", "prompt", "expected"), [(0.25, 1031, 257), (0.29, 100, 29), (0.001, 10, 1), (1.0, 7, 7)]
)
def test_a_ratio_is_rounded_down_to_at_least_one_token(ratio, prompt, expected):
    assert Budget("ratio", ratio).tokens(prompt, layout()) == expected


def test_tokens_are_taken_as_they_are():
    assert Budget("tokens", 512).tokens(100, layout()) == 512


@given(st.integers(1, 10**8), st.sampled_from([16, 64, 128]), st.integers(1, 8), st.sampled_from(KV_FORMATS))
def test_bytes_bound_the_pages_held_and_waste_less_than_a_page_per_head(value, page_size, heads, kv_dtype):
    shape = layout(page_size, heads, kv_dtype)
    k = Budget("bytes", value).tokens(4000, shape)
    assert shape.sequence_pages(k) * shape.page_bytes <= value
    assert shape.sequence_pages(k + 1) * shape.page_bytes > value


@pytest.mark.parametrize(
    ("kv_dtype", "tokens"), [("float16", 320), ("int8", 576), ("k8v4", 704), ("int4", 960)]
)
def test_the_same_bytes_hold_more_tokens_of_a_denser_format(kv_dtype, tokens):
    assert Budget("bytes", 8 * 2**20).tokens(4000, layout(kv_dtype=kv_dtype)) == tokens


@given(st.integers(10**6, 10**8), st.sampled_from([16, 64]), st.integers(1, 8), st.data())
def test_bytes_hold_any_split_of_a_layers_tokens_over_its_heads(value, page_size, heads, data):
    shape = layout(page_size, heads)
    left = heads * max(0, Budget("bytes", value).tokens(4000, shape, ragged=True))
    pages = 0
    for head in range(heads):
        share = left if head == heads - 1 else data.draw(st.integers(0, left))
        left -= share
        pages += -(-share // page_size)
    assert pages * shape.num_layers * shape.page_bytes <= value
