"""What a request asks of an engine, within the time that a request may take."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from raylm.serving.engines.base import EngineTimeout

Answer = TypeVar("Answer")


async def all_in_time(asked: Sequence[Coroutine[Any, Any, Answer]], seconds: float) -> list[Answer]:
    """Ask side by side, and give all answers; what fails, is late or is left takes the others with it.

    Args:
        asked: questions to an engine, not awaited yet.
        seconds: for all of them together (``serving.request_seconds``).

    Raises:
        EngineTimeout: an answer was not there in time.
        EngineFailure: the engine failed one.
    """
    tasks = [asyncio.ensure_future(question) for question in asked]
    try:
        async with asyncio.timeout(seconds):
            return await asyncio.gather(*tasks)
    except TimeoutError:
        raise EngineTimeout(f"the answer was not ready within {seconds:g} s (serving.request_seconds)") from None
    finally:
        for task in tasks:
            task.cancel()
