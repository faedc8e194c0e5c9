"""A terminal of any width for a command, and what a person sees on it."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

_TOKEN = re.compile(rb"\x1b\[([?\d;]*)([A-Za-z])|\r|\n|[^\x1b\r\n]+")


class Screen:
    """The lines of a terminal that never scrolls. It knows what progress bars use, and fails at anything else."""

    def __init__(self, width):
        self.width, self.lines, self.row, self.column = width, [""], 0, 0
        self.wrapped = 0
        """How often a text went on in the next line, because it was too long."""
        self.frames = []
        """The lines before each return of the cursor to a line above or to the first column."""

    def feed(self, content):
        for found in _TOKEN.finditer(content):
            argument, command = found[1], found[2]
            if command == b"K":
                self.lines[self.row] = ""
            elif command == b"A":
                self.frames.append(list(self.lines))
                self.row -= int(argument or b"1")
            elif found[0] == b"\r":
                self.frames.append(list(self.lines))
                self.column = 0
            elif found[0] == b"\n":
                self.row, self.column = self.row + 1, 0
                self.lines += [""] * (self.row + 1 - len(self.lines))
            elif command is None:
                self.write(found[0].decode())
            else:
                assert command in b"mhl", found[0]  # colours, and whether the cursor is shown
        return self

    def write(self, text):
        for letter in text:
            if self.column == self.width:
                self.wrapped += 1
                self.row, self.column = self.row + 1, 0
                self.lines += [""] * (self.row + 1 - len(self.lines))
            line = self.lines[self.row].ljust(self.column)
            self.lines[self.row] = line[: self.column] + letter + line[self.column + 1 :]
            self.column += 1


def in_terminal(code, width, **environment):
    """Runs Python code whose standard error is a terminal of that width. Returns the bytes that it got."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=theirs,
        env={**kept, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1", **environment},
    )
    os.close(theirs)
    got = []
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        got.append(part)
    os.close(ours)
    assert process.wait(timeout=60) == 0, b"".join(got).decode(errors="replace")
    return b"".join(got).replace(b"\r\n", b"\n")
