"""What the probes make of given machines: containers, old CPUs, full disks, missing packages."""

from __future__ import annotations

import errno
import socket
from pathlib import Path

import pytest

from raylm.doctor.devices import judge_cpu, judge_gpus, read_cpuinfo
from raylm.doctor.finding import GB
from raylm.doctor.imports import Import
from raylm.doctor.network import PORTS, holder, judge_hostname, judge_port, port_error
from raylm.doctor.packages import judge, judge_raylm, requirements, torch_build
from raylm.doctor.ray_start import connection_error, judge_ray
from raylm.doctor.system import (
    Limits,
    judge_disk,
    judge_files,
    judge_memory,
    judge_shared_memory,
    judge_text,
    own_group,
    read_limits,
)

REQUIREMENTS = ["ray[default]<3,>=2.60", "torch>=2.8", "deepspeed>=0.19", "transformers<6,>=5.5", "pydantic>=2.11",
                "openvino>=2026.0; extra == 'cpu'", "rjieba>=0.2; extra == 'chinese'",
                "colorama; sys_platform == 'no-such-system'"]  # fmt: skip
VERSIONS: dict[str, str | None] = {
    "ray": "2.60.0", "torch": "2.13.0+cpu", "deepspeed": "0.19.8", "transformers": "5.5.4", "pydantic": "2.12.0",
    "openvino": "2026.4.1",
}  # fmt: skip
IMPORTS = {name: Import(name, 1.25) for name in ("torch", "ray", "deepspeed", "transformers", "openvino")}


def judged(versions: dict[str, str | None], imports: dict[str, Import]):
    return {finding.what: finding for finding in judge(requirements(REQUIREMENTS, versions), imports, "CPU build")}


def test_packages_that_are_all_there() -> None:
    found = judged(VERSIONS, IMPORTS)
    assert {finding.state for finding in found.values()} == {"ok"}
    assert found["torch"].found == "2.13.0+cpu, CPU build, imported in 1.2 s"
    assert found["other packages"].found == "1 there, versions as raylm needs them"
    assert "vllm" not in found


def test_packages_that_are_missing_old_or_broken() -> None:
    versions = VERSIONS | {"transformers": "4.40.0", "pydantic": None, "openvino": None, "deepspeed": None}
    imports = IMPORTS | {"torch": Import("torch", error="OSError: libcudnn.so.9: cannot open shared object file")}
    found = judged(versions, imports)
    assert found["torch"].state == "broken" and "CUDA libraries" in found["torch"].remedy
    assert found["transformers"].state == "broken"
    assert found["transformers"].remedy in (
        "python -m pip install 'transformers<6,>=5.5'", "python -m pip install 'transformers>=5.5,<6'",
    )  # fmt: skip
    assert found["deepspeed"].remedy == "python -m pip install 'deepspeed>=0.19'"
    assert (found["openvino"].state, "raylm[cpu]" in found["openvino"].remedy) == ("warning", True)
    assert found["other packages"].found == "pydantic is missing"
    assert found["other packages"].remedy == "python -m pip install 'pydantic>=2.11'"
    slow = judged(VERSIONS, IMPORTS | {"ray": Import("ray", error="not imported within 26 s", timed_out=True)})
    assert slow["ray"].state == "warning"


@pytest.mark.parametrize(
    ("text", "build"),
    [
        ("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\nhip: Optional[str] = None\n", "CPU build"),
        ("__version__ = '2.13.0'\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n", "CUDA 13.0 build"),
        ("cuda = None\nhip = '6.4'\n", "ROCm 6.4 build"),
    ],
)
def test_torch_build_is_read_from_its_file(text: str, build: str, tmp_path: Path) -> None:
    (tmp_path / "version.py").write_text(text)
    assert torch_build(tmp_path) == build


def test_raylm_that_is_newer_than_its_installation() -> None:
    place = Path("/home/me/raylm")
    assert judge_raylm("0.2.0", "0.2.0", place).found == "0.2.0, in /home/me/raylm"
    assert judge_raylm("0.2.0", None, place).state == "ok"
    assert judge_raylm("0.2.0", "0.1.0", place).state == "warning"


def test_cpu() -> None:
    model, flags = read_cpuinfo(
        "processor : 0\nmodel name\t: Some CPU\nflags\t\t: sse avx2 avx512f amx_bf16 amx_tile\n"
    )
    finding = judge_cpu(model, flags, 8, 4, "x86_64")
    assert finding.found == "Some CPU, 4 of 8 CPUs; AVX2, AVX-512, AMX; bf16 in hardware"
    assert finding.state == "ok"
    assert judge_cpu("Old CPU", {"sse2"}, 4, 4, "x86_64").state == "warning"
    assert judge_cpu("Apple M2", set(), 8, 8, "arm64").state == "ok"
    assert judge_cpu(model, flags, 1, 1, "x86_64").state == "warning"


def test_gpus() -> None:
    said = "NVIDIA H100, 81559 MiB, 570.86\nNVIDIA H100, 81559 MiB, 570.86\n"
    finding = judge_gpus(said, "CUDA 13.0 build")
    assert (finding.state, finding.found) == ("ok", "2 x NVIDIA H100 (81559 MiB), driver 570.86")
    assert judge_gpus(said, "CPU build").state == "warning"
    assert judge_gpus(None, "CPU build").state == "ok"
    assert judge_gpus("NVIDIA-SMI has failed", "CPU build", failed=True).state == "warning"


