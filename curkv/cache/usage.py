"""What the pages of a cache are used for, as figures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CacheUsage:
    """Figures of a cache at one moment.

    Attributes:
        page_bytes: bytes of a page.
        page_size: tokens of a page.
        num_pages: pages in the pool.
        used_pages: pages that sequences own; a shared page counts once.
        prefix_pages: pages cached as prefixes, whether sequences use them or not.
        saved_pages: pages that more would be taken if every sequence and prefix had its own.
        empty_tokens: token slots of used pages that hold none, the cost of ragged last pages. Shared pages
            are always full, so that those of all heads together are exactly those of the pool.
    """

    page_bytes: int
    page_size: int
    num_pages: int
    used_pages: int
    prefix_pages: int
    saved_pages: int
    empty_tokens: int

    @property
    def capacity_bytes(self) -> int:
        """Bytes of all pages."""
        return self.num_pages * self.page_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes of the pages that sequences own."""
        return self.used_pages * self.page_bytes

    @property
    def prefix_bytes(self) -> int:
        """Bytes of the pages cached as prefixes."""
        return self.prefix_pages * self.page_bytes

    @property
    def saved_bytes(self) -> int:
        """Bytes that more would be taken if every sequence and prefix had pages of its own."""
        return self.saved_pages * self.page_bytes

    @property
    def stranded_slots_ratio(self) -> float:
        """Share of the token slots in used pages that hold no token, 0 to 1."""
        return self.empty_tokens / (self.used_pages * self.page_size) if self.used_pages else 0.0
