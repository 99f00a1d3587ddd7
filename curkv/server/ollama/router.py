"""Routes of Ollama's API."""

from __future__ import annotations

import time
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request, Response

from curkv.server.bodies import UntypedBodyRoute
from curkv.server.chat.conversation import converse
from curkv.server.embeddings import serving as embeddings
from curkv.server.errors import OllamaError, error_responses
from curkv.server.generation import Prompt, documented, respond
from curkv.server.ollama.protocol import (
    EmbedRequest,
    EmbedResponse,
    GenerateRequest,
    ModelDetails,
    OlderEmbedRequest,
    OlderEmbedResponse,
    OllamaChatRequest,
    OllamaResponse,
    OllamaVersion,
    Shown,
    ShowRequest,
    TaggedModel,
    Tags,
)
from curkv.server.ollama.serving import JSON_LINES, OllamaAnswer, loaded, nanoseconds, timestamp
from curkv.server.state import ServerState, server_state
from curkv.server.tokenizing import Reader

router = APIRouter(tags=["dialects"], route_class=UntypedBodyRoute)

API_VERSION = "0.12.6"
"""Of Ollama's API as it is spoken here; clients refuse servers that are older than what they need."""

EXAMPLES: dict[str, Any] = {
    "question": {
        "summary": "A question",
        "value": {
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "stream": False,
            "options": {"temperature": 0, "num_predict": 32},
        },
    }
}


@router.post(
    "/api/chat",
    summary="Ollama: continue a conversation",
    **documented(OllamaResponse, JSON_LINES, OllamaError),
)
async def chat(
    body: Annotated[OllamaChatRequest, Body(openapi_examples=EXAMPLES)], request: Request
) -> Response:
    """Answers a conversation as Ollama does: lines of JSON, or with `stream: false` one object."""
    state = server_state(request)
    body.model = state.untagged(body.model)
    if not body.messages:
        return _loaded(state, body.model, plain=False)
    conversation = await converse(body.whole_chat, request, state, "ollama")
    return await respond(OllamaAnswer(conversation, plain=False), request)


@router.post(
    "/api/generate", summary="Ollama: answer a prompt", **documented(OllamaResponse, JSON_LINES, OllamaError)
)
async def generate(body: GenerateRequest, request: Request) -> Response:
    """Answers a prompt through the chat template, or with `raw` continues it as it is."""
    state = server_state(request)
    body.model = state.untagged(body.model)
    if not body.prompt:
        return _loaded(state, body.model, plain=True)
    prompts = partial(_raw, body.prompt) if body.raw else None
    conversation = await converse(body.whole_chat, request, state, "ollama", prompts)
    return await respond(OllamaAnswer(conversation, plain=True), request)


@router.post("/api/embed", summary="Ollama: vectors of texts", **embeddings.documented(OllamaError))
async def embed(body: EmbedRequest, request: Request) -> EmbedResponse:
    """Gives the vectors that /v1/embeddings gives."""
    began, state = time.monotonic(), server_state(request)
    body.model = state.untagged(body.model)
    texts = [body.input] if isinstance(body.input, str) else body.input
    found = await embeddings.embed(body, texts, -1 if body.truncate is not False else None, request, state)
    return EmbedResponse(
        model=found.model,
        embeddings=found.vectors.tolist(),
        total_duration=nanoseconds(time.monotonic() - began),
        prompt_eval_count=found.tokens,
    )


@router.post(
    "/api/embeddings",
    summary="Ollama: the vector of a text, older form",
    **embeddings.documented(OllamaError),
)
async def older_embed(body: OlderEmbedRequest, request: Request) -> OlderEmbedResponse:
    """The same of one text."""
    state = server_state(request)
    body.model = state.untagged(body.model)
    found = await embeddings.embed(body, [body.prompt], -1, request, state, "prompt")
    return OlderEmbedResponse(embedding=found.vectors[0].tolist())


@router.get("/api/tags", summary="Ollama: list models", responses=error_responses(503, shape=OllamaError))
async def tags(request: Request) -> Tags:
    """Names the model that is served, under each of its names."""
    return _tags(server_state(request))


@router.get(
    "/api/ps",
    summary="Ollama: list models that are loaded",
    responses=error_responses(503, shape=OllamaError),
)
async def running(request: Request) -> Tags:
    """The same: the model served is loaded."""
    return _tags(server_state(request))


@router.post(
    "/api/show",
    summary="Ollama: describe a model",
    responses=error_responses(400, 404, 413, 503, shape=OllamaError),
)
async def show(body: ShowRequest, request: Request) -> Shown:
    """Tells what the model is and what it can do."""
    state = server_state(request)
    client = state.ready_client()
    state.check_model(state.untagged(body.model or body.name))
    template, architecture = client.chat_template, client.model_config.architecture
    capabilities = ["completion", "embedding"]
    if template is not None:
        capabilities += ["tools"] + ["thinking"] * template.thinks
    return Shown(
        template=template.source if template is not None else "",
        details=_details(state),
        model_info={
            "general.architecture": architecture,
            f"{architecture}.context_length": client.max_model_len,
        },
        capabilities=capabilities,
        modified_at=timestamp(state.created),
    )


@router.get(
    "/api/version", summary="Ollama: version of the API", responses=error_responses(shape=OllamaError)
)
async def version() -> OllamaVersion:
    """Names the version of Ollama's API that is spoken."""
    return OllamaVersion(version=API_VERSION)


def _raw(prompt: str, _: Any, reader: Reader) -> list[Prompt]:
    return [Prompt(reader.tokens(prompt, "prompt"), prompt)]


def _loaded(state: ServerState, model: str | None, plain: bool) -> Response:
    state.ready_client()
    answer = loaded(state.check_model(model), plain)
    return Response(answer.model_dump_json(), media_type="application/json")


def _tags(state: ServerState) -> Tags:
    client = state.ready_client()
    size, details = sum(client.weights_bytes.values()), _details(state)
    return Tags(
        models=[
            TaggedModel(
                name=name, model=name, modified_at=timestamp(state.created), size=size, details=details
            )
            for name in state.settings.model_names
        ]
    )


def _details(state: ServerState) -> ModelDetails:
    client = state.ready_client()
    family = client.model_config.architecture
    return ModelDetails(family=family, families=[family], quantization_level=client.weights)
