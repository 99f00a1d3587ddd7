"""Choosing the next token of every sequence of a step at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curkv.cache.upload import upload, upload_list
from curkv.engine.sequence import Sequence
from curkv.engine.structure import rule_out
from curkv.engine.types import SamplingParams, TokenLogprob

GREEDY_BELOW = 1e-5
"""A lower temperature is 0, as in vLLM: quotients of logits would leave the range of float32."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Sampled:
    """Tokens chosen for the rows of a step."""

    token_ids: list[int]
    logprobs: list[TokenLogprob | None]


def sample(logits: Tensor, sequences: list[Sequence], stop_ids: frozenset[int]) -> Sampled:
    """Chooses one token per row.

    As in vLLM: penalties, logit bias, suppressed stop tokens, structure, temperature, min_p, top_k, top_p.
    A row's random number depends only on the choice's seed and the token's index, so that a preempted
    sequence and a sequence batched differently draw the same tokens.

    Args:
        logits: float32 [R, vocab], on any device, where all that is as wide as the vocabulary happens;
            modified.
        sequences: the R sequences that the rows belong to.
        stop_ids: end-of-sequence ids of the model, which `min_tokens` holds back.
    """
    params = [sequence.request.sampling for sequence in sequences]
    if all(_takes_the_best(p) for p in params):
        return Sampled(logits.argmax(dim=-1).tolist(), [None] * len(params))
    wanted = [i for i, p in enumerate(params) if p.logprobs is not None]
    raw = logits[upload_list(wanted, logits.device)] if wanted else logits
    for row, sequence in zip(logits, sequences, strict=True):
        _adjust(row, sequence, stop_ids)
    rule_out(logits, [sequence.matcher for sequence in sequences])
    tokens = logits.argmax(dim=-1)
    drawn = [i for i, p in enumerate(params) if p.temperature >= GREEDY_BELOW]
    if drawn:
        rows = upload_list(drawn, logits.device)
        tokens[rows] = _draw(logits[rows], [sequences[i] for i in drawn])
    ids: list[int] = tokens.tolist()
    logprobs: list[TokenLogprob | None] = [None] * len(ids)
    for count in {params[i].logprobs or 0 for i in wanted}:
        alike = [row for row, i in enumerate(wanted) if (params[i].logprobs or 0) == count]
        rows = raw if len(alike) == len(raw) else raw[upload_list(alike, raw.device)]
        chosen = [wanted[row] for row in alike]
        for i, found in zip(chosen, token_logprobs(rows, [ids[i] for i in chosen], count), strict=True):
            logprobs[i] = found
    return Sampled(ids, logprobs)


def _takes_the_best(p: SamplingParams) -> bool:
    """Whether the token is simply the one with the highest logit."""
    adjusted = p.repetition_penalty != 1.0 or p.presence_penalty or p.frequency_penalty or p.logit_bias
    free = p.structure is None and not p.min_tokens and not p.bad_words and p.allowed_token_ids is None
    return p.temperature < GREEDY_BELOW and not adjusted and free and p.logprobs is None


def uniform(seeds: list[int], counters: list[int]) -> NDArray[np.float64]:
    """Random numbers in [0, 1), one per (seed, counter): splitmix64 of both (Steele et al., OOPSLA 2014)."""
    state = np.array(seeds, dtype=np.uint64) + _GOLDEN * np.array(counters, dtype=np.uint64)
    mixed = _mix(_mix(state) + _GOLDEN)
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def choice_seed(seed: int, index: int) -> int:
    """Seed of choice `index` of a request whose seed is `seed`."""
    state = np.array([seed & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64) ^ _mix(np.array([index], dtype=np.uint64))
    return int(_mix(state)[0])


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _adjust(row: Tensor, sequence: Sequence, stop_ids: frozenset[int]) -> None:
    """Applies penalties, bias, bad words, allowed tokens and min_tokens to one row of logits, in place."""
    p = sequence.request.sampling
    if p.repetition_penalty != 1.0:
        seen = upload_list(sorted({*sequence.prompt, *sequence.output}), row.device)
        values = row[seen]
        row[seen] = torch.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
    if (p.presence_penalty or p.frequency_penalty) and sequence.output:
        ids, counts = (torch.from_numpy(x) for x in np.unique(sequence.output, return_counts=True))
        penalties = p.presence_penalty + p.frequency_penalty * counts
        row[upload(ids, row.device)] -= upload(penalties, row.device)
    if p.logit_bias:
        biased = upload_list(p.logit_bias, row.device)
        row[biased] += upload_list(p.logit_bias.values(), row.device, row.dtype)
    for word in p.bad_words:
        *begin, last = word
        if sequence.output[len(sequence.output) - len(begin) :] == begin:
            row[last] = -torch.inf
    if p.allowed_token_ids is not None:
        allowed = upload_list(p.allowed_token_ids, row.device)
        kept = row[allowed]
        row.fill_(-torch.inf)
        row[allowed] = kept
    if len(sequence.output) < p.min_tokens:
        stops = sorted({*stop_ids, *p.stop_token_ids})
        row[upload_list(stops, row.device)] = -torch.inf


def _draw(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    """Draws from the softmax of each row after temperature and truncation, by the inverse of its CDF."""
    params = [sequence.request.sampling for sequence in sequences]
    logits = logits / upload_list((p.temperature for p in params), logits.device, torch.float32)[:, None]
    for row, p in zip(logits, params, strict=True):
        _truncate(row, p)
    cdf = torch.softmax(logits, dim=-1, dtype=torch.float64).cumsum(dim=-1)
    u = uniform([s.seed for s in sequences], [len(s.output) for s in sequences])
    targets = upload(torch.from_numpy(u), cdf.device)[:, None] * cdf[:, -1:]
    return torch.searchsorted(cdf, targets, right=True).squeeze(1).clamp_(max=logits.shape[1] - 1)


def _truncate(row: Tensor, p: SamplingParams) -> None:
    """Sets logits outside min_p, top_k and top_p to -inf, in place."""
    if p.min_p > 0:
        row.masked_fill_(row < row.max() + float(np.log(p.min_p)), -torch.inf)
    if 0 < p.top_k < row.numel():
        row.masked_fill_(row < row.topk(p.top_k).values[-1], -torch.inf)
    if p.top_p < 1:
        probabilities, order = torch.softmax(row, dim=-1).sort(descending=True, stable=True)
        before = probabilities.cumsum(dim=-1) - probabilities
        row[order] = row[order].masked_fill(before >= p.top_p, -torch.inf)


def token_logprobs(logits: Tensor, token_ids: list[int], count: int) -> list[TokenLogprob]:
    """Log-probabilities of given tokens, and of the likeliest ones.

    Args:
        logits: float32 [R, vocab], as the model gave them.
        token_ids: [R].
        count: how many of the likeliest to report.
    """
    logprobs = logits.log_softmax(dim=-1)  # a row is one thread's; logsumexp divides one that is alone
    ids = upload_list(token_ids, logits.device)[:, None]
    top = logits.topk(count, dim=-1)
    told = logprobs.gather(1, torch.cat([ids, top.indices], 1)).tolist()
    return [
        TokenLogprob(token, own, list(zip(others, values, strict=True)))
        for token, (own, *values), others in zip(token_ids, told, top.indices.tolist(), strict=True)
    ]
