"""OpenVINO GenAI's continuous batching as an engine: requests join and leave between any two steps.

The pipeline keeps the paged key-value cache with prefix reuse, schedules and samples; this file only feeds it and
reads from it. Its ``step`` holds Python's global lock: nothing else in the process runs meanwhile. Whole texts are read
by the same graph compiled once more, when the first such request comes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import openvino
import openvino_genai

from raylm.models.openvino import EXPORT_MODEL, find_export, has_tokenizer, open_pipeline
from raylm.serving.engines.base import (
    NO_BIAS,
    Backend,
    Constraint,
    EngineFailure,
    EngineRefusal,
    Event,
    FinishReason,
    Generate,
    Reading,
    SamplingParameters,
    reason_of,
)  # fmt: skip
from raylm.serving.engines.grammar_text import plain_text

# Tokens of a text that are read at once: with 50,000 words their logits take 50 MB.
TOKENS_PER_PART = 256

_REASONS: dict[openvino_genai.GenerationFinishReason, FinishReason] = {
    openvino_genai.GenerationFinishReason.STOP: "stop",
    openvino_genai.GenerationFinishReason.LENGTH: "length",
}


class OpenVinoBackend(Backend):
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
        self._directory, self._threads = directory, threads
        self._reader: TextReader | None = None
        self._open = functools.partial(open_pipeline, directory, cache_gigabytes, threads, sequences=sequences)
        self._pipeline = self._open()
        self._has_tokenizer = has_tokenizer(directory)
        # Requests with a schema that no step has seen yet.
        self._unproven: set[int] = set()
        # What is in work, and what of it has been generated: a new pipeline goes on from there.
        self._requests: dict[int, Generate] = {}
        self._generated: dict[int, list[int]] = {}
        # What texts that follow a schema and began again are to write once more.
        self._repeated: dict[int, list[int]] = {}
        # A handle that goes out of scope ends its request in the pipeline: they must be held.
        self._handles: dict[int, openvino_genai.py_openvino_genai.GenerationHandle] = {}

    def admit(self, request: Generate) -> None:
        config = self._config(request.parameters)
        if request.parameters.constraint is not None:
            self._unproven.add(request.number)
        prompt = openvino.Tensor(np.array([request.prompt_ids], dtype=np.int64))
        self._handles[request.number] = self._pipeline.add_request(request.number, prompt, config)
        self._requests[request.number] = request
        self._generated[request.number] = []

    def _config(self, parameters: SamplingParameters) -> openvino_genai.GenerationConfig:
        """The pipeline's own form of ``parameters``.

        Raises:
            EngineRefusal: it has no such thing.
        """
        if parameters.logit_bias:
            raise EngineRefusal(NO_BIAS)
        config = openvino_genai.GenerationConfig(
            max_new_tokens=parameters.max_new_tokens,
            do_sample=not parameters.greedy,
            stop_token_ids=set(parameters.ends(self._end_ids)),
        )
        # The pipeline takes penalties from logits above 0 and adds them to those below; what is likely under a
        # trained model lies above.
        config.presence_penalty = parameters.presence_penalty
        config.frequency_penalty = parameters.frequency_penalty
        config.repetition_penalty = parameters.repetition_penalty
        config.min_new_tokens = parameters.min_tokens
        if parameters.ignore_eos:
            # The pipeline adds the model's own end token where none is named as such, and with ignore_eos it looks at
            # no other token that ends the text either.
            if parameters.stop_token_ids:
                config.set_eos_token_id(parameters.stop_token_ids[0])
            else:
                config.ignore_eos = True
        if not parameters.greedy:
            config.temperature = parameters.temperature
            config.top_p = parameters.top_p
            config.min_p = parameters.min_p
            config.rng_seed = parameters.seed
            if parameters.top_k:
                config.top_k = parameters.top_k
        if (constraint := parameters.constraint) is not None:
            if not self._has_tokenizer:
                raise EngineRefusal(
                    f"{constraint.parameter}: this export has no tokenizer of OpenVINO's; `raylm compress` makes one"
                )
            config.structured_output_config = openvino_genai.StructuredOutputConfig(grammar=_grammar(constraint))
        return config

    def advance(self) -> list[Event]:
        try:
            self._pipeline.step()
        except RuntimeError as error:
            if not self._unproven:
                raise
            return self._refuse_unproven(error)
        self._unproven.clear()
        events = []
        for number, handle in list(self._handles.items()):
            event = Event(number)
            while handle.can_read():
                for output in handle.read().values():
                    event.tokens += output.generated_ids
                    event.finish_reason = _REASONS.get(output.finish_reason)
            if handle.get_status() == openvino_genai.GenerationStatus.IGNORED:
                event.error = "the request does not fit into the key-value cache (serving.cache_gigabytes)"
                event.refused = True
            self._leave_out_repeated(event)
            self._generated[number] += event.tokens
            if event.last:
                self._forget(number)
            if event.tokens or event.last:
                events.append(event)
        return events

    def _refuse_unproven(self, error: RuntimeError) -> list[Event]:
        """End the requests whose schema may have made the step fail.

        Schemas were checked before (:mod:`raylm.serving.tasks.structured`), by the nearest release of the same library.
        """
        reason = f"cannot be followed by this engine: {reason_of(error)}"
        events = [
            Event(number, error=f"{self._requests[number].parameters.constraint.parameter}: {reason}", refused=True)
            for number in self._unproven
        ]
        for number in self._unproven:
            if (handle := self._forget(number)) is not None:
                handle.cancel()
        self._unproven.clear()
        try:
            self._pipeline.step()
        except RuntimeError:
            # A step that failed half-way with others in work is never finished.
            self._begin_again()
        return events

    def _begin_again(self) -> None:
        """Go on in a new pipeline with what is in work.

        A text that follows a schema is written once more from its beginning, as there is no way back into a schema.
        """
        waiting = [(request, self._generated[number]) for number, request in self._requests.items()]
        for held in (self._handles, self._requests, self._generated, self._repeated):
            held.clear()
        # The weights and the cache are in memory once only.
        del self._pipeline
        self._pipeline = self._open()
        for request, given in waiting:
            number, parameters = request.number, request.parameters
            if parameters.constraint is not None:
                self.admit(request)
                self._unproven.discard(number)
                self._repeated[number] = list(given)
            else:
                left, seed = parameters.max_new_tokens - len(given), parameters.seed + len(given)
                least = max(0, parameters.min_tokens - len(given))
                rest = replace(parameters, max_new_tokens=left, seed=seed, min_tokens=least)
                self.admit(Generate(number, [*request.prompt_ids, *given], rest))
            self._generated[number] = list(given)

    def _leave_out_repeated(self, event: Event) -> None:
        """Take out of ``event`` what its text has given before; end a text that goes another way than it did."""
        if not (given := self._repeated.get(event.number)):
            return
        count = min(len(given), len(event.tokens))
        if event.tokens[:count] != given[:count]:
            self._handles[event.number].cancel()
            event.tokens, event.finish_reason = [], None
            event.error = "the engine began again, since another request's response_format had stopped it; try again"
        del event.tokens[:count], given[:count]

    def _forget(self, number: int) -> openvino_genai.py_openvino_genai.GenerationHandle | None:
        self._requests.pop(number, None)
        self._generated.pop(number, None)
        self._repeated.pop(number, None)
        return self._handles.pop(number, None)

    def drop(self, number: int) -> None:
        self._unproven.discard(number)
        handle = self._forget(number)
        if handle is not None:
            handle.cancel()
            # The pipeline frees the blocks of cancelled requests in its next step, which may be far off.
            if not self._handles:
                self._pipeline.step()

    def cache_usage(self) -> float | None:
        # The pipeline counts in percent.
        return self._pipeline.get_metrics().cache_usage / 100

    def read(self, ids: list[int], adapter: str | None = None) -> Reading:
        """Read a whole text with the plain graph."""
        if self._reader is None:
            self._reader = TextReader(self._directory, self._threads)
        return self._reader.read(ids)


def _grammar(constraint: Constraint) -> str:
    """The grammar of ``constraint`` for the release of xgrammar within OpenVINO GenAI."""
    try:
        return plain_text(constraint)
    except (RuntimeError, ValueError, ImportError) as error:
        raise EngineRefusal(f"{constraint.parameter}: cannot be followed by this engine: {reason_of(error)}") from None


class TextReader:
    """The exported graph compiled for reading whole texts: exact activations, and the hidden states as a second output.

    Args:
        directory: model directory with ``openvino/`` inside.
        threads: threads to compute with.
    """

    def __init__(self, directory: str | Path, threads: int) -> None:
        core = openvino.Core()
        export = find_export(directory)
        assert export is not None
        model = core.read_model(export / EXPORT_MODEL)
        self._gives_hidden = _add_hidden_output(model)
        # The plugin's own defaults quantize activations and cached keys to 8 bits; scores are to be the model's own.
        compiled = core.compile_model(
            model,
            "CPU",
            {
                "INFERENCE_NUM_THREADS": threads,
                "INFERENCE_PRECISION_HINT": "f32",
                "KV_CACHE_PRECISION": "f32",
                "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
            },
        )
        self._request = compiled.create_infer_request()
        self._inputs = {name for port in compiled.inputs for name in port.get_names()}

    def read(self, ids: list[int]) -> Reading:
        """Read ``ids`` in parts, so that the logits of a long text are never all in memory."""
        return _OpenVinoReading(self, ids)

    def parts(self, ids: list[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Logits fp32 [tokens, vocabulary] and hidden states fp32 [tokens, hidden size] of consecutive parts."""
        self._request.reset_state()
        for start in range(0, len(ids), TOKENS_PER_PART):
            part = np.array([ids[start : start + TOKENS_PER_PART]], dtype=np.int64)
            end = start + part.shape[1]
            values = {
                "input_ids": part,
                "attention_mask": np.ones((1, end), dtype=np.int64),
                "position_ids": np.arange(start, end, dtype=np.int64)[None],
                "beam_idx": np.zeros(1, dtype=np.int32),
            }
            self._request.infer({name: value for name, value in values.items() if name in self._inputs})
            logits = self._request.get_output_tensor(0).data[0]
            hidden = self._request.get_output_tensor(1).data[0] if self._gives_hidden else np.empty((0, 0))
            yield logits, hidden


class _OpenVinoReading(Reading):
    def __init__(self, reader: TextReader, ids: list[int]) -> None:
        self._reader, self._ids = reader, ids

    def logits(self) -> Iterator[np.ndarray]:
        return (logits for logits, _ in self._reader.parts(self._ids))

    def hidden(self) -> np.ndarray:
        if not self._reader._gives_hidden:
            raise EngineFailure("this export does not show its hidden states; use serving.engine: transformers")
        return np.concatenate([hidden.copy() for _, hidden in self._reader.parts(self._ids)])


def _add_hidden_output(model: openvino.Model) -> bool:
    """Make what the output projection multiplies a second output; False where there is no such product."""
    node = model.output("logits").get_node().input_value(0).get_node()
    # Between the product and the result there may be conversions and a bias.
    while node.get_type_name() in ("Convert", "Add"):
        node = node.input_value(0).get_node()
    if node.get_type_name() != "MatMul":
        return False
    model.add_outputs([node.input_value(0)])
    return True
