"""The other ways to serve a model on a CPU that `serving_load.py` measures raylm against; one process each.

    python tests/benchmarks/serving_peers.py KIND MODEL_DIRECTORY PORT THREADS

``naive``: Ray Serve and transformers as Serve's own streaming example has it, one text at a time, fp32.
``static``: transformers fp32, up to eight texts a `generate` call, without HTTP; reads jobs from stdin.
``llamacpp``: llama.cpp's server with eight slots through xllamacpp; MODEL_DIRECTORY is a GGUF file.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

STATIC_BATCH = 8


def naive(model: str, port: int, threads: int) -> None:
    """Serve until SIGTERM."""
    import ray
    from fastapi import FastAPI
    from fastapi.responses import StreamingResponse
    from ray import serve

    from raylm.cluster.local_access import local_access

    app = FastAPI()

    @serve.deployment(ray_actor_options={"num_cpus": threads}, max_ongoing_requests=64)
    @serve.ingress(app)
    class Naive:
        def __init__(self) -> None:
            import torch
            from transformers import AutoModelForCausalLM, AutoTokenizer

            torch.set_num_threads(threads)
            self._tokenizer = AutoTokenizer.from_pretrained(model)
            self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
            # Two texts at once would only take each other's cores.
            self._one = threading.Lock()

        @app.get("/health")
        def health(self) -> str:
            return "ok"

        @app.post("/v1/completions")
        def complete(self, body: dict) -> StreamingResponse:
            from transformers import TextIteratorStreamer

            streamer = TextIteratorStreamer(self._tokenizer, skip_prompt=True)
            inputs = self._tokenizer(body["prompt"], return_tensors="pt")
            arguments = {**inputs, "max_new_tokens": body["max_tokens"], "do_sample": False, "streamer": streamer}

            def generate() -> None:
                with self._one:
                    self._model.generate(**arguments)

            threading.Thread(target=generate).start()

            def events() -> Iterator[str]:
                count = 0
                for text in streamer:
                    count += 1
                    yield f"data: {json.dumps({'choices': [{'text': text}]})}\n\n"
                yield f"data: {json.dumps({'choices': [], 'usage': {'completion_tokens': count - 1}})}\n\n"
                yield "data: [DONE]\n\n"

            return StreamingResponse(events(), media_type="text/event-stream")

    with local_access():
        ray.init(address="local", include_dashboard=False, log_to_driver=False)
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        serve.run(Naive.bind(), name="naive", route_prefix="/")
        _wait_for_sigterm()
        ray.shutdown()


def static(model: str, threads: int) -> None:
    """Read jobs from stdin: ``{"texts": [...], "new_tokens": 64}``; print (first, whole, tokens) of each text."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.generation.streamers import BaseStreamer

    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)

    class FirstToken(BaseStreamer):
        """Notes when the second call comes: the first one hands over the prompt."""

        def __init__(self) -> None:
            self.calls, self.time = 0, 0.0

        def put(self, value: torch.Tensor) -> None:
            self.calls += 1
            if self.calls == 2:
                self.time = time.perf_counter()

        def end(self) -> None: ...

    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        texts, size = job["texts"], min(STATIC_BATCH, job["clients"])
        results, began = [], time.perf_counter()
        for place in range(0, len(texts), size):
            sent, streamer = time.perf_counter(), FirstToken()
            batch = tokenizer(texts[place : place + size], return_tensors="pt", padding=True)
            output = network.generate(**batch, max_new_tokens=job["new_tokens"], do_sample=False, streamer=streamer)
            whole, width = time.perf_counter() - sent, batch["input_ids"].shape[1]
            counts = (output[:, width:] != tokenizer.eos_token_id).sum(dim=1).tolist()
            results += [(streamer.time - sent, whole, count) for count in counts]
        print(json.dumps({"results": results, "seconds": time.perf_counter() - began}), flush=True)


def llamacpp(model: str, port: int, threads: int) -> None:
    """Serve until SIGTERM."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = model
    parameters.hostnames, parameters.port = ["127.0.0.1"], port
    parameters.n_parallel, parameters.n_ctx = 8, 8 * 512
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    parameters.n_gpu_layers, parameters.verbosity = 0, 0
    server = xllamacpp.Server(parameters)
    print(server.listening_address, flush=True)
    _wait_for_sigterm()
    # Leave without a farewell of its threads, which may still compute.
    os._exit(0)


def _wait_for_sigterm() -> None:
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    while not stop.wait(0.5):
        pass


if __name__ == "__main__":
    kind, path, port, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    if kind == "static":
        static(path, threads)
    elif kind == "naive":
        naive(path, port, threads)
    else:
        llamacpp(path, port, threads)
