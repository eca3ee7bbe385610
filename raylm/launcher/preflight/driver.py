"""``python -m raylm.launcher.preflight.driver`` on a cluster: calls the probes, prints their record as JSON.

``--storage FOLDER`` has a folder looked at that the nodes should share; ``--workers N --threads T`` has N workers of T
threads on each node timed, all at once.

Each wait has a bound: a node that does not answer is a finding, not an end.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from raylm.cluster.session import ray_files, ray_session
from raylm.launcher.nodes import live_nodes
from raylm.launcher.preflight import probe, worker

# A node's first process of Ray may have to load 2 GB of packages from disk.
FIRST_SECONDS = 120.0
ANSWER_SECONDS = 60.0
CONNECT_SECONDS = 5.0
SIZES = (1 << 10, 1 << 16, 1 << 20, 1 << 23, 1 << 26)
ROUNDS = 6
# A step sees the mean of sums, of which single ones vary much where CPUs are shared.
WORKER_SIZES, WORKER_ROUNDS = (1 << 10, 1 << 22), 60


def examine(storage: str | None, workers: int = 0, threads: int = 1) -> dict[str, Any]:
    """The record of all nodes and what is between them. Ray must be connected.

    Args:
        storage: folder that the nodes should share.
        workers: of each node, that are timed at once; 0 times none.
        threads: of each of them.
    """
    import ray

    for module in (probe, worker):
        ray.cloudpickle.register_pickle_by_value(module)
    nodes = live_nodes()
    probes = {node["address"]: _start(node["id"], probe.NodeProbe) for node in nodes}
    files = str(ray_files())
    timed = {"count": workers, "threads": threads} if workers else None
    record: dict[str, Any] = {"nodes": nodes, "folder": storage, "workers": timed, "seconds": {}}
    facts = _all(probes, lambda one: one.facts.remote(storage, files), FIRST_SECONDS)
    for node in nodes:
        node |= facts[node["address"]]
    probes = {address: one for address, one in probes.items() if "error" not in facts[address]}
    for name, step in {
        "clock": _clocks, "storage": _storage, "links": _links, "rates": _rates, "products": _products,
        "all_reduce": _all_reduce, "workers": _workers,
    }.items():  # fmt: skip
        began = time.monotonic()
        record[name] = step(probes, record)
        record["seconds"][name] = round(time.monotonic() - began, 1)
    return record


def _start(node_id: str, kind: type) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    # It takes no CPU: a node that has none to give, or gives them to others, is looked at as well.
    return ray.remote(num_cpus=0, scheduling_strategy=there, max_restarts=0)(kind).remote()


def _all(probes: dict[str, Any], call: Callable[[Any], Any], seconds: float = ANSWER_SECONDS) -> dict[str, Any]:
    """What each probe answers; ``{"error": why}`` for one that does not within ``seconds``."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError

    asked = {address: call(one) for address, one in probes.items()}
    end, answers = time.monotonic() + seconds, {}
    for address, reference in asked.items():
        try:
            answers[address] = ray.get(reference, timeout=max(0.1, end - time.monotonic()))
        except GetTimeoutError:
            answers[address] = {"error": f"no answer within {seconds:.0f} s"}
        except RayError as error:
            answers[address] = {"error": _reason(error)}
    return answers


def _reason(error: Exception) -> str:
    """One line of what Ray says about a process that failed or died."""
    text = " ".join(str(error).split()) or type(error).__name__
    _, _, detail = text.partition("Worker exit detail: ")
    return f"its process died: {detail.partition('. ')[0]}" if detail else text[-300:]


