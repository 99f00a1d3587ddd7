"""Which experts each token runs through on CPU, as a launch that can be recorded."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from curkv.kernels.cpu.memory import INT64, address, array, floats
from curkv.kernels.cpu.workers import compile_worker, empty, launch, read_arguments
from curkv.kernels.route.spec import Routes
from curkv.kernels.silu_mul.cpu import exp


def route(logits: Tensor, chosen: int, normalised: bool) -> Routes:
    """See `reference.route`; contiguous."""
    count, experts = logits.shape
    routes = Routes(
        empty(count * chosen, dtype=torch.int64),
        empty(count, chosen, dtype=torch.int64),
        empty(count, chosen),
        empty(min(experts, count * chosen), 3, dtype=torch.int64),
    )
    begins = empty(experts, dtype=torch.int64)
    places = (tensor.data_ptr() for tensor in (*routes, begins))
    launch(
        _worker(), 1, address(logits, torch.float32), *places,
        count, experts, chosen, len(routes.groups), int(normalised),
    )  # fmt: skip
    return routes


@functools.cache
def _worker() -> int:
    def work(arguments: int, part: int) -> None:
        logits, tokens, places, shares, groups, begins, count, experts, chosen, most, normalised = (
            read_arguments(arguments, 11)
        )
        begin, expert_of = array(INT64, begins, experts), array(INT64, places, count * chosen)
        begin[:] = 0
        for token in range(count):
            row = floats(logits + 4 * token * experts, experts)
            share = floats(shares + 4 * token * chosen, chosen)
            found = array(INT64, places + 8 * token * chosen, chosen)
            last, before = np.float32(np.inf), -1
            for i in range(chosen):
                best = -1
                for expert in range(experts):
                    after = row[expert] < last or (row[expert] == last and expert > before)
                    if after and (best < 0 or row[expert] > row[best]):
                        best = expert
                if best < 0:  # what is left is no number
                    best = i
                found[i], last, before = best, row[best], best
                begin[best] += 1
            total = np.float32(0)
            if normalised:
                for i in range(chosen):
                    total += exp(row[found[i]] - row[found[0]])
            else:
                for expert in range(experts):
                    total += exp(row[expert] - row[found[0]])
            for i in range(chosen):
                share[i] = exp(row[found[i]] - row[found[0]]) / total
        group, sorted_tokens = array(INT64, groups, 3 * most), array(INT64, tokens, count * chosen)
        group[:] = 0
        used, first = 0, 0
        for expert in range(experts):
            size = begin[expert]
            if size > 0:
                group[3 * used], group[3 * used + 1], group[3 * used + 2] = expert, first, size
                used += 1
            begin[expert] = first
            first += size
        for i in range(count * chosen):
            expert = expert_of[i]
            place = begin[expert]
            begin[expert] = place + 1
            sorted_tokens[place], expert_of[i] = i // chosen, place

    return compile_worker(work)
