"""How many cores this process may use: those it is bound to, and those that its control groups pay for."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def usable_cores(root: Path = Path("/")) -> int:
    """At least 1; a quota of a core and a half counts as two.

    Args:
        root: Below which `proc` and `sys` lie.
    """
    bound = len(os.sched_getaffinity(0))
    return max(1, min([bound, *(math.floor(quota + 0.5) for quota in _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    """The processor time per time of each control group above this process that has a limit.

    A container sees the name that its group has outside, and a mount that begins at the group itself: groups
    that are not there are passed over.
    """
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            number, controllers, name = line.split(":", 2)
            if number == "0":
                mounts, read = (root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"), _quota_of_v2
            elif "cpu" in controllers.split(","):
                mounts, read = (root / "sys/fs/cgroup/cpu", root / "sys/fs/cgroup/cpu,cpuacct"), _quota_of_v1
            else:
                continue
            path = Path(name.lstrip("/"))
            for mount in mounts:
                for group in (path, *path.parents):
                    with suppress(OSError, ValueError):
                        yield read(mount / group)


def _quota_of_v2(group: Path) -> float:
    """Raises ValueError where there is no limit."""
    quota, period = (group / "cpu.max").read_text().split()
    return int(quota) / int(period)


def _quota_of_v1(group: Path) -> float:
    """Raises ValueError where there is no limit."""
    quota, period = (int((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
    if quota <= 0:
        raise ValueError("no limit")
    return quota / period