def _clocks(probes: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """Seconds that each clock is ahead of this one, and how exactly that is known."""
    found: dict[str, Any] = {}
    for address, one in probes.items():
        best = None
        for _ in range(5):
            before = time.time()
            answer = _all({address: one}, lambda p: p.now.remote())[address]
            after = time.time()
            if isinstance(answer, dict):
                best = answer
                break
            within = (after - before) / 2
            if best is None or within < best["within"]:
                best = {"ahead": answer - before - within, "within": within}
        found[address] = best
    return found


def _storage(probes: dict[str, Any], record: dict[str, Any]) -> dict[str, Any] | None:
    """Per node: why it cannot write, and whose files it does not see."""
    storage = record["folder"]
    if storage is None:
        return None
    names = {address: f".raylm-check-{uuid.uuid4().hex}" for address in probes}
    written = _all(probes, lambda one: one.write.remote(storage, names[_of(probes, one)]))
    refused = {address: why if isinstance(why, str) else why["error"] for address, why in written.items() if why}
    owners = {names[address]: address for address in probes if address not in refused}
    seen = _all(probes, lambda one: one.missing.remote(storage, list(owners)))
    _all(probes, lambda one: one.remove.remote(storage, list(names.values())))
    return {
        address: {
            "refused": refused.get(address, ""),
            "unseen": [owners[name] for name in missing] if isinstance(missing, list) else [],
        }
        for address, missing in seen.items()
    }


def _of(probes: dict[str, Any], wanted: Any) -> str:
    return next(address for address, one in probes.items() if one is wanted)


def _links(probes: dict[str, Any], record: dict[str, Any]) -> list[dict[str, Any]]:
    """From each node to each other one: whether a connection is made, and its latency."""
    ports = {a: port for a, port in _all(probes, lambda one: one.listen.remote()).items() if isinstance(port, int)}
    record["ports"] = ports
    found = []
    for to, port in ports.items():
        others = {address: one for address, one in probes.items() if address != to}
        answers = _all(others, lambda one, to=to, port=port: one.link.remote(to, port, CONNECT_SECONDS))
        found += [{"from": address, "to": to, **answer} for address, answer in answers.items()]
    return found


def _rates(probes: dict[str, Any], record: dict[str, Any]) -> list[dict[str, Any]]:
    """Bytes a second from each node to the next, one pair after the other, round all of them both ways."""
    reached = {(link["from"], link["to"]) for link in record["links"] if not link.get("error")}
    addresses = list(record["ports"])
    following = list(zip(addresses, addresses[1:] + addresses[:1], strict=True))
    found = []
    for source, to in dict.fromkeys([*following, *((to, source) for source, to in following)]):
        if (source, to) not in reached:
            continue
        port = record["ports"][to]
        answer = _all({source: probes[source]}, lambda one, to=to, port=port: one.rate.remote(to, port, 10.0))[source]
        found.append({"from": source, "to": to, **(answer if isinstance(answer, dict) else {"rate": answer})})
    return found


def _products(probes: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    return _all(probes, lambda one: one.products.remote())


def _all_reduce(probes: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """Seconds of an all-reduce over all nodes, by bytes; with NCCL where every node has a GPU, else with gloo."""
    broken = [link for link in record["links"] if link.get("error")]
    if len(probes) < 2 or broken:
        return {"error": "a link is broken" if broken else "there is one node"}
    backend = "nccl" if all(node.get("gpus") for node in record["nodes"]) else "gloo"
    answers = _sums(probes, SIZES, backend, ROUNDS, 2 * ANSWER_SECONDS)
    if wrong := _first_error(answers):
        return {"error": wrong, "backend": backend}
    seconds = {str(size): max(statistics.median(one[size]) for one in answers.values()) for size in SIZES}
    return {"backend": backend, "nodes": len(probes), "seconds": seconds}


def _sums(
    probes: dict[str, Any], sizes: Sequence[int], backend: str, rounds: int, seconds: float = ANSWER_SECONDS
) -> dict[str, Any]:
    """What each of these processes takes for sums over all of them; their keys begin with their nodes' addresses."""
    names = list(probes)
    port = _all({names[0]: probes[names[0]]}, lambda one: one.free_port.remote())[names[0]]
    if not isinstance(port, int):
        return {names[0]: port}
    store = (names[0].split()[0], port)

    def call(one: Any) -> Any:
        name = _of(probes, one)
        return one.all_reduce.remote(
            names.index(name), len(names), store, name.split()[0], list(sizes), backend, rounds
        )

    return _all(probes, call, seconds)


def _workers(probes: dict[str, Any], record: dict[str, Any]) -> dict[str, Any] | None:
    """What each of so many workers on each node gets while all compute, and sums over a node's and over all of them."""
    if record["workers"] is None:
        return None
    count, threads = record["workers"]["count"], record["workers"]["threads"]
    ids = {node["address"]: node["id"] for node in record["nodes"]}
    started = {f"{address} {n}": _start(ids[address], worker.WorkerProbe) for address in probes for n in range(count)}
    found: dict[str, Any] = {"count": count, "threads": threads}
    answers = _all(started, lambda one: one.start.remote(threads), FIRST_SECONDS)
    if wrong := _first_error(answers):
        return found | {"error": wrong}
    found["rates"] = _all(started, lambda one: one.rates.remote())
    groups = {address: [f"{address} {n}" for n in range(count)] for address in probes} if count > 1 else {}
    found["near"] = {address: _mean_sums({name: started[name] for name in names}) for address, names in groups.items()}
    found["far"] = _mean_sums(started) if len(probes) > 1 else {}
    wrong = _first_error(found["rates"]) or _first_error(found["near"]) or found["far"].get("error")
    return found | ({"error": wrong} if wrong else {})


def _mean_sums(started: dict[str, Any]) -> dict[str, Any]:
    """Mean seconds of sums over these workers, by bytes."""
    answers = _sums(started, WORKER_SIZES, "gloo", WORKER_ROUNDS)
    if wrong := _first_error(answers):
        return {"error": wrong}
    return {str(size): max(statistics.fmean(one[size]) for one in answers.values()) for size in WORKER_SIZES}


def _first_error(answers: dict[str, Any]) -> str | None:
    return next((one["error"] for one in answers.values() if isinstance(one, dict) and "error" in one), None)


def main() -> None:
    """Print the record of the cluster that this process is on."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--storage")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    os.environ.setdefault("RAY_ADDRESS", "auto")
    with ray_session():
        record = examine(given.storage, given.workers, given.threads)
    print(json.dumps({"preflight": record}), flush=True)


if __name__ == "__main__":
    main()