def test_limits_of_control_groups(tmp_path: Path) -> None:
    assert read_limits(tmp_path) == Limits(None, None)
    group = tmp_path / "kubepods" / "pod"
    group.mkdir(parents=True)
    (group / "cpu.max").write_text("150000 100000\n")
    (group / "memory.max").write_text("max\n")
    (group.parent / "cpu.max").write_text("max 100000\n")
    (group.parent / "memory.max").write_text(f"{4 * GB}\n")
    name = own_group("12:pids:/other\n0::/kubepods/pod\n")
    assert read_limits(tmp_path, name) == Limits(1.5, 4 * GB)
    assert own_group("") == "/"


def test_limits_of_the_first_version(tmp_path: Path) -> None:
    for name, text in {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000",
                       "memory/memory.limit_in_bytes": "9223372036854771712"}.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    assert read_limits(tmp_path) == Limits(None, None)
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("400000\n")
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text(f"{2 * GB}\n")
    assert read_limits(tmp_path) == Limits(4.0, 2 * GB)


def test_memory() -> None:
    (machine,) = judge_memory(32 * GB, 30 * GB, Limits(), 8)
    assert (machine.state, machine.found) == ("ok", "32 GB, 30 GB free")
    memory, cpus = judge_memory(32 * GB, 30 * GB, Limits(1.5, 4 * GB), 8)
    assert (memory.state, memory.found) == ("warning", "this container may take 4.0 GB of 32 GB, 30 GB free")
    assert (cpus.state, cpus.found) == ("warning", "this container may use 1.5 of 8 CPUs")
    assert judge_memory(2 * GB, GB, Limits(), 1)[0].state == "broken"
    assert judge_memory(32 * GB, GB, Limits(), 8)[0].state == "warning"
    assert judge_memory(None, None, Limits(), 8)[0].found.startswith("not known")


def test_shared_memory_disk_files_and_text() -> None:
    docker = judge_shared_memory(Path("/dev/shm"), 64 * 10**6, 64 * 10**6)
    assert docker.state == "warning" and "--shm-size" in docker.remedy
    assert judge_shared_memory(Path("/dev/shm"), 8 * GB, 8 * GB).state == "ok"
    assert judge_disk("disk", "here", 100 * GB, 50 * GB, True).state == "ok"
    assert judge_disk("disk", "here", 100 * GB, 5 * GB, True).state == "warning"
    assert judge_disk("disk", "here", 100 * GB, GB // 2, True).state == "broken"
    assert judge_disk("disk", "here", 100 * GB, 50 * GB, False).state == "warning"
    assert judge_disk("ray's files", "/tmp/ray", 1000 * GB, 40 * GB, True, ray=True).state == "warning"
    assert judge_files(1024, 524288).remedy == "ulimit -n 65536: Ray holds many open"
    assert judge_files(65536, 65536).state == judge_files(-1, -1).state == "ok"
    assert "limits.conf" in judge_files(1024, 1024).remedy
    assert judge_text("utf-8", "UTF-8", "utf8").state == "ok"
    assert judge_text("utf-8", "ANSI_X3.4-1968", "utf-8").remedy.startswith("export LC_ALL")


def test_ports() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert port_error(port) == "in use"
        assert "process" in holder(port)
    assert port_error(port) == ""
    assert judge_port(8000, "", "").state == "ok"
    taken = judge_port(8000, "in use", "python3, process 7")
    assert (taken.state, "serving.port=8001" in taken.remedy) == ("warning", True)
    assert judge_port(6379, "in use", "gcs_server, process 7").state == "ok"
    assert set(PORTS) == {8000, 8265, 6379}


def test_host_name() -> None:
    assert judge_hostname("box", "10.0.0.7").state == "ok"
    assert "/etc/hosts" in judge_hostname("box", OSError(errno.ENOENT, "unknown")).remedy
    assert judge_hostname("box", None).found == "box: the resolver does not answer"


def test_ray() -> None:
    said = {"seconds": 3.2, "nodes": 1, "cpus": 2.0, "gpus": 0}
    assert judge_ray("", said, 5.0, 26.0).found == "starts in 3.2 s with 2 CPUs"
    assert judge_ray("", said | {"seconds": 20.0}, 25.0, 26.0).state == "warning"
    assert judge_ray("", None, 26.0, 26.0).state == "warning"
    assert judge_ray("", {"error": "ModuleNotFoundError: No module named 'ray'"}, 1.0, 26.0).state == "broken"
    assert judge_ray("head:6379", said | {"nodes": 3}, 1.0, 26.0).found == "head:6379 answers: 3 nodes, 2 CPUs"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"  # bound, but nobody listens
        refusal = connection_error(address)
    assert "refused" in refusal
    assert "unset RAY_ADDRESS" in judge_ray(address, {"error": refusal}, 0.0, 26.0).remedy
    assert connection_error("auto") == ""
