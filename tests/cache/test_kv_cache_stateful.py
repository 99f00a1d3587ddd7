"""The cache against a model of plain Python lists, with operations in any order."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from curkv.cache.batch import Batch
from curkv.cache.integrity import check_integrity
from curkv.cache.page_manager import OutOfSlots
from curkv.cache.page_pool import OutOfPages
from curkv.kernels.formats.base import Store
from curkv.kernels.store_kv.reference import store_kv
from tests.cache.util import books, kept, make_cache, poison, same_books, token_slots

LAYERS, HEADS, PAGE, MAX_TOKENS = 2, 2, 4, 24

K_PATTERN, V_PATTERN = torch.tensor([1.0, 0.0, 0.5, 0.0]), torch.tensor([0.0, -2.0, 0.0, 0.0])
ROPE = (torch.ones(512, 2), torch.zeros(512, 2))


@dataclass
class Modelled:
    """A sequence: its next position and, per (layer, head), the (position, value) of every kept token."""

    next_position: int = 0
    heads: dict[tuple[int, int], list[tuple[int, float]]] = field(
        default_factory=lambda: {(layer, head): [] for layer in range(LAYERS) for head in range(HEADS)}
    )

    def pages(self, new_tokens: int = 0) -> int:
        return sum(-(-(len(tokens) + new_tokens) // PAGE) for tokens in self.heads.values())

    @property
    def whole(self) -> list[tuple[int, float]]:
        """Its tokens, as long as every head holds all of them."""
        first = self.heads[0, 0]
        same = all(tokens == first for tokens in self.heads.values())
        return first if same and len(first) == self.next_position else []

    @property
    def longest(self) -> int:
        return max(len(tokens) for tokens in self.heads.values())


class CacheMachine(RuleBasedStateMachine):
    @initialize(num_pages=st.sampled_from([20, 32, 48, 80]), max_prefix_pages=st.sampled_from([0, 12, 80]))
    def start(self, num_pages: int, max_prefix_pages: int) -> None:
        self.cache = make_cache(
            num_pages,
            max_tokens=MAX_TOKENS,
            page_size=PAGE,
            max_sequences=6,
            max_prefix_pages=max_prefix_pages,
        )
        self.model: dict[int, Modelled] = {}
        self.chains: list[list[tuple[tuple[int, float], ...]]] = []
        self.kept: list[Modelled] = []
        self.next_value = 1.0

    @rule(prompt=st.sampled_from([0, 1, 3, 4, 5, 8, 11, 17]))
    def admit(self, prompt: int) -> None:
        if self.cache.free_slots:
            slot = self.cache.add_sequence()
            assert slot not in self.model
            self.model[slot] = Modelled()
            self.advance({slot: prompt} if prompt else {})
        else:
            with pytest.raises(OutOfSlots):
                self.cache.add_sequence()

    @precondition(lambda self: self.model)
    @rule(data=st.data(), tokens=st.lists(st.integers(1, 9), min_size=1, max_size=4))
    def run_step(self, data: st.DataObject, tokens: list[int]) -> None:
        """A chunk for some sequences and one token for others, all in one step."""
        slots = data.draw(
            st.lists(st.sampled_from(sorted(self.model)), unique=True, max_size=4), label="slots"
        )
        self.advance(dict(zip(slots, sorted(tokens), strict=False)))

    @precondition(lambda self: self.model)
    @rule()
    def decode_all(self) -> None:
        self.advance(dict.fromkeys(self.model, 1))

    @precondition(lambda self: any(sequence.longest for sequence in self.model.values()))
    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        slot = self.draw_slot(data)
        heads = self.model[slot].heads
        keep = {where: draw_kept(data, len(tokens)) for where, tokens in heads.items()}
        indices, counts = kept([[keep[layer, head] for head in range(HEADS)] for layer in range(LAYERS)])
        before, free = books(self.cache), self.cache.free_pages
        try:
            freed = self.cache.evict(slot, indices, counts)
        except OutOfPages:
            assert self.cache.pool.owners.max() > 1, "only shared pages need room to be evicted from"
            return
        assert self.cache.free_pages == free + freed
        if all(len(keep[where]) == len(tokens) for where, tokens in heads.items()):
            assert same_books(before, books(self.cache))
        for where, tokens in heads.items():
            heads[where] = [tokens[i] for i in keep[where]]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        slot = self.draw_slot(data)
        partial = sum(len(tokens) % PAGE > 0 for tokens in self.model[slot].heads.values())
        before, free = books(self.cache), self.cache.free_pages
        if not self.cache.free_slots or partial > free:
            with pytest.raises((OutOfSlots, OutOfPages)):
                self.cache.fork(slot)
            assert same_books(before, books(self.cache))
            return
        new = self.cache.fork(slot)
        assert new not in self.model
        assert self.cache.free_pages == free - partial
        self.model[new] = deepcopy(self.model[slot])

    @precondition(lambda self: any(len(sequence.whole) >= PAGE for sequence in self.model.values()))
    @rule(data=st.data())
    def keep_blocks(self, data: st.DataObject) -> None:
        slots = [slot for slot, sequence in self.model.items() if len(sequence.whole) >= PAGE]
        slot = data.draw(st.sampled_from(sorted(slots)), label="slot")
        tokens = self.model[slot].whole
        chain = [tuple(tokens[:end]) for end in range(PAGE, len(tokens) + 1, PAGE)]
        free = self.cache.free_pages
        self.cache.keep_blocks(slot, chain)
        assert self.cache.free_pages == free, "what is held gives way"
        self.chains.append(chain)

    @precondition(lambda self: self.chains and self.cache.free_slots)
    @rule(data=st.data())
    def adopt_blocks(self, data: st.DataObject) -> None:
        chain = data.draw(st.sampled_from(self.chains), label="chain")
        prefix = self.cache.prefixes.find_blocks(chain)
        if prefix is not None:
            slot = self.cache.adopt(prefix)
            assert prefix.tokens % PAGE == 0 and 0 < prefix.tokens <= len(chain) * PAGE
            tokens = list(chain[prefix.tokens // PAGE - 1])
            self.model[slot] = Modelled(prefix.tokens)
            self.model[slot].heads = {where: list(tokens) for where in self.model[slot].heads}

    @precondition(lambda self: any(sequence.longest for sequence in self.model.values()))
    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        slot, free = self.draw_slot(data), self.cache.free_pages
        self.cache.keep(slot, len(self.kept), self.model[slot].next_position, evictions=1)
        assert self.cache.free_pages == free, "what is held gives way"
        self.kept.append(deepcopy(self.model[slot]))

    @precondition(lambda self: self.kept and self.cache.free_slots)
    @rule(data=st.data())
    def adopt(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(range(len(self.kept))), label="key")
        prefix, before = self.cache.prefixes.find(key), books(self.cache)
        if prefix is None:
            return
        try:
            slot = self.cache.adopt(prefix)
        except OutOfPages:
            assert same_books(before, books(self.cache))
            return
        assert prefix.tokens == self.kept[key].next_position
        self.model[slot] = deepcopy(self.kept[key])

    @rule(pages=st.none() | st.integers(0, 20))
    def drop_prefixes(self, pages: int | None) -> None:
        free, idle = self.cache.pool.num_free, self.cache.free_pages
        freed = self.cache.prefixes.drop(pages)
        assert self.cache.pool.num_free == free + freed and self.cache.free_pages == idle
        assert freed >= min(pages, idle - free) if pages is not None else freed == idle - free

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        slot, free = self.draw_slot(data), self.cache.free_pages
        assert self.cache.free(slot) == self.cache.free_pages - free
        del self.model[slot]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def preempt_and_recompute(self, data: st.DataObject) -> None:
        slot = self.draw_slot(data)
        self.cache.free(slot)
        tokens = self.model.pop(slot).next_position
        new = self.cache.add_sequence()
        self.model[new] = Modelled()
        if tokens:
            self.advance({new: tokens})

    @invariant()
    def books_agree(self) -> None:
        check_integrity(self.cache)
        assert self.cache.active_slots == sorted(self.model)
        for slot, sequence in self.model.items():
            assert self.cache.sequence_bytes(slot) == sequence.pages() * self.cache.page_bytes
            assert self.cache.sequence_tokens(slot) == sum(map(len, sequence.heads.values()))
        assert self.cache.usage.used_bytes <= sum(map(self.cache.sequence_bytes, self.model))
        assert self.cache.prefixes.held_pages <= self.cache.prefixes.max_pages
        assert self.cache.usage.saved_bytes >= 0

    @invariant()
    def contents_equal_the_model(self) -> None:
        tokens = [
            (slot, layer, head, position, value)
            for slot, sequence in sorted(self.model.items())
            for (layer, head), kept_tokens in sequence.heads.items()
            for position, value in kept_tokens
        ]
        expected = torch.tensor(tokens).reshape(-1, 5)
        *where, page, place = token_slots(self.cache)
        assert torch.equal(torch.stack(where, dim=1), expected[:, :3].long())
        pages = self.cache.pages
        assert torch.equal(pages.position[page, place], expected[:, 3].int())
        _, layer, head, _, value = expected.unbind(1)
        for name, content in contents(value, layer, head).items():
            held = getattr(pages, name)
            found = held.read(page, place) if isinstance(held, Store) else held[page, place]
            assert torch.equal(found, content), name
        poison(self.cache)

    def teardown(self) -> None:
        for slot in self.model:
            self.cache.free(slot)
        check_integrity(self.cache)
        assert self.cache.free_pages == self.cache.num_pages
        assert self.cache.usage.used_bytes == 0
        self.cache.prefixes.drop()
        assert self.cache.pool.num_free == self.cache.num_pages and not self.cache.prefixes.held_pages
        assert self.cache.free_slots == self.cache.layout.max_sequences

    def draw_slot(self, data: st.DataObject) -> int:
        slot: int = data.draw(st.sampled_from(sorted(self.model)), label="slot")
        return slot

    def advance(self, chunks: dict[int, int]) -> None:
        """Extends and stores, or sees that a step without room changes nothing."""
        slots, counts = list(chunks), list(chunks.values())
        too_long = any(self.model[slot].longest + n > MAX_TOKENS for slot, n in chunks.items())
        needed = sum(self.model[slot].pages(n) - self.model[slot].pages() for slot, n in chunks.items())
        assert self.cache.pages_needed(slots, counts) == needed
        before = books(self.cache)
        if too_long or needed > self.cache.free_pages:
            with pytest.raises(ValueError if too_long else OutOfPages):
                self.cache.extend(slots, counts)
            assert same_books(before, books(self.cache))
            return
        self.cache.extend(slots, counts)
        if slots:
            self.store(chunks)

    def store(self, chunks: dict[int, int]) -> None:
        starts = [self.model[slot].next_position for slot in chunks]
        batch = Batch.build(list(chunks), [[0] * n for n in chunks.values()], starts)
        total = len(batch.token_ids)
        values = self.next_value + torch.arange(total)
        self.next_value += total
        for layer in range(LAYERS):
            rows = [contents(values, layer, head) for head in range(HEADS)]
            k, v = (torch.stack([row[name] for row in rows], dim=1) for name in "kv")
            table, lengths = self.cache.page_table[:, layer], self.cache.lengths[:, layer]
            store_kv(
                self.cache.pages, k, v, *ROPE, batch.positions, table, lengths, batch.slots, batch.query_start
            )
        for slot, start, end in zip(
            chunks, batch.query_start.tolist(), batch.query_start.tolist()[1:], strict=False
        ):
            self.record(slot, values[start:end], batch.positions[start:end].tolist())

    def record(self, slot: int, values: Tensor, positions: list[int]) -> None:
        """Writes the tokens into the model, and an attention into the pages, which only the kernels know."""
        sequence = self.model[slot]
        sequence.next_position = positions[-1] + 1
        for (layer, head), tokens in sequence.heads.items():
            index = torch.arange(len(tokens), len(tokens) + len(positions))
            page = self.cache.page_table[slot, layer, head][index // PAGE].long()
            assert not self.cache.pages.attention[page, index % PAGE].any()
            self.cache.pages.attention[page, index % PAGE] = contents(values, layer, head)["attention"]
            tokens.extend(zip(positions, values.tolist(), strict=True))


def draw_kept(data: st.DataObject, length: int) -> list[int]:
    """Everything, or any subset."""
    mask = data.draw(st.just(2**length - 1) | st.integers(0, 2**length - 1), label="kept")
    return [i for i in range(length) if mask >> i & 1]


def contents(values: Tensor, layer: Tensor | int, head: Tensor | int) -> dict[str, Tensor]:
    """What a head's pages hold for tokens of these values; exact in float32, different in every head."""
    own = values * 16 + layer * 4 + head
    k, v = own[:, None] * K_PATTERN, own[:, None] * V_PATTERN
    return {"k": k, "v": v, "k_sq": k.square().sum(-1), "v_sq": v.square().sum(-1), "attention": own / 8}


TestCache = CacheMachine.TestCase
TestCache.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
