"""Pages, who owns them, and which are free."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from curkv.kernels.formats.base import KVFormat
from curkv.kernels.pages import allocate

Ids = NDArray[np.int32]
"""Page ids, on the host like all bookkeeping: numpy costs a fifth of torch on arrays this small."""


class OutOfPages(RuntimeError):
    """The pool has fewer free pages than were asked for; nothing was taken.

    Attributes:
        needed: pages asked for.
        free: pages that were free.
    """

    def __init__(self, needed: int, free: int) -> None:
        super().__init__(f"{needed} pages are needed but only {free} are free")
        self.needed = needed
        self.free = free


class PagePool:
    """Owns the memory of all pages, a stack of free ones and a reference count for each.

    Every operation works on any number of pages at once. Memory is allocated but not touched: the operating
    system backs a page when it is first written, and recently freed pages are the first to be taken again.

    Attributes:
        pages: the memory; contents of free pages are undefined.
        owners: int32 [num_pages] on the host, reference counts; 0 for a free page.
        held: int32 [num_pages] on the host, how many of the owners are prefixes and not sequences.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        head_dim: int,
        format: KVFormat,
        device: str | torch.device = "cpu",
    ) -> None:
        """Allocates `num_pages` free pages.

        Args:
            num_pages: pages in the pool, at least 1.
            page_size: tokens per page.
            head_dim: channels of a key or value.
            format: of keys and values.
            device: where the pages' memory lies.
        """
        self.pages = allocate(format, num_pages, page_size, head_dim, device)
        self.owners: Ids = np.zeros(num_pages, dtype=np.int32)
        self.held: Ids = np.zeros(num_pages, dtype=np.int32)
        self._stack: Ids = np.arange(num_pages - 1, -1, -1, dtype=np.int32)
        self._num_free = self._num_idle = num_pages

    @property
    def num_pages(self) -> int:
        """Pages in the pool, free or not."""
        return len(self.owners)

    @property
    def num_free(self) -> int:
        """Pages that `take` can still hand out."""
        return self._num_free

    @property
    def num_idle(self) -> int:
        """Pages that no sequence owns: free ones, and those that only prefixes own."""
        return self._num_idle

    @property
    def free_pages(self) -> Ids:
        """int32 [num_free], ids of the free pages, the next one to be taken last. A view: do not write."""
        return self._stack[: self._num_free]

    def take(self, count: int) -> Ids:
        """Takes free pages, each with one owner.

        Args:
            count: how many.

        Returns:
            int32 [count] page ids; neighbours in a fresh pool, so that a head's pages lie side by side.

        Raises:
            OutOfPages: fewer than `count` pages are free.
        """
        if count > self._num_free:
            raise OutOfPages(count, self._num_free)
        left = self._num_free - count
        ids = self._stack[left : self._num_free][::-1].copy()
        self.owners[ids] = 1
        self._num_free = left
        self._num_idle -= count
        return ids

    def clear(self) -> None:
        """Frees every page, whoever owns it."""
        self.owners[:] = self.held[:] = 0
        self._stack[:] = np.arange(self.num_pages - 1, -1, -1)
        self._num_free = self._num_idle = self.num_pages

    def share(self, ids: Ids, held: bool = False) -> None:
        """Adds one owner to each listed page; a page listed twice gains two.

        Args:
            ids: int32 [n], pages in use.
            held: the new owner is a prefix.

        Raises:
            RuntimeError: a page is free; nothing is changed.
        """
        pages, counts = np.unique(ids, return_counts=True)
        owners = self.owners[pages]
        if not owners.all():
            raise RuntimeError(f"page {pages[owners == 0][0]} is free and cannot be shared")
        self._count(pages, counts, held)

    def release(self, ids: Ids, held: bool = False) -> int:
        """Removes one owner from each listed page and frees those left without any.

        Args:
            ids: int32 [n]; a page may be listed once for each of its owners.
            held: the owner is a prefix.

        Returns:
            The number of pages freed.

        Raises:
            RuntimeError: a page was released more often than it is owned; nothing is changed.
        """
        pages, counts = np.unique(ids, return_counts=True)
        left = (self.held[pages] if held else self.owners[pages] - self.held[pages]) - counts
        if left.min(initial=0) < 0:
            raise RuntimeError(f"page {pages[left < 0][0]} was released more often than it is owned")
        self._count(pages, -counts, held)
        freed = pages[self.owners[pages] == 0]
        self._stack[self._num_free : self._num_free + len(freed)] = freed[::-1]
        self._num_free += len(freed)
        return len(freed)

    def _count(self, pages: Ids, change: NDArray[np.int64], held: bool) -> None:
        """Adds to the owners of different pages, and keeps count of those that no sequence owns."""
        idle = int(np.count_nonzero(self.owners[pages] == self.held[pages]))
        self.owners[pages] += change
        if held:
            self.held[pages] += change
        self._num_idle += int(np.count_nonzero(self.owners[pages] == self.held[pages])) - idle
