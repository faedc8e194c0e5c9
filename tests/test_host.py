"""The processor, how many cores this process may use, in control groups of both versions, and its memory."""

import os
import platform
import sys

import pytest
from support.checks import run_python

from deit import host


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("", {}, 8),
        ("0::/\n", {"cpu.max": "max 100000"}, 8),
        ("0::/\n", {"cpu.max": "200000 100000"}, 2),  # a container
        ("0::/\n", {"cpu.max": "250000 100000"}, 3),
        ("0::/\n", {"cpu.max": "5000 100000"}, 1),
        ("0::/\n", {"cpu.max": "1600000 100000"}, 8),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "500000 100000"}, 3),  # the group around it
        ("0::/a/b\n", {"a/cpu.max": "max 100000", "a/b/cpu.max": "50000 10000"}, 5),
        ("0::/../x\n", {"cpu.max": "100000 100000"}, 1),
        ("4:cpu:/job\n0::/\n", {"cpu/job/cpu.cfs_quota_us": "200000", "cpu/job/cpu.cfs_period_us": "50000"}, 4),
        ("4:cpu,cpuacct:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ("4:memory:/\n3:cpuset:/\n", {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 8),
    ],
)
def test_cores_are_those_that_machine_and_groups_allow(tmp_path, monkeypatch, groups, files, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    contents = {"proc/self/cgroup": groups, **{f"sys/fs/cgroup/{name}": f"{text}\n" for name, text in files.items()}}
    for name, text in contents.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert host.cores(str(tmp_path)) == expected


def test_the_processor_and_the_cores_of_this_process(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 4}, raising=False)
    (tmp_path / "proc").mkdir()
    lines = "processor\t: 0\nmodel name\t: Xeon(R): 8-core @ 2.10GHz\nflags\t\t: fpu\nmodel name\t: another\n"
    (tmp_path / "proc" / "cpuinfo").write_text(lines)
    assert host.processor(str(tmp_path)) == "Xeon(R): 8-core @ 2.10GHz, 2 cores"
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1}, raising=False)
    monkeypatch.setattr(platform, "processor", lambda: "arm")
    for content in ("processor\t: 0\nBogoMIPS\t: 50.00\n", "model name\t:\n"):
        (tmp_path / "proc" / "cpuinfo").write_text(content)
        assert host.processor(str(tmp_path)) == "arm, 1 core"
    assert host.processor(str(tmp_path / "another system")) == "arm, 1 core"


def used_by(child, mib):
    """MiB that a process has used which another one has started, when that one had used more."""
    code = (
        f"import subprocess, sys; taken = bytes([1]) * ({mib} << 20); subprocess.run([sys.executable, '-c', {child!r}])"
    )
    return float(run_python(code)) / 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says")
def test_memory_is_that_of_this_process_and_not_of_the_one_that_started_it(tmp_path):
    child = "from deit import host; taken = bytes([1]) * (50 << 20); del taken; print(host.peak_memory())"
    assert 50 < used_by(child, 400) < 150
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "status").write_text("Name:\tpython\nVmPeak:\t  9000 kB\nVmHWM:\t    8772 kB\n")
    assert host.peak_memory(str(tmp_path)) == 8772 * 1024
    assert host.peak_memory(str(tmp_path / "another system")) is None
