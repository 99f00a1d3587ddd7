"""Has the model repeat a text, to see what it looks at (KVzip)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from curkv.cache.observations import Needs
from curkv.cache.page_manager import Mark
from curkv.cache.plan import INSTRUCTION_TOKENS, REPEATED_TOKENS
from curkv.engine.runner import Runner

if TYPE_CHECKING:
    from curkv.models.info import ModelInfo

_FIRST = "\n\nRepeat the previous context exactly."
_NEXT = "\n\nRepeat the part of the previous context exactly, starting with:"
_MARK = "\ue000"
"""A private-use character that stands for the text while a conversation is written out."""

_LEAD = 8
"""Tokens before a part that say where it starts."""

_STEP = 512
"""Tokens that a step computes, as a chunk of a prompt has; the queries of so many are held."""


def _instruction(text: str, info: ModelInfo) -> list[int]:
    """Tokens of an instruction behind a text, and of how the model's answer begins if it is one for chat."""
    template, message = info.chat_template, {"role": "user", "content": _MARK + text}
    said = text + "\n\n"
    if template is not None:
        with contextlib.suppress(ValueError):  # a template that takes no such conversation
            said = template.render([message], {}).partition(_MARK)[2]
    ids: list[int] = info.tokenizer.encode(said, add_special_tokens=False).ids
    return ids


class Repetition:
    """A text that is repeated behind itself, a piece in each step, and forgotten again.

    As in KVzip (https://arxiv.org/abs/2505.23416, section 3.2) it is repeated in parts of 2,048 tokens, or as
    many as the model's context has room for, each after the whole text and an instruction. Of a text that was
    evicted from before, what has followed since is repeated.

    The score of a token is the most attention that any token of instructions and repetitions has paid it,
    over the group of query heads too: float32 [L, H, n], -inf if there was no room to repeat anything. Each
    softmax runs over everything up to its query.
    """

    def __init__(
        self,
        tokens: Sequence[int],
        info: ModelInfo,
        room: int = REPEATED_TOKENS + INSTRUCTION_TOKENS,
        evicted_at: int = 0,
        before: Tensor | None = None,
    ) -> None:
        """Takes a text, of which some may be gone.

        Args:
            tokens: its tokens.
            info: tells the instructions' tokens.
            room: tokens that can stand behind it.
            evicted_at: how many there were when it was last evicted from.
            before: what those that were kept then had been paid, float32 [L, H, m], -inf past a head's.
        """
        self._start = len(tokens)
        first, following = (_instruction(text, info) for text in (_FIRST, _NEXT))
        self._parts: list[list[int]] = []
        most = min(REPEATED_TOKENS, room - INSTRUCTION_TOKENS)
        for start in range(evicted_at, len(tokens), most) if most > 0 else ():
            lead = [*following, *tokens[max(0, start - _LEAD) : start]] if start else first
            lead = lead[:INSTRUCTION_TOKENS]
            self._parts.append([*lead, *tokens[start : start + most]])
        self._said = 0
        self._mark: Mark | None = None
        self._before = before
        self._scores: Tensor | None = None

    @property
    def scores(self) -> Tensor:
        """The scores, once all is repeated."""
        assert self.done and self._scores is not None
        return self._scores

    @property
    def done(self) -> bool:
        """Whether all is repeated, and the sequence holds what it held before."""
        return self._scores is not None and not self._parts

    def advance(self, runner: Runner, slot: int, most: int = _STEP) -> int:
        """Computes the next piece.

        Args:
            runner: Computes tokens.
            slot: The sequence that holds what is left of the text, and nothing else.
            most: Tokens of the piece, if there are so many.

        Returns:
            How many they were.

        Raises:
            OutOfPages: There is no room for it; the sequence is to be given up.
        """
        kv = runner.kv
        if not self._parts:
            view = runner.attention.view(slot)
            self._take(view.keys(0).new_full((*view.lengths.shape, view.width), -torch.inf))
            return 0
        part = self._parts[0]
        if self._mark is None:
            self._mark = kv.mark([slot])
            kv.observe(slot, Needs(chunk=True))
        size, left = max(2, min(most, _STEP)), len(part) - self._said
        size = -(-left // -(-left // size))  # alike: few queries would take kernels of their own
        if left - size == 1:  # which would be a decode
            size = left
        piece = part[self._said : self._said + size]
        runner.run([slot], [piece], [self._start + self._said])
        self._said += len(piece)
        view = runner.attention.view(slot)
        (table, lengths), (queries, lse) = view.rows, view.chunk()
        paid = kv.kernels.window_scores(
            queries, view.pages, table, lengths - self._said, view.scale, "max", lse,
            width=view.width - self._said, softcap=view.softcap,
        )  # fmt: skip
        self._take(paid.view(*view.lengths.shape, -1))
        if self._said == len(part):
            kv.retract(self._mark)
            self._parts, self._said, self._mark = self._parts[1:], 0, None
        return len(piece)

    def _take(self, paid: Tensor) -> None:
        """Takes note of what each stored token was paid, [L, H, n], -inf past a head's."""
        before = self._before if self._scores is None else self._scores
        if before is not None:
            missing = paid.shape[2] - before.shape[2]
            paid = torch.maximum(F.pad(before, (0, missing), value=-torch.inf), paid)
        self._scores = paid
