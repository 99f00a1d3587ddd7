"""What a layer calls: rotate, store, attend, and let policies see the queries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypedDict

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from curkv.cache.batch import Batch, Begun, Observed, Seen
from curkv.cache.page_manager import PageManager
from curkv.cache.upload import upload_list
from curkv.cache.view import CacheView


class Masks(TypedDict):
    """What a layer's attention is told besides what is stored."""

    window: int | None
    softcap: float | None
    sinks: Tensor | None


class PagedAttention:
    """Attention over the pages of a cache; it holds nothing of any sequence itself.

    Attributes:
        kv: which pages hold what.
        rope: by layer of the model, cos and sin, float32 [positions, head_dim / 2] each.
        output_projection: gives a layer's W_o, float32 [query heads, head_dim, hidden], to policies that
            weigh values by what they add to the output; None: there are none.
        softcap: scaled scores x become softcap tanh(x / softcap); None: they do not.
        sinks: by layer of the model, float32 [query heads], the score of one more token whose value is 0;
            empty: there are none.
        dense_prompts: long chunks that begin a text attend to their keys and values where they have been
            computed, and read no page. Those are not rounded to the cache's format.
    """

    def __init__(
        self,
        kv: PageManager,
        rope: Sequence[tuple[Tensor, Tensor]],
        output_projection: Callable[[int], Tensor] | None = None,
        prefill_dtype: torch.dtype | None = None,
        softcap: float | None = None,
        sinks: Sequence[Tensor] = (),
        dense_prompts: bool = False,
    ) -> None:
        """Takes a cache and what a model's attention needs beside it.

        Args:
            kv: the cache.
            rope: by layer of the model, cos and sin, float32 [positions, head_dim / 2] each; layers may share
                them.
            output_projection: gives a layer's W_o, by the index of the layer in the model.
            prefill_dtype: what queries are rounded to before chunks attend; None: not at all.
            softcap: of scores; None: they are not capped.
            sinks: by layer of the model, float32 [query heads]; empty: there are none.
            dense_prompts: whether long chunks that begin a text read no page.
        """
        layout = kv.layout
        self.kv = kv
        moved = {id(table): table.to(kv.device) for pair in rope for table in pair}
        self.rope = tuple((moved[id(cos)], moved[id(sin)]) for cos, sin in rope)
        self.output_projection = output_projection
        self._kernels = kv.kernels
        self._scale = layout.head_dim**-0.5
        self._prefill_dtype = prefill_dtype
        self._grams: dict[int, Tensor] = {}
        self.softcap = softcap
        self.dense_prompts = dense_prompts
        self.sinks = tuple(sink.to(kv.device, torch.float32) for sink in sinks)
        self._masks: dict[int, Masks] = {
            layer: {"window": window, "softcap": softcap, "sinks": self.sinks[layer] if sinks else None}
            for layer, window in zip(layout.cached_layers, layout.windows, strict=True)
        }
        self._rows = {layer: row for row, layer in enumerate(layout.cached_layers)}
        self._evicted = {row: index for index, row in enumerate(layout.evicted_rows)}

    def view(
        self, slot: int, seed: int = 0, phase: Literal["prefill", "decode"] = "prefill", round: int = 0
    ) -> CacheView:
        """What a policy sees of a sequence: the layers that it evicts from.

        The arguments are those of `CacheView`.
        """
        kv, layout, projection = self.kv, self.kv.layout, self.output_projection
        table, lengths = kv.page_table[slot], kv.lengths[slot]
        if len(self._evicted) < layout.num_layers:
            rows = upload_list(layout.evicted_rows, kv.device)
            table, lengths = table.index_select(0, rows), lengths.index_select(0, rows)
        return CacheView(
            kv.pages,
            table,
            lengths,
            int(kv.head_lengths(slot)[list(layout.evicted_rows)].max()),
            seed,
            phase,
            round,
            observations=kv.observed.get(slot),
            rope=tuple(self.rope[layout.cached_layers[row]] for row in layout.evicted_rows),
            output_projection=None if projection is None else self._projection,
            output_gram=None if projection is None else self._gram,
            softcap=self.softcap,
            sinks=tuple(self.sinks[layout.cached_layers[row]] for row in layout.evicted_rows if self.sinks),
            ranks=kv.ranks,
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
        """
        row, decodes = self._rows[layer], batch.num_decodes
        index = self._evicted.get(row, -1)
        observed = batch.observed if index >= 0 else ()
        table, lengths = self.kv.page_table[:, row], self.kv.lengths[:, row]
        for one in observed:
            one.observations.see_unrotated(index, q[one.start : one.end], one.position)
        cos, sin = self.rope[layer]
        place = table, lengths, batch.slots, batch.query_start
        self._kernels.store_kv(self.kv.pages, k, v, cos, sin, batch.positions, *place, q)
        for one in observed:
            self._observe(index, one, q, k, batch, (cos, sin))
        if batch.seen is not None and index >= 0:
            rows = self._kernels.gather_rows(q.flatten(1), batch.seen.rows)
            batch.seen.layers[index] = rows.view(decodes, *q.shape[1:])
        parts, masks = [], self._masks[layer]
        if decodes:
            attend = self._kernels.paged_decode_attention
            heads = self.kv.pages, table, lengths, batch.decode_slots
            parts.append(attend(q[:decodes], *heads, self._scale, **masks))
        if decodes < batch.slots.shape[0]:
            new = q[decodes:], k[decodes:], v[decodes:]
            parts.append(self._prefill(index, *new, table, lengths, batch, observed, masks, (cos, sin)))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _projection(self, index: int) -> Tensor:
        """W_o of one of the layers that policies evict from."""
        assert self.output_projection is not None
        layout = self.kv.layout
        return self.output_projection(layout.cached_layers[layout.evicted_rows[index]])

    def _gram(self, index: int) -> Tensor:
        """W_o W_o^T of one of these, by query head; made once."""
        if index not in self._grams:
            weight = self._projection(index).float()
            self._grams[index] = weight @ weight.transpose(1, 2)
        return self._grams[index]

    def _observe(
        self, index: int, one: Observed, q: Tensor, k: Tensor, batch: Batch, rope: tuple[Tensor, Tensor]
    ) -> None:
        rows = slice(one.start, one.end)
        if one.index >= batch.num_decodes:
            one.observations.see_rotated(index, q[rows])
        if one.observations.needs.block:
            keys = k[rows].clone()
            self._kernels.rope(keys, *rope, batch.positions[rows])
            one.observations.see_block(index, q[rows], keys, one.position)

    def see_steps(self, stepped: Sequence[Observed], seen: Seen | None) -> None:
        """Takes note of the queries of single tokens, after a step has run through all layers.

        Args:
            stepped: sequences that want them, see `Batch.stepped`.
            seen: the queries.
        """
        if seen is None:
            return
        rows, layers = upload_list((one.index for one in stepped), self.kv.device), seen.layers
        steps = torch.stack([layers[index] for index in range(len(layers))]).index_select(1, rows)
        for place, one in enumerate(stepped):
            one.observations.see_step(steps[:, place])
            if one.column_sums:
                self._add_up(one.slot, steps[:, place])

    def _add_up(self, slot: int, q: Tensor) -> None:
        """Adds what a sequence's newest token attends to, by its queries [L, Hq, head_dim] after RoPE."""
        if self.kv.layout.evicts_from_windows:
            return self._add_up_by_layer(slot, q)
        view = self.view(slot)
        queries = q.reshape(view.lengths.numel(), 1, -1, q.shape[-1])
        paid = self._kernels.window_scores(
            queries, view.pages, *view.rows, view.scale, "mean", width=view.width, softcap=view.softcap,
            sinks=view.sink_rows,
        )  # fmt: skip
        _add_attention(view, paid.view(*view.lengths.shape, -1) * queries.shape[2])

    def _add_up_by_layer(self, slot: int, q: Tensor) -> None:
        """The same where layers have windows, as attention of a chunk of one token finds it."""
        kv, layout, device = self.kv, self.kv.layout, self.kv.device
        slots, start = (upload_list(numbers, device, torch.int32) for numbers in ((slot,), (0, 1)))
        for index, row in enumerate(layout.evicted_rows):
            masks, queries = self._masks[layout.cached_layers[row]], q[index : index + 1]
            place = kv.pages, kv.page_table[:, row], kv.lengths[:, row], slots, start, self._scale
            _, lse = self._kernels.paged_prefill_attention(queries, *place, return_lse=True, **masks)
            self._kernels.column_sums(queries, lse, *place, masks["window"], masks["softcap"])

    def _prefill(
        self,
        index: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        table: Tensor,
        lengths: Tensor,
        batch: Batch,
        observed: tuple[Observed, ...],
        masks: Masks,
        rope: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Attention of chunks; what each token receives is added up, or told from, where that is needed."""
        heads, starts = (self.kv.pages, table, lengths), batch.prefill_query_start
        place = *heads, batch.prefill_slots, starts, self._scale
        chunks = [one for one in observed if one.index >= batch.num_decodes]
        summed = [one for one in chunks if one.column_sums]
        told = [one for one in chunks if one.chunk]
        queries = q if self._prefill_dtype is None else q.to(self._prefill_dtype)
        if not (summed or told):
            begun = batch.begun if self.dense_prompts and _only_causal(masks, batch.begun) else ()
            if not begun:
                return self._kernels.paged_prefill_attention(queries, *place, **masks)
            out = torch.empty_like(queries)
            if len(begun) < len(batch.prefill_slots):
                place = *heads, batch.continued_slots, starts, self._scale
                out = self._kernels.paged_prefill_attention(queries, *place, **masks)
            for chunk in begun:
                rows = slice(chunk.start - batch.num_decodes, chunk.end - batch.num_decodes)
                keys = k[rows].clone()
                self._kernels.rope(keys, *rope, batch.positions[chunk.start : chunk.end])
                out[rows] = self._attend_densely(queries[rows], keys, v[rows])
            return out
        out, lse = self._kernels.paged_prefill_attention(queries, *place, return_lse=True, **masks)
        for one in told:
            rows = slice(one.start - batch.num_decodes, one.end - batch.num_decodes)
            one.observations.see_attended(index, queries[rows], lse[rows])
        for one in summed:
            rows = slice(one.start - batch.num_decodes, one.end - batch.num_decodes)
            slots = batch.slots[one.index : one.index + 1]
            count = upload_list((0, one.end - one.start), q.device, torch.int32)
            self._kernels.column_sums(
                q[rows], lse[rows], *heads, slots, count, self._scale,
                masks["window"], masks["softcap"],
            )  # fmt: skip
        return out

    def _attend_densely(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention of a chunk to itself, [T, query heads, head_dim], by torch's fastest kernel."""
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k.to(q.dtype), v.to(q.dtype)))
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=self._scale, enable_gqa=True)
        return out[0].transpose(0, 1)


def _add_attention(view: CacheView, paid: Tensor) -> None:
    """Adds float32 [L, H, n_max] to what a sequence's tokens have received, whose pages nobody shares."""
    size = view.pages.page_size
    token = torch.arange(view.width, device=paid.device)
    page = view.table[..., : -(-view.width // size)].long().clamp_(0, len(view.pages.attention) - 1)
    place = page.index_select(-1, token // size) * size + token % size
    paid = paid.masked_fill(~view.stored, 0.0)  # where the table may say anything
    view.pages.attention.view(-1).index_add_(0, place.flatten(), paid.flatten())


def _only_causal(masks: Masks, begun: Sequence[Begun]) -> bool:
    """Whether nothing but causality keeps these chunks from seeing all of themselves."""
    window = masks["window"]
    within = window is None or all(one.end - one.start <= window for one in begun)
    return within and masks["softcap"] is None and masks["sinks"] is None
