"""What other servers document of their requests' bodies, and what becomes of each field here."""

from __future__ import annotations

import json
from collections.abc import Iterator

from pydantic import BaseModel

from curkv.server.chat.protocol import ChatRequest
from curkv.server.completions.protocol import CompletionRequest
from curkv.server.fields import GENERATION

_OPENAI = """
    audio best_of echo frequency_penalty function_call functions logit_bias logprobs max_completion_tokens
    max_tokens messages metadata modalities model n parallel_tool_calls prediction presence_penalty prompt
    prompt_cache_key prompt_cache_retention reasoning_effort response_format safety_identifier seed
    service_tier stop store stream stream_options suffix temperature tool_choice tools top_logprobs top_p
    user verbosity web_search_options
"""
_VLLM = """
    add_generation_prompt add_special_tokens allowed_token_ids bad_words cache_salt chat_template
    chat_template_kwargs continue_final_message documents ec_transfer_params echo frequency_penalty
    guided_choice guided_decoding_backend guided_grammar guided_json guided_regex
    guided_whitespace_pattern ignore_eos include_reasoning include_stop_str_in_output kv_transfer_params
    length_penalty logit_bias logits_processors logprob_token_ids logprobs max_completion_tokens
    max_tokens media_io_kwargs messages min_p min_tokens mm_processor_kwargs model n parallel_tool_calls
    presence_penalty priority prompt prompt_embeds prompt_logprobs reasoning_effort repetition_detection
    repetition_penalty request_id response_format return_mm_kwargs return_prompt_text return_token_ids
    return_token_offsets return_tokens_as_token_ids routed_experts_prompt_start seed session_id
    skip_special_tokens spaces_between_special_tokens stop stop_token_ids stream stream_interval
    stream_options structured_outputs suffix temperature thinking_token_budget tool_choice tools top_k
    top_logprobs top_p truncate_prompt_tokens truncation_side use_beam_search user vllm_xargs watermarking
"""
_SGLANG = """
    best_of bootstrap_host bootstrap_port bootstrap_room cache_salt chat_template_kwargs
    continue_final_message custom_labels custom_logit_processor custom_params data_parallel_rank
    disagg_prefill_dp_rank ebnf echo extra_key frequency_penalty ignore_eos images_config input_ids
    json_schema logit_bias logprobs lora_path max_completion_tokens max_dynamic_patch max_tokens messages
    min_dynamic_patch min_p min_tokens model n ngram_corpus_id no_stop_trim parallel_tool_calls
    presence_penalty priority prompt reasoning reasoning_effort regex repetition_penalty response_format
    return_cached_tokens_details return_hidden_states return_meta_info return_prompt_token_ids
    return_routed_experts return_token_ids rid routed_dp_rank routed_experts_start_len seed
    separate_reasoning session_id session_params skip_special_tokens stop stop_regex stop_token_ids stream
    stream_options stream_reasoning suffix task temperature tool_choice tools top_k top_logprobs top_p
    use_audio_in_video user
"""
_LLAMA_CPP = """
    add_generation_prompt cache_prompt chat_template_kwargs dry_allowed_length dry_base dry_multiplier
    dry_penalty_last_n dry_sequence_breakers dynatemp_exponent dynatemp_range frequency_penalty grammar
    id_slot ignore_eos json_schema logit_bias lora max_tokens messages min_keep min_p mirostat
    mirostat_eta mirostat_tau model n n_cache_reuse n_cmpl n_indent n_keep n_predict n_probs
    parallel_tool_calls parse_tool_calls post_sampling_probs presence_penalty prompt reasoning_budget
    reasoning_format repeat_last_n repeat_penalty response_fields response_format return_progress
    return_tokens samplers seed sse_ping_interval stop stream stream_options t_max_predict_ms temperature
    thinking_budget_tokens thinking_forced_open timings_per_token tool_choice tools top_k top_p typical_p
    xtc_probability xtc_threshold
"""

DOCUMENTED = {
    "OpenAI": frozenset(_OPENAI.split()),
    "vLLM": frozenset(_VLLM.split()),
    "SGLang": frozenset(_SGLANG.split()),
    "llama.cpp": frozenset(_LLAMA_CPP.split()),
}
"""Fields of the bodies of chat completions and completions, by server."""

_BODIES: dict[str, type[BaseModel]] = {"chat": ChatRequest, "completions": CompletionRequest}


def done(name: str) -> list[str]:
    """Which of the two bodies have a field."""
    return [endpoint for endpoint, body in _BODIES.items() if name in body.model_fields]


def table() -> Iterator[str]:
    """Every field that is documented somewhere or known here, as the lines of a Markdown table."""
    known = frozenset().union(*(body.model_fields for body in _BODIES.values()))
    named = frozenset().union(*DOCUMENTED.values())
    yield "| field | of | |"
    yield "|---|---|---|"
    for name in sorted(known | named | GENERATION.refused.keys() | GENERATION.harmless.keys()):
        servers = [server for server, fields in DOCUMENTED.items() if name in fields] or ["curkv"]
        yield f"| `{name}` | {', '.join(servers)} | {_fate(name)} |"


def _fate(name: str) -> str:
    endpoints = done(name)
    if endpoints:
        told = next(text for body in _BODIES.values() if (text := _description(body, name)) is not None)
        only = f" in {endpoints[0]}" if len(endpoints) < len(_BODIES) else ""
        return f"done{only}{f': {told}' if told else ''}"
    if (refused := GENERATION.refused.get(name)) is not None:
        unless = " or ".join(f"`{json.dumps(value)}`" for value in refused.unless)
        return f"refused{f' unless {unless}' if unless else ''}: {refused.why}"
    return f"passed over: {GENERATION.harmless[name]}"


def _description(body: type[BaseModel], name: str) -> str | None:
    """What a field does, if the body has it."""
    field = body.model_fields.get(name)
    return None if field is None else field.description or ""
