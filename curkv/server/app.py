"""The application: routes, errors, middleware."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

from fastapi import Depends, FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline

import curkv
from curkv.config import Settings
from curkv.server.chat.router import router as chat
from curkv.server.completions.router import router as completions
from curkv.server.embeddings.router import router as embeddings
from curkv.server.errors import error_responses, install_error_handlers
from curkv.server.explain.router import router as explain
from curkv.server.headers import OPENAPI_RESPONSE_HEADERS, default_options
from curkv.server.health.router import router as health
from curkv.server.keys import Keys
from curkv.server.live.router import router as live
from curkv.server.messages.router import router as messages
from curkv.server.metrics import Metrics
from curkv.server.middleware import (
    ApiKeyMiddleware,
    BodyMiddleware,
    CrashMiddleware,
    HeadMiddleware,
    RequestIdMiddleware,
)
from curkv.server.models.router import router as models
from curkv.server.ollama.router import router as ollama
from curkv.server.page.router import files as page_files
from curkv.server.page.router import router as page
from curkv.server.responses.router import router as responses
from curkv.server.sessions.router import router as sessions
from curkv.server.state import ServerState
from curkv.server.tokens.router import router as tokens

if TYPE_CHECKING:
    from curkv.engine.client import EngineClient

ROUTERS = (
    completions, chat, responses, messages, ollama, embeddings, explain, tokens, models, live, sessions, page,
)  # fmt: skip
"""All routes that an API key guards."""

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]

DESCRIPTION = """OpenAI-compatible inference that keeps only the part of the KV cache that matters.
What a request may keep is said in `X-KV-*` headers or in the body's `kv` object;
what it really kept is in the response headers and in `usage.kv`."""


def create_app(client: EngineClient | None, settings: Settings, lifespan: Lifespan | None = None) -> FastAPI:
    """Builds the application.

    Args:
        client: a started engine; None if it comes later through `app.state.server.attach`, until when
            requests are answered 503.
        settings: the server's settings.
        lifespan: what to do around the application's life.

    Raises:
        OptionError: the settings' default eviction options are wrong.
        KeysError: the file of API keys cannot be used.
    """
    app = FastAPIOffline(
        redoc_url=None,
        static_url="/docs/files",
        favicon_url="/page/icon.svg",
        title="curkv",
        version=curkv.__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
    )
    keys = Keys(settings.server.api_key, settings.server.api_key_file)
    metrics = Metrics(settings.model_name, settings.server.vllm_metrics)
    app.state.server = ServerState(settings, metrics, default_options(settings), keys)
    if client is not None:
        app.state.server.attach(client)
    guarded = [Depends(HTTPBearer(auto_error=False))] if keys else []
    refusals = error_responses(401) if keys else {}
    for router in ROUTERS:
        app.include_router(router, dependencies=guarded, responses=refusals)
    app.include_router(health)
    app.mount("/page", page_files)
    install_error_handlers(app)
    app.add_middleware(
        BodyMiddleware,
        max_bytes=settings.limits.max_body_size,
        max_values=settings.limits.max_body_values,
        seconds=settings.limits.receive_timeout,
    )
    if keys:
        app.add_middleware(ApiKeyMiddleware, keys=keys, count=metrics.count_answer)
    app.add_middleware(CrashMiddleware)
    if settings.server.cors_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.server.cors_origin,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", *OPENAPI_RESPONSE_HEADERS],
        )
    app.add_middleware(HeadMiddleware)
    app.add_middleware(RequestIdMiddleware)
    return app
