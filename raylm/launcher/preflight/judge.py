"""What of a preflight's record would break a run or slow it down, and the remedy; the record as a table."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from raylm.doctor.finding import GB, Finding, gigabytes

# A checkpoint of a small model and Ray's logs; and what Ray spills to a disk, on which it writes no more at 95%.
LEAST_FREE = 2 * GB
RAY_FULL = 0.95
LEAST_SHARED = 0.5 * GB
# What Ray asks for, and with how few it fails.
WANTED_FILES, LEAST_FILES = 65_536, 4_096
# Leases and the age of checkpoints are in seconds.
MOST_AHEAD = 1.0
# Share of the others' median below which a node holds all of them up.
SLOW = 0.5
SLOW_LATENCY = 5e-3
# Bytes a second below which only tiny models are trained over a link.
LEAST_RATE = 30e6
INSTALL = "install the locked set there: python jobs/environment.py"


@dataclass(frozen=True)
class NodeFinding:
    """A finding about one node; ``node`` is its address, or "cluster"."""

    node: str
    finding: Finding


def judge(record: dict[str, Any], wanted: list[str], versions: dict[str, str]) -> list[NodeFinding]:
    """All that is wrong.

    Args:
        record: the driver's.
        wanted: addresses that should be nodes.
        versions: of the packages on the machine that asks.
    """
    return [
        *_missing(record, wanted), *_packages(record, versions), *_space(record), *_limits(record), *_storage(record),
        *_clocks(record), *_ports(record), *_network(record), *_speed(record), *_gpus(record), *_access(record),
    ]  # fmt: skip


def _missing(record: dict[str, Any], wanted: list[str]) -> Iterator[NodeFinding]:
    there = {node["address"] for node in record["nodes"]}
    for address in wanted:
        if address not in there:
            mend = "its ports may be closed to the head; raylm cluster up starts it again, and its log says why not"
            yield NodeFinding(address, Finding("node", "not in the cluster", "broken", mend))
    for node in record["nodes"]:
        if "error" in node:
            mend = "the ports of its workers (10002 to 19999) may be closed, or it has no memory or disk left"
            yield NodeFinding(node["address"], Finding("node", node["error"], "broken", mend))


def _answering(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [node for node in record["nodes"] if "error" not in node]


def _packages(record: dict[str, Any], versions: dict[str, str]) -> Iterator[NodeFinding]:
    """What differs from the version that most nodes have; and the cluster's Ray from that of this machine."""
    nodes = _answering(record)
    names = list(dict.fromkeys(name for node in nodes for name in node["packages"]))
    for name in ("python", *names):
        found = [node["python"] if name == "python" else node["packages"].get(name) for node in nodes]
        usual, count = Counter(found).most_common(1)[0]
        for node, version in zip(nodes, found, strict=True):
            if version != usual:
                text = f"{name} {version or 'missing'}; {count} of {len(nodes)} nodes have {usual or 'none'}"
                yield NodeFinding(node["address"], Finding("packages", text, "broken", INSTALL))
        here = versions.get(name)
        if here and usual and here != usual and name in ("python", "ray", "raylm"):
            text = f"{name} {usual} on the nodes, {here} on this machine"
            state = "broken" if name == "ray" else "warning"
            yield NodeFinding("cluster", Finding("packages", text, state, "install the same locked set on both"))


def _space(record: dict[str, Any]) -> Iterator[NodeFinding]:
    for node in record["nodes"]:
        # Of a node that does not answer they may be known all the same, and be the reason.
        disk, shared = node.get("disk"), node.get("shared_memory")
        if disk and (disk["free"] < LEAST_FREE or disk["free"] < (1 - RAY_FULL) * disk["total"]):
            text = f"{gigabytes(disk['free'])} of {gigabytes(disk['total'])} free where Ray writes"
            mend = "free some space, or ray start --temp-dir on another disk"
            yield NodeFinding(node["address"], Finding("disk", text, "broken", mend))
        if shared and shared["free"] < LEAST_SHARED:
            text = f"{gigabytes(shared['free'])} free in /dev/shm"
            mend = "docker run --shm-size=8g, an emptyDir with medium Memory in Kubernetes, or end who holds it"
            yield NodeFinding(node["address"], Finding("shared memory", text, "warning", mend))


def _limits(record: dict[str, Any]) -> Iterator[NodeFinding]:
    for node in _answering(record):
        files = node["open_files"]
        if files is not None and 0 < files < WANTED_FILES:
            state = "broken" if files < LEAST_FILES else "warning"
            mend = f"ulimit -n {WANTED_FILES} before ray start, or in /etc/security/limits.conf"
            yield NodeFinding(node["address"], Finding("open files", f"at most {files:,}", state, mend))


