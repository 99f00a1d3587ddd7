"""How much memory the cache gets and how many pages that is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

from curkv.cache.layout import CacheLayout

_CGROUP = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")


def num_pages_for(num_bytes: int, layout: CacheLayout) -> int:
    """Counts the pages that fit into a number of bytes.

    Args:
        num_bytes: memory for keys, values and side arrays.
        layout: the cache's shape.

    Returns:
        The number of pages.

    Raises:
        ValueError: not even one page per layer and KV head fits, so no sequence could hold a token.
    """
    num_pages = num_bytes // layout.page_bytes
    if num_pages < layout.num_tables:
        raise ValueError(
            f"a KV cache of {num_bytes} bytes cannot hold one page for each of {layout.num_layers} layers x "
            f"{layout.num_kv_heads} KV heads: it needs at least {layout.num_tables * layout.page_bytes} bytes"
        )
    return num_pages


def free_memory() -> int:
    """Bytes that this process can still use: the machine's, or less where a control group sets a limit."""
    available: int = psutil.virtual_memory().available
    limits = (_headroom(folder, *files) for folder, *files in _memory_groups())
    return min([available, *(left for left in limits if left is not None)])


def _memory_groups() -> Iterator[tuple[Path, str, str]]:
    """Gives the folders of this process's control group and of those above it, with the names of two files.

    The files tell limit and usage; their names differ between versions 1 and 2 of control groups.
    """
    lines = _OWN_GROUPS.read_text().splitlines() if _OWN_GROUPS.exists() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, files = _CGROUP, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root, files = _CGROUP / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(root):
                yield folder, *files


def _headroom(folder: Path, limit: str, usage: str) -> int | None:
    """Bytes left in one control group; page cache that the kernel can drop counts as free."""
    try:
        most, used = int((folder / limit).read_text()), int((folder / usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    reclaimable = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
    return max(0, most - used + reclaimable)
