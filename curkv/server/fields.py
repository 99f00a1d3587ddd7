"""Fields of requests that are not done: refused if they ask for something, else passed over.

What is done are the fields of the bodies themselves. A field that is neither is refused, so that nothing is
dropped in silence; `reference.py` holds all three against what other servers document.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from curkv.engine.types import InvalidRequest


@dataclass(frozen=True)
class Refused:
    """A field that asks for something that is not done.

    Attributes:
        why: and what to ask for instead.
        unless: values that ask for nothing, beside null.
    """

    why: str
    unless: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Undone:
    """Fields that a body may have beside its own.

    Attributes:
        refused: by name.
        harmless: name to why nothing is lost.
    """

    refused: Mapping[str, Refused] = field(default_factory=dict)
    harmless: Mapping[str, str] = field(default_factory=dict)

    def check(self, given: Mapping[str, Any], done: Mapping[str, Any], prefix: str = "") -> None:
        """Checks the fields of a request that its body does not know.

        Args:
            given: these fields.
            done: the fields that its body knows.
            prefix: what stands before their names in an error.

        Raises:
            InvalidRequest: one asks for something.
        """
        for name, value in given.items():
            if value is None or name in self.harmless:
                continue
            if (refused := self.refused.get(name)) is None:
                near = get_close_matches(name, [*done, *self.refused, *self.harmless], 1)
                hint = f"; is {near[0]!r} meant?" if near else "; docs/api.md lists the fields"
                raise InvalidRequest(f"there is no such field{hint}", f"{prefix}{name:.80}")
            if not any(_is(value, nothing) for nothing in refused.unless):
                raise InvalidRequest(f"not supported: {refused.why}", prefix + name)


def _is(value: Any, nothing: Any) -> bool:
    return bool(value == nothing) and isinstance(value, bool) == isinstance(nothing, bool)


_TEXT = "the models served read text and write text"
_TIERS = "there is one kind of service"
_PLACES = "the server has one engine"
_LABELS = "a note of the client's"
_BILLS = "nothing is billed"
_MEDIA = "it is about media, of which there are none"
_SAMPLER = "this way of sampling is not built"
_BUDGET = "reasoning has no budget of its own; `max_tokens` bounds all"
_ADAPTERS = "the server has no adapters"

GENERATION = Undone(
    refused={
        "audio": Refused(_TEXT),
        "bootstrap_host": Refused("the cache is not handed between servers"),
        "bootstrap_port": Refused("the cache is not handed between servers"),
        "bootstrap_room": Refused("the cache is not handed between servers"),
        "cache_prompt": Refused("a `cache_salt` of its own keeps a request from what is cached", (True,)),
        "chat_template": Refused("requests bring no template; render it, and use /v1/completions"),
        "custom_logit_processor": Refused("requests bring no code"),
        "custom_params": Refused("requests bring no code", ({},)),
        "dry_multiplier": Refused(_SAMPLER, (0,)),
        "dynatemp_range": Refused(_SAMPLER, (0,)),
        "ec_transfer_params": Refused("the cache is not handed between servers", ({},)),
        "echo": Refused("only completions begin with the prompt", (False,)),
        "guided_whitespace_pattern": Refused("use `structured_outputs.disable_any_whitespace`"),
        "include_reasoning": Refused("reasoning is always told apart and answered", (True,)),
        "input_ids": Refused("tokens are continued by /v1/completions"),
        "kv_transfer_params": Refused("the cache is not handed between servers", ({},)),
        "logits_processors": Refused("requests bring no code", ([],)),
        "logprob_token_ids": Refused("`logprobs` reports the likeliest tokens, at most 20"),
        "lora": Refused(_ADAPTERS, ([],)),
        "lora_path": Refused(_ADAPTERS),
        "min_keep": Refused(_SAMPLER, (0,)),
        "mirostat": Refused(_SAMPLER, (0,)),
        "modalities": Refused(_TEXT, (["text"],)),
        "n_cmpl": Refused("use `n`", (1,)),
        "n_indent": Refused("use `regex` or `grammar`", (0,)),
        "n_probs": Refused("use `logprobs`", (0,)),
        "parse_tool_calls": Refused("calls are always read; without `tools` there are none", (True,)),
        "post_sampling_probs": Refused("probabilities are those of the model", (False,)),
        "prompt_embeds": Refused("prompts are texts or tokens"),
        "reasoning": Refused("use `reasoning_effort` or `chat_template_kwargs`", ({},)),
        "reasoning_budget": Refused(_BUDGET, (-1,)),
        "reasoning_format": Refused("reasoning comes as `reasoning_content`", ("auto", "deepseek")),
        "repeat_last_n": Refused("`repetition_penalty` looks at prompt and answer", (-1,)),
        "repetition_detection": Refused("use penalties or `max_tokens`"),
        "response_fields": Refused("answers are always whole", ([],)),
        "return_cached_tokens_details": Refused(
            "`usage.prompt_tokens_details` has the number of cached tokens", (False,)
        ),
        "return_hidden_states": Refused("use /v1/embeddings", (False,)),
        "return_meta_info": Refused("`usage` has what there is", (False,)),
        "return_progress": Refused("a stream begins with the first token", (False,)),
        "return_prompt_text": Refused("use `return_token_ids` and /detokenize", (False,)),
        "return_prompt_token_ids": Refused("use `return_token_ids`", (False,)),
        "return_routed_experts": Refused("not reported", (False,)),
        "return_tokens": Refused("use `return_token_ids`", (False,)),
        "return_tokens_as_token_ids": Refused("use `return_token_ids`", (False,)),
        "samplers": Refused("the order is fixed: min_p, top_k, top_p"),
        "separate_reasoning": Refused("reasoning comes as `reasoning_content`", (True,)),
        "session_params": Refused("conversations are sent whole; what they share is found in the cache"),
        "spaces_between_special_tokens": Refused("tokens are joined as the tokenizer joins them", (True,)),
        "stop_regex": Refused("use `stop`, or `regex` for the whole answer", ([],)),
        "stream_reasoning": Refused("reasoning is streamed as it comes", (True,)),
        "suffix": Refused("the models served continue a text, they do not fill in", ("",)),
        "t_max_predict_ms": Refused("use the header X-Request-Timeout", (0,)),
        "task": Refused("the models served know no such tasks"),
        "thinking_budget_tokens": Refused(_BUDGET, (-1,)),
        "thinking_forced_open": Refused("the chat template begins the reasoning", (False,)),
        "thinking_token_budget": Refused(_BUDGET, (-1,)),
        "timings_per_token": Refused("/metrics has the times", (False,)),
        "truncation_side": Refused("`truncate_prompt_tokens` keeps the last tokens", ("left",)),
        "typical_p": Refused(_SAMPLER, (1,)),
        "use_beam_search": Refused("there is no beam search", (False,)),
        "vllm_xargs": Refused("there are no extensions of vLLM", ({},)),
        "watermarking": Refused("outputs are not marked", (False,)),
        "web_search_options": Refused("the server does not search", ({},)),
        "xtc_probability": Refused(_SAMPLER, (0,)),
    },
    harmless={
        "custom_labels": _LABELS,
        "data_parallel_rank": _PLACES,
        "disagg_prefill_dp_rank": _PLACES,
        "dry_allowed_length": "of a way of sampling that `dry_multiplier` asks for",
        "dry_base": "of a way of sampling that `dry_multiplier` asks for",
        "dry_penalty_last_n": "of a way of sampling that `dry_multiplier` asks for",
        "dry_sequence_breakers": "of a way of sampling that `dry_multiplier` asks for",
        "dynatemp_exponent": "of a way of sampling that `dynatemp_range` asks for",
        "extra_key": _LABELS,
        "guided_decoding_backend": "there is one backend",
        "id_slot": "any slot gives the same answer",
        "images_config": _MEDIA,
        "length_penalty": "it is about beam search, which is refused",
        "max_dynamic_patch": _MEDIA,
        "media_io_kwargs": _MEDIA,
        "metadata": _LABELS,
        "min_dynamic_patch": _MEDIA,
        "mirostat_eta": "of a way of sampling that `mirostat` asks for",
        "mirostat_tau": "of a way of sampling that `mirostat` asks for",
        "mm_processor_kwargs": _MEDIA,
        "n_cache_reuse": "what is cached is found",
        "n_keep": "what does not fit is refused, not cut",
        "ngram_corpus_id": "it is about speed alone",
        "prediction": "it is about speed alone",
        "prompt_cache_key": "what is cached is found",
        "prompt_cache_retention": "what is cached stays as long as there is room",
        "request_id": "the header X-Request-Id names a request",
        "return_mm_kwargs": _MEDIA,
        "return_token_offsets": "vLLM has it for other endpoints alone",
        "rid": "the header X-Request-Id names a request",
        "routed_dp_rank": _PLACES,
        "routed_experts_prompt_start": "of a report that `return_routed_experts` asks for",
        "routed_experts_start_len": "of a report that `return_routed_experts` asks for",
        "safety_identifier": _LABELS,
        "service_tier": _TIERS,
        "session_id": "what is cached is found",
        "sse_ping_interval": "streams have no pings",
        "store": "nothing is kept; /v1/responses keeps conversations",
        "stream_interval": "each token is sent when it is there",
        "use_audio_in_video": _MEDIA,
        "verbosity": "a wish to models that were trained for it",
        "xtc_threshold": "of a way of sampling that `xtc_probability` asks for",
    },
)
"""Of /v1/chat/completions and /v1/completions."""

EMBEDDINGS = Undone(
    refused={
        "add_special_tokens": Refused("texts get the tokens that the tokenizer begins one with", (True,)),
        "dimensions": Refused("vectors come whole: a part of one means nothing in models not trained for it"),
        "input_type": Refused("texts are read as they are"),
        "kv": Refused("texts are read with the whole cache", ({},)),
        "messages": Refused("use `input`"),
        "pooling": Refused("the mean over all tokens", ("mean",)),
        "normalize": Refused("vectors have length 1", (True,)),
    },
    harmless={"user": _LABELS, "keep_alive": "the model stays", "request_id": "X-Request-Id names a request"},
)
"""Of /v1/embeddings, and of Ollama's /api/embed and /api/embeddings."""

