"""An engine client that follows a script, and a server around it, to test the protocol."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import uvicorn
from tokenizers import Tokenizer, models, pre_tokenizers

from curkv.cache.explain import Explanation
from curkv.cache.layout import CacheLayout, full_attention
from curkv.cache.options import OptionError
from curkv.cache.plan import EvictionPlan, resolve
from curkv.cache.sessions import SessionStats
from curkv.config import Settings
from curkv.engine.client import EngineUnavailable
from curkv.engine.stats import StatsSink, StepStats
from curkv.engine.types import (
    InvalidRequest,
    KVReport,
    Output,
    Planned,
    Request,
    Structure,
    TokenLogprob,
    check_ids,
)
from curkv.kernels.formats import get_format
from curkv.models.chat_template import ChatTemplate
from curkv.models.tools.hermes import Hermes
from curkv.models.vocabulary import Vocabulary
from curkv.server.app import create_app

VOCABULARY = 1000
MAX_MODEL_LEN = 256


def word_tokenizer() -> Tokenizer:
    """Words `w0` to `w999`, one token each."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


class NoStructures:
    """Takes every structure for compiled."""

    @staticmethod
    def key(structure: Structure) -> tuple[str, str]:
        return structure.kind, str(structure.source)

    def holds(self, structure: Structure) -> bool:
        return True


class WordTemplate:
    """Writes `w4` for each tool, `w1` before a user's text, `w2` before the rest, `w3` for the answer."""

    source = "words"
    special_tokens: ClassVar[dict[str, str]] = {"bos_token": "w0"}
    tool_format = Hermes()
    thinks = False
    frame = ChatTemplate.frame

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any],
        tools: Sequence[Mapping[str, Any]] = (),
        documents: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
    ) -> str:
        if "refuse" in variables:
            raise ValueError("the template refuses")
        turns = (
            ("w1" if m["role"] == "user" else "w2", m["content"].strip(), m.get("name", "")) for m in messages
        )
        answer = ("w3" if add_generation_prompt else "", variables.get("extra", ""))
        told = ("w4",) * len(tools)
        return " ".join(word for turn in (told, *turns, answer) for word in turn if word)


