"""What other servers document of their requests' bodies, and what becomes of each field here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from pydantic import BaseModel

from curkv.server.chat.protocol import ChatRequest
from curkv.server.completions.protocol import CompletionRequest
from curkv.server.embeddings.protocol import EmbeddingRequest
from curkv.server.fields import EMBEDDINGS, GENERATION, MESSAGES, OLLAMA, OLLAMA_OPTIONS, RESPONSES, Undone
from curkv.server.messages.protocol import CountRequest, MessagesRequest
from curkv.server.ollama.protocol import (
    EmbedRequest,
    GenerateRequest,
    OlderEmbedRequest,
    OllamaChatRequest,
    OllamaOptions,
)
from curkv.server.responses.protocol import ResponsesRequest

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

_RESPONSES = """
    access_programs background background_options context_management conversation image include input
    instructions max_output_tokens max_tool_calls metadata model moderation parallel_tool_calls
    previous_response_id prompt prompt_cache_key prompt_cache_options prompt_cache_retention reasoning
    safety_identifier service_tier store stream stream_options temperature text tool_choice tools
    top_logprobs top_p truncation user
"""
_MESSAGES = """
    betas billing_policy cache_control compaction container context_management diagnostics
    fallback_credit_token fallbacks inference_geo max_tokens mcp_servers messages metadata model
    output_config output_format service_tier speed stop_sequences stream system temperature thinking thread
    tool_choice tools top_k top_p user_profile_id workspace_id
"""
_OLLAMA = """
    context format height images keep_alive logprobs messages model options prompt raw shift steps stream
    suffix system template think tools top_logprobs truncate width
"""
_OLLAMA_OPTIONS = """
    draft_num_predict embedding_only f16_kv frequency_penalty logits_all low_vram main_gpu min_p mirostat
    mirostat_eta mirostat_tau num_batch num_ctx num_gpu num_keep num_predict num_thread numa
    penalize_newline presence_penalty repeat_last_n repeat_penalty seed stop temperature tfs_z top_k top_p
    typical_p use_mlock use_mmap vocab_only
"""
_EMBEDDINGS = {
    "OpenAI": "dimensions encoding_format input model user",
    "vLLM": """
        add_special_tokens dimensions encoding_format input messages model normalize priority request_id
        truncate_prompt_tokens user
    """,
    "Ollama": "dimensions input keep_alive model options prompt truncate",
}


@dataclass(frozen=True)
class Reference:
    """The bodies of endpoints that belong together.

    Attributes:
        bodies: each, by the name that the docs give its endpoint.
        undone: what is done with other fields.
        documented: server to the fields that it documents; a mapping too where there is one.
    """

    bodies: Mapping[str, type[BaseModel]]
    undone: Undone
    documented: Mapping[str, str] = field(default_factory=dict)

    def fields_of(self, server: str) -> frozenset[str]:
        """Fields that a server documents."""
        return frozenset(self.documented[server].split())

    def done_by(self, name: str) -> list[str]:
        """Which of the endpoints do a field."""
        return [endpoint for endpoint, body in self.bodies.items() if name in body.model_fields]

    def table(self) -> Iterator[str]:
        """Every field that is documented somewhere or known here, as the lines of a Markdown table."""
        known = frozenset().union(*(body.model_fields for body in self.bodies.values()))
        documented = {server: self.fields_of(server) for server in self.documented}
        undone = self.undone.refused.keys() | self.undone.harmless.keys()
        yield "| field | of | |"
        yield "|---|---|---|"
        for name in sorted(known.union(undone, *documented.values())):
            servers = [server for server, fields in documented.items() if name in fields] or ["curkv"]
            yield f"| `{name}` | {', '.join(servers)} | {self._fate(name)} |"

    def _fate(self, name: str) -> str:
        if endpoints := self.done_by(name):
            found = (body.model_fields.get(name) for body in self.bodies.values())
            told = next(field.description for field in found if field is not None)
            only = f" in {', '.join(endpoints)}" if len(endpoints) < len(self.bodies) else ""
            return f"done{only}{f': {told}' if told else ''}"
        if (refused := self.undone.refused.get(name)) is not None:
            unless = " or ".join(f"`{json.dumps(value)}`" for value in refused.unless)
            return f"refused{f' unless {unless}' if unless else ''}: {refused.why}"
        return f"passed over: {self.undone.harmless[name]}"


GENERATING = Reference(
    {"chat": ChatRequest, "completions": CompletionRequest},
    GENERATION,
    {"OpenAI": _OPENAI, "vLLM": _VLLM, "SGLang": _SGLANG, "llama.cpp": _LLAMA_CPP},
)
REFERENCES = {
    "Chat completions and completions": GENERATING,
    "Responses": Reference({"responses": ResponsesRequest}, RESPONSES, {"OpenAI": _RESPONSES}),
    "Messages": Reference(
        {"messages": MessagesRequest, "count_tokens": CountRequest}, MESSAGES, {"Anthropic": _MESSAGES}
    ),
    "Ollama's chat and generate": Reference(
        {"chat": OllamaChatRequest, "generate": GenerateRequest}, OLLAMA, {"Ollama": _OLLAMA}
    ),
    "Ollama's options": Reference({"options": OllamaOptions}, OLLAMA_OPTIONS, {"Ollama": _OLLAMA_OPTIONS}),
    "Embeddings": Reference(
        {
            "/v1/embeddings": EmbeddingRequest,
            "/api/embed": EmbedRequest,
            "/api/embeddings": OlderEmbedRequest,
        },
        EMBEDDINGS,
        _EMBEDDINGS,
    ),
}
"""All tables of docs/api.md, by their titles."""


def tables() -> Iterator[str]:
    """The lines of all of them, in Markdown."""
    for title, reference in REFERENCES.items():
        yield from (f"### {title}", "", *reference.table(), "")
