"""What browsers and monitors ask beside the routes: HEAD, and whether a page of another origin may read the answers.

Plain ASGI, so that streams pass through untouched.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastapi.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

METHODS = ("GET", "HEAD", "POST", "DELETE")
# Of an answer, beside those that any page may read.
READABLE_HEADERS = ("X-Request-Id", "Retry-After")


class HeadAsGet:
    """ASGI middleware: HEAD is answered with what GET would be answered with, without the body.

    Args:
        app: the application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def without_body(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = message | {"body": b""}
            await send(message)

        # Not a copy: the route that is found is noted in it, and counted outside.
        scope["method"] = "GET"
        await self._app(scope, receive, without_body)


def allow_origins(app: ASGIApp, origins: Sequence[str]) -> CORSMiddleware:
    """``app``, whose answers pages of ``origins`` may read (the Fetch standard, "CORS protocol").

    It stands outside of the gate: a browser asks first, without a key, and has to be let to read refusals too.
    """
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=METHODS,
        allow_headers=["*"],
        expose_headers=READABLE_HEADERS,
    )
