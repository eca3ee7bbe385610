"""Machines on this one, for clusters: each has its own network, processes, /tmp, /dev/shm, home directory and sshd.

They are namespaces of Linux, joined by a bridge; the rest of the file system is this machine's. Needs root.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 30.0
NEEDED = ("ip", "nsenter", "unshare", "mount", "ssh", "ssh-keygen", "rsync")
SSHD = "/usr/sbin/sshd"
# prctl(2)
PR_SET_PDEATHSIG = 1

# The first process of a host; it dies with all others of the host. What a covered directory has and the host needs is
# mounted again. Processes without a parent become its own, and it reaps them.
_INIT = """
set -e
mount --make-rprivate /
hostname {name}
cover() {{
  directory=$1; shift
  mount -t tmpfs -o size=$1,mode=1777 tmpfs /mnt; shift
  for kept in "$@"; do
    mkdir -p "/mnt/${{kept#"$directory"/}}"
    mount --rbind "$kept" "/mnt/${{kept#"$directory"/}}"
  done
  mount --move /mnt "$directory"
}}
{covers}
mount -t tmpfs -o size={shared_memory},mode=1777 tmpfs /dev/shm
mount -t tmpfs -o size=16m tmpfs /run
mkdir -p /run/sshd
mount --bind {directory}/hosts /etc/hosts
log={directory}/{name}.log
env -i HOME="$HOME" PATH=/usr/sbin:/usr/bin:/sbin:/bin {sshd} -D -e -f {directory}/sshd-{name} >$log 2>&1 &
trap 'exit 0' TERM
set +e
while :; do wait -n 2>/dev/null || sleep 0.2; done
"""
_SSHD = """
ListenAddress {address}:22
HostKey {directory}/host_key
AuthorizedKeysFile {directory}/key.pub
StrictModes no
UsePAM no
UseDNS no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
PidFile none
MaxSessions 100
MaxStartups 100
PrintMotd no
PrintLastLog no
"""


def why_not() -> str:
    """What this machine lacks; empty where hosts can be made."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need root on Linux"
    missing = [name for name in NEEDED if shutil.which(name) is None] + ([] if Path(SSHD).exists() else ["sshd"])
    return f"not installed: {', '.join(missing)}" if missing else ""


