"""What the endpoints share: the engine once it is there, the settings, the metrics."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from starlette.requests import Request

from curkv.cache.options import EvictionOptions
from curkv.config import Settings
from curkv.server.errors import APIError, unavailable
from curkv.server.keys import Keys
from curkv.server.metrics import Metrics
from curkv.server.queue import Queue, QueueLimits
from curkv.server.responses.store import ResponseStore
from curkv.server.vetting import Vetting

if TYPE_CHECKING:
    from curkv.engine.client import EngineClient


@dataclass
class ServerState:
    """State of one application.

    Attributes:
        settings: the server's settings.
        metrics: fed by the engine's statistics.
        eviction: options of requests that say nothing about their cache.
        keys: API keys.
        client: the engine; None while the model loads.
        created: start of the server, Unix time in seconds.
        queue: what waits.
        vetting: tries the structures of requests.
        responses: those that others may go on with.
    """

    settings: Settings
    metrics: Metrics
    eviction: EvictionOptions
    keys: Keys = field(default_factory=Keys)
    client: EngineClient | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    queue: Queue = field(init=False)
    vetting: Vetting = field(init=False)
    responses: ResponseStore = field(init=False)

    def __post_init__(self) -> None:
        limits = self.settings.limits
        self.queue = Queue(
            QueueLimits(limits.max_waiting, limits.max_waiting_tokens, limits.max_waiting_per_key)
        )
        self.vetting = Vetting(limits.structure_timeout)
        self.responses = ResponseStore(limits.max_stored_responses)
        self.metrics.watch(lambda: self.phase == "ready")

    def attach(self, client: EngineClient) -> None:
        """Opens the server for requests to an engine that has been started."""
        self.metrics.describe(client)
        client.add_sink(self.metrics.observe)
        self.client = client

    @property
    def phase(self) -> str:
        """`loading`, or the engine's state: `ready`, `draining`, `stopped`, `dead`."""
        if self.client is None:
            return "loading"
        return "dead" if self.client.state == "ready" and not self.client.healthy else self.client.state

    def ready_client(self) -> EngineClient:
        """The engine, if it takes requests.

        Raises:
            APIError: 503, it does not.
        """
        if self.client is None or self.phase != "ready":
            raise unavailable(f"the server takes no requests: it is {self.phase}", self.phase)
        return self.client

    def key_of(self, request: Request) -> str:
        """Name of the API key that a request came with; "" if the server has none."""
        return str(request.scope.get("api_key", ""))

    def check_model(self, name: str | None) -> str:
        """Checks the `model` field of a request.

        Returns:
            The name to answer under.

        Raises:
            APIError: 404, another model was asked for.
        """
        served = self.settings.model_names
        if name is None:
            return served[0]
        if name not in served and not self.settings.server.any_model:
            known = " or ".join(map(repr, served))
            raise APIError(404, f"there is no model {name!r}; served is {known}", "model", "model_not_found")
        return name

    def untagged(self, name: str | None) -> str | None:
        """A model's name without `:latest`, which Ollama's clients add to names that have no tag."""
        if name is None or name in self.settings.model_names:
            return name
        return name.removesuffix(":latest")


def server_state(request: Request) -> ServerState:
    """The state of the application that serves `request`."""
    state: ServerState = request.app.state.server
    return state
