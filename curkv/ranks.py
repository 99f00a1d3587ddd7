"""The processes that run one model together, each with its share of the heads; usually it is one alone."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import FileStore  # type: ignore[attr-defined]

COLLECTIVE_SECONDS = 300.0
"""Longest wait for the other processes: each may be compiling its kernels."""


class Ranks:
    """A process that runs a model alone: nothing is divided and nothing exchanged.

    Attributes:
        rank: number of this process, from 0, which alone is asked for something; the others follow it.
        size: how many processes there are.
        exchanged: bytes of the tensors that this process has handed in, by what they were: `sums`, what
            `heads` have, `numbers` that rank 0 tells.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size
        self.exchanged: Counter[str] = Counter()

    def share(self, count: int) -> slice:
        """Which of so many heads, rows or columns, a multiple of `size`, are this process's."""
        own = count // self.size
        return slice(self.rank * own, (self.rank + 1) * own)

    def own(self, x: Tensor, dim: int) -> Tensor:
        """This process's share of a dimension."""
        share = self.share(x.shape[dim])
        return x if self.size == 1 else x.narrow(dim, share.start, share.stop - share.start)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of what all processes have, the same in each to the last bit; x may be written over."""
        return x

    def whole(self, x: Tensor, dim: int) -> Tensor:
        """What all processes have, one behind the other along a dimension."""
        return x

    def told(self, numbers: list[int]) -> list[int]:
        """What rank 0 has, where others have as many numbers."""
        return numbers

    def leave(self) -> None:
        """Ends the exchange: this process can join others."""


ALONE = Ranks()


class RankLost(RuntimeError):
    """Another process has ended, or has been silent for too long."""


class Group(Ranks):
    """One of several processes, joined by torch.distributed: NCCL between GPUs, gloo between CPUs.

    Nothing waits for ever: without an answer for `COLLECTIVE_SECONDS` every exchange raises `RankLost`.
    """

    def __init__(self, rank: int, size: int, meeting: Path, device: torch.device) -> None:
        """Joins the others, which are on this machine.

        Args:
            rank: number of this process.
            size: how many there are.
            meeting: a file in an empty directory, the same for all, by which they find each other.
            device: where this process's tensors lie.

        Raises:
            RankLost: one of them does not come.
        """
        super().__init__(rank, size)
        self._device = device
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        with _others():
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=FileStore(str(meeting), size),
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=COLLECTIVE_SECONDS),
            )

    def sum(self, x: Tensor) -> Tensor:
        """See `Ranks.sum`."""
        x = x.contiguous()
        with _others():
            dist.all_reduce(x)
        self.exchanged["sums"] += x.nbytes
        return x

    def whole(self, x: Tensor, dim: int) -> Tensor:
        """See `Ranks.whole`."""
        sent = x.contiguous().view(torch.uint8) if x.dtype is torch.bool else x.contiguous()
        parts = [torch.empty_like(sent) for _ in range(self.size)]
        with _others():
            dist.all_gather(parts, sent)
        self.exchanged["heads"] += sent.nbytes
        return torch.cat(parts, dim).view(x.dtype)

    def told(self, numbers: list[int]) -> list[int]:
        """See `Ranks.told`."""
        sent = torch.tensor(numbers, dtype=torch.int64, device=self._device)
        with _others():
            dist.broadcast(sent, 0)
        self.exchanged["numbers"] += sent.nbytes
        heard: list[int] = sent.tolist()
        return heard

    def leave(self) -> None:
        """See `Ranks.leave`."""
        dist.destroy_process_group()


@contextmanager
def _others() -> Iterator[None]:
    """Says plainly what it means if an exchange fails."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition(". ")[0]
        raise RankLost(f"another process of the model has ended or does not answer ({reason})") from error
