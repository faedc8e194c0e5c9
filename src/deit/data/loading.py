"""Loader processes: how many there are, how they read ahead, what happens if one dies, and how they end."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from deit.host import cores


class LoaderDied(RuntimeError):
    """A loader process died."""


def loader_processes(asked: int | None, fits: Callable[[], bool], device: torch.device) -> int:
    """Number of loader processes for this process.

    `asked` if it is set, 0 if one process is enough (`fits`), and otherwise a number that depends on this process's
    share of the machine's cores. If a GPU computes, the loaders get the whole share but one core, which feeds the GPU:
    a core prepares a few hundred images of ImageNet a second, and a GPU trains on thousands. If the CPU computes, the
    model needs the cores itself and is slower than a few loaders, so there are at most 8.
    """
    if asked is not None:
        return asked
    if fits():
        return 0
    share = share_of_cores()
    return max(1, min(8, share) if device.type == "cpu" else share - 1)


def share_of_cores() -> int:
    """This process's share of the machine's cores."""
    return cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def loaded(views: Dataset[Any], wanted: Iterable[Any], workers: int, device: torch.device) -> Iterator[Any]:
    """Yields what `views` gives for each of `wanted`, in order. Loader processes read ahead and end with it.

    The batches are in memory that is pinned for `device` if that is a GPU. An exception that `views` returns is raised
    here, with its own type and message.

    Raises `LoaderDied` if a loader process dies.
    """
    pinned = device.type == "cuda"

    def opened() -> AbstractContextManager[Any]:
        """Makes `device` the present GPU, because pinning opens the present one. It takes memory for each process."""
        return torch.cuda.device(device) if pinned else nullcontext()

    loader = DataLoader(
        views,
        sampler=wanted,
        batch_size=None,
        num_workers=workers,
        collate_fn=_unchanged,
        worker_init_fn=_begin_worker,
        pin_memory=pinned,
        generator=torch.Generator(),  # its own, because PyTorch's global one is the model's
    )
    with _child_signal_kept(), opened():
        batches = iter(loader)
        _unwatch(batches)
    died = ""
    try:
        while True:
            try:
                with opened():
                    batch = next(batches)
            except StopIteration:
                return
            except (RuntimeError, ConnectionError, EOFError) as error:
                if not _tells_of_a_death(error):
                    raise
                died = (str(error) or type(error).__name__).splitlines()[0]
            if died:  # raised here, because the traceback of `error` would keep the other processes alive
                raise LoaderDied(
                    f"a loader process died ({died}), most likely because memory or shared memory (/dev/shm) ran "
                    f"out; set compute.workers below {workers}"
                )
            if isinstance(batch, Exception):
                raise batch
            yield batch
    finally:
        loaders = getattr(batches, "_workers", ())  # each is a process that may wait for a file for ever
        if loaders and not pinned:
            _kill(loaders)
            # PyTorch sets it, and a killed process may have its lock, for which PyTorch would wait for ever.
            batches._workers_done_event = threading.Event()  # type: ignore[attr-defined]
        del batches
        _kill(loaders)  # not before, because the thread that pins waits for what they send


def _unwatch(batches: Any) -> None:
    """Takes the loader processes from the list of those whose death PyTorch's handler of signals tells.

    The handler is there if the program has used a `DataLoader` of its own. It would raise wherever the program is, for
    the processes that are killed here too. Without it, waiting for a batch finds the death within 5 seconds.
    """
    if getattr(batches, "_worker_pids_set", False):
        signal_handling._remove_worker_pids(id(batches))
        batches._worker_pids_set = False


def _kill(loaders: Iterable[Any]) -> None:
    for loader in loaders:
        if loader.is_alive():
            loader.kill()


def _tells_of_a_death(error: Exception) -> bool:
    """Whether a loader process died while the next batch was waited for, or while its memory was handed over, which
    takes a connection to the process."""
    if isinstance(error, ConnectionError | EOFError):
        return "in DataLoader worker process" not in str(error)  # which is an error of the process itself
    return "exited unexpectedly" in str(error)


def _unchanged(batch: Any) -> Any:
    return batch


def _begin_worker(_: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # they may go to all processes; the parent ends this one
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = _not_of_the_parents_end
    gc.freeze()  # a collection would write to all memory that is shared with the parent, and so copy it


def _not_of_the_parents_end(
    kind: type[BaseException], error: BaseException, traceback: types.TracebackType | None
) -> None:
    """Prints no traceback of the thread that hands batches over if the parent, which may end at any time, broke off."""
    if not issubclass(kind, OSError | EOFError):
        sys.__excepthook__(kind, error, traceback)


@contextmanager
def _child_signal_kept() -> Iterator[None]:
    """Keeps the present handler for the end of a child process, which PyTorch would replace.

    PyTorch sets its own once, so it must not believe that it is set: another `DataLoader` of the program needs it.
    """
    number = getattr(signal, "SIGCHLD", None)  # Windows has none
    before = None if number is None else signal.getsignal(number)
    there = signal_handling._SIGCHLD_handler_set
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and number is not None and before is not None:
            signal.signal(number, before)
            signal_handling._SIGCHLD_handler_set = there
