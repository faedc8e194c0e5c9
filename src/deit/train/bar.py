"""A bar that moves in a terminal, as wide as the terminal allows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.progress import Progress, ProgressColumn, Task
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from deit.terminal import shown
from deit.train.records import span

_LEAST, _MOST = 8, 40
"""Smallest and largest width of a bar, in characters."""
_BETWEEN = "  "


class Bar:
    """A name, a bar, how much is done, the time left, and numbers. It is silent outside of a terminal.

    Args:
        done, total: how much is done, and how much there is.
    """

    def __init__(self, console: Console, name: str, *, total: int, done: int = 0):
        self.moves = console.is_terminal and not console.is_dumb_terminal
        self.progress = Progress(_Line(console), console=console, disable=not self.moves)
        self.task = self.progress.add_task(shown(name), total=total, completed=done, numbers=[], left=[])

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def move(self, done: int, left: float | None, *, total: int | None = None) -> None:
        """Moves it. `left` is the number of seconds to go; None if it is not known."""
        known = [] if left is None else [f"{span(left)} left"]
        self.progress.update(self.task, completed=done, left=known, total=total)

    def say(self, numbers: Sequence[str]) -> None:
        """Shows these numbers from now on. In a narrow terminal, those at the end are left out."""
        self.progress.update(self.task, numbers=list(numbers))


class _Line(ProgressColumn):
    """One line, or a second one with the numbers if the first would be too long."""

    def __init__(self, console: Console):
        super().__init__()
        self.console = console

    def render(self, task: Task) -> RenderableType:
        width, numbers = self.console.width, task.fields["numbers"]
        place = [f"{task.completed:.0f}/{task.total or 0:.0f}", *task.fields["left"]]
        line = _drawn(task.description, task, [*place, *numbers], width)
        if line is not None:
            return line
        fitting = [part for end, part in enumerate(numbers, 1) if cell_len(_BETWEEN.join(numbers[:end])) <= width]
        return Group(
            _drawn(task.description, task, place, width) or _drawn("", task, place, width) or _text(place),
            _text(fitting),
        )


def _drawn(name: str, task: Task, parts: Sequence[str], width: int) -> RenderableType | None:
    """The name, the bar and the parts; None if that is too wide."""
    named = [Text(name, no_wrap=True)] if name else []
    room = width - cell_len(_BETWEEN.join(parts)) - 1 - sum(cell_len(name) + 1 for _ in named)
    if room < _LEAST:
        return None
    line = Table.grid(padding=(0, 1))
    line.add_row(*named, ProgressBar(task.total or 1, task.completed, width=min(room, _MOST)), _text(parts))
    return line


def _text(parts: Sequence[str]) -> Text:
    return Text(_BETWEEN.join(parts), no_wrap=True, overflow="crop")
