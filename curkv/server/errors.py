"""Every answer that is not a success has the shape of errors in the API that was asked."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any, Literal

from fastapi import FastAPI, HTTPException
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import Request
from starlette.types import Scope

from curkv.engine.client import EngineUnavailable
from curkv.engine.types import EngineFault, InvalidRequest

logger = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = 5
INTERNAL_ERROR = "internal_error"

_KINDS = {401: "authentication_error", 429: "rate_limit_error"}
_MESSAGES_KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
NOT_AGAIN = {"x-should-retry": "false"}
"""Header by which OpenAI's and Anthropic's clients do not repeat by themselves what would fail again."""
CLIENT_CLOSED_REQUEST = 499


class ClientDisconnected(Exception):
    """The client closed its connection before the answer was ready."""


class ErrorDetail(BaseModel):
    """What went wrong.

    Attributes:
        message: for a person.
        type: `authentication_error` (401), `rate_limit_error` (429), `invalid_request_error` (other 4xx) or
            `server_error` (5xx).
        param: the field or header at fault, if it is one.
        code: for a program, if there is more to know than the status.
    """

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """Body of every error."""

    error: ErrorDetail


class APIError(HTTPException):
    """An error with everything its answer needs; FastAPI lets it pass even while it reads the body."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(status, message, dict(headers or {}))
        kind = "server_error" if status >= 500 else _KINDS.get(status, "invalid_request_error")
        param = _encodable(param) if param is not None else None
        self.body = ErrorResponse(
            error=ErrorDetail(message=_encodable(message), type=kind, param=param, code=code)
        )

    @property
    def unforeseen(self) -> bool:
        """Whether it says nothing, so that the log has to."""
        return self.body.error.code == INTERNAL_ERROR

    def response(self, scope: Scope) -> JSONResponse:
        """The error as an answer to a request."""
        path = scope.get("path", "")
        body = next((shape(self) for prefix, shape in _SHAPES if path.startswith(prefix)), self.body)
        return JSONResponse(jsonable_encoder(body), self.status_code, self.headers)


class MessagesErrorDetail(BaseModel):
    """What went wrong, in the words of Anthropic's API."""

    type: str
    message: str


class MessagesError(BaseModel):
    """Body of every error of Anthropic's API."""

    type: Literal["error"] = "error"
    error: MessagesErrorDetail

    @classmethod
    def of(cls, error: APIError) -> MessagesError:
        """The same error there."""
        status, detail = error.status_code, error.body.error
        kind = _MESSAGES_KINDS.get(status, "api_error" if status >= 500 else "invalid_request_error")
        return cls(error=MessagesErrorDetail(type=kind, message=_naming(detail)))


class OllamaError(BaseModel):
    """Body of every error of Ollama's API."""

    error: str

    @classmethod
    def of(cls, error: APIError) -> OllamaError:
        """The same error there."""
        return cls(error=_naming(error.body.error))


def _naming(detail: ErrorDetail) -> str:
    """What went wrong, and in which field, where errors have no place of its own for that."""
    named = detail.param is None or detail.message.startswith(f"{detail.param}:")
    return detail.message if named else f"{detail.param}: {detail.message}"


_SHAPES: tuple[tuple[str, Callable[[APIError], BaseModel]], ...] = (
    ("/v1/messages", MessagesError.of),
    ("/api/", OllamaError.of),
)
"""Where errors have another shape, by the beginning of the path."""


def _encodable(text: str) -> str:
    """The text with lone surrogates, which JSON may smuggle in, written out."""
    return text.encode("utf-8", "backslashreplace").decode()


def unavailable(message: str, code: str) -> APIError:
    """A 503 that asks the client to come back."""
    return APIError(503, message, code=code, headers={"Retry-After": str(RETRY_AFTER_SECONDS)})


def as_api_error(error: Exception) -> APIError:
    """Translates any exception; what is unexpected becomes a 500 that tells no internals."""
    match error:
        case APIError():
            return error
        case InvalidRequest():
            return APIError(400, error.message, error.param, error.code)
        case EngineFault():  # the engine has tried again itself
            return APIError(500, str(error), code="engine_error", headers=NOT_AGAIN)
        case EngineUnavailable():
            return unavailable(str(error), "engine_unavailable")
        case ClientDisconnected():  # nobody reads it
            return APIError(CLIENT_CLOSED_REQUEST, "the client went away")
        case RequestValidationError():
            return _validation_error(error.errors())
        case StarletteHTTPException():
            return APIError(error.status_code, _http_message(error), headers=error.headers)
    return APIError(500, "internal error: the server's log says more", code=INTERNAL_ERROR)


def error_responses(
    *statuses: int, shape: type[BaseModel] = ErrorResponse
) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that may answer with these errors of a shape, and with no undeclared one."""
    responses: dict[int | str, dict[str, Any]] = {"default": _documented("Any other error", shape)}
    for status in statuses:
        responses[status] = _documented(HTTPStatus(status).phrase, shape)
    return responses


def _documented(description: str, shape: type[BaseModel]) -> dict[str, Any]:
    return {"model": shape, "description": description}


def install_error_handlers(app: FastAPI) -> None:
    """Makes every error of `app` an `ErrorResponse`, routing errors and crashes included."""

    async def handle(request: Request, error: Exception) -> JSONResponse:
        response = as_api_error(error).response(request.scope)
        if (request_id := request.scope.get("request_id")) is not None:
            response.headers["X-Request-Id"] = request_id
        return response

    for kind in (
        InvalidRequest,
        EngineFault,
        EngineUnavailable,
        ClientDisconnected,
        RequestValidationError,
        StarletteHTTPException,
        Exception,
    ):
        app.add_exception_handler(kind, handle)


def _http_message(error: StarletteHTTPException) -> str:
    hints = {
        400: "the body cannot be read as JSON",
        404: "there is no such path; GET /openapi.json lists them",
        405: "the path does not take this method",
    }
    return hints.get(error.status_code, str(error.detail))


def _validation_error(errors: Sequence[Mapping[str, Any]]) -> APIError:
    """A 400 that names the first field at fault and tells what is wrong with each."""
    found: dict[str | None, str] = {}
    for error in errors:
        found.setdefault(_field(error), _message(error))
    text = "; ".join(f"{param}: {message}" if param else message for param, message in found.items())
    return APIError(400, text, next(iter(found)))


def _field(error: Mapping[str, Any]) -> str | None:
    """Dotted path of the field: list positions and the names of union members are of no use to a caller."""
    if error["type"] == "json_invalid":
        return None
    loc = error["loc"]
    if "[key]" in loc:  # what precedes it is the wrong key itself
        loc = loc[: loc.index("[key]") - 1]
    path: list[str] = []
    for part in loc[1:]:
        if not isinstance(part, str) or not part.isidentifier() or part in ("str", "int", "float", "bool"):
            break
        path.append(part)
    return ".".join(path) or None


def _message(error: Mapping[str, Any]) -> str:
    if error["type"] == "json_invalid":
        return f"the body is not JSON: {error['ctx']['error']} at character {error['loc'][-1]}"
    if len(error["loc"]) == 1:
        return "the body must be a JSON object, sent with Content-Type: application/json"
    message = str(error["msg"]).removeprefix("Value error, ")
    return message[:1].lower() + message[1:]
