"""The training loop, one for every model, objective and number of processes.

A run's whole state is its tensors and `State`. Everything random is a function of the step's number. So a run that
stopped anywhere can resume from its last checkpoint and reach the same end: on a CPU in float32 bit for bit, and on a
GPU up to rounding.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, Self

from rich.console import Console

from deit import files
from deit.data.ahead import Ahead
from deit.data.batches import Batch, Faults
from deit.data.folders import Split, fingerprint
from deit.data.loading import LoaderDied
from deit.machine import (
    Processes,
    Rows,
    keep_memory,
    processes,
    resolve_precision,
)
from deit.recipe import LinearProbe, MaskedImage, Recipe
from deit.train import budget, compiling, forecast, objectives, runs, stepping
from deit.train.build import find_sources
from deit.train.progress import Reporter
from deit.train.receivers import Receiver, named
from deit.train.records import ABOUT, About
from deit.train.runs import State, Work
from deit.train.stepping import Diverged

_ROWS = 50
"""Largest number of steps between two rows of metrics."""
_FEW = 10
"""Least number of steps after which it is said whether a run waits for images."""


class _Interrupted(BaseException):
    """A signal came during a wait. It is no `Exception`, which would count as the fault of an image."""


@dataclass(frozen=True)
class Run:
    """The result of a run."""

    model: Path
    """Folder of the model with the best validation score: weights, config, preprocessing."""
    score: float
    """Its score on the validation images: the accuracy of the fused heads, 0 to 1, or the negative loss of masked
    images."""
    seconds: float
    """Training time of all sessions together."""


class Stopped(SystemExit):
    """SIGTERM or Ctrl-C ended the run early, and its state is saved. If this is not caught, the process ends with
    status 143 or 130."""


def train(
    recipe: Recipe,
    train_split: Split,
    val_split: Split,
    out: str | Path,
    *,
    device: str = "auto",
    console: Console | None = None,
    resume: bool = False,
    minutes: float | None = None,
    receivers: Sequence[Receiver] = (),
    onward: str = "resume=True continues it",
) -> Run:
    """Trains a recipe on images. Under torchrun, it trains together with the other processes.

    Writes `recipe.json`, `about.json` and `metrics.jsonl` into `out`, the best model into `out/model/`, and the run's
    state into `out/checkpoints/`.

    Args:
        device: `auto` is CUDA if there is a CUDA device, otherwise the CPU.
        console: where progress is shown; standard error if it is None.
        resume: continues a stopped run of this recipe in `out`. The settings of the machine (`compute`) may differ.
            Implied if torchrun starts a process again.
        minutes: shortens the schedule so that the run ends within this time. A linear probe has no schedule.
        receivers: what receives the rows of `metrics.jsonl` too, beside the recipe's `compute.log`.
        onward: how people continue, for the sentence about a stop.

    Raises:
        FileExistsError: `out` holds a run, and `resume` is False.
        locks.InUse: another process trains into `out`.
        ValueError: the run to resume has another recipe or other images, or `minutes` are given for a linear probe.
        TooShort: not even one step fits into `minutes`. It is a `ValueError`.
        Diverged: the loss is not finite again and again; the best model so far stays in `out/model`.
        Stopped: SIGTERM or Ctrl-C ended the run, and its state is saved. It is a `SystemExit`.
        data.BadImages: too many images can't be read.
        data.LoaderDied: a loader process died.
    """
    if minutes is not None and isinstance(recipe.objective, LinearProbe):
        raise ValueError(
            f"a linear probe takes no steps that could be fewer, found --time (in Python minutes={minutes:g}); leave "
            "it out, or set objective.images to look at fewer images"
        )
    find_sources(recipe)
    receivers = [*receivers, *named(recipe.compute.log)]
    end = math.inf if minutes is None else time.perf_counter() + 60 * minutes
    resume = resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    with processes(device) as us, _Signals() as signals, runs.held(Path(out), us):
        if us.device.type == "cpu":
            keep_memory()
        try:
            if isinstance(recipe.objective, LinearProbe):
                with signals.interrupting():
                    return _probe(recipe, (train_split, val_split), Path(out), us, console, resume, receivers)
            splits = train_split, val_split
            return _train(recipe, splits, Path(out), us, signals, console, resume, end, receivers, onward)
        except _Interrupted:
            if us.main:
                (console or Console(stderr=True)).print(f"stopped by {signals.name} before it began")
            raise Stopped(128 + signals.caught) from None


def _train(
    recipe: Recipe,
    splits: tuple[Split, Split],
    out: Path,
    us: Processes,
    signals: _Signals,
    console: Console | None,
    resume: bool,
    end: float,
    receivers: Sequence[Receiver],
    onward: str,
) -> Run:
    """Trains until `end` at the latest, a time of `time.perf_counter`. Keeps nothing of the run when it returns."""
    with signals.interrupting():
        found = runs.find(out, recipe, resume, planned=end < math.inf)
        us.wait()  # because no process may write before all have looked
        if found is not None:
            recipe = replace(recipe, schedule=found.schedule, evaluate=found.evaluate)
        elif end < math.inf:
            recipe = budget.fitted(recipe, *splits, us, end - time.perf_counter(), console)
        if us.main:
            files.write_json(out / "recipe.json", recipe.to_dict())
        work, state = runs.prepare(recipe, *splits, us, found)
        about: About | None = None
        room = _room(work, out)
        if us.main:
            about = runs.write_about(us, work.precision, state.data, *splits, out, resumed=state.step > 0)
    with Reporter(
        out,
        recipe,
        us,
        console,
        done=state.step,
        total=work.total,
        written=state.written,
        receivers=receivers,
        every=work.every,
        until=end,
    ) as reporter:
        for sentence in (*forecast.opening(work, state), str(room)):
            reporter.say(sentence)
        for problem in found.problems if found else []:
            reporter.say(f"{problem}: resuming from an earlier one")
        if about and not state.step:
            with signals.interrupting():
                for sentence in work.objective.introduction(work.model, splits[1], us):
                    reporter.say(sentence)
                if (teacher := work.objective.teacher) is not None:
                    about = replace(about, teacher=(teacher.correct, teacher.total))
                    files.write_json(out / ABOUT, about.to_dict())
        with compiling.graphs(reporter.say) if work.compiled else nullcontext():
            _loop(_Session(work, state, out, reporter, signals, end, onward))
        if about and state.best is not None and not isinstance(recipe.objective, MaskedImage):
            for alarm in about.alarms(state.best):
                reporter.say(str(alarm))
    return Run(out / "model", state.best if state.best is not None else -math.inf, state.seconds)


def _room(work: Work, out: Path) -> forecast.Room:
    """What the run needs of its disk, as the main process sees it. Raises `DiskFull` in all processes if it is not
    there."""
    room = forecast.Room.of(work, out)
    refused: str | None = None
    if work.us.main:
        try:
            room.refuse_too_little(out)
        except files.DiskFull as error:
            refused = str(error)
    if refused := work.us.gather(refused)[0]:
        raise OSError(refused)
    return room


def _probe(
    recipe: Recipe,
    splits: tuple[Split, Split],
    out: Path,
    us: Processes,
    console: Console | None,
    resume: bool,
    receivers: Sequence[Receiver] = (),
) -> Run:
    """Fits a head on frozen features. A resumed run begins again, with the features that were kept."""
    from deit.train import probe

    if us.world > 1:
        raise ValueError(f"a linear probe is fitted by one process, found {us.world}; start it without torchrun")
    if not resume and (out / "metrics.jsonl").exists():
        raise FileExistsError(
            f"{out} already holds a run; replace it with --resume (in Python resume=True), or choose another --out"
        )
    began = time.perf_counter()
    files.write_json(out / "recipe.json", recipe.to_dict())
    precision = resolve_precision(recipe.compute.precision, us.device)
    about = runs.write_about(us, precision, fingerprint(splits[0]), *splits, out)
    with Reporter(out, recipe, us, console, done=0, total=1, written=0, receivers=receivers) as reporter:
        model, numbers = probe.learn(recipe, splits, us, reporter)
        runs.save_classifier(model, recipe, out / "model")
        seconds = time.perf_counter() - began
        images = len(splits[0])
        reporter.row({"step": 1, "epoch": 1.0, "images": images, **numbers, "seconds": round(seconds, 3)})
        for sentence in about.alarms(numbers["val_accuracy"]):
            reporter.say(str(sentence))
    return Run(out / "model", numbers["val_accuracy"], seconds)


class _Session:
    """One part of a run, from its beginning or a checkpoint to its end or a signal."""

    def __init__(
        self,
        work: Work,
        state: State,
        out: Path,
        reporter: Reporter,
        signals: _Signals,
        deadline: float,
        onward: str,
    ):
        self.work, self.state, self.out = work, state, out
        self.reporter, self.signals, self.deadline, self.onward = reporter, signals, deadline, onward
        self.faults, self.val_faults = Faults(len(work.batches.split)), Faults(len(work.validation.split))
        self.faults.load_state(state.faults)
        self.last_saved = time.perf_counter()
        self.began = self.last_saved - state.seconds
        sharded = work.recipe.compute.parallel == "shard" and work.us.world > 1
        self.rows = Rows(reporter.say, divides=not sharded)
        self.first_epoch = state.step + max(_FEW, math.ceil(work.batches.steps_per_epoch))
        """The step after which it is said whether the run waits for images."""
        self.judging = 0.0
        """Seconds that the last evaluation took."""

    @property
    def seconds(self) -> float:
        """Training time of all sessions together."""
        return time.perf_counter() - self.began

    def wishes(self) -> tuple[bool, bool, bool]:
        """Whether to stop, to save and to end early. The main process has the clock; signals reach any process."""
        now, main = time.perf_counter(), self.work.us.main
        return (
            self.signals.caught != 0,
            main and now - self.last_saved >= 60 * self.work.recipe.compute.save_minutes,
            main and now + 1.5 * self.judging >= self.deadline,
        )

    def save(self) -> None:
        stepping.settle(self.work, self.state, self.reporter.say)
        self.state.seconds, self.state.written = self.seconds, self.reporter.written
        self.state.faults = self.faults.state()
        runs.save(self.work, self.state, self.out)
        self.last_saved = time.perf_counter()

    def stop(self) -> NoReturn:
        self.save()
        self.reporter.say(
            f"stopped by {self.signals.name} after step {self.state.step} of {self.work.total}; the "
            f"state is saved, {self.onward}"
        )
        raise Stopped(128 + (self.signals.caught or signal.SIGTERM))

    def lose(self, error: LoaderDied) -> NoReturn:
        """Saves the state after the last step, unless many processes would have to agree, and raises."""
        stepping.settle(self.work, self.state, self.reporter.say)
        if self.work.us.world > 1 or not self.state.step or self.state.skipped_in_a_row:
            raise error
        if self.signals.caught:
            self.stop()
        self.save()
        raise LoaderDied(f"{error}; the state after step {self.state.step} is saved, {self.onward}")

    def out_of_patience(self) -> bool:
        state, part, total = self.state, self.work.recipe.patience, self.work.total
        ends = 0 < part * total <= state.evaluated - state.improved
        if ends:
            self.reporter.say(
                f"the validation score has not improved since step {state.improved}, so training ends after step "
                f"{state.step} of {total}"
            )
        return ends

    def judge(self) -> None:
        """Scores the model, saves it if it is the best so far, and writes a row."""
        began = time.perf_counter()
        try:
            verdict = _judge(self.work, self.state, self.out, self.validation(), self.rows)
        except _Interrupted:  # saved here, where the model has its own weights again; a resumed run evaluates first
            self.stop()
        self.reporter.judged(time.perf_counter() - began)
        self.row(verdict.numbers)
        self.judging = time.perf_counter() - began

    def validation(self) -> Iterator[Batch]:
        batches = iter(self.work.validation)
        while (batch := self.waited(batches)) is not None:
            for file, reason in self.val_faults.add(batch.faults):
                self.reporter.say(f"{file} {reason}. The evaluation leaves it out")
            yield batch

    def waited(self, batches: Iterator[Batch]) -> Batch | None:
        """The next batch; None if there is none. A signal ends the wait, unless many processes would have to agree."""
        with self.signals.interrupting() if self.work.us.world == 1 else nullcontext():
            return next(batches, None)

    def advance(self, numbers: dict[str, float], seconds: float, waited: float) -> None:
        """Shows a step that took `seconds`, `waited` of them to get images."""
        self.reporter.advance(self.state.step, numbers, seconds, waited)
        if self.state.step == self.first_epoch:
            self.reporter.first_epoch(self.work.batches.advice())

    def row(self, numbers: dict[str, float]) -> None:
        work, state = self.work, self.state
        for theirs in work.us.gather(self.faults.state()):
            self.tell(theirs.items())
        means = {name: total / state.counted for name, total in state.sums.items()} if state.counted else {}
        self.reporter.row(
            {
                "step": state.step,
                "epoch": state.step / work.batches.steps_per_epoch,
                "images": state.step * work.recipe.data.batch,
                "lr": work.lr(state.step - 1),
                **means,
                **numbers,
                "skipped": state.skipped,
                "bad_images": len(self.faults),
                "seconds": round(self.seconds, 3),
            }
        )
        state.sums, state.counted = {}, 0

    def tell(self, faults: Iterable[tuple[str, str]]) -> None:
        for file, reason in self.faults.add(faults):
            self.reporter.say(f"{file} {reason}. Another image stands in for it")


def _loop(session: _Session) -> None:
    work, state, say = session.work, session.state, session.reporter.say
    per_row = work.every / math.ceil(work.every / _ROWS)
    if not state.step:
        runs.save_model(work, session.out / "model")
    fitted = False
    stream = Ahead(work.batches.from_step(state.step), work.us.device)
    try:
        while True:
            if work.due(state.step, work.every) or work.due(state.step, per_row):
                stepping.settle(work, state, say)
            if state.evaluated < state.step and work.due(state.step, work.every):
                session.judge()
            elif state.counted and work.due(state.step, per_row):
                session.row({})
            if state.step >= work.total or session.out_of_patience():
                break

            began, waited = time.perf_counter(), stream.waited
            try:
                batch = session.waited(stream)
            except _Interrupted:
                session.stop()
            except LoaderDied as error:
                session.lose(error)
            assert batch is not None  # the stream has no end
            session.tell(batch.faults)
            if not fitted:
                stepping.fit(work, state, batch, say)
                fitted = True
            work.optimizers.set_lr(work.lr(state.step))
            ahead = stream.fetch if state.step + 1 < work.total else None
            numbers, (stop, save, late) = stepping.take(work, state, batch, session.wishes(), say, ahead)
            session.advance(numbers, time.perf_counter() - began, stream.waited - waited)

            if late or stop or save:
                stepping.settle(work, state, say)
            if late and state.step < work.total:
                say(f"the time is up after step {state.step} of {work.total}")
                session.judge()
                break
            if stop:
                session.stop()
            if save and not state.skipped_in_a_row:
                session.save()
    finally:
        stream.close()
    session.save()


def _judge(work: Work, state: State, out: Path, validation: Iterable[Batch], rows: Rows) -> objectives.Verdict:
    """Scores the model on the validation images, and saves it if it is the best so far."""
    with work.average.averaged() if work.average else nullcontext():
        verdict = work.objective.judge(work.model, validation, work.us, work.precision, rows)
        # On a tie, the later model is better, because it has seen more images at a lower learning rate.
        if math.isfinite(verdict.score) and (state.best is None or verdict.score >= state.best):
            if state.best is None or verdict.score > state.best:
                state.improved = state.step
            state.best = verdict.score
            runs.save_model(work, out / "model")
    if verdict.picture is not None and work.us.main:
        path = out / "reconstructions" / f"update-{state.step:09}.png"
        with files.replacing(path) as temporary:
            verdict.picture.save(temporary, "PNG")
    state.evaluated = state.step
    return verdict


# ------------------------------------------------------------------------------------------------- time, interruptions


class _Signals:
    """Remembers SIGTERM and Ctrl-C, so that the loop can stop when its state is complete. A second Ctrl-C stops it at
    once."""

    def __init__(self) -> None:
        self.caught = 0
        self.interrupts = False
        self.previous: dict[int, Any] = {}

    @property
    def name(self) -> str:
        return signal.Signals(self.caught).name if self.caught else "a signal to another process"

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.previous[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _catch(self, number: int, _: object) -> None:
        if self.caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.caught = number
        if self.interrupts:
            raise _Interrupted

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """While the block runs, and if one came before, a signal raises `_Interrupted`."""
        before, self.interrupts = self.interrupts, True
        try:
            if self.caught:
                raise _Interrupted
            yield
        finally:
            self.interrupts = before


__all__ = ["Diverged", "Run", "Stopped", "train"]
