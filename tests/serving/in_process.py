"""The HTTP application in the test's own process over real engines, without Ray."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from starlette.types import ASGIApp

from raylm.config.loading import validate
from raylm.config.stages import ServeConfig
from raylm.serving.deploy.app import model_sources, open_service
from raylm.serving.deploy.models import Models
from raylm.serving.http.metrics import ServerMetrics
from raylm.serving.http.routes import create_app
from raylm.serving.retrieval.opening import open_library


class Application:
    """An application and what sends requests to it.

    Args:
        app: receives them.
        models: behind it.
    """

    def __init__(self, app: ASGIApp, models: Models) -> None:
        self.app, self.models = app, models

    def ask(self, method: str, route: str, body: Any = None, **headers: str) -> httpx.Response:
        """The answer."""

        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
                content = None if body is None else json.dumps(body)
                return await client.request(method, route, content=content, headers=headers)

        return asyncio.run(send())

    def post(self, route: str, **body: Any) -> dict[str, Any]:
        """The JSON of a request that is answered."""
        answer = self.ask("POST", route, body, **{"content-type": "application/json"})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def refused(self, route: str, **body: Any) -> dict[str, Any]:
        """The error object of a request that is wrong."""
        answer = self.ask("POST", route, body, **{"content-type": "application/json"})
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error

    def events(self, route: str, **body: Any) -> list[dict[str, Any]]:
        """What a stream brings before its end."""
        answer = self.ask("POST", route, body | {"stream": True}, **{"content-type": "application/json"})
        assert answer.status_code == 200, answer.text
        lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
        assert lines.pop() == "[DONE]"
        return [json.loads(line) for line in lines]


@contextlib.contextmanager
def opened(model: Path, storage: Path, **serving: Any) -> Iterator[Application]:
    """The application of a model, and of ``serving.models``."""
    values = {"run": {"name": "tiny", "storage": str(storage)}, "model": {"path": str(model)}, "serving": serving}
    config = validate(ServeConfig, values, "test")
    models = Models([open_service(config, name, threads=1) for name in model_sources(config)])
    try:
        yield Application(create_app(models, ServerMetrics(export=False), open_library(config, 1)), models)
    finally:
        for service in models.services:
            service.engine.close()
        models.services[0].schemas.close()
