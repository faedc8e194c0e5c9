"""What this installation and this machine offer: the version, cores, memory, the extras. Loads no framework."""

from __future__ import annotations

import os
from collections.abc import Iterator

VERSION = "0.1.0"


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory(root: str = "/") -> int | None:
    """Number of bytes of main memory that processes can still take before the system kills one; None if it isn't known.

    It is the least of what the machine has (`MemAvailable`) and what the control groups of this process allow. `root`
    is the folder where `proc` and `sys` are.
    """
    rooms = [_room(*place) for place in _groups(root)]
    for line in _lines(os.path.join(root, "proc/meminfo")):
        name, *rest = line.split()
        if name == "MemAvailable:":
            rooms.append(1024 * int(rest[0]))
    return min((room for room in rooms if room is not None), default=None)


def _groups(root: str) -> Iterator[tuple[str, str, str]]:
    """Folder of each control group that limits this process, and its files for the limit and for what is in use.

    A container may see its own group as the topmost one.
    """
    for line in _lines(os.path.join(root, "proc/self/cgroup")):
        _, controllers, path = line.strip().split(":", 2)
        if not controllers:
            top, names = os.path.join(root, "sys/fs/cgroup"), ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            top, names = os.path.join(root, "sys/fs/cgroup/memory"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        steps = [step for step in path.split("/") if step not in ("", "..")]
        for count in range(len(steps) + 1):
            yield os.path.join(top, *steps[:count]), *names


def _room(folder: str, limit: str, usage: str) -> int | None:
    """Number of bytes that a group may still take. What it keeps of files can be dropped at any time."""
    [most], [used] = ([*_lines(os.path.join(folder, name))][:1] or [""] for name in (limit, usage))
    if not most.strip().isdigit() or not used.strip().isdigit():  # no such group, or no limit ("max")
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
