"""vLLM (Kwon et al. 2023) as an engine on a GPU: its asynchronous engine behind the same pipe as the others.

Written to the documentation of ``AsyncLLM`` (https://docs.vllm.ai, "Async LLM Streaming") and run against vLLM 0.32's
CPU build (``tests/benchmarks/vllm_engine.py``); not on a GPU yet, as none was at hand. vLLM batches, caches prefixes
and samples by itself: here a task a request hands its tokens on.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from raylm import telemetry
from raylm.config.serving import ServingSection
from raylm.errors import UserError
from raylm.models.checks import read_part
from raylm.models.lora import SETTINGS, adapter_ends, load_lora, resolve_adapter
from raylm.serving.engines.base import (
    Alive,
    Cancel,
    Close,
    Command,
    Constraint,
    EngineFailure,
    Event,
    FinishReason,
    Generate,
    Ping,
    Ready,
    Score,
    TokenScores,
)  # fmt: skip

NAME = "vllm"
# Ranks that vLLM has kernels for.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length"}


def run(connection: Connection, source: str, serving: ServingSection, end_ids: frozenset[int]) -> None:
    """Load the model, answer ``Ready`` or the reason against it, and work until told to close.

    Args:
        connection: commands come from here, lists of events go there.
        source: Hugging Face directory or hub name.
        serving: limits.
        end_ids: token ids that end a text.
    """
    telemetry.silence()
    asyncio.run(_Work(connection, end_ids).run(source, serving))


def adapter_rank(adapters: dict[str, str], key: str) -> int:
    """The smallest rank of vLLM's that all ``adapters`` (paths by names) fit into.

    Raises:
        UserError: vLLM would compute an adapter wrongly, or not at all.
    """
    largest = 0
    for name, path in adapters.items():
        settings = read_part(resolve_adapter(path, f"{key}.{name}") / SETTINGS, f"{key}.{name}")
        for pattern in ("rank_pattern", "alpha_pattern"):
            if settings.get(pattern):
                raise UserError(f"{key}.{name}: found {pattern}, allowed with engine: transformers")
        rank = max(layer.first.shape[0] for layer in load_lora(path, f"{key}.{name}").values())
        if rank > RANKS[-1]:
            raise UserError(f"{key}.{name}: found rank {rank}, allowed with vLLM: at most {RANKS[-1]}")
        largest = max(largest, rank)
    return next(allowed for allowed in RANKS if allowed >= largest)


class _Work:
    """Everything that one vLLM engine has in work."""

    def __init__(self, connection: Connection, end_ids: frozenset[int]) -> None:
        self._connection, self._end_ids = connection, end_ids
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._events: list[Event] = []
        self._adapters: dict[str, Any] = {}
        self._ends: dict[str, frozenset[int]] = {}
        self._sign: asyncio.Task[None] | None = None
        self._closed = asyncio.Event()

    async def run(self, source: str, serving: ServingSection) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = AsyncEngineArgs(
            model=source,
            trust_remote_code=False,
            tensor_parallel_size=max(1, int(serving.gpus_per_replica)),
            gpu_memory_utilization=serving.gpu_memory_utilization,
            max_num_seqs=serving.max_concurrent_requests,
            enable_prefix_caching=True,
            **self._adapter_arguments(serving),
        )
        self._engine = AsyncLLM.from_engine_args(arguments)
        self._connection.send(Ready(NAME))
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._receive, daemon=True).start()
        try:
            await self._closed.wait()
        finally:
            self._engine.shutdown()

    def _adapter_arguments(self, serving: ServingSection) -> dict[str, Any]:
        """What vLLM needs to know of adapters before it loads the model; it keeps their caches apart itself."""
        if not serving.adapters:
            return {}
        from vllm.lora.request import LoRARequest

        for number, (name, path) in enumerate(serving.adapters.items(), start=1):
            directory = resolve_adapter(path, f"serving.adapters.{name}")
            self._ends[name] = adapter_ends(path, f"serving.adapters.{name}")
            self._adapters[name] = LoRARequest(name, number, str(directory))
        rank = adapter_rank(serving.adapters, "serving.adapters")
        return {"enable_lora": True, "max_loras": len(serving.adapters), "max_lora_rank": rank}

    def _receive(self) -> None:
        """Hand commands to the event loop; runs on a thread."""
        try:
            while not isinstance(command := self._connection.recv(), Close):
                self._loop.call_soon_threadsafe(self._take, command)
        except (EOFError, OSError):
            # Nobody is at the other end any more.
            pass
        self._loop.call_soon_threadsafe(self._closed.set)

    def _take(self, command: Command) -> None:
        if isinstance(command, Cancel):
            # vLLM drops a request whose generator is closed.
            if (task := self._tasks.pop(command.number, None)) is not None:
                task.cancel()
            return
        if isinstance(command, Ping):
            if self._sign is None or self._sign.done():
                self._sign = self._loop.create_task(self._give_sign())
            return
        self._tasks[command.number] = self._loop.create_task(self._answer(command))

    async def _answer(self, command: Command) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        try:
            if isinstance(command, Generate):
                async for event in self._generate(command):
                    self._deliver(event)
            elif isinstance(command, Score):
                self._deliver(Event(command.number, result=await self._score(command)))
            else:
                raise ValueError("vLLM serves this model for generation; serve it with engine: transformers as well")
        except EngineDeadError as error:
            # Without its engine this process is of no use: the replica sees it end, and is replaced.
            self._deliver(Event(command.number, error=str(error)))
            self._loop.call_soon(self._closed.set)
        except (EngineGenerateError, RuntimeError, ValueError, TypeError, EngineFailure) as error:
            self._deliver(Event(command.number, error=str(error)))
        finally:
            self._tasks.pop(command.number, None)

    async def _give_sign(self) -> None:
        """Ask vLLM's own process, which answers between two steps, a question that changes nothing."""
        await self._engine.is_sleeping()
        self._connection.send(Alive())

    async def _generate(self, command: Generate) -> AsyncIterator[Event]:
        reason = None
        async for output in self._outputs(command, command.prompt_ids, self._sampling(command)):
            part = output.outputs[0]
            reason = REASONS.get(part.finish_reason or "")
            yield Event(command.number, list(part.token_ids), reason, cached=output.num_cached_tokens)
        if reason is None:
            yield Event(command.number, error="vLLM ended the text without a reason")

    async def _score(self, command: Score) -> TokenScores:
        """Log-probabilities of the prompt's tokens, and of what may follow the last."""
        from vllm import SamplingParams

        wanted = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=command.top, logprobs=command.top)
        last = None
        async for output in self._outputs(command, command.ids, wanted):
            last = output
        if last is None:
            raise EngineFailure("vLLM gave no scores")
        # Of each place the likeliest tokens, and the one that stands there: {token id: Logprob}. The first has none.
        places = [*last.prompt_logprobs[1:], last.outputs[0].logprobs[0]]
        chosen = [place[token].logprob for place, token in zip(places, command.ids[1:], strict=False)]
        top = [sorted(((-entry.logprob, token) for token, entry in place.items()))[: command.top] for place in places]
        return TokenScores(
            np.array(chosen, dtype=np.float32),
            np.array([[token for _, token in row] for row in top], dtype=np.int64),
            np.array([[-value for value, _ in row] for row in top], dtype=np.float32),
        )

    def _outputs(self, command: Generate | Score, ids: list[int], wanted: Any) -> AsyncIterator[Any]:
        from vllm.inputs import TokensPrompt

        adapter = None if command.adapter is None else self._adapters[command.adapter]
        prompt = TokensPrompt(prompt_token_ids=ids)
        return self._engine.generate(prompt, wanted, request_id=str(command.number), lora_request=adapter)

    def _sampling(self, command: Generate) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        parameters = command.parameters
        ends = self._end_ids | self._ends.get(command.adapter or "", frozenset())
        return SamplingParams(
            max_tokens=parameters.max_new_tokens,
            min_tokens=parameters.min_tokens,
            temperature=0.0 if parameters.greedy else parameters.temperature,
            top_p=1.0 if parameters.greedy else parameters.top_p,
            top_k=0 if parameters.greedy else parameters.top_k,
            min_p=0.0 if parameters.greedy else parameters.min_p,
            seed=parameters.seed,
            presence_penalty=parameters.presence_penalty,
            frequency_penalty=parameters.frequency_penalty,
            repetition_penalty=parameters.repetition_penalty,
            logit_bias=dict(parameters.logit_bias) or None,
            stop_token_ids=sorted(parameters.ends(ends)),
            # The model's own end tokens are vLLM's business too.
            ignore_eos=parameters.ignore_eos,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            structured_outputs=_structured(parameters.constraint),
        )

    def _deliver(self, event: Event) -> None:
        """Send what one turn of the loop brought in one message."""
        if not self._events:
            self._loop.call_soon(self._flush)
        self._events.append(event)

    def _flush(self) -> None:
        events, self._events = self._events, []
        self._connection.send(events)


def _structured(constraint: Constraint | None) -> Any:
    """vLLM's own form of ``constraint``."""
    from vllm.sampling_params import StructuredOutputsParams

    if constraint is None:
        return None
    if constraint.kind == "json":
        # Small models would go on with white space for ever.
        return StructuredOutputsParams(json=constraint.text, disable_any_whitespace=True)
    text = json.loads(constraint.text) if constraint.kind == "choice" else constraint.text
    return StructuredOutputsParams(**{constraint.kind: text})