@dataclass
class ScriptedClient:
    """Answers every choice with `w1 w2 w3 ...`, one token per output.

    Attributes:
        delay: seconds between tokens.
        fail_after: tokens after which `failure` happens.
        failure: raised, or reported as a finish reason if it is text.
        waits: whether requests that begin stay in the queue.
        taken, closed: ids of requests that began, and that ended one way or another.
    """

    delay: float = 0.0
    fail_after: int | None = None
    failure: Exception | str = "error"
    state: str = "ready"
    taken: list[Request] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    sinks: list[StatsSink] = field(default_factory=list)
    tokenizer: Tokenizer = field(default_factory=word_tokenizer)
    chat_template: WordTemplate | None = field(default_factory=WordTemplate)
    max_model_len: int = MAX_MODEL_LEN
    max_kv_tokens: int = MAX_MODEL_LEN
    die: Callable[[], object] = lambda: None
    waits: bool = False

    @property
    def num_token_ids(self) -> int:
        return VOCABULARY

    def on_death(self, act: Callable[[], object]) -> None:
        self.die = act

    @property
    def healthy(self) -> bool:
        return self.state == "ready"

    @property
    def pruning(self) -> dict[str, Any]:
        base = {"name": "more-words", "sha256": "0", "pruning": None}
        return {"method": "self-calibrated", "removed": 0.25, "base": base, "details": {}}

    @property
    def model_config(self) -> SimpleNamespace:
        return SimpleNamespace(architecture="WordsForCausalLM")

    @property
    def weights(self) -> str:
        return "int8"

    @property
    def weights_bytes(self) -> dict[str, int]:
        return {"mlp": 300, "head": 100}

    @property
    def cache_layout(self) -> CacheLayout:
        return CacheLayout(full_attention(2, 3), 8, 16, get_format("float16"), 4, self.max_model_len)

    @property
    def stats(self) -> StepStats:
        return StepStats(0, 0, 0, 100, 0, 1 << 20)

    def add_sink(self, sink: StatsSink) -> None:
        self.sinks.append(sink)

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.tokenizer)

    @property
    def structures(self) -> NoStructures:
        return NoStructures()

    def plan(self, request: Request) -> Planned:
        ids = request.prompt_token_ids
        if not ids:
            raise InvalidRequest("the prompt is empty", "prompt")
        check_ids(ids, VOCABULARY, "prompt")
        if len(ids) + (request.sampling.max_tokens or 1) > self.max_model_len:
            raise InvalidRequest("prompt + max_tokens exceeds the context", "max_tokens")
        try:
            asked = request.sampling.max_tokens
            most = asked if asked is not None else self.max_model_len - len(ids)
            return Planned(request, resolve(request.eviction, ids, self.cache_layout), most)
        except OptionError as error:
            raise InvalidRequest(error.message, f"kv.{error.field}") from error

    async def generate(
        self, planned: Planned, started: Callable[[], None] = lambda: None
    ) -> AsyncGenerator[Output, None]:
        if not self.healthy:
            raise EngineUnavailable(f"the engine is {self.state}")
        request, plan = planned.request, planned.eviction
        self.taken.append(request)
        try:
            while self.waits:
                await asyncio.sleep(0.01)
            started()
            if request.sampling.max_tokens == 0:
                yield self._output_without_tokens(request)
                return
            for token in range(1, (request.sampling.max_tokens or 8) + 1):
                if self.delay:
                    await asyncio.sleep(self.delay)
                for index in range(request.sampling.n):
                    yield self._output(request, plan, index, token)
        finally:
            self.closed.append(request.id)

    def _output(self, request: Request, plan: EvictionPlan, index: int, token: int) -> Output:
        if self.fail_after is not None and token > self.fail_after:
            if isinstance(self.failure, Exception):
                raise self.failure
            return Output(request.id, index, "", [], finish_reason=self.failure)
        last = token == (request.sampling.max_tokens or 8)
        kept = plan.budget_tokens
        report = KVReport(
            plan.policy.name, kept, kept, plan.prompt_tokens - kept, kept / plan.prompt_tokens, 1000, 2000, 1
        )
        logprob = TokenLogprob(token, -0.5, [(token, -0.5), (token + 1, -1.5)][: request.sampling.logprobs])
        return Output(
            request_id=request.id,
            index=index,
            text=f" w{token}",
            token_ids=[token],
            logprobs=None if request.sampling.logprobs is None else [logprob],
            prompt_logprobs=self._prompt_logprobs(request) if token == 1 else None,
            finish_reason="length" if last else None,
            cached_tokens=min(16, plan.prompt_tokens - 1),
            kv=report if last else None,
        )

    def _prompt_logprobs(self, request: Request) -> list[TokenLogprob] | None:
        if request.sampling.prompt_logprobs is None:
            return None
        return [TokenLogprob(i, -2.0, [(9, -0.1)]) for i in request.prompt_token_ids[1:]]

    def _output_without_tokens(self, request: Request) -> Output:
        shape = (2, 3, len(request.prompt_token_ids))
        kept = np.zeros(shape, dtype=bool)
        kept[..., :2] = kept[0, 0, -1] = True
        explanations = [
            Explanation(options.policy, 2, kept, np.full(shape, 7, np.uint8), np.full((2, 3), 0.5), 900, 300)
            for options in request.explain
        ]
        return Output(
            request_id=request.id,
            index=0,
            text="",
            token_ids=[],
            prompt_logprobs=self._prompt_logprobs(request),
            explanations=explanations,
            embedding=[3.0, 6.0] if request.sampling.embed else None,
            finish_reason="length",
        )

    async def sessions(self, owner: str) -> list[SessionStats]:
        """One for each of an owner's requests that named one."""
        named = {r.session: r for r in self.taken if r.session and r.owner == owner}
        return [
            SessionStats(name, r.eviction.policy, 9, 4.0, 4096, 1, 1, 2.0, 98.0) for name, r in named.items()
        ]

    async def drop_session(self, owner: str, name: str, tenant: str = "") -> int | None:
        return 4096 if name in [session.id for session in await self.sessions(owner)] else None

    async def drop_prefixes(self, tenant: str = "") -> int:
        return 4096

    async def drain(self, timeout: float) -> bool:
        self.state = "draining"
        for _ in range(int(timeout / 0.02)):
            if len(self.closed) == len(self.taken):
                return True
            await asyncio.sleep(0.02)
        return False

    def stop(self) -> None:
        self.state = "stopped"
        self.fail_after, self.failure = 0, EngineUnavailable("the engine is stopped")


@contextmanager
def running(client: ScriptedClient | None, settings: Settings) -> Iterator[str]:
    """A server on a free port; gives its URL."""
    config = uvicorn.Config(create_app(client, settings), port=0, log_config=None, lifespan="on")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Waits for something that another thread brings about."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)
