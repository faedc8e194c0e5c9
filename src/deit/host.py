"""What this installation and this machine offer: version, processor, cores, memory, extras. Loads no framework."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator, Sequence

VERSION = "0.1.0"


def cores(root: str = "/") -> int:
    """Number of CPU cores that this process may use.

    They are those that the system lets it run on, or fewer if a control group allows less time, as in a container with
    a limit. A part of a core counts as one. `root` is the folder where `proc` and `sys` are.
    """
    known = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shares = (_share_of_time(*place) for place in _groups(root, "cpu", ("cpu.max",), _CPU_OF_V1))
    return min([known, *(math.ceil(share) for share in shares if share is not None)])


def processor(root: str = "/") -> str:
    """The processor in words: its name, and the number of cores that this process may use. `root` is as for `cores`."""
    lines = (line.partition(":") for line in _lines(os.path.join(root, "proc/cpuinfo")))
    named = (value.strip() for key, _, value in lines if key.strip() == "model name")
    name = next(named, "") or platform.processor() or platform.machine() or "an unnamed processor"
    count = cores(root)
    return f"{name}, {count} core{'s' * (count != 1)}"


def available_memory(root: str = "/") -> int | None:
    """Number of bytes of main memory that processes can still take before the system kills one; None if it isn't known.

    It is the least of what the machine has (`MemAvailable`) and what the control groups of this process allow. `root`
    is the folder where `proc` and `sys` are.
    """
    rooms = [_room(*place) for place in _groups(root, "memory", ("memory.max", "memory.current"), _MEMORY_OF_V1)]
    for line in _lines(os.path.join(root, "proc/meminfo")):
        name, *rest = line.split()
        if name == "MemAvailable:":
            rooms.append(1024 * int(rest[0]))
    return min((room for room in rooms if room is not None), default=None)


def peak_memory(root: str = "/") -> int | None:
    """The most bytes of main memory that this process has used; None if the system doesn't say it here.

    `getrusage` isn't asked, because Linux counts there what the process that started this one used, too.
    """
    for line in _lines(os.path.join(root, "proc/self/status")):
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    return None


_CPU_OF_V1 = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
_MEMORY_OF_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")


def _groups(
    root: str, controller: str, names: Sequence[str], names_of_v1: Sequence[str]
) -> Iterator[tuple[str, Sequence[str]]]:
    """Folder of each control group that limits this process, and the names of its files for one controller.

    A container may see its own group as the topmost one.
    """
    for line in _lines(os.path.join(root, "proc/self/cgroup")):
        _, controllers, path = line.strip().split(":", 2)
        if not controllers:
            top, there = os.path.join(root, "sys/fs/cgroup"), names
        elif controller in controllers.split(","):
            top, there = os.path.join(root, "sys/fs/cgroup", controller), names_of_v1
        else:
            continue
        steps = [step for step in path.split("/") if step not in ("", "..")]
        for count in range(len(steps) + 1):
            yield os.path.join(top, *steps[:count]), there


def _first_lines(folder: str, names: Sequence[str]) -> list[str]:
    """The first line of each file; an empty text for one that is missing."""
    return [next(iter(_lines(os.path.join(folder, name))), "").strip() for name in names]


def _share_of_time(folder: str, names: Sequence[str]) -> float | None:
    """Seconds that all processes of a group may compute in each second; None if there is no limit."""
    quota, period, *_ = [*" ".join(_first_lines(folder, names)).split(), "", ""]
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None  # no limit: "max", or -1


def _room(folder: str, names: Sequence[str]) -> int | None:
    """Number of bytes that a group may still take. What it keeps of files can be dropped at any time."""
    most, used = _first_lines(folder, names)
    if not most.isdigit() or not used.isdigit():  # no such group, or no limit ("max")
        return None
    found = {name: int(value) for name, value in map(str.split, _lines(os.path.join(folder, "memory.stat")))}
    prefix = "total_" if "total_inactive_file" in found else ""
    files = found.get(f"{prefix}inactive_file", 0) + found.get(f"{prefix}active_file", 0)
    return max(0, int(most) - int(used) + files)


def _lines(file: str) -> list[str]:
    try:
        with open(file) as text:
            return text.readlines()
    except OSError:  # another system
        return []


def missing(what: str, extra: str) -> ImportError:
    """The error for a package that is not installed: `what` needs it, and the `extra` of `deit` installs it."""
    return ImportError(f'{what}: pip install "deit[{extra}]"')