@dataclass
class Host:
    """One machine.

    Attributes:
        name, address: as the others know it.
        namespace: of its network.
        process: its first, which all others end with.
    """

    name: str
    address: str
    namespace: str
    process: subprocess.Popen[bytes]

    def command(self, *command: str) -> list[str]:
        """What runs a command on it."""
        return ["nsenter", f"--target={self._first()}", "--mount", "--uts", "--ipc", "--net", "--pid", *command]

    def run(self, *command: str, seconds: float = PATIENCE_SECONDS, check: bool = True) -> str:
        """Run a command on it; what it wrote. It gets nothing that this process or its tests set for Ray."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        done = subprocess.run(self.command(*command), capture_output=True, text=True, timeout=seconds, env=environment)
        assert not check or done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    def processes(self) -> list[str]:
        """The command lines of all its processes but the first, sshd and this one."""
        lines = self.run("ps", "-eo", "pid=,args=").splitlines()
        found = [line.strip().partition(" ") for line in lines]
        return [args for pid, _, args in found if pid != "1" and not args.startswith(("ps ", "sshd", "sleep", SSHD))]

    def lose(self) -> None:
        """End it at once, as if its power were cut."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._first(), signal.SIGKILL)
        self.process.wait(PATIENCE_SECONDS)

    def _first(self) -> int:
        """Its first process, as this machine counts; the child of `unshare`."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0])


class Hosts:
    """Several machines and the bridge between them; this machine is on it as well.

    Args:
        directory: for keys, logs, and what the hosts share.
        count: of machines.
        kept: paths below /tmp or the home directory that the hosts see, beside Python's and the repository's.
    """

    def __init__(self, directory: Path, count: int, kept: Sequence[Path] = ()) -> None:
        self.directory, self.hosts = directory, []
        self.shared = directory / "shared"
        self.shared.mkdir(parents=True)
        self._kept = [Path(sys.prefix), Path(sys.base_prefix), ROOT, directory, *kept]
        self._number = 20 + os.getpid() % 200
        self._bridge = f"raylm{self._number}"
        self.key = directory / "key"
        for key in (self.key, directory / "host_key"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
        names = {f"host{number}": self._address(number) for number in range(1, count + 1)}
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in names.items())]
        (directory / "hosts").write_text("\n".join(lines) + "\n")
        _run("ip", "link", "add", self._bridge, "type", "bridge")
        _run("ip", "addr", "add", f"{self._address(254)}/24", "dev", self._bridge)
        _run("ip", "link", "set", self._bridge, "up")
        for number in range(1, count + 1):
            self.add(number)

    def _address(self, number: int) -> str:
        return f"10.77.{self._number}.{number}"

    def add(self, number: int) -> Host:
        """Start host ``number``, new or once more after it was lost."""
        name, address = f"host{number}", self._address(number)
        namespace, link = f"{self._bridge}h{number}", f"rl{self._number}v{number}"
        self._remove_network(namespace, link)
        _run("ip", "netns", "add", namespace)
        _run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        _run("ip", "link", "set", link, "master", self._bridge, "up")
        _run("ip", "-n", namespace, "link", "set", "lo", "up")
        _run("ip", "-n", namespace, "addr", "add", f"{address}/24", "dev", "eth0")
        _run("ip", "-n", namespace, "link", "set", "eth0", "up")
        (self.directory / f"sshd-{name}").write_text(_SSHD.format(address=address, directory=self.directory))
        init = _INIT.format(
            name=name, covers=self._covers(), shared_memory="1g", directory=shlex.quote(str(self.directory)), sshd=SSHD
        )
        command = [
            "nsenter", f"--net=/var/run/netns/{namespace}", "unshare", "--mount", "--uts", "--ipc", "--pid", "--fork",
            "--kill-child", "--mount-proc", "bash", "-c", init,
        ]  # fmt: skip
        with (self.directory / f"init-{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                preexec_fn=_end_with_parent,
            )  # fmt: skip
        host = Host(name, address, namespace, process)
        self.hosts = [*(other for other in self.hosts if other.name != name), host]
        self._await_ssh(host)
        return host

    def _covers(self) -> str:
        """The home directory and /tmp, the one that holds the other first."""
        lines = []
        for place, size in sorted([("/tmp", "3g"), (str(Path.home()), "1g")]):
            inside = {str(path) for path in self._kept if path.is_relative_to(place) and str(path) != place}
            # One within another comes with it.
            outer = [
                path
                for path in inside
                if not any(Path(path) != Path(o) and Path(path).is_relative_to(o) for o in inside)
            ]
            lines.append(shlex.join(["cover", place, size, *sorted(outer)]))
        return "\n".join(lines)

    def ssh(self, host: Host, *command: str) -> list[str]:
        """What runs a command over ssh."""
        options = ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"]
        return ["ssh", "-i", str(self.key), *options, "-o", "ConnectTimeout=5", f"root@{host.address}", *command]

    def _await_ssh(self, host: Host) -> None:
        end = time.monotonic() + PATIENCE_SECONDS
        while subprocess.run(self.ssh(host, "true"), capture_output=True).returncode:
            log = (self.directory / f"init-{host.name}.log").read_text()
            assert time.monotonic() < end and host.process.poll() is None, log
            time.sleep(0.2)

    def close(self) -> None:
        """End all of it."""
        for host in self.hosts:
            with contextlib.suppress(IndexError, OSError):
                host.lose()
            link = f"rl{self._number}v{host.name.removeprefix('host')}"
            self._remove_network(host.namespace, link)
        subprocess.run(["ip", "link", "del", self._bridge], capture_output=True)

    def _remove_network(self, namespace: str, link: str) -> None:
        subprocess.run(["ip", "link", "del", link], capture_output=True)
        subprocess.run(["ip", "netns", "del", namespace], capture_output=True)


@contextlib.contextmanager
def hosts(directory: Path, count: int, kept: Sequence[Path] = ()) -> Iterator[Hosts]:
    """``count`` machines while the block lasts."""
    made = Hosts(directory, count, kept)
    try:
        yield made
    finally:
        made.close()


def fill_in(made: Hosts, ray_start: str) -> Path:
    """``cluster/local.yaml`` for these hosts, which have this environment instead of making one.

    Args:
        ray_start: what stands in the place of ``ray start``.
    """
    values = yaml.safe_load((ROOT / "cluster" / "local.yaml").read_text())
    head, *workers = (host.address for host in made.hosts)
    values["provider"] |= {"head_ip": head, "worker_ips": workers}
    values["auth"] = {"ssh_user": "root", "ssh_private_key": str(made.key)}
    values["setup_commands"] = [f"ln -sfn {sys.prefix} ~/raylm/.venv"]
    values["file_mounts"]["~/raylm"] = str(ROOT)
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        lines = [line.replace("ray start", ray_start) for line in values[key]]
        values[key] = [line.replace("node.sh;", f"node.sh; export PYTHONPATH={ROOT};") for line in lines]
    path = made.directory / "cluster.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def _end_with_parent() -> None:
    """Have this process killed when the one that started it is gone, however that ended."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == 0, (command, done.stderr)
