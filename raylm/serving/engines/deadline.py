"""What a request asks of an engine, within the time that a request may take."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from raylm.serving.engines.base import EngineTimeout

Answer = TypeVar("Answer")
Item = TypeVar("Item")
# Texts of one request that are in an engine's queue together, where it brings more than the queue may hold.
AT_ONCE = 32


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


async def all_in_groups(
    ask: Callable[[Item], Coroutine[Any, Any, Answer]], items: Sequence[Item], seconds: float
) -> list[Answer]:
    """Ask about all ``items``, :data:`AT_ONCE` side by side: who else asks has a turn between them.

    Raises:
        EngineTimeout: all together take longer than ``seconds``.
        EngineFailure: the engine failed one.
    """

    async def one_group_after_another() -> list[Answer]:
        found: list[Answer] = []
        for start in range(0, len(items), AT_ONCE):
            found += await all_in_time([ask(item) for item in items[start : start + AT_ONCE]], seconds)
        return found

    (answers,) = await all_in_time([one_group_after_another()], seconds)
    return answers
