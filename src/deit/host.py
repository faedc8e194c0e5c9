"""This installation and this machine: the version, the cores, the packages that extras bring. Loads no framework."""

from __future__ import annotations

import os

VERSION = "0.1.0"


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def missing(what: str, extra: str) -> ImportError:
    """The error for a package that is not installed: `what` is needed, and the extra of `deit` that brings it."""
    return ImportError(f'{what}: pip install "deit[{extra}]"')