MESSAGES = Undone(
    refused={
        "compaction": Refused("nothing is summarized; evict by `kv`"),
        "container": Refused("the server runs no code"),
        "context_management": Refused("conversations are sent as they are to be read; evict by `kv`", ({},)),
        "fallbacks": Refused("one model is served", ([], "default")),
        "mcp_servers": Refused("the server calls no tools itself", ([],)),
        "speed": Refused(_TIERS, ("standard",)),
        "thread": Refused("conversations are sent whole; what they share is found in the cache"),
    },
    harmless={
        "anthropic_beta": "headers of the client's",
        "anthropic_version": "headers of the client's",
        "betas": "headers of the client's",
        "billing_policy": _BILLS,
        "diagnostics": "`usage.cache_read_input_tokens` says what was found in the cache",
        "fallback_credit_token": _BILLS,
        "inference_geo": _TIERS,
        "metadata": _LABELS,
        "service_tier": _TIERS,
        "user_profile_id": _LABELS,
        "workspace_id": _LABELS,
    },
)
"""Of /v1/messages."""

RESPONSES = Undone(
    refused={
        "access_programs": Refused("there are none"),
        "background": Refused("a response runs as long as its connection", (False,)),
        "context_management": Refused("evict by `kv`", ([],)),
        "conversation": Refused("use `previous_response_id`"),
        "max_tool_calls": Refused("it is about tools that the server would call; use `parallel_tool_calls`"),
        "moderation": Refused("nothing is moderated"),
        "prompt": Refused("there are no stored prompts"),
    },
    harmless={
        "background_options": "of a way of running that `background` asks for",
        "client_metadata": _LABELS,
        "image": _MEDIA,
        "prompt_cache_key": "what is cached is found",
        "prompt_cache_options": "what is cached is found",
        "prompt_cache_retention": "what is cached stays as long as there is room",
        "safety_identifier": _LABELS,
        "service_tier": _TIERS,
        "user": _LABELS,
    },
)
"""Of /v1/responses."""

