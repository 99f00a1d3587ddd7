from __future__ import annotations

from benchmarks.gpu.balance import HEADS, PER_PROCESSOR, balance, by_units, mixes

RESIDENT = PER_PROCESSOR * 132


def test_equal_shares_lose_less_than_a_quarter_of_any_mix_of_several_sequences() -> None:
    for name, lengths in mixes():
        work = by_units(lengths, RESIDENT)
        assert sum(work) >= lengths.sum()
        assert len(work) <= RESIDENT
        if lengths.size > HEADS:
            assert balance(lengths, work, RESIDENT) >= 0.75, name
