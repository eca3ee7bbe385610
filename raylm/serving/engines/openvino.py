"""OpenVINO GenAI's continuous batching as an engine: requests join and leave between any two steps.

The pipeline keeps the paged key-value cache with prefix reuse, schedules and samples; this file only feeds it and
reads from it. Its ``step`` holds Python's global lock: nothing else in the process runs meanwhile.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino
import openvino_genai

from raylm.models.openvino import open_pipeline
from raylm.serving.engines.base import Engine, EngineRequest, Event, FinishReason

_REASONS: dict[openvino_genai.GenerationFinishReason, FinishReason] = {
    openvino_genai.GenerationFinishReason.STOP: "stop",
    openvino_genai.GenerationFinishReason.LENGTH: "length",
}


class OpenVinoEngine(Engine):
    """Serves an OpenVINO export on the CPU.

    Args:
        directory: model directory with ``openvino/`` inside.
        end_ids: token ids that end a text.
        sequences: requests decoded together.
        cache_gigabytes: upper limit of the key-value cache.
        threads: threads of a step.
    """

    name = "openvino"

    def __init__(
        self, directory: str | Path, end_ids: frozenset[int], *, sequences: int, cache_gigabytes: int, threads: int
    ) -> None:
        super().__init__(sequences)
        self._end_ids = end_ids
        self._pipeline = open_pipeline(directory, cache_gigabytes, threads, sequences=sequences)
        # A handle that goes out of scope ends its request in the pipeline: they must be held.
        self._handles: dict[int, openvino_genai.py_openvino_genai.GenerationHandle] = {}

    def _admit(self, request: EngineRequest) -> None:
        parameters = request.parameters
        config = openvino_genai.GenerationConfig(
            max_new_tokens=parameters.max_new_tokens,
            do_sample=not parameters.greedy,
            stop_token_ids=set(self._end_ids),
        )
        if not parameters.greedy:
            config.temperature = parameters.temperature
            config.top_p = parameters.top_p
            config.rng_seed = parameters.seed
        prompt = openvino.Tensor(np.array([request.prompt_ids], dtype=np.int64))
        self._handles[request.number] = self._pipeline.add_request(request.number, prompt, config)

    def _advance(self) -> list[Event]:
        self._pipeline.step()
        events = []
        for number, handle in list(self._handles.items()):
            event = Event(number)
            while handle.can_read():
                for output in handle.read().values():
                    event.tokens += output.generated_ids
                    event.finish_reason = _REASONS.get(output.finish_reason)
            if handle.get_status() == openvino_genai.GenerationStatus.IGNORED:
                event.error = "the request does not fit into the key-value cache (serving.cache_gigabytes)"
            if event.last:
                del self._handles[number]
            if event.tokens or event.last:
                events.append(event)
        return events

    def _drop(self, number: int) -> None:
        handle = self._handles.pop(number, None)
        if handle is not None:
            handle.cancel()
            # The pipeline frees the blocks of cancelled requests in its next step, which may be far off.
            if not self._handles:
                self._pipeline.step()
