"""What is asked of a request before it may enter the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from curkv.cache.options import EvictionOptions, OptionError
from curkv.cache.page_manager import PageManager
from curkv.cache.plan import EvictionPlan, resolve
from curkv.engine.structure import Structures
from curkv.engine.types import InvalidRequest, Planned, Request, SamplingParams, check_ids

if TYPE_CHECKING:
    from llguidance import LLMatcher


class Planner:
    """Checks requests and resolves their eviction options; takes nothing.

    Args:
        kv: the cache.
        num_token_ids: token ids are below it.
        structures: makes matchers of structured outputs.
        max_model_len: most tokens of prompt and output together.
    """

    def __init__(self, kv: PageManager, num_token_ids: int, structures: Structures, max_model_len: int):
        self._kv = kv
        self._num_token_ids = num_token_ids
        self._structures = structures
        self._max_model_len = max_model_len

    def plan(self, request: Request) -> Planned:
        """Checks a request and resolves its eviction options. Any thread may call it.

        Raises:
            InvalidRequest: it could never be served as asked.
        """
        sampling, max_tokens = request.sampling, self.max_tokens(request)
        self._check_length(request)
        for field in ("logit_bias", "stop_token_ids"):
            check_ids(getattr(sampling, field), self._num_token_ids, field)
        if sampling.min_tokens > max_tokens:
            raise InvalidRequest(f"is larger than max_tokens ({max_tokens})", "min_tokens")
        plan = self._resolve(request.eviction, request.prompt_token_ids)
        self._check_pool(plan, max_tokens)
        explain_plans = tuple(self._resolve(options, request.prompt_token_ids) for options in request.explain)
        return Planned(request, plan, explain_plans, self._matcher(sampling))

    def _resolve(self, options: EvictionOptions, prompt: Sequence[int]) -> EvictionPlan:
        try:
            return resolve(options, prompt, self._kv.layout)
        except OptionError as error:
            raise InvalidRequest(error.message, f"kv.{error.field}") from error

    def max_tokens(self, request: Request) -> int:
        """Tokens the request may generate: what it asked for, else what the context has left."""
        asked = request.sampling.max_tokens
        return asked if asked is not None else self._max_model_len - len(request.prompt_token_ids)

    def _check_length(self, request: Request) -> None:
        prompt, max_tokens, most = request.prompt_token_ids, self.max_tokens(request), self._max_model_len
        if not prompt:
            raise InvalidRequest("the prompt is empty", "prompt")
        check_ids(prompt, self._num_token_ids, "prompt")
        if request.sampling.max_tokens is None and max_tokens < 1:
            message = f"{len(prompt)} tokens leave no room in the context of {most} tokens"
            raise InvalidRequest(message, "prompt")
        if len(prompt) + max_tokens > most:
            raise InvalidRequest(
                f"prompt ({len(prompt)} tokens) + max_tokens ({max_tokens}) exceeds the context of "
                f"{most} tokens",
                "max_tokens" if len(prompt) < most else "prompt",
            )

    def _matcher(self, sampling: SamplingParams) -> LLMatcher | None:
        if sampling.structure is None:
            return None
        if sampling.min_tokens:
            raise InvalidRequest("a structured output ends where its structure does", "min_tokens")
        return self._structures.matcher(sampling.structure)

    def _check_pool(self, plan: EvictionPlan, max_tokens: int) -> None:
        needed, pages = self._kv.footprint(plan, max(0, max_tokens - 1)), self._kv.num_pages
        if needed > pages:
            raise InvalidRequest(
                f"the request needs {needed} pages of KV cache at its peak, of {pages}: shorten it, lower "
                "its budget, choose prefill 'streaming', or start the server with a larger --kv-cache-memory",
                "prompt" if self._kv.footprint(plan, 0) > pages else "max_tokens",
            )
