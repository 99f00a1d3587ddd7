"""Conversations that go on: what their sequences held at the end of an answer, found by those that follow."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from curkv.cache.options import EvictionOptions
from curkv.cache.prefixes import Prefix, PrefixCache, Tokens, common_length

MAX_STATES = 4
"""Ends of answers that a session can go on from, those used last: of two turns, each asked twice."""


@dataclass(frozen=True)
class SessionName:
    """Whose session it is, and what it is called."""

    owner: str
    name: str


@dataclass(frozen=True)
class State:
    """Where a session stood at the end of an answer.

    Attributes:
        tokens: int64, those computed: the prompt, and the answer but for its last token.
        shaped_by: all but the tokens that has decided what is held of them, see `shaped_by`.
    """

    tokens: Tokens
    shaped_by: str


@dataclass(frozen=True)
class SessionStats:
    """A session, as it is told to its owner.

    Attributes:
        id: name of the session.
        policy: name of the eviction policy of its newest answer.
        tokens: tokens of the conversation at the end of it.
        held_tokens: tokens that a head holds of these, mean over layers and heads.
        bytes: bytes of the pages of all its states; one that two states share counts for both.
        states: ends of answers that it can go on from.
        answers: answers so far.
        idle_seconds: since it was last used.
        expires_in_seconds: until it is dropped, if it is not used before.
    """

    id: str
    policy: str
    tokens: int
    held_tokens: float
    bytes: int
    states: int
    answers: int
    idle_seconds: float
    expires_in_seconds: float


@dataclass
class _Session:
    policy: str = ""
    answers: int = 0
    used: float = 0.0
    states: OrderedDict[Hashable, State] = field(default_factory=OrderedDict)


class Sessions:
    """What sessions can go on from; the pages lie in the prefix cache, and give way as its other pages do.

    A state serves a prompt that begins with its tokens, or with as many of them as there were when it was
    last evicted from: what came behind is whole and can be cut off, unless the model's layers have windows.

    Args:
        prefixes: holds the pages; it tells which it has dropped.
        page_size: tokens of a page.
        ttl: seconds after its last use at which a session is dropped.
        whole: a state is gone on from as a whole or not at all.
    """

    def __init__(
        self,
        prefixes: PrefixCache,
        page_size: int,
        ttl: float,
        whole: bool = False,
    ) -> None:
        self._prefixes = prefixes
        self._page_size = page_size
        self._ttl = ttl
        self._whole = whole
        self._sessions: OrderedDict[SessionName, _Session] = OrderedDict()
        self._of: dict[Hashable, SessionName] = {}
        self._serial = itertools.count()
        self.held_pages = 0
        prefixes.dropped = self._forget

    def _clock(self) -> float:
        return self._prefixes.clock()

    def __len__(self) -> int:
        return len(self._sessions)

    def __contains__(self, key: object) -> bool:
        """Whether a key of the prefix cache is that of a state."""
        return key in self._of

    def find(self, name: SessionName, shaped: str, tokens: Sequence[int]) -> Prefix | None:
        """The state that has most of a prompt.

        Args:
            name: the session.
            shaped: as the state was, see `shaped_by`.
            tokens: the prompt as far as it need not be computed.

        Returns:
            A state as it was held, or cut; None if there is none that the prompt can go on from.
        """
        self.expire()
        session = self._sessions.get(name)
        if session is None:
            return None
        wanted = np.asarray(tokens, dtype=np.int64)
        best: Prefix | None = None
        used: Hashable = None
        for key, state in session.states.items():
            prefix, common = self._prefixes.get(key), common_length(state.tokens, wanted)
            whole = common == prefix.tokens
            cuttable = prefix.evicted_at <= common and prefix.observed is None and not self._whole
            if state.shaped_by == shaped and (whole or cuttable) and common >= (best.tokens if best else 1):
                best, used = prefix if whole else prefix.cut(common, self._page_size), key
        if best is not None:
            self._prefixes.find(used)
            session.states.move_to_end(used)
        session.used = self._clock()
        self._sessions.move_to_end(name)
        return best

    def most(self, name: SessionName, shaped: str, tokens: Sequence[int]) -> int:
        """How many tokens of a prompt a state has; any thread may ask, and is told what was true just now."""
        session = self._sessions.get(name)
        states = list(session.states.values()) if session is not None else []
        wanted = np.asarray(tokens, dtype=np.int64)
        lengths = [(common_length(s.tokens, wanted), len(s.tokens)) for s in states if s.shaped_by == shaped]
        return max((common for common, length in lengths if common == length or not self._whole), default=0)

    def key(self) -> Hashable:
        """A key for a state to be held under."""
        return "session", next(self._serial)

    def add(self, name: SessionName, key: Hashable, state: State, policy: str) -> None:
        """Takes note of a state.

        Args:
            name: the session.
            key: under which the prefix cache holds its pages.
            state: what it stands for.
            policy: name of its policy.
        """
        if key not in self._prefixes:
            return
        session = self._sessions.setdefault(name, _Session())
        same = [k for k, s in session.states.items() if s.shaped_by == state.shaped_by
                and np.array_equal(s.tokens, state.tokens)]  # fmt: skip
        session.states[key] = state
        self._of[key] = name
        self.held_pages += len(self._prefixes.get(key).pages)
        session.policy, session.used, session.answers = policy, self._clock(), session.answers + 1
        self._sessions.move_to_end(name)
        for old in [*same, *list(session.states)[:-MAX_STATES]]:
            if old in self._of:
                self._prefixes.remove(old)
        self.expire()

    def expire(self) -> None:
        """Drops the sessions that were not used for too long."""
        while self._sessions:
            name, session = next(iter(self._sessions.items()))
            if session.used + self._ttl > self._clock():
                return
            self.drop(name)

    def drop(self, name: SessionName) -> int | None:
        """Drops a session.

        Returns:
            Pages that went back to the pool; None: there is no such session.
        """
        session = self._sessions.pop(name, None)
        if session is None:
            return None
        return sum(self._prefixes.remove(key) for key in list(session.states))

    def told(self, owner: str, page_bytes: int) -> list[SessionStats]:
        """The sessions of an owner, the one used last first."""
        self.expire()
        return [
            self._stats(name, session, page_bytes)
            for name, session in reversed(self._sessions.items())
            if name.owner == owner
        ]

    def _stats(self, name: SessionName, session: _Session, page_bytes: int) -> SessionStats:
        prefixes = [self._prefixes.get(key) for key in session.states]
        idle = self._clock() - session.used
        return SessionStats(
            id=name.name,
            policy=session.policy,
            tokens=prefixes[-1].tokens,
            held_tokens=round(float(prefixes[-1].lengths.mean()), 3),
            bytes=sum(len(prefix.pages) for prefix in prefixes) * page_bytes,
            states=len(prefixes),
            answers=session.answers,
            idle_seconds=round(idle, 3),
            expires_in_seconds=round(self._ttl - idle, 3),
        )

    def _forget(self, key: Hashable) -> None:
        """Hears that the prefix cache has dropped something."""
        name = self._of.pop(key, None)
        if name is None:
            return
        self.held_pages -= len(self._prefixes.get(key).pages)
        session = self._sessions.get(name)
        if session is not None:
            del session.states[key]
            if not session.states:
                del self._sessions[name]


def shaped_by(options: EvictionOptions, salt: str) -> str:
    """What two requests must have in common for one to go on from what the other holds.

    Spans and the end of a context may move as a conversation grows; where defaults bend is no part either.
    """
    own = dict(sorted(options.own.items()))
    return repr((replace(options, protect=(), context_tokens=None, own=own, bending=frozenset()), salt))
