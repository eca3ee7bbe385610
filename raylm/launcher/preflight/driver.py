"""``python -m raylm.launcher.preflight.driver`` on a cluster: calls the probes, prints their record as JSON.

``--storage FOLDER`` has a folder looked at that the nodes should share; ``--workers N --threads T`` has N workers of T
threads on each node timed, all at once.

Each wait has a bound: a node that does not answer is a finding, not an end.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import uuid
from collections.abc import Callable
from typing import Any

from raylm.cluster.session import ray_files, ray_session
from raylm.launcher.nodes import live_nodes
from raylm.launcher.preflight import probe, worker

# A node's first process of Ray may have to load 2 GB of packages from disk.
FIRST_SECONDS = 120.0
ANSWER_SECONDS = 60.0
CONNECT_SECONDS = 5.0
SIZES = (1 << 10, 1 << 16, 1 << 20, 1 << 23, 1 << 26)


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
    record: dict[str, Any] = {"nodes": nodes, "folder": storage, "seconds": {}}
    facts = _all(probes, lambda one: one.facts.remote(storage, files), FIRST_SECONDS)
    for node in nodes:
        node |= facts[node["address"]]
    probes = {address: one for address, one in probes.items() if "error" not in facts[address]}
    for name, step in {
        "clock": _clocks, "storage": _storage, "links": _links, "rates": _rates, "products": _products,
        "all_reduce": _all_reduce,
    }.items():  # fmt: skip
        began = time.monotonic()
        record[name] = step(probes, record)
        record["seconds"][name] = round(time.monotonic() - began, 1)
    if workers:
        began = time.monotonic()
        record["workers"] = _time_workers({node["address"]: node["id"] for node in nodes}, workers, threads)
        record["seconds"]["workers"] = round(time.monotonic() - began, 1)
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
    gpus = all(node.get("gpus") for node in record["nodes"])
    backend, first = ("nccl" if gpus else "gloo"), next(iter(probes))
    port = _all({first: probes[first]}, lambda one: one.free_port.remote())[first]
    if not isinstance(port, int):
        return port
    ranks = {address: rank for rank, address in enumerate(probes)}

    def call(one: Any) -> Any:
        address = _of(probes, one)
        return one.all_reduce.remote(ranks[address], len(ranks), (first, port), address, list(SIZES), backend)

    answers = _all(probes, call, 2 * ANSWER_SECONDS)
    if wrong := _first_error(answers):
        return {"error": wrong, "backend": backend}
    seconds = {str(size): max(answer[size] for answer in answers.values()) for size in SIZES}
    return {"backend": backend, "nodes": len(ranks), "seconds": seconds}


def _time_workers(nodes: dict[str, str], count: int, threads: int) -> dict[str, Any]:
    """What each of ``count`` workers on each node gets while all compute, and sums over a node's and over all of them.

    Args:
        nodes: Ray's ids by address.
    """
    started = {f"{address} {n}": _start(nodes[address], worker.WorkerProbe) for address in nodes for n in range(count)}
    found: dict[str, Any] = {"count": count, "threads": threads}
    answers = _all(started, lambda one: one.start.remote(threads), FIRST_SECONDS)
    if wrong := _first_error(answers):
        return found | {"error": wrong}
    found["rates"] = _all(started, lambda one: one.rates.remote())
    groups = {address: [f"{address} {n}" for n in range(count)] for address in nodes} if count > 1 else {}
    near = {address: _sums({name: started[name] for name in names}) for address, names in groups.items()}
    found["near"], found["far"] = near, _sums(started) if len(nodes) > 1 else {}
    wrong = _first_error(found["rates"]) or _first_error(near) or found["far"].get("error")
    return found | ({"error": wrong} if wrong else {})


def _sums(started: dict[str, Any]) -> dict[str, Any]:
    """Seconds of sums over these workers, by bytes; their keys begin with the addresses of their nodes."""
    first = next(iter(started))
    port = _all({first: started[first]}, lambda one: one.free_port.remote())[first]
    if not isinstance(port, int):
        return port
    names = list(started)

    def call(one: Any) -> Any:
        name = _of(started, one)
        return one.sums.remote(names.index(name), len(names), (first.split()[0], port), name.split()[0])

    answers = _all(started, call)
    if wrong := _first_error(answers):
        return {"error": wrong}
    sizes = next(iter(answers.values()))
    return {size: max(answer[size] for answer in answers.values()) for size in sizes}


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