def _storage(record: dict[str, Any]) -> Iterator[NodeFinding]:
    folder, seen = record["folder"], record["storage"]
    if not seen:
        return
    for address, found in seen.items():
        if found["refused"]:
            text = f"{folder} cannot be written: {found['refused']}"
            yield NodeFinding(address, Finding("storage", text, "broken", "mount it there for the user who runs Ray"))
    others = len(seen) - 1
    unseen = {address: [other for other in found["unseen"] if other != address] for address, found in seen.items()}
    # One that sees few of the others is apart; those that miss but that one are not to blame.
    apart = [address for address, missing in unseen.items() if 2 * len(missing) > others]
    for address in apart or [address for address, missing in unseen.items() if missing]:
        text = f"{folder} is not shared: files of {', '.join(unseen[address])} are not there"
        mend = "mount the same folder (NFS, EFS, Lustre) on all nodes"
        yield NodeFinding(address, Finding("storage", text, "broken", mend))
    for node in _answering(record):
        space = node["storage"]
        if space and space["free"] < LEAST_FREE and not seen.get(node["address"], {}).get("refused"):
            text = f"{gigabytes(space['free'])} free in {folder}"
            yield NodeFinding(node["address"], Finding("storage", text, "broken", "free some space"))


def _clocks(record: dict[str, Any]) -> Iterator[NodeFinding]:
    for address, clock in record["clock"].items():
        if "ahead" in clock and abs(clock["ahead"]) > MOST_AHEAD + clock["within"]:
            way = "ahead of" if clock["ahead"] > 0 else "behind"
            text = f"{abs(clock['ahead']):,.1f} s {way} the head's"
            mend = "run chrony or systemd-timesyncd on all nodes"
            yield NodeFinding(address, Finding("clock", text, "broken", mend))


def _ports(record: dict[str, Any]) -> Iterator[NodeFinding]:
    """Who cannot be reached: the node that most broken links have in common."""
    broken = [link for link in record["links"] if link.get("error")]
    while broken:
        ends = Counter(link["to"] for link in broken) + Counter(link["from"] for link in broken)
        worst = max(ends, key=lambda address: (ends[address], sum(link["to"] == address for link in broken)))
        others = sorted(
            {
                link["from"] if link["to"] == worst else link["to"]
                for link in broken
                if worst in (link["from"], link["to"])
            }
        )
        error = next(link["error"] for link in broken if worst in (link["from"], link["to"]))
        text = f"no connection with {', '.join(others)} at a port that is not Ray's: {error}"
        mend = "open all TCP ports between the nodes: training connects at ports that the system gives"
        yield NodeFinding(worst, Finding("ports", text, "broken", mend))
        broken = [link for link in broken if worst not in (link["from"], link["to"])]


def _network(record: dict[str, Any]) -> Iterator[NodeFinding]:
    best = _node_rates(record)
    for address, rate in best.items():
        if rate < LEAST_RATE:
            text, mend = f"{_rate(rate)} to its best neighbour", "training across nodes wants 10 Gbit/s and more"
            yield NodeFinding(address, Finding("network", text, "warning", mend))
    best = {address: rate for address, rate in best.items() if rate >= LEAST_RATE}
    yield from _slower(best, "network", "its link is slow: look at the cable, the switch, the instance type", _rate)
    for address in best:
        times = [
            link["latency"] for link in record["links"] if address in (link["from"], link["to"]) and "latency" in link
        ]
        if times and min(times) > SLOW_LATENCY:
            text = f"{min(times) * 1e3:.1f} ms to the nearest node"
            yield NodeFinding(address, Finding("network", text, "warning", "put the nodes into one network or zone"))
    for one in record["rates"]:
        if one.get("error"):
            text = f"no rate to {one['to']}: {one['error']}"
            yield NodeFinding(one["from"], Finding("network", text, "broken", "the link breaks under load"))
    wrong = record["all_reduce"].get("error")
    if wrong and len(record["nodes"]) > 1 and not any(link.get("error") for link in record["links"]):
        mend = "GLOO_SOCKET_IFNAME (NCCL_SOCKET_IFNAME) names the interface that the nodes share"
        yield NodeFinding("cluster", Finding("all-reduce", wrong, "broken", mend))


def _node_rates(record: dict[str, Any]) -> dict[str, float]:
    """Bytes a second that each node sends or takes, whichever is less, over the best of its links."""
    rates = [one for one in record["rates"] if one.get("rate")]
    found = {}
    for address in dict.fromkeys(one[end] for one in rates for end in ("from", "to")):
        ways = [[one["rate"] for one in rates if one[end] == address] for end in ("from", "to")]
        found[address] = min(max(way) for way in ways if way)
    return found


def _slower(values: dict[str, float], what: str, mend: str, written: Any) -> Iterator[NodeFinding]:
    """Those below half of the others' median."""
    for address, value in values.items():
        others = [other for name, other in values.items() if name != address]
        if others and value < SLOW * statistics.median(others):
            text = f"{written(value)}; the others have {written(statistics.median(others))}"
            yield NodeFinding(address, Finding(what, text, "warning", mend))


