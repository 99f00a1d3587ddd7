from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from curkv.cache import sizing
from curkv.cache.layout import CacheLayout, full_attention
from curkv.kernels.formats import get_format

LAYOUT = CacheLayout(
    layers=full_attention(2, 3),
    head_dim=64,
    page_size=16,
    format=get_format("float16"),
    max_sequences=4,
    max_tokens=100,
)


def test_pages_fill_the_bytes_given() -> None:
    assert LAYOUT.page_bytes == 16 * (2 * 64 * 2 + 16)
    assert sizing.num_pages_for(10 * LAYOUT.page_bytes - 1, LAYOUT) == 9


def test_less_than_a_page_per_head_is_an_error_that_says_how_much_is_needed() -> None:
    with pytest.raises(ValueError, match=f"at least {6 * LAYOUT.page_bytes} bytes"):
        sizing.num_pages_for(6 * LAYOUT.page_bytes - 1, LAYOUT)


def test_a_control_groups_limit_counts_where_it_is_tighter(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    outer, inner = tmp_path / "outer", tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    for folder, limit in ((outer, "5000"), (inner, "max")):
        (folder / "memory.max").write_text(limit)
        (folder / "memory.current").write_text("1500\n")
        (folder / "memory.stat").write_text("anon 1000\ninactive_file 200\n")
    groups = tmp_path / "cgroup"
    groups.write_text("0::/outer/inner\n")
    monkeypatch.setattr(sizing, "_CGROUP", tmp_path)
    monkeypatch.setattr(sizing, "_OWN_GROUPS", groups)
    monkeypatch.setattr(sizing.psutil, "virtual_memory", lambda: SimpleNamespace(available=9000))
    assert sizing.free_memory() == 5000 - 1500 + 200
    (outer / "memory.max").write_text("max")
    assert sizing.free_memory() == 9000
