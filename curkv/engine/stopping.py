"""When a token ends its sequence."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from curkv.engine.sequence import Sequence
from curkv.engine.types import FinishReason, InvalidRequest


@dataclass(frozen=True)
class Stop:
    """What a token does to its sequence.

    Attributes:
        text: what it adds.
        reason: why the sequence ends; None: it goes on.
        by: the stop string or token id that ended it, if one did.
        problem: what of the request cannot be followed, if that ended it.
    """

    text: str
    reason: FinishReason | None = None
    by: str | int | None = None
    problem: InvalidRequest | None = None


def stop_after(sequence: Sequence, token: int, eos_ids: Set[int]) -> Stop:
    """Tells what a token does to its sequence, whose output it has been added to.

    Args:
        sequence: the sequence; its detokenizer and matcher take the token.
        token: the newest token of its output.
        eos_ids: ids that end a sequence unless its request says otherwise.
    """
    params, detokenizer, matcher = sequence.request.sampling, sequence.detokenizer, sequence.matcher
    may_stop = len(sequence.output) > params.min_tokens
    if may_stop and token in params.stop_token_ids:
        text = detokenizer.append(token, watch=False)[0] if params.include_stop else ""
        return Stop(text + detokenizer.flush(), "stop", token)
    if may_stop and token in eos_ids and not params.ignore_eos:
        return Stop(detokenizer.flush(), "stop")
    text, found = detokenizer.append(token, watch=may_stop)
    if found is not None:
        return Stop(text, "stop", found)
    if matcher is not None and not (matcher.consume_token(token) and not matcher.is_stopped()):
        problem = _structure_problem(sequence) if matcher.is_error() else None
        return Stop(text + detokenizer.flush(), "error" if problem else "stop", problem=problem)
    if len(sequence.output) >= sequence.max_tokens:
        return Stop(text + detokenizer.flush(), "length")
    return Stop(text)


def _structure_problem(sequence: Sequence) -> InvalidRequest:
    """Why the output of a sequence cannot go on as its structure wants."""
    structure, matcher = sequence.request.sampling.structure, sequence.matcher
    assert structure is not None and matcher is not None
    reason = matcher.get_error().partition("\n")[0]
    return InvalidRequest(f"the output cannot be continued: {reason}", structure.param)
