"""The same server on Ray Serve, which starts, scales and routes between replicas.

    pip install 'curkv[ray]'
    serve run curkv.server.ray_app:app max_replicas=2 kv_policy=curdkv kv_budget=25%

Every replica is a whole server with its own engine. Ray's consistent-hash router sends all requests with the
same `X-Session-Id` to the same replica: name the document or the conversation there.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from curkv.config import Settings
from curkv.server.app import create_app
from curkv.server.run import build_client

if TYPE_CHECKING:
    from curkv.server.state import ServerState

ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"


class Scale(BaseModel):
    """How many replicas, and what each takes.

    Attributes:
        min_replicas, max_replicas: bounds of the autoscaling.
        target_requests: requests per replica that autoscaling aims for.
        max_requests: requests that a replica takes at once, its queue included; the rest wait in the proxy.
        cpus, gpus: what Ray reserves for a replica.
    """

    model_config = ConfigDict(extra="forbid")

    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(1, ge=1)
    target_requests: float = Field(8, gt=0)
    max_requests: int = Field(128, ge=1)
    cpus: float = Field(1, gt=0)
    gpus: float = Field(0, ge=0)


def app(args: dict[str, Any]) -> serve.Application:
    """Builds the application that `serve run` and Serve's configuration files name.

    Args:
        args: fields of `Scale`; every other one is a setting of the server.

    Raises:
        pydantic.ValidationError: an argument is unknown or has a bad value.
    """
    scale = Scale(**{name: args[name] for name in Scale.model_fields if name in args})
    settings = Settings.load(
        **{name: value for name, value in args.items() if name not in Scale.model_fields}
    )
    return (
        serve.deployment(Replica)
        .options(
            name="curkv",
            autoscaling_config=AutoscalingConfig(
                min_replicas=scale.min_replicas,
                max_replicas=max(scale.min_replicas, scale.max_replicas),
                target_ongoing_requests=scale.target_requests,
            ),
            max_ongoing_requests=scale.max_requests,
            graceful_shutdown_timeout_s=settings.limits.drain_timeout,
            request_router_config=RequestRouterConfig(request_router_class=ROUTER),
            ray_actor_options={"num_cpus": scale.cpus, "num_gpus": scale.gpus},
        )
        .bind(settings)
    )


@serve.ingress()
class Replica:
    """One server. Ray counts it in when its engine is loaded, and replaces it when the engine has died."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self._state: ServerState | None = None

    def __serve_build_asgi_app__(self) -> FastAPI:
        application = create_app(None, self._settings, self._lifespan)
        self._state = application.state.server
        return application

    @contextlib.asynccontextmanager
    async def _lifespan(self, application: FastAPI) -> AsyncIterator[None]:
        client = await asyncio.to_thread(build_client, self._settings)
        application.state.server.attach(client)
        yield
        await client.drain(self._settings.limits.drain_timeout)
        await asyncio.to_thread(client.stop)

    def check_health(self) -> None:
        """Raises if the engine has died; Ray asks every ten seconds."""
        if self._state is not None and self._state.phase == "dead":
            raise RuntimeError("the engine is dead")
