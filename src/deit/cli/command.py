"""From arguments to an exit status: one verb runs, and errors, warnings and signals end in one line each."""

from __future__ import annotations

import codecs
import io
import os
import select
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from deit import signals
from deit.cli.arguments import parser
from deit.cli.verbs import BY_NAME
from deit.terminal import shortened, shown


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status.

    It is 0 if the work is done, 1 if it failed with a message, 2 after wrong usage, 130 or 143 if Ctrl-C or SIGTERM
    ended it, and 141 if nobody reads the output any more.

    A training that a signal stops ends the process itself, with status 130 or 143.
    """
    _share_cores()
    options = parser().parse_args(arguments)
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape" if stream is sys.stdin else _NAMES)
    with warnings.catch_warnings():
        # Appended, so that -W and PYTHONWARNINGS come first. The room `image` refuses what is too large.
        warnings.filterwarnings("ignore", r"Image size \(\d+ pixels\) exceeds limit", append=True)
        formatted, warnings.formatwarning = warnings.formatwarning, _sentence(options.verb, warnings.formatwarning)
        try:
            with _told_of_exports(options.verb), nullcontext() if options.verb in _OWN_SIGNALS else signals.ending():
                status = int(BY_NAME[options.verb](options) or 0)
                sys.stdout.flush()
            return status
        except KeyboardInterrupt as error:
            print("interrupted", file=sys.stderr)
            return error.status if isinstance(error, signals.Interrupted) else 130
        except MemoryError:
            if options.debug:
                raise
            print(
                f"deit {options.verb}: expected more free memory than this process may have; end other programs, raise "
                "its limit, or ask for less at once",
                file=sys.stderr,
            )
            return 1
        except (ValueError, OSError, ImportError, RuntimeError) as error:
            if isinstance(error, BrokenPipeError) and _nobody_reads():
                return 141  # 128 + SIGPIPE, as a shell reports it
            if options.debug:
                raise
            print(f"deit {options.verb}: {shortened(shown(error))}", file=sys.stderr)
            return 1
        finally:
            warnings.formatwarning = formatted


_OWN_SIGNALS = ("fit", "train", "quickstart", "serve")
"""Verbs that save or answer something when a signal comes, which may take its time."""
_NAMES = "deit.names"
"""How standard output writes what its encoding lacks: the bytes of file names that are not text as they are, other
characters as \\u escapes."""


def _share_cores() -> None:
    """Lets PyTorch's threads sleep soon while they wait for each other.

    GNU's OpenMP reads these variables when PyTorch is loaded. By default, a thread spins for a long time. If another
    program takes a core, the threads that spin keep the thread that they wait for from running.
    """
    if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)


_SPINS = "20000"
"""How often a thread looks before it sleeps. Measured in docs/log.md."""


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)


codecs.register_error(_NAMES, _escape)


def _sentence(verb: str, otherwise: Any) -> Any:
    """Formats the warnings that are meant for users in one line, like errors."""

    def formatted(message: Any, category: Any, *where: Any, **more: Any) -> str:
        return (
            f"deit {verb}: {shortened(shown(message))}\n"
            if category is UserWarning
            else otherwise(message, category, *where, **more)
        )

    return formatted


@contextmanager
def _told_of_exports(verb: str) -> Iterator[None]:
    """Shows what the room `export` logs, because a minute of silence looks like a program that hangs."""
    import logging  # here and not above, because it slows `deit --help`

    log, handler = logging.getLogger("deit.export"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"deit {verb}: %(message)s"))
    level = log.level
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def _nobody_reads() -> bool:
    """Whether the reader of standard output or standard error has gone away, as `head` does; then both lead nowhere."""
    try:
        places = [stream.fileno() for stream in (sys.stdout, sys.stderr)]
    except (OSError, ValueError, AttributeError):
        return False
    if hasattr(select, "poll"):
        poll = select.poll()
        for place in places:
            poll.register(place, 0)  # errors are told unasked
        if not any(event & select.POLLERR for _, event in poll.poll(0)):
            return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for place in places:
        os.dup2(nowhere, place)
    return True
