"""What is asked of a request before it may enter the engine."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from curkv.cache.footprint import footprint
from curkv.cache.options import EvictionOptions, OptionError
from curkv.cache.page_manager import PageManager
from curkv.cache.plan import EvictionPlan, resolve
from curkv.engine.structure import Structures
from curkv.engine.types import CONTEXT_EXCEEDED, InvalidRequest, Planned, Request, SamplingParams, check_ids

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
        sampling, prompt = request.sampling, request.prompt_token_ids
        self._check_length(prompt, sampling.max_tokens)
        for field in ("logit_bias", "stop_token_ids", "allowed_token_ids"):
            check_ids(getattr(sampling, field) or (), self._num_token_ids, field)
        plan = self._resolve(request.eviction, request, bool(request.session))
        explain_plans = tuple(self._resolve(options, request) for options in request.explain)
        behind = max((other.tokens_behind(other.context_tokens) for other in explain_plans), default=0)
        plan = replace(plan, explained_behind=behind)
        max_tokens = self._max_tokens(plan, sampling.max_tokens)
        if sampling.min_tokens > max_tokens:
            raise InvalidRequest(f"is larger than max_tokens ({max_tokens})", "min_tokens")
        return Planned(request, plan, max_tokens, explain_plans, self._matcher(sampling))

    def _resolve(self, options: EvictionOptions, request: Request, session: bool = False) -> EvictionPlan:
        prompt, frame = request.prompt_token_ids, request.frame_tokens
        try:
            plan = resolve(options, prompt, self._kv.layout, session, frame)
        except OptionError as error:
            raise InvalidRequest(error.message, f"kv.{error.field}") from error
        if plan.draft_tokens and footprint(self._kv, plan, 0) > self._kv.num_pages:
            return replace(plan, draft_tokens=0)  # rather than refuse a prompt that has room
        return plan

    def _check_length(self, prompt: Sequence[int], asked: int | None) -> None:
        most = self._max_model_len
        if not prompt:
            raise InvalidRequest("the prompt is empty", "prompt")
        check_ids(prompt, self._num_token_ids, "prompt")
        if asked is None and len(prompt) >= most:
            message = f"{len(prompt)} tokens leave no room in the context of {most} tokens"
            raise InvalidRequest(message, "prompt", CONTEXT_EXCEEDED)
        if asked is not None and len(prompt) + asked > most:
            raise InvalidRequest(
                f"prompt ({len(prompt)} tokens) + max_tokens ({asked}) exceeds the context of {most} tokens",
                "max_tokens" if len(prompt) < most else "prompt",
                CONTEXT_EXCEEDED,
            )

    def _matcher(self, sampling: SamplingParams) -> LLMatcher | None:
        if sampling.structure is None:
            return None
        if sampling.min_tokens:
            raise InvalidRequest("a structured output ends where its structure does", "min_tokens")
        return self._structures.matcher(sampling.structure)

    def _max_tokens(self, plan: EvictionPlan, asked: int | None) -> int:
        """Tokens that may be generated: what was asked for, else all that context and pool have room for."""
        left, pages = self._max_model_len - plan.prompt_tokens, self._kv.num_pages
        generated = max(0, asked - 1) if asked is not None else 0  # the last token is not stored
        needed = footprint(self._kv, plan, generated)
        if needed > pages:
            raise InvalidRequest(
                f"the request needs {needed} pages of KV cache at its peak, of {pages}: shorten it, lower "
                "its budget, choose prefill 'streaming', or start the server with a larger --kv-cache-memory",
                "prompt" if footprint(self._kv, plan, 0) > pages else "max_tokens",
            )
        if asked is not None:
            return asked
        return bisect_left(range(left), True, key=lambda stored: footprint(self._kv, plan, stored) > pages)
