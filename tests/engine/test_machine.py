"""How many cores and how much memory the process may use, where control groups limit them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from cpmbee import machine
from cpmbee.control_groups import cpu_quota, memory_limit

V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "32 31 0:29 {top} /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 master:3 - cgroup cgroup rw,cpu,cpuacct"
V1_MEMORY = "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
OTHER = "22 27 0:21 / /proc rw,relatime - proc proc rw"


def system(root: Path, groups: str, mounts: str, files: Mapping[str, str]) -> Path:
    """A file system of a process in these groups."""
    own = {"proc/self/cgroup": groups + "\n", "proc/self/mountinfo": f"{OTHER}\n{mounts}\n"}
    for name, text in {**own, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("group", "files", "quota"),
    [
        pytest.param("/", {"cpu.max": "150000 100000\n"}, 1.5, id="a container's own view"),
        pytest.param("/a/b", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "50000 100000"}, 0.5, id="the one above"),
        pytest.param("/a/b", {"a/b/cpu.max": "20000 10000", "a/cpu.max": "max 100000"}, 2.0, id="its own"),
        pytest.param("/a/b", {"a/b/cpu.max": "4000 1000", "cpu.max": "3000 1000"}, 3.0, id="the least of them"),
        pytest.param("/a", {"a/b/cpu.max": "1000 1000", "c/cpu.max": "1000 1000"}, None, id="others do not count"),
        pytest.param("/a", {"a/cpu.max": "max 100000"}, None, id="no limit"),
        pytest.param("/../b", {"cpu.max": "2000 1000"}, 2.0, id="outside of the namespace"),
        pytest.param("/a", {"a/cpu.max": "nonsense", "cpu.max": "1000 0"}, None, id="unreadable"),
    ],
)
def test_quota_of_version_2(tmp_path: Path, group: str, files: dict[str, str], quota: float | None) -> None:
    files = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    assert cpu_quota(system(tmp_path, f"0::{group}", V2, files)) == quota


@pytest.mark.parametrize(
    ("top", "group", "folder", "quota"),
    [
        pytest.param("/", "/", "", 2.5, id="the root"),
        pytest.param("/", "/docker/12", "docker/12", 2.5, id="as the host sees it"),
        pytest.param("/", "/docker/12", "docker", 2.5, id="the one above"),
        pytest.param("/docker/12", "/docker/12", "", 2.5, id="mounted in the container"),
        pytest.param("/docker/12", "/docker/12/inner", "inner", 2.5, id="below what is mounted"),
        pytest.param("/docker/1", "/docker/12", "2", None, id="names are compared whole"),
        pytest.param("/a\\040b", "/a b/c", "c", 2.5, id="blanks"),
    ],
)
def test_quota_of_version_1(tmp_path: Path, top: str, group: str, folder: str, quota: float | None) -> None:
    base = Path("sys/fs/cgroup/cpu,cpuacct", folder)
    files = {str(base / "cpu.cfs_quota_us"): "250000\n", str(base / "cpu.cfs_period_us"): "100000\n"}
    root = system(tmp_path, f"4:memory:/other\n3:cpu,cpuacct:{group}\n0::/", V1.format(top=top), files)
    assert cpu_quota(root) == quota


def test_no_quota_of_version_1(tmp_path: Path) -> None:
    base = "sys/fs/cgroup/cpu,cpuacct"
    files = {f"{base}/cpu.cfs_quota_us": "-1\n", f"{base}/cpu.cfs_period_us": "100000\n"}
    assert cpu_quota(system(tmp_path, "3:cpu,cpuacct:/", V1.format(top="/"), files)) is None


def test_memory_of_the_group_and_those_above(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "3000\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory.max": "max\n",
    }
    assert memory_limit(system(tmp_path / "1", "4:memory:/a/b\n0::/", f"{V1_MEMORY}\n{V2}", files)) == 3000
    files = {"sys/fs/cgroup/a/b/memory.max": "5000\n", "sys/fs/cgroup/a/memory.max": "4000\n"}
    assert memory_limit(system(tmp_path / "2", "0::/a/b", V2, files)) == 4000


@pytest.mark.parametrize("mounts", ["", "a line of another kind", "1 2 3 / /sys/fs/cgroup - cgroup2"])
def test_systems_without_control_groups(tmp_path: Path, mounts: str) -> None:
    assert cpu_quota(tmp_path) is None
    assert memory_limit(system(tmp_path, "nothing\n\n", mounts, {})) is None


@pytest.mark.parametrize(
    ("cores", "quota", "expected"),
    [(8, None, 8), (8, 2.0, 2), (8, 2.9, 2), (8, 0.5, 1), (2, 16.0, 2), (1, 1.0, 1)],
)
def test_cores_within_affinity_and_quota(
    monkeypatch: pytest.MonkeyPatch, cores: int, quota: float | None, expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(1000, 1000 + cores)), raising=False)
    monkeypatch.setattr(machine, "cpu_quota", lambda: quota)
    assert machine.physical_cores() == expected


def test_the_group_of_this_process_is_obeyed() -> None:
    """In a group made for it; needs the right to make one."""
    base = next((Path(name) for name in ("/sys/fs/cgroup/cpu", "/sys/fs/cgroup") if Path(name).is_dir()), None)
    if base is None:
        pytest.skip("there are no control groups")
    group = base / f"cpmbee-test-{os.getpid()}"
    version_1 = (base / "cpu.cfs_period_us").exists()
    file, limit = ("cpu.cfs_quota_us", "100000") if version_1 else ("cpu.max", "100000 100000")
    code = "from cpmbee import control_groups as c, machine as m; print(c.cpu_quota(), m.physical_cores())"
    try:
        group.mkdir()
        (group / file).write_text(limit)
        # sh joins the group and then becomes Python
        join = ["sh", "-c", 'echo $$ > "$0" || exit 77; exec "$@"', str(group / "cgroup.procs")]
        run = subprocess.run([*join, sys.executable, "-c", code], capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"no control group can be made: {error.strerror}")
    finally:
        if group.exists():
            group.rmdir()
    if run.returncode == 77:
        pytest.skip("processes cannot join a control group")
    assert run.stdout == "1.0 1\n"


def test_memory_is_that_of_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_limit", lambda: None)
    whole = machine.physical_memory()
    monkeypatch.setattr(machine, "memory_limit", lambda: 1 << 20)
    assert machine.physical_memory() == 1 << 20
    monkeypatch.setattr(machine, "memory_limit", lambda: 1 << 62)
    assert machine.physical_memory() == whole
