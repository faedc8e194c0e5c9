"""A run that ends in time: what its parts take, measured before it begins, and a schedule that fits.

Steps and evaluation are timed on a model that is then thrown away, so that the record of the run stays complete.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import islice

import torch
from rich.console import Console

from deit.data.ahead import Ahead
from deit.data.batches import Batch
from deit.data.folders import Split
from deit.machine import Processes
from deit.recipe import Recipe, steps
from deit.train import runs, stepping
from deit.train.records import span
from deit.train.runs import State, Work

_PLANNED, _MOST_PLANNED = 0.05, 0.2
"""Parts of a time budget: the usual one that measuring takes, and the largest."""
_RESERVED = 0.1
"""Part of the time that is left after measuring, kept for what was not foreseen."""
_EVALUATED = 0.1
"""Largest part of a time budget that evaluations take, if the recipe leaves their interval open."""


class TooShort(ValueError):
    """Not even one step fits into the time that a run was given."""


def fitted(
    recipe: Recipe, train_split: Split, val_split: Split, us: Processes, seconds: float, console: Console | None
) -> Recipe:
    """The recipe with a schedule that ends within `seconds` and is never longer than the recipe's own.

    If the recipe leaves the interval of evaluations open, and they would take more than a tenth of the time, it has a
    longer interval, too.

    Raises `TooShort`.
    """
    began = time.perf_counter()
    work, state = runs.prepare(recipe, train_split, val_split, us, None)
    costs = _measured(work, state, us, seconds)
    left = (1 - _RESERVED) * (seconds - (time.perf_counter() - began))
    # the main process's choice, because the clocks of the others differ and their work must not
    total, interval = (int(_by_main(value, us)) for value in costs.choice(left, work))
    if total < 1:
        raise TooShort(
            f"a step takes about {costs.step:.1f} s and an evaluation {costs.judging:.1f} s, so not even one step fits "
            f"into the {max(0.0, left):.0f} s that are left of {max(0.0, seconds):.0f} s after they were measured; "
            "give more time, take a smaller data.batch, or take a smaller model"
        )
    taken, reason = min(total, work.total), ""
    if interval:
        recipe = replace(recipe, evaluate=steps(min(interval, taken)))
        count = math.ceil(taken / interval)
        reason = (
            f", with {count} evaluation{'s' * (count != 1)}, because one after each epoch would take more than a tenth "
            "of it"
        )
    if total < work.total:
        reason += f"; all of them would take about {span(costs.whole(work))}"
    if us.main:
        (console or Console(stderr=True)).print(
            f"a step takes about {costs.step:.2g} s and an evaluation {costs.judging:.2g} s, so {taken} of the "
            f"recipe's {work.total} steps fit into {span(seconds)}{reason}",
            highlight=False,
            soft_wrap=True,
        )
    if total >= work.total:
        return recipe
    shorter = replace(work.schedule, total=steps(total), warmup=steps(round(work.warmup * total / work.total)))
    return replace(recipe, schedule=shorter)


@dataclass(frozen=True)
class Costs:
    """Seconds that the parts of a run take."""

    step: float
    reading: float
    """What a step takes in addition while its images are read for the first time."""
    unread: float
    """Number of steps that do."""
    judging: float
    """What an evaluation takes."""
    first: float
    """What the first evaluation takes in addition, because its images are read."""

    def choice(self, seconds: float, work: Work) -> tuple[float, int]:
        """How many steps fit into `seconds`, with their evaluations, and how many there are from one evaluation to the
        next; 0 if the interval of `work` stays."""
        seconds -= self.first
        if work.recipe.evaluate is None and self.judging > 0:
            most = max(1, int(_EVALUATED * seconds / self.judging))
            total = min(work.total, int(self._steps(seconds - most * self.judging, self.step)))
            if total > most * work.every:
                return total, math.ceil(total / most)
        return self._steps(seconds - self.judging, self.step + self.judging / work.every), 0

    def whole(self, work: Work) -> float:
        """Seconds of all steps of the recipe, with its evaluations."""
        evaluations = math.ceil(work.total / work.every) * self.judging
        return self.first + min(work.total, self.unread) * self.reading + work.total * self.step + evaluations

    def _steps(self, seconds: float, each: float) -> float:
        """How many steps fit that take `each` second, and some of them the time of reading."""
        read = seconds / (each + self.reading)
        return read if read <= self.unread else (seconds - self.unread * self.reading) / each


def _by_main(value: float, us: Processes) -> float:
    """The main process's value, in all processes."""
    return float(us.sum(torch.tensor(float(value) if us.main else 0.0, device=us.device)))


def _measured(work: Work, state: State, us: Processes, seconds: float) -> Costs:
    """The costs of a run that has `seconds`, as this process's clock sees them."""
    # Loader processes give batches in bursts of as many as there are loaders, with waits between the bursts. At the
    # start, they have time to make two bursts ahead. So whole bursts count, and only those after that. Images that are
    # kept in memory take longer the first time only, so the same ones come again.
    batches = work.batches
    burst = max(1, batches.workers)
    first = 2 * burst if batches.workers else 2
    stream = Ahead(batches.from_step(0, repeat=burst if batches.keeps else None), us.device)
    times: list[float] = []

    def spent_above(part: float) -> bool:
        return _by_main(sum(times) > part * seconds, us) > 0

    def enough() -> bool:
        if len(times) < 3:
            return bool(times) and spent_above(1.0)
        return (
            spent_above(_MOST_PLANNED)
            or (len(times) >= first + max(4, burst) and (len(times) - first) % burst == 0 and spent_above(_PLANNED))
            or len(times) >= first + 12 * burst
        )

    while not enough():
        started = time.perf_counter()
        batch = next(stream)
        if not times:
            stepping.fit(work, state, batch, lambda _: None)
        work.optimizers.set_lr(work.lr(0))
        stepping.take(work, state, batch, (False,), lambda _: None, stream.fetch)
        times.append(time.perf_counter() - started)
    stream.close()
    per_image = batches.reading_seconds() if batches.keeps else 0.0
    return Costs(
        _seconds_per_step(times, first, burst),
        per_image * work.recipe.data.batch / us.world / burst,
        batches.steps_per_epoch * us.world,  # because each process keeps images of its own
        *_judging_seconds(work, us),
    )


def _judging_seconds(work: Work, us: Processes) -> tuple[float, float]:
    """Seconds of an evaluation, and those that the first one takes in addition, judged by up to three batches."""

    def judged(batches: Iterable[Batch]) -> float:
        began = time.perf_counter()
        work.objective.judge(work.model, batches, us, work.precision)
        return time.perf_counter() - began

    judged(islice(work.validation, 1))  # because the first one is slow
    sample = min(3, len(work.validation))
    parts = len(work.validation) / sample
    if not work.validation.keeps:
        return parts * judged(islice(work.validation, sample)), 0.0
    began = time.perf_counter()
    batches = list(islice(work.validation, sample))
    reading = time.perf_counter() - began
    return parts * judged(batches), parts * reading


def _seconds_per_step(times: list[float], first: int, burst: int) -> float:
    """The mean over the whole bursts of steps from the `first` on; if there is none, over all but the two first steps,
    which start things, although loaders then gave some batches that they had made ahead. If there are no more than two
    steps, the last one counts."""
    whole = (len(times) - first) // burst * burst
    return statistics.fmean(times[first : first + whole] if whole > 0 else times[2:] or times[-1:])
