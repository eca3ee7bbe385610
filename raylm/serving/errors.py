"""What goes wrong with a request, as OpenAI's error object and HTTP status."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from raylm.serving.engines.base import EngineFailure

INVALID = "invalid_request_error"


class RequestError(Exception):
    """A request that cannot be answered.

    Args:
        message: one sentence for the client.
        status: HTTP status.
        parameter: name of the parameter at fault.
        code: machine-readable code, such as ``model_not_found``.
        kind: OpenAI's error type.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        parameter: str | None = None,
        code: str | None = None,
        kind: str = INVALID,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = error_body(message, kind, parameter, code)


def error_body(message: str, kind: str, parameter: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": parameter, "code": code}}


def install_error_handlers(app: FastAPI) -> None:
    """Make every error of ``app`` an OpenAI error object."""

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> JSONResponse:
        headers = {"Retry-After": "1"} if error.status == 503 else None
        return JSONResponse(error.body, status_code=error.status, headers=headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse(_describe(error.errors()[0]), status_code=400)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(error_body(message, INVALID), status_code=error.status_code, headers=error.headers)

    @app.exception_handler(EngineFailure)
    async def engine_failed(request: Request, error: EngineFailure) -> JSONResponse:
        return JSONResponse(error_body(str(error), "server_error", code="engine_failure"), status_code=500)


def _describe(mistake: dict[str, Any]) -> dict[str, Any]:
    """The first mistake that pydantic found in a body."""
    if mistake["type"] == "json_invalid":
        reason = mistake.get("ctx", {}).get("error", "")
        return error_body(f"The body is not valid JSON: {reason} at character {mistake['loc'][-1]}", INVALID)
    keys = [str(part) for part in mistake["loc"][1:]]
    if not keys:
        return error_body("The body must be a JSON object, sent as application/json", INVALID)
    parameter = keys[0]
    message = mistake["msg"].removeprefix("Value error, ")
    if mistake["type"] == "extra_forbidden":
        return error_body(f"Unsupported parameter: {'.'.join(keys)}", INVALID, parameter, "unsupported_parameter")
    if mistake["type"] == "missing":
        return error_body(f"Missing parameter: {'.'.join(keys)}", INVALID, parameter, "missing_parameter")
    return error_body(f"{parameter}: {message}", INVALID, parameter, "invalid_value")
