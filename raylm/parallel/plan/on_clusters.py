"""``raylm plan`` for a cluster that need not be there: layout, time and price on each kind of its nodes.

In: a training file, a cluster file (:mod:`raylm.parallel.plan.node_types`) or as many workers as the training file
says, and what neither says: GPUs of machines that Ray asks itself, network, prices, measured figures. Out: text, or the
plans themselves. Nothing is started, and nothing asked of a cloud.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from raylm.cluster.capacity import SHARE_OF_NODE, Capacity, Node
from raylm.cluster.hardware import CPU, GPUS, NETWORK, Figures, gpu_figures
from raylm.config.stages import TrainConfig
from raylm.errors import UserError
from raylm.parallel.plan.description import digits
from raylm.parallel.plan.measured import Measured, read_measured
from raylm.parallel.plan.node_types import NodeType, read_node_types
from raylm.parallel.plan.planning import Plan, check_model, make_plan, refuse_counted_plan

if TYPE_CHECKING:
    from raylm.parallel.plan.planning import TrainedModel


@dataclass(frozen=True)
class Terms:
    """What the command line says of a cluster beside its file.

    Attributes:
        gpus: kind and number on each worker node, where the file names none.
        network: between nodes, bytes/s of a node, whatever is known of them.
        prices: dollars an hour of a node, by its name in the file; by "" of any other worker.
        measured: figures by the names of :class:`raylm.cluster.hardware.Figures`, and the file that they are from.
    """

    gpus: tuple[str, int] | None = None
    network: float | None = None
    prices: Mapping[str, float] = field(default_factory=dict)
    measured: Measured | None = None


def read_terms(gpus: str | None, network: float | None, prices: list[str], measured: Path | None) -> Terms:
    """The options of ``raylm plan``: KIND:COUNT, Gbit/s, PRICE or NAME=PRICE, and a JSON file.

    Raises:
        UserError: names the option, what was found and what is allowed.
    """
    pair = None
    if gpus is not None:
        kind, _, count = gpus.partition(":")
        if kind not in GPUS or not re.fullmatch(r"[1-9]\d?", count):
            raise UserError(f"--gpus: found '{gpus[:100]}', allowed: KIND:COUNT with a kind of {', '.join(GPUS)}")
        pair = kind, int(count)
    if network is not None and not 0 < network < 1e6:
        raise UserError(f"--network: found {network:g}, allowed: Gbit/s of a node, above 0")
    found: dict[str, float] = {}
    for price in prices:
        name, _, text = price.rpartition("=")
        if not re.fullmatch(r"\d{1,9}(\.\d{1,9})?", text):
            raise UserError(
                f"--price: found '{price[:100]}', allowed: dollars an hour of a node, as 32.77 or NAME=32.77"
            )
        found[name] = float(text)
    return Terms(
        pair,
        None if network is None else network * 1e9 / 8,
        found,
        None if measured is None else read_measured(measured),
    )


def describe_plan(config: TrainConfig, path: Path | None, terms: Terms, vocab_size: int | None = None) -> str:
    """What ``raylm plan`` prints.

    Args:
        path: cluster file; None for this machine, or the cluster that ``resources`` describes.
        vocab_size: of a new model, with which neither data nor a tokenizer need be there.

    Raises:
        UserError: what is refused, with the reason.
    """
    if path is None and terms.gpus is None:
        options = {"--network": terms.network, "--price": terms.prices}
        if given := [name for name, value in options.items() if value]:
            raise UserError(f"{given[0]}: found without --cluster and --gpus, allowed with one of them")
        refuse_counted_plan(config)
        model = None if vocab_size is None else check_model(config, vocab_size=vocab_size)
        return make_plan(config, model=model, measured=terms.measured).describe()
    found = plan_on_cluster(config, path, terms, vocab_size)
    return "\n\n".join("\n".join([one.heading, one.plan.describe(), *_cost_lines(one)]) for one in found)


@dataclass(frozen=True)
class PlannedNodes:
    """A plan for one kind of node.

    Attributes:
        nodes: that have ranks.
        heading: the nodes in words.
        price: dollars an hour of all nodes that the layout needs, a head that has a price included; None without one.
    """

    plan: Plan
    nodes: int
    heading: str
    price: float | None

    @property
    def billion_hours(self) -> float:
        """Hours for 10^9 tokens; infinite where not even the weights fit."""
        return 1e9 / 3600 / self.plan.tokens_per_second if self.plan.tokens_per_second else float("inf")


def plan_on_cluster(
    config: TrainConfig, path: Path | None, terms: Terms, vocab_size: int | None = None
) -> list[PlannedNodes]:
    """A plan for each kind of node that can take ranks; see :func:`describe_plan`."""
    refuse_counted_plan(config)
    origin = "--gpus" if path is None else str(path)
    types = _asked(config, terms) if path is None else _completed(read_node_types(path), config, terms, origin)
    names = list(dict.fromkeys(one.name for one in types))
    if unknown := [name for name in terms.prices if name and name not in names]:
        raise UserError(f"--price: found a node type '{unknown[0][:100]}', allowed: {', '.join(names)}")
    model = _model(config, vocab_size)
    found = []
    for nodes in _groups(types, config):
        network = terms.network
        if nodes and nodes[0].gpus and config.resources.gpus_per_worker != 0:
            network = network or min(one.network or NETWORK for one in nodes)
            figures = gpu_figures(str(nodes[0].kind), nodes[0].gpus, network, f"{origin}: {nodes[0].name}")
        else:
            per_node = _capacity(nodes).places_per_node(config.resources)
            figures = CPU if network is None else replace(CPU, far_bandwidth=network / per_node)
        plan = make_plan(config, _capacity(nodes), figures, model, terms.measured)
        figures = plan.space.figures
        needed = -(-plan.layout.workers // plan.space.per_node)
        found.append(PlannedNodes(plan, needed, _heading(nodes, figures, network), _price(needed, nodes, types, terms)))
    return found


def _asked(config: TrainConfig, terms: Terms) -> list[NodeType]:
    """Nodes for the workers that the training file wants, without a cluster file."""
    assert terms.gpus is not None
    workers, (kind, gpus) = config.resources.workers, terms.gpus
    if not isinstance(workers, int):
        raise UserError(f"resources.workers: found {workers}, allowed with --gpus and without --cluster: a number")
    return [NodeType("node", -(-workers // gpus), gpus * config.resources.cpus_per_worker, gpus, kind)]


def _completed(types: list[NodeType], config: TrainConfig, terms: Terms, origin: str) -> list[NodeType]:
    """The nodes with what the command line and the training file say of them."""
    resources = config.resources
    on_gpus = resources.gpus_per_worker != 0 and (terms.gpus is not None or any(one.gpus for one in types))
    found = []
    for one in types:
        if terms.gpus is not None and not one.gpus and not one.head:
            one = replace(one, kind=terms.gpus[0], gpus=terms.gpus[1])
        elif terms.gpus is not None and one.gpus and one.kind is None:
            one = replace(one, kind=terms.gpus[0])
        if one.gpus and one.kind is None:
            raise UserError(
                f"{origin}: {one.name}: found {one.gpus} GPUs of a kind that is not named, allowed: a resource "
                "accelerator_type:KIND, a known machine type, a node selector, or --gpus KIND:COUNT"
            )
        if not one.gpus:
            one = replace(one, kind=None)
        if one.cpus is None:
            workers = one.gpus or resources.workers_per_node or 0
            # Beside GPUs, a node without them takes no rank.
            if not workers and not one.head and not on_gpus:
                raise UserError(
                    f"{origin}: {one.name}: found {one.machine or 'a node without resources'}, neither CPUs nor GPUs "
                    "of which are known, allowed: resources with CPU and GPU, --gpus KIND:COUNT, or "
                    "resources.workers_per_node in the training file"
                )
            one = replace(one, cpus=workers * resources.cpus_per_worker)
        found.append(one)
    return found


def _groups(types: list[NodeType], config: TrainConfig) -> list[list[NodeType]]:
    """The nodes that can take ranks together: those with the same GPUs, or else all with CPUs."""
    with_gpus = [one for one in types if one.gpus]
    if not with_gpus or config.resources.gpus_per_worker == 0:
        return [[one for one in types if one.cpus]]
    kinds = dict.fromkeys((one.kind, one.gpus) for one in with_gpus)
    return [[one for one in with_gpus if (one.kind, one.gpus) == kind] for kind in kinds]


def _capacity(nodes: list[NodeType]) -> Capacity:
    return Capacity(
        tuple(
            Node(
                one.cpus or 0.0,
                float(one.gpus),
                None if one.memory is None else one.memory * SHARE_OF_NODE,
                GPUS[one.kind].gib * 2.0**30 if one.kind else None,
            )
            for one in nodes
            for _ in range(one.count)
        )
    )


def _model(config: TrainConfig, vocab_size: int | None) -> TrainedModel:
    if config.model.path is not None or vocab_size is not None:
        return check_model(config, vocab_size=vocab_size)
    try:
        return check_model(config)
    except UserError as error:
        # The data may be on the cluster only. The size of a tokenizer that is still to be trained is in the file.
        section = config.tokenizer
        if section is None or section.vocab_size is None:
            raise UserError(f"{error}; raylm plan needs neither with --vocabulary") from None
        return check_model(config, vocab_size=section.vocab_size)


def _heading(nodes: list[NodeType], figures: Figures, network: float | None) -> str:
    names = ", ".join(f"{one.count} x {one.name}{' (head)' if one.head else ''}" for one in nodes)
    has = f"{nodes[0].gpus} {figures.kind}" if nodes[0].gpus else f"{nodes[0].cpus:g} CPUs"
    told = any(one.network for one in nodes)
    assumed = ", assumed" if network == NETWORK and not told else ""
    speed = "" if network is None else f", {network * 8 / 1e9:,.0f} Gbit/s between nodes{assumed}"
    return f"nodes           {names}; each with {has}{speed}"


def _cost_lines(found: PlannedNodes) -> list[str]:
    """Hours, and dollars where there is a price: for 10^9 tokens, and for the run where its length is known."""
    plan, training = found.plan, found.plan.config.training
    if not plan.tokens_per_second:
        return []
    total = training.tokens or (training.steps or 0) * training.batch_size * training.sequence_length
    run = total / 1e9 * found.billion_hours
    lines = [
        f"hours           {digits(found.billion_hours)} for 10^9 tokens" + (f", {digits(run)} for the run" * (run > 0))
    ]
    if found.price is not None:
        whole = f", ${digits(found.price * run)} for the run" * (run > 0)
        lines.append(
            f"cost            ${digits(found.price * found.billion_hours)} for 10^9 tokens{whole}, at "
            f"${digits(found.price)} an hour for {found.nodes} {'node' if found.nodes == 1 else 'nodes'}"
        )
    return lines


def _price(workers: int, nodes: list[NodeType], types: list[NodeType], terms: Terms) -> float | None:
    """Dollars an hour of the nodes with ranks, and of a head with a price that has none; None without prices."""
    left, total = workers, 0.0
    for one in nodes:
        price = terms.prices.get(one.name, terms.prices.get(""))
        used = min(left, one.count)
        if used and price is None:
            return None
        total += used * (price or 0.0)
        left -= used
    heads = {one.name for one in types if one.head and one not in nodes}
    return total + sum(terms.prices.get(name, 0.0) for name in heads)
