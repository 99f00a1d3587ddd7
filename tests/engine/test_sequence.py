"""What of a sequence is copied, forgotten and kept."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np

from curkv.cache.layout import CacheLayout, full_attention
from curkv.cache.options import EvictionOptions
from curkv.cache.plan import resolve
from curkv.cache.prefixes import Prefix
from curkv.engine.detokenizer import Detokenizer
from curkv.engine.sequence import Progress, Sequence
from curkv.engine.types import Request, SamplingParams, TokenLogprob
from curkv.kernels.formats import get_format
from curkv.models.vocabulary import Vocabulary
from tests.server.scripted import word_tokenizer

LAYOUT = CacheLayout(full_attention(1, 2), 8, 4, get_format("float32"), 2, 64)


def sequence() -> Sequence:
    prompt = list(range(10))
    request = Request("r", prompt, SamplingParams(), EvictionOptions())
    plan = resolve(request.eviction, prompt, LAYOUT)
    return Sequence(request, 0, 0, plan, 0, 16, Detokenizer(Vocabulary(word_tokenizer()), prompt, ()))


def advanced() -> Progress:
    """Progress in which every field differs from that of a new sequence."""
    logprobs, anything = [TokenLogprob(1, -0.5)], [None]
    others = "states", "again", 40, "paid", "next"
    progress = Progress(7, 4.5, 2.5, 2, 6, False, 1, logprobs, anything, *others)  # type: ignore[arg-type]
    new = Progress()
    assert all(getattr(progress, f.name) != getattr(new, f.name) for f in fields(Progress))
    return progress


def test_a_fork_takes_all_progress_and_goes_on_apart() -> None:
    parent, fork = sequence(), sequence()
    parent.start(0, None)
    parent.progress = advanced()
    fork.fork_from(parent, slot=1)
    assert replace(fork.progress, repeated_tokens=40) == parent.progress
    assert fork.first_run == parent.first_run
    assert fork.progress.repeated_tokens == 0  # told once, by the parent
    fork.progress.prompt_logprobs.append(TokenLogprob(2, -1.0))
    fork.progress.computed += 1
    assert parent.progress == advanced()


def test_a_reset_forgets_all_progress_but_not_when_it_first_ran() -> None:
    one = sequence()
    one.start(0, None)
    first, one.progress = one.first_run, advanced()
    one.reset()
    assert one.slot == -1 and one.progress == Progress()
    one.start(1, None)
    assert one.first_run == first


def test_a_sequence_starts_where_a_prefix_ends() -> None:
    one, table = sequence(), np.zeros((1, 2, 2), dtype=np.int32)
    one.start(0, Prefix(table, np.array([[3, 4]], dtype=np.int32), table.reshape(-1), 8, evictions=1))
    assert (one.computed, one.progress.evictions, one.progress.evicted_tokens) == (8, 1, 4.5)
    assert one.cached_tokens == 8
    one.reset()
    one.start(0, None)
    assert (one.computed, one.cached_tokens) == (0, 8)