OLLAMA = Undone(
    refused={
        "context": Refused("send the conversation to /api/chat", ([],)),
        "height": Refused(_TEXT, (0,)),
        "steps": Refused(_TEXT, (0,)),
        "template": Refused("a request does not bring its own template; use `raw`", ("",)),
        "shift": Refused("what does not fit is refused, not cut", (False, True)),
        "truncate": Refused("what does not fit is refused, not cut", (False, True)),
        "width": Refused(_TEXT, (0,)),
    },
    harmless={"keep_alive": "the model stays"},
)
"""Of /api/chat and /api/generate."""

OLLAMA_OPTIONS = Undone(
    refused={
        "embedding_only": Refused("use /api/embed", (False,)),
        "logits_all": Refused("use `logprobs`", (False,)),
        "mirostat": Refused(_SAMPLER, (0,)),
        "repeat_last_n": Refused("`repeat_penalty` looks at prompt and answer", (-1,)),
        "tfs_z": Refused(_SAMPLER, (1,)),
        "typical_p": Refused(_SAMPLER, (1,)),
        "penalize_newline": Refused("use `repeat_penalty`, which looks at all tokens", (True,)),
    },
    harmless={
        "draft_num_predict": "it is about speed alone",
        "f16_kv": "`--kv-dtype` is the server's",
        "low_vram": "memory is the server's",
        "main_gpu": _PLACES,
        "mirostat_eta": "of a way of sampling that `mirostat` asks for",
        "mirostat_tau": "of a way of sampling that `mirostat` asks for",
        "num_batch": "it is about speed alone",
        "num_ctx": "the context is as long as the server's",
        "num_gpu": _PLACES,
        "num_keep": "what does not fit is refused, not cut",
        "num_thread": "it is about speed alone",
        "numa": "it is about speed alone",
        "use_mlock": "memory is the server's",
        "use_mmap": "memory is the server's",
        "vocab_only": "memory is the server's",
    },
)
"""Of `options` in Ollama's bodies."""
