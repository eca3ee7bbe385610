"""Where ranks are, and what is said and kept of those that are lost."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from raylm.errors import RunFailure
from raylm.training.driver_log import driver_log
from raylm.training.ray_train.places import (
    LOGS,
    Loss,
    Place,
    answering,
    check_tensor_groups,
    describe_losses,
    gone_nodes,
    keep_logs,
    place_here,
)


def place(node: str, worker: str = "w", logs: str = "/nowhere") -> Place:
    return Place(node, f"host-{node} (10.0.0.{len(node)})", worker, 7, logs)


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as once:
        return once.getsockname()[1]


def test_tensor_parallel_ranks_on_several_nodes_are_refused() -> None:
    check_tensor_groups([place("a"), place("a"), place("bb"), place("bb")], 2)
    check_tensor_groups([place("a"), place("bb")], 1)
    with pytest.raises(
        RunFailure, match=r"^parallel\.tensor: found 2, but ranks 2 to 3, .*host-a .*, host-bb .*allowed"
    ):
        check_tensor_groups([place("a"), place("a"), place("a"), place("bb")], 2)


def test_a_lost_node_is_named_with_its_ranks() -> None:
    losses = [Loss("g", rank, place(node), "died") for rank, node in enumerate(("a", "bb", "bb"))]
    assert describe_losses(losses, {"bb"}) == "node host-bb (10.0.0.2) was lost with ranks 1, 2"
    assert describe_losses(losses[2:], set()) == "rank 2 on host-bb (10.0.0.2): the worker process died"
    assert describe_losses([Loss("g", 3, None, "died")], set()) == "rank 3: the worker process died"


def test_a_node_that_takes_no_connection_is_lost_before_the_cluster_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as open_port:
        nodes = [
            {"NodeID": name, "NodeManagerAddress": "127.0.0.1", "NodeManagerPort": port}
            for name, port in (("there", open_port.getsockname()[1]), ("gone", closed_port()))
        ]
        assert answering(nodes) == {"there"}
    assert answering([]) == set()


def test_logs_of_lost_ranks_are_kept(ray_instance: object, tmp_path: Path) -> None:
    """Files of a process that ran here, and what is known of one whose node is gone."""
    here = place_here()
    logs = tmp_path / "session"
    (logs / "train").mkdir(parents=True)
    (logs / "worker-abc-01-7.err").write_text("out of memory\n")
    (logs / "worker-abc-01-7.out").touch()
    (logs / "worker-other-01-8.err").write_text("of another\n")
    mine = Place(here.node, here.host, "abc", 7, str(logs))
    losses = [Loss("g1", 0, mine, "killed"), Loss("g1", 1, place("ab" * 28), "its node was lost")]
    assert gone_nodes([loss.place for loss in losses if loss.place]) == {"ab" * 28}
    assert keep_logs(losses, tmp_path / "run") == ["logs/g1-rank-00000", "logs/g1-rank-00001"]
    first, second = (tmp_path / "run" / LOGS / f"g1-rank-0000{rank}" for rank in (0, 1))
    assert {path.name for path in first.iterdir()} == {"worker-abc-01-7.err", "reason.txt"}
    assert (first / "worker-abc-01-7.err").read_text() == "out of memory\n"
    assert {path.name for path in second.iterdir()} == {"reason.txt"}
    assert (second / "reason.txt").read_text().endswith("\nits node was lost\n")


def test_what_the_driver_says_is_kept_without_the_drawing_of_bars(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RunFailure), driver_log() as log:
        print("before the run has a directory")
        log.begin(tmp_path, "abcd")
        print("bar 1%\r\x1b[2Kbar 2%\r\x1b[1mbar 3%\x1b[0m")
        raise RunFailure("rank 0: it broke")
    assert "bar 1%" in capsys.readouterr().out
    (path,) = (tmp_path / LOGS).glob("driver-*-abcd.txt")
    said = [line.partition(" ")[2] for line in path.read_text().splitlines()]
    assert said == ["before the run has a directory", "bar 3%", "RunFailure: rank 0: it broke"]


def test_a_start_that_is_refused_leaves_no_log(tmp_path: Path) -> None:
    with driver_log():
        print("refused")
    assert list(tmp_path.iterdir()) == []
