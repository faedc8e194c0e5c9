"""Shows and logs the progress of a run: a live line, `metrics.jsonl`, and whatever else receives its rows."""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from rich.console import Console

from deit import files
from deit.machine import Processes, peak_memory
from deit.recipe import Recipe
from deit.terminal import shown
from deit.train.bar import Bar
from deit.train.receivers import Receiver, TensorBoard
from deit.train.records import span

_SETTLED = 10
"""Steps before the first estimate of the remaining time. The first steps compile, allocate and fill caches."""
_RECENT = 50
"""Number of latest steps whose mean duration gives the rate. Batches may come in bursts, so a median would ignore the
waits between them."""
_STARTING = 2
"""Number of first steps that do not count for the rate after them, because they start things."""
MUCH = 1 / 3
"""Share of the time spent on waiting for images that is worth a sentence."""


class _Shares:
    """The time of some steps, and the part of it that went by waiting for images."""

    def __init__(self) -> None:
        self.seconds = self.waited = 0.0

    def add(self, seconds: float, waited: float) -> None:
        self.seconds += seconds
        self.waited += waited

    @property
    def waiting(self) -> float:
        return self.waited / self.seconds if self.seconds else 0.0


class Reporter:
    """Shows and logs a run in the main process. It is silent in the others.

    Args:
        out: the run's folder.
        done, total: number of steps so far and in all.
        written: number of bytes of `metrics.jsonl` that belong to the run so far. Whatever a stopped run wrote after
            its last checkpoint is cut off and written again.
        receivers: what else receives the rows. TensorBoard does anyway, if it is installed.
        every: number of steps between two evaluations.
        until: the time of `time.perf_counter` at which the run ends at the latest.
    """

    def __init__(
        self,
        out: Path,
        recipe: Recipe,
        us: Processes,
        console: Console | None,
        *,
        done: int,
        total: int,
        written: int,
        receivers: Sequence[Receiver] = (),
        every: float = math.inf,
        until: float = math.inf,
    ):
        self.out, self.recipe, self.us, self.total = out, recipe, us, total
        self.console = (console or Console(stderr=True)) if us.main else Console(quiet=True)
        self.first, self.rate, self.waiting = done, 0.0, 0.0
        self.since_row, self.since_start = _Shares(), _Shares()
        self.durations: deque[float] = deque(maxlen=_RECENT)
        self.latest: dict[str, float] = {}
        self.receivers: list[Receiver] = []
        self.every, self.until = every, until
        self.judging: float | None = None
        """Seconds that the last evaluation took; None before the first one."""
        self.bar = Bar(self.console, recipe.name, total=total, done=done)
        if us.main:
            self.metrics = open(out / "metrics.jsonl", "a+b")  # noqa: SIM115 (closed by __exit__)
            self.metrics.truncate(written)
            self.metrics.seek(0, os.SEEK_END)
            self.receivers = [*receivers, *([TensorBoard()] if find_spec("tensorboard") else [])]
            self._tell(lambda receiver: receiver.begin(out, recipe, done))

    def __enter__(self) -> Self:
        self.bar.__enter__()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self.bar.__exit__()
        if self.us.main:
            with suppress(OSError) if error else nullcontext():  # a full disk, which is told already
                self.metrics.close()
        self._tell(lambda receiver: receiver.close(error is None))

    def _tell(self, call: Callable[[Receiver], None]) -> None:
        """Calls each receiver. One that fails is left out from then on, because the run matters more."""
        for receiver in list(self.receivers):
            try:
                call(receiver)
            except Exception as error:
                self.receivers = [each for each in self.receivers if each is not receiver]
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                self.say(
                    f"{type(receiver).__name__} failed ({reason}); the run goes on without it, and metrics.jsonl holds "
                    "every row"
                )

    @property
    def written(self) -> int:
        return self.metrics.tell() if self.us.main else 0

    def say(self, sentence: str) -> None:
        self.console.print(shown(sentence), markup=False, highlight=False, soft_wrap=True)

    def advance(self, step: int, numbers: dict[str, float], seconds: float, waited: float) -> None:
        """Moves the line. To be called after every step, which took `seconds`, `waited` of them to get images."""
        since = step - self.first
        if since == _STARTING + 1:
            self.durations.clear()
            self.since_row, self.since_start = _Shares(), _Shares()
        for shares in (self.since_row, self.since_start):
            shares.add(seconds, waited)
        self.durations.append(seconds)
        self.rate = self.recipe.data.batch / statistics.fmean(self.durations)
        self.latest |= numbers
        if since == _SETTLED and self.total - step > _SETTLED:
            count, known = self._evaluations(step), self.judging is not None
            evaluations = f"with {count} evaluation{'s' * (count != 1)}" if known else "evaluation not counted"
            self.say(
                f"{self.total - step} steps of {self.recipe.data.batch} images to go: about {span(self.left(step))} at "
                f"{self.rate:.0f} images/s, {evaluations}; {self._memory()} of memory so far"
            )
        self.bar.move(step, self.left(step) if since > _STARTING and step < self.total else None)
        self.bar.say(self._numbers())

    def judged(self, seconds: float) -> None:
        """Remembers how long an evaluation took."""
        self.judging = seconds

    def left(self, step: int) -> float:
        """Seconds to go after a step: the steps at the recent rate, the evaluations as the last one."""
        steps = (self.total - step) * self.recipe.data.batch / self.rate if self.rate else 0.0
        left = steps + self._evaluations(step) * (self.judging or 0.0)
        return max(0.0, min(left, self.until - time.perf_counter()))

    def _evaluations(self, step: int) -> int:
        """Number of evaluations after a step. The last one is after the last step."""
        if step >= self.total:
            return 0
        regular = int((self.total - 1) / self.every) - int(step / self.every)
        return regular + 1

    def first_epoch(self, advice: str) -> None:
        """Says it if the run waits for images much of the time, and what to do. To be called after the first epoch."""
        if self.since_start.waiting > MUCH and advice:
            self.say(f"{self.since_start.waiting:.0%} of the time went by waiting for images; {advice}")

    def row(self, row: dict[str, Any]) -> None:
        """Writes one line of `metrics.jsonl`."""
        if not self.us.main:
            return
        if self.since_row.seconds:
            self.waiting, self.since_row = self.since_row.waiting, _Shares()
        row = row | {
            "images_per_second": round(self.rate, 1),
            "waiting": round(self.waiting, 3),
            "memory": peak_memory(self.us.device),
        }
        with files.told_if_full(self.out / "metrics.jsonl"):
            self.metrics.write(json.dumps(row).encode() + b"\n")
            self.metrics.flush()
        self.latest |= {name: value for name, value in row.items() if name.startswith("val_")}
        self._tell(lambda receiver: receiver.row(dict(row)))
        self.bar.say(self._numbers())
        if not self.bar.moves and any(name.startswith("val_") for name in row):
            left = [f"about {span(self.left(row['step']))} left"] if self.rate and row["step"] < self.total else []
            self.say(
                f"{self.recipe.name}: epoch {row['epoch']:.4g}, step {row['step']} of {self.total}: "
                f"{'  '.join([*self._numbers(), *left])}"
            )

    def looked(self, images: int, total: int, rate: float) -> None:
        """Moves the line of a run that takes no steps, but looks once at each of its images."""
        self.bar.move(images, (total - images) / rate, total=total)
        self.bar.say([f"{rate:.0f} images/s", self._memory()])

    def _numbers(self) -> list[str]:
        shown = [
            f"{name.replace('val_accuracy', 'val').replace('_', ' ')} {self.latest[name]:.3f}"
            for name in ("loss", "accuracy", "val_accuracy", "agreement", "val_loss")
            if name in self.latest
        ]
        return [*shown, *([f"{self.rate:.0f} images/s"] if self.rate else []), self._memory()]

    def _memory(self) -> str:
        return f"{peak_memory(self.us.device) / 2**30:.1f} GiB"
