"""Ends a command on SIGTERM and Ctrl-C, whatever it waits for."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE = 4.0
"""Seconds that a command may take to end after a signal."""


class Interrupted(KeyboardInterrupt):
    """SIGTERM or Ctrl-C came."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number
        """The exit status of a process that this signal ended, as a shell reports it."""


@contextmanager
def ending() -> Iterator[None]:
    """Makes SIGTERM and Ctrl-C raise `Interrupted` in the main thread.

    Python can't raise while that thread waits for the system, as for a file on a server that is gone. If the block has
    not ended within `PATIENCE` seconds after a signal, the process ends at once, with the same status. What it was
    writing then stays under its temporary name. Another signal changes nothing, so the block can tidy up meanwhile.
    """
    if threading.current_thread() is not threading.main_thread() or os.name != "posix":
        yield
        return
    caught = 0

    def catch(number: int, _: object) -> None:
        nonlocal caught
        if caught:  # some batch systems and some people send it again and again
            return
        caught = number
        raise Interrupted(number)

    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    ended = threading.Event()
    watching = threading.Thread(target=_watch, args=(reading, ended), daemon=True)
    watching.start()
    before = {number: signal.signal(number, catch) for number in _NUMBERS}
    pipe = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(pipe)
        for number, handler in before.items():
            signal.signal(number, handler)
        if caught:
            for thread in threading.enumerate():  # the process would wait for them anyway, and without an end
                if not thread.daemon and thread is not threading.current_thread():
                    thread.join()
        ended.set()
        os.write(writing, b"\0")
        os.close(writing)


_NUMBERS = (signal.SIGTERM, signal.SIGINT)


def _watch(reading: int, ended: threading.Event) -> None:
    """Reads the numbers of the signals that come, and ends the process if the main thread does not."""
    while number := os.read(reading, 1)[0]:
        if number in _NUMBERS and not ended.wait(PATIENCE):
            os.write(2, b"interrupted\n")
            os._exit(128 + number)
    os.close(reading)
