"""Pages, who owns them, and which are free."""

from __future__ import annotations

import torch
from torch import Tensor

from curkv.kernels.pages import Pages


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
        owners: int32 [num_pages], reference counts; 0 for a free page.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        head_dim: int,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
    ) -> None:
        """Allocates `num_pages` free pages.

        Args:
            num_pages: pages in the pool, at least 1.
            page_size: tokens per page.
            head_dim: channels of a key or value.
            dtype: float32, bfloat16 or float16.
            device: where the memory lies.
        """
        slots = (num_pages, page_size)

        def side(dtype: torch.dtype) -> Tensor:
            return torch.empty(slots, dtype=dtype, device=device)

        self.pages = Pages(
            k=torch.empty(*slots, head_dim, dtype=dtype, device=device),
            v=torch.empty(*slots, head_dim, dtype=dtype, device=device),
            position=side(torch.int32),
            k_sq=side(torch.float32),
            v_sq=side(torch.float32),
            attention=side(torch.float32),
        )
        self.owners = torch.zeros(num_pages, dtype=torch.int32, device=device)
        self._stack = torch.arange(num_pages - 1, -1, -1, dtype=torch.int32, device=device)
        self._num_free = num_pages

    @property
    def num_pages(self) -> int:
        """Pages in the pool, free or not."""
        return self.owners.shape[0]

    @property
    def num_free(self) -> int:
        """Pages that `take` can still hand out."""
        return self._num_free

    @property
    def free_pages(self) -> Tensor:
        """int32 [num_free], ids of the free pages, the next one to be taken last. A view: do not write."""
        return self._stack[: self._num_free]

    def take(self, count: int) -> Tensor:
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
        ids = self._stack[left : self._num_free].flip(0)
        self.owners[ids] = 1
        self._num_free = left
        return ids

    def share(self, ids: Tensor) -> None:
        """Adds one owner to each listed page; a page listed twice gains two.

        Args:
            ids: int32 [n], pages in use.

        Raises:
            RuntimeError: a page is free.
        """
        if not bool((self.owners[ids] > 0).all()):
            raise RuntimeError("a free page cannot be shared")
        self.owners.index_add_(0, ids, torch.ones_like(ids))

    def release(self, ids: Tensor) -> int:
        """Removes one owner from each listed page and frees those left without any.

        Args:
            ids: int32 [n]; a page may be listed once for each of its owners.

        Returns:
            The number of pages freed.

        Raises:
            RuntimeError: a page was released more often than it is owned; nothing is changed.
        """
        self.owners.index_add_(0, ids, torch.ones_like(ids), alpha=-1)
        left = self.owners[ids]
        if bool((left < 0).any()):
            self.owners.index_add_(0, ids, torch.ones_like(ids))
            page = int(ids[left < 0][0])
            raise RuntimeError(f"page {page} was released more often than it is owned")
        freed: Tensor = torch.unique(ids[left == 0])
        count = freed.shape[0]
        self._stack[self._num_free : self._num_free + count] = freed.flip(0)
        self._num_free += count
        return count