def _speed(record: dict[str, Any]) -> Iterator[NodeFinding]:
    """Nodes that are slower than others of the same hardware."""
    kinds: dict[tuple, dict[str, float]] = {}
    for node in _answering(record):
        products = record["products"].get(node["address"], {})
        if "float32" in products:
            kind = (node["cpu"], node["cpus"], *(gpu["name"] for gpu in node["gpus"]))
            kinds.setdefault(kind, {})[node["address"]] = products["float32"]
    for values in kinds.values():
        mend = "something else runs there, or it is throttled; all workers wait for the slowest"
        yield from _slower(values, "speed", mend, _flops)


def _gpus(record: dict[str, Any]) -> Iterator[NodeFinding]:
    for node in _answering(record):
        seen, given = len(node["gpus"]), node["resources"].get("GPU", 0)
        if seen and not given:
            text = f"{seen} GPUs, of which Ray has none"
            mend = "ray start --num-gpus, or in a container --gpus all"
            yield NodeFinding(node["address"], Finding("gpus", text, "warning", mend))
        if seen and node["cuda"] is None:
            text = "torch is a CPU build"
            yield NodeFinding(node["address"], Finding("gpus", text, "broken", INSTALL))
        for number, gpu in enumerate(node["gpus"]):
            if gpu["used"] > 0.1 * gpu["memory"]:
                text = f"{gigabytes(gpu['used'])} of GPU {number} are in use"
                yield NodeFinding(node["address"], Finding("gpus", text, "warning", "end who holds them (nvidia-smi)"))


def _access(record: dict[str, Any]) -> Iterator[NodeFinding]:
    if any(not node["token"] for node in _answering(record)):
        mend = "start all nodes with RAY_AUTH_MODE=token and a token file, as cluster/local.yaml does"
        text = "no token: whoever reaches its ports may run code on it"
        yield NodeFinding("cluster", Finding("access", text, "warning", mend))


def rows(record: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row a node, below a head."""
    table = [("node", "CPUs", "memory", "GPUs", "disk free", "storage free", "clock", "network", "products")]
    rates = _node_rates(record)
    for node in record["nodes"]:
        address = node["address"]
        name = f"{address}{' (head)' if node['head'] else ''}"
        if "error" in node:
            table.append((name, "?", "?", "?", "?", "?", "?", "?", "?"))
            continue
        clock, products = record["clock"].get(address) or {}, record["products"].get(address, {})
        measured = [value for value in products.values() if isinstance(value, float)]
        table.append((
            name, str(node["cpus"]), gigabytes(node["memory"]), _gpu_names(node["gpus"]), _free(node["disk"]),
            _free(node["storage"]), f"{clock['ahead'] * 1e3:+.0f} ms" if "ahead" in clock else "?",
            _rate(rates[address]) if address in rates else "-", _flops(max(measured)) if measured else "?",
        ))  # fmt: skip
    return table


def all_reduce_line(record: dict[str, Any]) -> str:
    """What sums over all nodes take; empty where they were not measured."""
    measured = record["all_reduce"]
    if "seconds" not in measured:
        return ""
    times = [f"{_size(int(size))} {seconds * 1e3:,.2f} ms" for size, seconds in measured["seconds"].items()]
    return f"all-reduce over {measured['nodes']} nodes ({measured['backend']}): {', '.join(times)}"


def workers_line(record: dict[str, Any]) -> str:
    """What workers that compute at once get; empty where they were not timed."""
    timed = record.get("workers")
    if not timed:
        return ""
    who = f"{timed['count']} workers a node at once"
    if "error" in timed:
        return f"{who}: {timed['error']}"
    rates = timed["rates"].values()
    least = {name: min(one[name] for one in rates) for name in ("matrix_flops", "attention_flops", "memory_bandwidth")}
    return (
        f"{who}, the slowest: products {_flops(least['matrix_flops'])}, attention {_flops(least['attention_flops'])}, "
        f"memory {_rate(least['memory_bandwidth'])}"
    )


def _size(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"


def _gpu_names(gpus: list[dict[str, Any]]) -> str:
    counted = Counter(gpu["name"] for gpu in gpus)
    return ", ".join(f"{count} x {name}" for name, count in counted.items()) or "-"


def _free(space: dict[str, int] | None) -> str:
    return gigabytes(space["free"]) if space else "-"


def _rate(value: float) -> str:
    return f"{value / GB:.2f} GB/s" if value >= 0.1 * GB else f"{value / 1e6:.1f} MB/s"


def _flops(value: float) -> str:
    return f"{value / 1e12:.1f} TFLOP/s" if value >= 1e12 else f"{value / 1e9:.0f} GFLOP/s"
