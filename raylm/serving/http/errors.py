"""What goes wrong with a request, as OpenAI's error object and HTTP status."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from raylm.serving.engines.base import EngineFailure, EngineRefusal, EngineTimeout

INVALID = "invalid_request_error"
# Of a validator's PydanticCustomError: what the client asks for is not done here.
UNSUPPORTED = "unsupported"
# The places that pydantic names for the kinds of a value (:mod:`raylm.serving.http.bodies`), which no body has.
TEXT, IDS, LIST = KINDS = ("<text>", "<ids>", "<list>")
# Of a name or message that may quote what the client sent.
LONGEST_QUOTE, LONGEST_MESSAGE = 300, 1500


class ErrorObject(BaseModel):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every error response."""

    error: ErrorObject


def error_response(meaning: str) -> dict[str, Any]:
    """An entry of the OpenAPI document."""
    return {"description": meaning, "model": ErrorBody}


# For the OpenAPI document: what any route may answer instead.
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: error_response(meaning)
    for status, meaning in {
        400: "The request is wrong; the message says what is allowed",
        401: "The API key is missing or wrong",
        404: "No such model, collection or page",
        405: "The route does not take this method",
        413: "The body is too large",
        421: "The server has no API keys, and the Host header names no loopback address",
        429: "Too many requests with this key",
        500: "The engine failed",
        503: "The server is busy",
        504: "The answer was not ready in time",
    }.items()
}


class RequestError(Exception):
    """A request that cannot be answered.

    Args:
        message: one sentence for the client.
        status: HTTP status.
        parameter: name of the parameter at fault.
        code: machine-readable code, such as ``model_not_found``.
        kind: OpenAI's error type.
        headers: to send with the answer.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        parameter: str | None = None,
        code: str | None = None,
        kind: str = INVALID,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers
        self.body = error_body(message, kind, parameter, code)


def error_body(message: str, kind: str, parameter: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error object; its message, which may quote what the client sent, is one line."""
    message = _short(message, LONGEST_MESSAGE)
    return {"error": {"message": message, "type": kind, "param": parameter, "code": code}}


def install_error_handlers(app: FastAPI) -> None:
    """Make every error of ``app`` an OpenAI error object."""

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> JSONResponse:
        return JSONResponse(error.body, status_code=error.status, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse(_describe(error.errors()[0]), status_code=400)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
        return JSONResponse(
            error_body(message, INVALID, code=code), status_code=error.status_code, headers=error.headers
        )

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> JSONResponse:
        # The exception itself goes on to the replica's log; what it says is not the client's business.
        return JSONResponse(error_body("The server made a mistake", "server_error", code="internal"), status_code=500)

    @app.exception_handler(EngineTimeout)
    async def too_slow(request: Request, error: EngineTimeout) -> JSONResponse:
        return JSONResponse(error_body(str(error), "server_error", code="timeout"), status_code=504)

    @app.exception_handler(EngineRefusal)
    async def engine_refused(request: Request, error: EngineRefusal) -> JSONResponse:
        return JSONResponse(error_body(str(error), INVALID, code="not_supported"), status_code=400)

    @app.exception_handler(EngineFailure)
    async def engine_failed(request: Request, error: EngineFailure) -> JSONResponse:
        return JSONResponse(error_body(str(error), "server_error", code="engine_failure"), status_code=500)


def _describe(mistake: dict[str, Any]) -> dict[str, Any]:
    """The first mistake that pydantic found in a body; the parameter is the path to the part at fault."""
    if mistake["type"] == "json_invalid":
        reason = mistake.get("ctx", {}).get("error", "")
        return error_body(f"The body is not valid JSON: {reason} at character {mistake['loc'][-1]}", INVALID)
    keys = [_short(str(part)) for part in mistake["loc"][1:] if part not in KINDS]
    message = mistake["msg"].removeprefix("Value error, ")
    if mistake["type"] == "value_error" and not keys:
        # A validator of the whole body names its parameter itself.
        name, colon, _ = message.partition(": ")
        return error_body(message, INVALID, name if colon and name.isidentifier() else None, "invalid_value")
    if not keys:
        return error_body("The body must be a JSON object, sent as application/json", INVALID)
    parameter, message = ".".join(keys), _short(message)
    if mistake["type"] == "extra_forbidden":
        return error_body(f"Unsupported parameter: {parameter}", INVALID, parameter, "unsupported_parameter")
    if mistake["type"] == UNSUPPORTED:
        return error_body(f"Unsupported parameter: {parameter}: {message}", INVALID, parameter, "unsupported_parameter")
    if mistake["type"] == "missing":
        return error_body(f"Missing parameter: {parameter}", INVALID, parameter, "missing_parameter")
    return error_body(f"{parameter}: {message}", INVALID, parameter, "invalid_value")


def _short(text: str, most: int = LONGEST_QUOTE) -> str:
    """``text``, cut where it is long, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[:most]}…"
