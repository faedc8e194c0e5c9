"""What this installation and this machine offer: the version, the cores, the extras. Loads no framework."""

from __future__ import annotations

import os

VERSION = "0.1.0"


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def missing(what: str, extra: str) -> ImportError:
    """The error for a package that is not installed: `what` needs it, and the `extra` of `deit` installs it."""
    return ImportError(f'{what}: pip install "deit[{extra}]"')
