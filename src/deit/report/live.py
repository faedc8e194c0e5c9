"""The page of a run that still trains. It is written anew at each evaluation, and the report replaces it at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deit import files, locks
from deit.recipe import Recipe
from deit.report import document
from deit.report.markup import Html, Section, date, facts, joined, sentence
from deit.train.progress import MUCH
from deit.train.records import Record, is_number, span
from deit.words import Text, said, series

_RECENT = 20
"""Number of latest rows that tell how fast the run is."""


class LivePage:
    """Receives the rows of a run, and writes its page from the run's folder: no model is loaded, none is evaluated.

    Args:
        file: where the page is written; `RUN/report.html` if it is None.
        more: makes a section about the work that the run is a part of. The page then stays unfinished when the run
            ends.
        what: the name of the whole work, for people; a run if it is None.
    """

    def __init__(self, file: Path | None = None, more: Callable[[], Section] | None = None, what: Text | None = None):
        self.file, self.more, self.what = file, more, what or said("run")
        self.out: Path | None = None

    def begin(self, out: Path, recipe: Recipe, step: int) -> None:
        self.out, self.recipe, self.first = out, recipe, step
        self.write()

    def row(self, numbers: dict[str, Any]) -> None:
        if any(name.startswith("val_") for name in numbers):
            self.write()

    def close(self, finished: bool) -> None:
        assert self.out is not None
        if not finished:
            told = said(
                "A signal or an error has ended the {what} early; its terminal or log says which.", what=self.what
            )
            move = (
                said("The same command goes on with --resume.")
                if self.more is None
                else said("The same command goes on.")
            )
            self.write(series(" ", [told, move]))
        elif self.more:
            self.write(said("A step has reached its end, and the next one follows."))
        else:
            self._put(self.out, Record.read(self.out), [])

    def write(self, state: Text = "") -> None:
        """Writes the page of the latest run, if there is one. `state` says it if the run doesn't train now."""
        if self.out is None:
            return
        record = Record.read(self.out)
        title = said("This {what} is not finished", what=self.what)
        first = [Section("unfinished", title, self._status(record, state))]
        self._put(self.out, record, [*first, *([self.more()] if self.more else [])])

    def _put(self, out: Path, record: Record, first: list[Section]) -> None:
        file = self.file or out / document.FILE
        with suppress(locks.InUse), locks.held(file, lock=locks.beside(file)):  # `deit report` writes it now
            files.sweep(file.parent, file.name)
            document.write(file, record, None, first=first, unfinished=bool(first))

    def _status(self, record: Record, state: Text) -> Html:
        known: list[tuple[Text, object]] = []
        step, total = record.last("step") or self.first, self._total(record)
        steps = said("{step:,.0f} of {total:,}", step=step, total=total) if total else f"{step:,.0f}"
        known.append((said("steps"), steps))
        if (epoch := record.last("epoch")) is not None:
            known.append((said("epochs"), f"{epoch:.4g}"))
        if (seconds := record.last("seconds")) is not None:
            known.append((said("training time so far"), span(seconds)))
        left = remaining(record, total) if total else None
        if left is not None and not state:
            known.append((said("time left"), said("about {time}", time=span(left))))
        for key, name in (
            ("val_accuracy", said("best accuracy so far")),
            ("val_loss", said("lowest loss on validation images so far")),
        ):
            if (best := record.best) and is_number(best.get(key)):
                found = said("{value:.4g}, after step {step:,.0f}", value=best[key], step=best["step"])
                known.append((name, found))
        now = date(datetime.now(UTC).isoformat())
        known.append((said("this page"), said("as of {date}", date=now)))
        told = state or said(
            "The numbers are those of the latest evaluation. The page loads itself again while the run goes on, and "
            "the report replaces it at the end. If its date stays the same for long, the run was killed, or its disk "
            "is full: look into its terminal or log."
        )
        waits = []
        if (waiting := record.last("waiting")) is not None and waiting > MUCH:
            waits.append(
                sentence(
                    said(
                        "{share:.0%} of the recent time went by waiting for images. Resume with more loader processes "
                        "(compute.workers), or install the extra fast.",
                        share=waiting,
                    )
                )
            )
        return joined([sentence(told), *waits, facts(known)])

    def _total(self, record: Record) -> int | None:
        """Number of steps of the whole run; None if it isn't known."""
        schedule, about = self.recipe.schedule, record.about
        if schedule is None or about is None:
            return None
        return max(1, schedule.total.in_steps(sum(about.train) / self.recipe.data.batch))


def remaining(record: Record, total: int) -> float | None:
    """Seconds that a run of `total` steps still takes, by its recent rows; None if they don't tell."""
    rows: list[Mapping[str, Any]] = [row for row in record.rows if is_number(row.get("seconds"))][-_RECENT:]
    if not rows:
        return None
    before = rows[0] if len(rows) > 1 else {"step": 0, "seconds": 0.0}
    steps, seconds = rows[-1]["step"] - before["step"], rows[-1]["seconds"] - before["seconds"]
    if steps <= 0 or seconds < 0:
        return None
    return max(0.0, (total - rows[-1]["step"]) * seconds / steps)
