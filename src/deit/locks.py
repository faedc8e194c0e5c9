"""Locks: one process at a time writes a folder or a file, also if others run on another machine."""

from __future__ import annotations

import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deit import files

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class InUse(OSError):
    """Another process writes there now. The message names it, and says what to do."""


_BEAT = 5.0
"""Seconds between two signs of life in a lock's file."""
_WATCHED = 20.0
"""Seconds without a sign of life after which the owner of a lock is taken to be dead, if the system can't tell."""
_DYING = 1.0
"""Seconds that a process which was just killed may take to end."""
_descriptors: set[int] = set()
"""Open files of the locks that this process has."""


def _close_in_child() -> None:
    for descriptor in _descriptors:
        os.close(descriptor)
    _descriptors.clear()


if hasattr(os, "register_at_fork"):  # or a loader process would keep the lock of a parent that was killed
    os.register_at_fork(after_in_child=_close_in_child)


def beside(path: Path) -> Path:
    """Where the lock of a file lies, or of a folder that is replaced as a whole."""
    return path.with_name(f".{path.name}.lock")


@contextmanager
def held(target: Path, *, lock: Path | None = None, wait: bool = False) -> Iterator[None]:
    """Keeps other processes from writing `target` while the block runs.

    The lock is one of the operating system (`flock`), which ends with its process. It is on a hidden file that names
    the owner for people. The file's time of change moves every `_BEAT` seconds. Where the system can't tell whether
    the owner lives, because it is another machine or the file system has no locks, the owner is dead if that time
    stands still for `_WATCHED` seconds. No two clocks are compared.

    Args:
        lock: the lock's file; `.lock` in the folder `target` if it is None.
        wait: waits for another owner instead of refusing.

    Raises `InUse` if another process has the lock.
    """
    lock = target / ".lock" if lock is None else lock
    files.make_parent(lock)
    until = time.monotonic() + _DYING
    while True:
        try:
            descriptor = _locked(lock, target)
            break
        except InUse:
            if not wait and time.monotonic() > until:
                raise
            time.sleep(0.1)
    process, ended = os.getpid(), threading.Event()
    _descriptors.add(descriptor)
    beating = threading.Thread(target=_beat, args=(lock, ended), daemon=True)
    beating.start()
    try:
        yield
    finally:
        if os.getpid() == process:
            ended.set()
            beating.join()
            _descriptors.discard(descriptor)
            if fcntl is None:  # Windows removes no open file
                os.close(descriptor)
            with suppress(OSError):  # while it is still locked, so that it is no other's
                lock.unlink()
            if fcntl is not None:
                os.close(descriptor)


@contextmanager
def turn(file: Path) -> Iterator[None]:
    """Waits until other processes have written `file`, so that none replaces a later one. Removes what killed ones left
    of it."""
    with held(file, lock=beside(file), wait=True):
        files.sweep(file.parent, file.name)
        yield


def _beat(lock: Path, ended: threading.Event) -> None:
    while not ended.wait(_BEAT):
        with suppress(OSError):
            os.utime(lock)


def _locked(lock: Path, target: Path) -> int:
    """An open file that has the lock, and names this process as its owner."""
    here, moment = platform.node(), min(1.0, _WATCHED / 10)
    since = datetime.now(UTC).isoformat(timespec="seconds")
    text = json.dumps({"host": here, "pid": os.getpid(), "since": since, "key": uuid.uuid4().hex}).encode()
    while True:
        try:
            descriptor, created = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
        except FileExistsError:
            try:
                descriptor, created = os.open(lock, os.O_RDWR), False
            except FileNotFoundError:  # its owner has just removed it
                continue
        try:
            locked = _flock(descriptor)
            owner = _owner(descriptor)
            if locked is False:
                raise _in_use(target, owner)
            if locked and not _is_at(descriptor, lock):  # its owner has just removed it
                os.close(descriptor)
                continue
            if not created and (locked is None or owner.get("host", here) != here):
                _watch(lock, target, owner, moment)
            try:
                with files.told_if_full(target):
                    _write(descriptor, text)
            except OSError:
                with suppress(OSError):
                    lock.unlink()
                raise
            if locked is None and not created:  # two processes may have found the same dead owner
                time.sleep(moment)
                if _read(descriptor) != text:
                    raise _in_use(target, _owner(descriptor))
            return descriptor
        except BaseException:
            with suppress(OSError):
                os.close(descriptor)
            raise


def _watch(lock: Path, target: Path, owner: Mapping[str, Any], moment: float) -> None:
    """Returns if the owner of a lock gives no sign of life."""
    before, until = _stamp(lock), time.monotonic() + _WATCHED
    while time.monotonic() < until:
        time.sleep(moment)
        if _stamp(lock) not in (before, None):
            raise _in_use(target, owner)


def _flock(descriptor: int) -> bool | None:
    """Whether the file is locked for this process now; None if there are no such locks here."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # the file system has none
        return None
    return True


def _is_at(descriptor: int, lock: Path) -> bool:
    """Whether the open file is still the one at the path."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.stat(lock))
    return False


def _stamp(lock: Path) -> int | None:
    """The file's time of change. It is opened for that, because network file systems then ask the server."""
    with suppress(OSError), open(lock, "rb") as file:
        return os.fstat(file.fileno()).st_mtime_ns
    return None


def _read(descriptor: int) -> bytes:
    os.lseek(descriptor, 0, os.SEEK_SET)
    return os.read(descriptor, 4096)


def _write(descriptor: int, text: bytes) -> None:
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, text)


def _owner(descriptor: int) -> dict[str, Any]:
    try:
        found = json.loads(_read(descriptor))
    except (ValueError, OSError):
        return {}
    return found if isinstance(found, dict) else {}


def _in_use(target: Path, owner: Mapping[str, Any]) -> InUse:
    who = (
        f"process {owner.get('pid')} on {owner.get('host')}, since {owner.get('since')}"
        if owner
        else "which has just begun"
    )
    return InUse(
        f"{target} is being written by another process ({who}); wait until it ends, end it, or give another place to "
        "write"
    )
