"""What a layer calls: rotate, store, attend, and let policies see the queries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from curkv.cache.batch import Batch, Observed
from curkv.cache.page_manager import PageManager
from curkv.cache.upload import upload_list
from curkv.cache.view import CacheView


class PagedAttention:
    """Attention over the pages of a cache; it holds nothing of any sequence itself.

    Attributes:
        kv: which pages hold what.
        rope: by layer of the model, cos and sin, float32 [positions, head_dim / 2] each.
        output_projection: gives a layer's W_o, float32 [query heads, head_dim, hidden], to policies that
            weigh values by what they add to the output; None: there are none.
    """

    def __init__(
        self,
        kv: PageManager,
        rope: Sequence[tuple[Tensor, Tensor]],
        output_projection: Callable[[int], Tensor] | None = None,
        prefill_dtype: torch.dtype | None = None,
    ) -> None:
        """Takes a cache and what a model's attention needs beside it.

        Args:
            kv: the cache.
            rope: by layer of the model, cos and sin, float32 [positions, head_dim / 2] each; layers may share
                them.
            output_projection: gives a layer's W_o, by the index of the layer in the model.
            prefill_dtype: what queries are rounded to before chunks attend; None: not at all.
        """
        layout = kv.layout
        self.kv = kv
        moved = {id(table): table.to(kv.device) for pair in rope for table in pair}
        self.rope = tuple((moved[id(cos)], moved[id(sin)]) for cos, sin in rope)
        self.output_projection = output_projection
        self._kernels = kv.kernels
        self._scale = layout.head_dim**-0.5
        self._prefill_dtype = prefill_dtype
        self._rows = {layer: row for row, layer in enumerate(layout.cached_layers)}
        self._evicted = {row: index for index, row in enumerate(layout.full_rows)}

    def view(
        self, slot: int, seed: int = 0, phase: Literal["prefill", "decode"] = "prefill", round: int = 0
    ) -> CacheView:
        """What a policy sees of a sequence: the layers that attend to everything.

        The arguments are those of `CacheView`.
        """
        kv, layout, projection = self.kv, self.kv.layout, self.output_projection
        table, lengths = kv.page_table[slot], kv.lengths[slot]
        if len(self._evicted) < layout.num_layers:
            rows = upload_list(layout.full_rows, kv.device)
            table, lengths = table.index_select(0, rows), lengths.index_select(0, rows)
        return CacheView(
            kv.pages,
            table,
            lengths,
            int(kv.head_lengths(slot)[list(layout.full_rows)].max()),
            seed,
            phase,
            round,
            observations=kv.observed.get(slot),
            rope=tuple(self.rope[layout.cached_layers[row]] for row in layout.full_rows),
            output_projection=None if projection is None else self._projection,
        )

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        """Stores one layer's new keys and values and attends over everything its heads hold.

        Args:
            layer: index of the layer in the model.
            q: float32 [T, query heads, head_dim] before RoPE; rotated in place.
            k: float32 [T, KV heads, head_dim] before RoPE.
            v: float32 [T, KV heads, head_dim].
            batch: the step's tokens; `PageManager.extend` has been called for them.

        Returns:
            float32 [T, query heads, head_dim].

        Raises:
            NotImplementedError: the layer has a window, which the kernels cannot be told yet.
        """
        row, decodes, observed = self._rows[layer], batch.num_decodes, batch.observed
        if row not in self._evicted:
            raise NotImplementedError(f"layer {layer} has a window, which the attention kernels do not know")
        table, lengths = self.kv.page_table[:, row], self.kv.lengths[:, row]
        for one in observed:
            one.observations.see_unrotated(self._evicted[row], q[one.start : one.end], one.position)
        cos, sin = self.rope[layer]
        self._kernels.rope(q, cos, sin, batch.positions)
        self._kernels.store_kv(
            self.kv.pages, k, v, cos, sin, batch.positions, table, lengths, batch.slots, batch.query_start
        )
        for one in observed:
            self._observe(self._evicted[row], one, q, k, batch, (cos, sin))
        parts = []
        if decodes:
            parts.append(self._decode(q[:decodes], table, lengths, batch, observed))
        if decodes < batch.slots.shape[0]:
            parts.append(self._prefill(q[decodes:], table, lengths, batch, observed))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _projection(self, index: int) -> Tensor:
        """W_o of one of the layers that attend to everything."""
        assert self.output_projection is not None
        layout = self.kv.layout
        return self.output_projection(layout.cached_layers[layout.full_rows[index]])

    def _observe(
        self, index: int, one: Observed, q: Tensor, k: Tensor, batch: Batch, rope: tuple[Tensor, Tensor]
    ) -> None:
        rows, keys = slice(one.start, one.end), None
        if one.observations.needs.block:
            keys = k[rows].clone()
            self._kernels.rope(keys, *rope, batch.positions[rows])
        one.observations.see_rotated(index, q[rows], keys, one.position)

    def _decode(
        self, q: Tensor, table: Tensor, lengths: Tensor, batch: Batch, observed: tuple[Observed, ...]
    ) -> Tensor:
        """Attention of single tokens; the probabilities are added up for those sequences that need it."""
        attend, slots, pages = self._kernels.paged_decode_attention, batch.decode_slots, self.kv.pages
        summed = [one.index for one in observed if one.column_sums and one.index < batch.num_decodes]
        if not summed or len(summed) == len(slots):
            return attend(q, pages, table, lengths, slots, self._scale, accumulate=bool(summed))
        out = torch.empty_like(q)
        others = sorted(set(range(len(slots))) - set(summed))
        for chosen, accumulate in ((summed, True), (others, False)):
            rows = upload_list(chosen, q.device)
            out[rows] = attend(
                q[rows], pages, table, lengths, slots[rows], self._scale, accumulate=accumulate
            )
        return out

    def _prefill(
        self, q: Tensor, table: Tensor, lengths: Tensor, batch: Batch, observed: tuple[Observed, ...]
    ) -> Tensor:
        """Attention of chunks; what each token receives is added up for those sequences that need it."""
        heads = self.kv.pages, table, lengths
        place = *heads, batch.prefill_slots, batch.prefill_query_start, self._scale
        summed = [one for one in observed if one.column_sums and one.index >= batch.num_decodes]
        queries = q if self._prefill_dtype is None else q.to(self._prefill_dtype)
        if not summed:
            out: Tensor = self._kernels.paged_prefill_attention(queries, *place)
            return out
        out, lse = self._kernels.paged_prefill_attention(queries, *place, return_lse=True)
        for one in summed:
            rows = slice(one.start - batch.num_decodes, one.end - batch.num_decodes)
            index = slice(one.index, one.index + 1)
            count = upload_list((0, one.end - one.start), q.device, torch.int32)
            self._kernels.column_sums(q[rows], lse[rows], *heads, batch.slots[index], count, self._scale)
        return out
