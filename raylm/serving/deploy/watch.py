"""How long one text took, for the metrics and the request's line in the log."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from raylm.serving.engines.base import EngineFailure, FinishReason
from raylm.serving.http import request_log
from raylm.serving.http.metrics import TextTiming

if TYPE_CHECKING:
    from raylm.serving.deploy.service import ModelService


class TextWatch:
    """Times one text, and counts it when its block ends, however it ends.

    Attributes:
        reason: why it ended, once that is known; a block that ends before was left by its client.
    """

    def __init__(self, service: ModelService) -> None:
        self.reason: FinishReason | None = None
        self._service = service
        self._began, self._tokens = time.monotonic(), 0
        self._first: float | None = None

    def tokens(self, count: int) -> None:
        """Note that ``count`` tokens came."""
        if self._first is None:
            self._first = time.monotonic() - self._began
            request_log.note(first_token_milliseconds=round(self._first * 1e3, 1))
        self._tokens += count

    def __enter__(self) -> TextWatch:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        failed = kind is not None and issubclass(kind, EngineFailure)
        reason = self.reason or ("error" if failed else "abort")
        request_log.note(finish_reason=reason)
        request_log.count(completion_tokens=self._tokens)
        if self._service.metrics is not None:
            timing = TextTiming(reason, self._first, time.monotonic() - self._began, self._tokens)
            self._service.metrics.text(self._service.name, timing)
