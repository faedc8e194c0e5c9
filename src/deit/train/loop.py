"""The training loop, one for every model, objective and number of processes.

A run's whole state is its tensors and `State`. Everything random is a function of the step's number. So a run that
stopped anywhere can resume from its last checkpoint and reach the same end: on a CPU in float32 bit for bit, and on a
GPU up to rounding.
"""

from __future__ import annotations

import math
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from rich.console import Console
from torch import Tensor, nn

from deit import files
from deit.config import DeiTConfig
from deit.data.ahead import Ahead
from deit.data.batches import Batch, Faults, LoaderDied
from deit.data.draws import Stream, draws
from deit.data.folders import Split
from deit.machine import (
    Processes,
    Rows,
    alone,
    available_memory,
    free_memory,
    keep_memory,
    out_of_memory,
    processes,
    synchronised,
)
from deit.recipe import MICRO_BATCHES_REFUSED, Recipe, steps
from deit.train import compiling, memory, objectives, optim, runs
from deit.train.build import find_sources
from deit.train.progress import Reporter
from deit.train.receivers import Receiver, named
from deit.train.runs import State, Unread, Work

_MOST_SKIPPED = 5
"""Number of steps in a row without a finite loss and gradient that stop the run."""
_PLANNED, _MOST_PLANNED = 0.05, 0.2
"""Parts of a time budget: the usual one that planning takes, and the largest."""
_ROWS = 50
"""Largest number of steps between two rows of metrics."""


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


class Diverged(RuntimeError):
    """The loss is not finite again and again."""


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
) -> Run:
    """Trains a recipe on images. Under torchrun, it trains together with the other processes.

    Writes `recipe.json`, `about.json` and `metrics.jsonl` into `out`, the best model into `out/model/`, and the run's
    state into `out/checkpoints/`.

    Args:
        device: `auto` is CUDA if there is a CUDA device, otherwise the CPU.
        console: where progress is shown; standard error if it is None.
        resume: continues a stopped run of this recipe in `out`. The settings of the machine (`compute`) may differ.
            Implied if torchrun starts a process again.
        minutes: shortens the schedule so that the run ends within this time.
        receivers: what receives the rows of `metrics.jsonl` too, beside the recipe's `compute.log`.

    Raises:
        FileExistsError: `out` holds a run, and `resume` is False.
        files.InUse: another process trains into `out`.
        ValueError: the run to resume has another recipe or other images.
        Diverged: the loss is not finite again and again; the best model so far stays in `out/model`.
        Stopped: SIGTERM or Ctrl-C ended the run, and its state is saved. It is a `SystemExit`.
        data.BadImages: too many images can't be read.
        data.LoaderDied: a loader process died.
    """
    find_sources(recipe)
    receivers = [*receivers, *named(recipe.compute.log)]
    end = math.inf if minutes is None else time.perf_counter() + 60 * minutes
    resume = resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    with processes(device) as us, _Signals() as signals, runs.held(Path(out), us):
        if us.device.type == "cpu":
            keep_memory()
        try:
            return _train(recipe, (train_split, val_split), Path(out), us, signals, console, resume, end, receivers)
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
) -> Run:
    """Trains until `end` at the latest, a time of `time.perf_counter`. Keeps nothing of the run when it returns."""
    with signals.interrupting():
        found = runs.find(out, recipe, resume, planned=end < math.inf)
        us.wait()  # because no process may write before all have looked
        if found is not None:
            recipe = replace(recipe, schedule=found.schedule)
        elif end < math.inf:
            recipe = _plan(recipe, *splits, us, end - time.perf_counter(), console)
        if us.main:
            files.write_json(out / "recipe.json", recipe.to_dict())
        work, state = runs.prepare(recipe, *splits, us, found)
        if us.main:
            runs.write_about(work, state, *splits, out)
    with Reporter(
        out, recipe, us, console, done=state.step, total=work.total, written=state.written, receivers=receivers
    ) as reporter:
        for problem in found.problems if found else []:
            reporter.say(f"{problem}: resuming from an earlier one")
        if us.main and not state.step:
            with signals.interrupting():
                for sentence in work.objective.introduction(splits[1], us):
                    reporter.say(sentence)
        with compiling.graphs(reporter.say) if work.compiled else nullcontext():
            _loop(_Session(work, state, out, reporter, signals, end))
    return Run(out / "model", state.best if state.best is not None else -math.inf, state.seconds)


class _Session:
    """One part of a run, from its beginning or a checkpoint to its end or a signal."""

    def __init__(self, work: Work, state: State, out: Path, reporter: Reporter, signals: _Signals, deadline: float):
        self.work, self.state, self.out = work, state, out
        self.reporter, self.signals, self.deadline = reporter, signals, deadline
        self.faults, self.val_faults = Faults(len(work.batches.split)), Faults(len(work.validation.split))
        self.faults.load_state(state.faults)
        self.last_saved = time.perf_counter()
        self.began = self.last_saved - state.seconds
        sharded = work.recipe.compute.parallel == "shard" and work.us.world > 1
        self.rows = Rows(reporter.say, divides=not sharded)
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
        _settle(self.work, self.state, self.reporter.say)
        self.state.seconds, self.state.written = self.seconds, self.reporter.written
        self.state.faults = self.faults.state()
        runs.save(self.work, self.state, self.out)
        self.last_saved = time.perf_counter()

    def stop(self) -> NoReturn:
        self.save()
        self.reporter.say(
            f"stopped by {self.signals.name} after step {self.state.step} of {self.work.total}; the "
            "state is saved, continue with --resume"
        )
        raise Stopped(128 + (self.signals.caught or signal.SIGTERM))

    def lose(self, error: LoaderDied) -> NoReturn:
        """Saves the state after the last step, unless many processes would have to agree, and raises."""
        if self.work.us.world > 1 or not self.state.step or self.state.skipped_in_a_row:
            raise error
        if self.signals.caught:
            self.stop()
        self.save()
        raise LoaderDied(f"{error}; the state after step {self.state.step} is saved, continue with --resume")

    def judge(self) -> None:
        """Scores the model, saves it if it is the best so far, and writes a row."""
        began = time.perf_counter()
        try:
            verdict = _judge(self.work, self.state, self.out, self.validation(), self.rows)
        except _Interrupted:  # saved here, where the model has its own weights again; a resumed run evaluates first
            self.stop()
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
                _settle(work, state, say)
            if state.evaluated < state.step and work.due(state.step, work.every):
                session.judge()
            elif state.counted and work.due(state.step, per_row):
                session.row({})
            if state.step >= work.total:
                break

            began = time.perf_counter()
            try:
                batch = session.waited(stream)
            except _Interrupted:
                session.stop()
            except LoaderDied as error:
                session.lose(error)
            assert batch is not None  # the stream has no end
            session.tell(batch.faults)
            if not fitted:
                _fit(work, state, batch, say)
                fitted = True
            work.optimizers.set_lr(work.lr(state.step))
            ahead = stream.fetch if state.step + 1 < work.total else None
            numbers, (stop, save, late) = _step(work, state, batch, session.wishes(), say, ahead)
            session.reporter.advance(state.step, numbers, time.perf_counter() - began)

            if late or stop or save:
                _settle(work, state, say)
            if late and state.step < work.total:
                say(f"the time is up after step {state.step} of {work.total}; continue with --resume")
                session.judge()
                break
            if stop:
                session.stop()
            if save and not state.skipped_in_a_row:
                session.save()
    finally:
        stream.close()
    session.save()


def _step(
    work: Work,
    state: State,
    batch: Batch,
    wishes: tuple[bool, ...],
    say: Callable[[str], None],
    meanwhile: Callable[[], None] | None = None,
) -> tuple[dict[str, float], list[bool]]:
    """Takes one step, or skips it if the loss or the gradient is not finite. Calls `meanwhile` while a GPU computes.

    Returns the logged numbers and, for each of `wishes`, whether any process has it. On a GPU, these are usually those
    of the step before, because the GPU would stand still while the host reads its numbers and then gives it new work.
    So the GPU decides by itself whether to skip. `_settle` reads what is left.
    """
    buffers = [buffer.clone() for buffer in work.model.buffers()]  # running statistics change in the forward pass
    names, means = _gradients(work, state, batch, buffers, say)
    norm = optim.clip_gradients(work.model.parameters(), work.recipe.optim.clip).detach().float() / work.us.world
    asked = torch.tensor(wishes, dtype=torch.float32).to(work.us.device, non_blocking=True)
    totals = work.us.sum(torch.cat([means, norm.reshape(1), asked]))
    names = [*names, "gradient_norm"]
    state.step += 1
    unread = Unread.of(state.step, names, totals)
    meanwhile = meanwhile or (lambda: None)
    if work.decides:
        earlier = _settle(work, state, say) or ({}, [False] * len(wishes))
        judged = torch.stack([totals[names.index(name)] for name in ("loss", "gradient_norm")])
        skip = 1.0 - judged.isfinite().all().float()
        work.optimizers.step(skip)
        if work.average:
            work.average.update(skip)
        for buffer, kept in zip(work.model.buffers(), buffers, strict=True):
            buffer.copy_(torch.where(skip > 0, kept, buffer))
        work.optimizers.zero_grad()
        work.unread = unread
        meanwhile()
        return earlier
    meanwhile()
    numbers, wanted = unread.read()
    if _is_finite(numbers):
        work.optimizers.step()
        if work.average:
            work.average.update()
        work.optimizers.zero_grad()
    else:
        _undo(work, buffers)
    _count(work, state, unread.step, numbers, say)
    return numbers, wanted


def _settle(work: Work, state: State, say: Callable[[str], None]) -> tuple[dict[str, float], list[bool]] | None:
    """Reads what `_step` has left unread, if anything. Then `state` is that of the model."""
    unread, work.unread = work.unread, None
    if unread is None:
        return None
    numbers, wanted = unread.read()
    if work.average and not _is_finite(numbers):
        work.average.not_updated()
    _count(work, state, unread.step, numbers, say)
    return numbers, wanted


def _is_finite(numbers: Mapping[str, float]) -> bool:
    return math.isfinite(numbers["loss"]) and math.isfinite(numbers["gradient_norm"])


def _count(work: Work, state: State, step: int, numbers: Mapping[str, float], say: Callable[[str], None]) -> None:
    """Counts a step that was taken or skipped. Raises `Diverged` if too many in a row were skipped."""
    if _is_finite(numbers):
        state.skipped_in_a_row = 0
        state.counted += 1
        for name, value in numbers.items():
            state.sums[name] = state.sums.get(name, 0.0) + value
        return
    state.skipped += 1
    state.skipped_in_a_row += 1
    say(f"step {step} is skipped: loss {numbers['loss']}, gradient norm {numbers['gradient_norm']}")
    if state.skipped_in_a_row >= _MOST_SKIPPED:
        optimizer = work.recipe.optim
        raise Diverged(
            f"{work.recipe.name}: the loss or its gradient was not finite in {_MOST_SKIPPED} steps in a row, up to "
            f"{step}; the last good checkpoint and model are kept. Lower optim.lr (now {optimizer.lr}), set optim.clip "
            f"(now {optimizer.clip}), lengthen schedule.warmup, or set compute.precision=float32"
        )


def _gradients(
    work: Work, state: State, batch: Batch, buffers: list[Tensor], say: Callable[[str], None]
) -> tuple[list[str], Tensor]:
    """Computes the gradients of the mean loss over the global batch. Returns this process's share of the logged means.

    If memory runs out, the micro-batches are halved and the batch is computed again.
    """
    while True:
        try:
            return _accumulated(work, state, batch, work.computing, _depth_draws(work, state))
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if work.us.world > 1:  # the others wait in a collective operation
                raise _too_large(work, batch) from error
        _undo(work, buffers)
        _halve(work, batch, say)


def _fit(work: Work, state: State, batch: Batch, say: Callable[[str], None]) -> None:
    """Divides the batch into micro-batches that fit into memory, in all processes alike, before the first step.

    First, the need of memory is measured on a few images. Then many processes compute their shares by themselves, with
    results that are not used. Without this trial, a process that runs out of memory in a collective operation would
    leave the others waiting. A sharded model can't be computed by one process, so it is not tried.
    """
    if work.recipe.compute.parallel == "shard" and work.us.world > 1:
        return
    _divide(work, state, batch, say)
    while work.us.world > 1:
        failed = False
        try:
            _try(work, state, batch, _depth_draws(work, state))
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            failed = True
        if not work.us.sum(torch.tensor(float(failed), device=work.us.device)).item():
            return
        _halve(work, batch, say)


def _try(work: Work, state: State, batch: Batch, depth: Tensor | None) -> None:
    """Computes a batch in this process alone, and leaves everything as it was."""
    buffers = [buffer.clone() for buffer in work.model.buffers()]
    devices = [work.us.device] if work.us.device.type == "cuda" else []
    try:
        with alone(work.model), torch.random.fork_rng(devices):
            _accumulated(work, state, batch, work.model, depth)
    finally:
        _undo(work, buffers)


def _divide(work: Work, state: State, batch: Batch, say: Callable[[str], None]) -> None:
    """Measures the memory that a step needs, says it, and divides the batch if it would not fit.

    On a GPU it does nothing, because lack of memory is an error there, which the step itself survives.
    """
    recipe, us = work.recipe, work.us
    images = (work.total - state.step) * recipe.data.batch
    if us.device.type == "cuda" or not memory.worthwhile(images, (recipe.data.batch + 1) // 2 // us.world):
        return
    room = available_memory(us.device)
    whole, depth = replace(work, accumulate=1), _depth_draws(work, state)
    kept = None if depth is None else torch.ones_like(depth)  # no branch is dropped, which takes most memory

    def compute(few: Batch) -> None:
        with torch.compiler.set_stance("force_eager") if work.compiled else nullcontext():
            _try(whole, state, few, kept)

    try:
        need = memory.measured(compute, batch)
    except (RuntimeError, MemoryError) as error:
        if us.world > 1 or not out_of_memory(error):
            raise
        return  # the step itself will say it
    plans = us.gather(memory.plan(need, len(batch), work.accumulate, not _has_batch_norm(work.model), room))
    chosen = max(plans, key=lambda each: (not each.fits, each.parts, each.need))
    if chosen.room is None:
        say(f"a step needs about {_gib(chosen.need)} of memory")
        return
    found = f"about {_gib(chosen.whole)} of memory, and {_gib(chosen.room)} are free"
    if not chosen.fits:
        if _has_batch_norm(work.model):
            raise RuntimeError(f"a step needs {found}; {_batch_norm_advice(work)}")
        raise RuntimeError(
            f"a step needs {found}; in the smallest parts it needs {_gib(chosen.need)}. Set "
            "compute.checkpoint_blocks=True, take a smaller model, or free memory"
        )
    if chosen.parts == work.accumulate:
        say(f"a step needs {found}")
        return
    work.accumulate = chosen.parts
    say(
        f"a step would need {found}: the batch is now computed in {chosen.parts} parts, which need "
        f"{_gib(chosen.need)}; the result is the same"
    )


def _gib(count: int) -> str:
    return f"{count / 2**30:.2g} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in model.modules())


def _batch_norm_advice(work: Work) -> str:
    return (
        f"{MICRO_BATCHES_REFUSED}: set data.batch below {work.recipe.data.batch} (the learning rate follows it), or "
        "take a smaller model"
    )


def _halve(work: Work, batch: Batch, say: Callable[[str], None]) -> None:
    if _has_batch_norm(work.model):
        raise RuntimeError(f"out of memory with {len(batch)} images at once; {_batch_norm_advice(work)}")
    if work.accumulate >= (len(batch) + 1) // 2:  # mirror images can't be separated
        raise _too_large(work, batch)
    work.accumulate *= 2
    free_memory()
    say(f"out of memory: the batch is now computed in {work.accumulate} parts; the result is the same")


def _too_large(work: Work, batch: Batch) -> RuntimeError:
    pairs = (len(batch) + 1) // 2
    return RuntimeError(  # the size is computed, because to divide the batch takes memory
        f"out of memory with micro-batches of {min(len(batch), 2 * -(-pairs // work.accumulate))} images; set "
        f"compute.accumulate above {work.accumulate} or compute.checkpoint_blocks=True, or take a smaller "
        "model"
    )


def _undo(work: Work, buffers: list[Tensor]) -> None:
    work.optimizers.zero_grad()
    for buffer, kept in zip(work.model.buffers(), buffers, strict=True):
        buffer.copy_(kept)


def _accumulated(
    work: Work, state: State, batch: Batch, computing: nn.Module, depth: Tensor | None
) -> tuple[list[str], Tensor]:
    recipe, us = work.recipe, work.us
    torch.manual_seed(int(draws(recipe.seed, state.step, us.rank, 0, stream=Stream.DROPOUT).integers(2**62)))
    parts = batch.to(us.device).parts(work.accumulate)
    totals: list[Tensor] = []
    for i, part in enumerate(parts):
        share = len(part) / recipe.data.batch
        rows = None if depth is None else torch.cat([each[part.positions] for each in depth])
        part = work.batches.mix(part.finished())
        with synchronised(computing, i == len(parts) - 1):
            with torch.autocast(us.device.type, work.precision, enabled=work.precision != torch.float32):
                found = work.objective(computing, part, rows)
            # DDP and FSDP take the mean over processes, but the loss is a sum of shares.
            (found["loss"] * (share * us.world)).backward()
        totals.append(torch.stack([value.detach().float() for value in found.values()]) * share)
    return list(found), torch.stack(totals).sum(0)


def _depth_draws(work: Work, state: State) -> Tensor | None:
    return depth_draws(work.recipe, state.step, work.objective.passes)


def depth_draws(recipe: Recipe, step: int, passes: int) -> Tensor | None:
    """(passes, batch, blocks, 2) for the global batch, so that each image's stochastic depth is the same however the
    batch is divided. None if the model has no stochastic depth."""
    config = recipe.model
    if not isinstance(config, DeiTConfig) or not config.drop_path_rate:
        return None
    shape = (passes, recipe.data.batch, config.num_hidden_layers, 2)
    return torch.from_numpy(draws(recipe.seed, step, 0, 0, stream=Stream.DEPTH).random(shape, dtype="float32"))


def _judge(work: Work, state: State, out: Path, validation: Iterable[Batch], rows: Rows) -> objectives.Verdict:
    """Scores the model on the validation images, and saves it if it is the best so far."""
    with work.average.averaged() if work.average else nullcontext():
        verdict = work.objective.judge(work.model, validation, work.us, work.precision, rows)
        # On a tie, the later model is better, because it has seen more images at a lower learning rate.
        if math.isfinite(verdict.score) and (state.best is None or verdict.score >= state.best):
            state.best = verdict.score
            runs.save_model(work, out / "model")
    if verdict.picture is not None and work.us.main:
        path = out / "reconstructions" / f"update-{state.step:09}.png"
        with files.replacing(path) as temporary:
            verdict.picture.save(temporary, "PNG")
    state.evaluated = state.step
    return verdict


# ------------------------------------------------------------------------------------------------- time, interruptions


def _plan(
    recipe: Recipe, train_split: Split, val_split: Split, us: Processes, seconds: float, console: Console | None
) -> Recipe:
    """The recipe with a schedule that ends within `seconds` and is never longer than the recipe's own.

    Steps and evaluation are timed on a model that is then thrown away, so that the record of the run stays complete.
    """
    began = time.perf_counter()
    work, state = runs.prepare(recipe, train_split, val_split, us, None)
    times: list[float] = []
    stream = Ahead(work.batches.from_step(0), us.device)

    def by_main(value: float) -> float:
        """The main process's value, in all processes, because their clocks differ and their work must not."""
        return float(us.sum(torch.tensor(float(value) if us.main else 0.0, device=us.device)))

    def spent_above(part: float) -> bool:
        return by_main(sum(times) > part * seconds) > 0

    # Loader processes give batches in bursts of as many as there are loaders, with waits between the bursts. At the
    # start, they have time to make two bursts ahead. So whole bursts count, and only those after that.
    burst = max(1, work.batches.workers)
    first = max(2, 2 * burst) if work.batches.workers else 2
    while len(times) < 3 or not (
        spent_above(_MOST_PLANNED)
        or (len(times) >= first + max(4, burst) and (len(times) - first) % burst == 0 and spent_above(_PLANNED))
        or len(times) >= first + 12 * burst
    ):
        started = time.perf_counter()
        batch = next(stream)
        if not times:
            _fit(work, state, batch, lambda _: None)
        work.optimizers.set_lr(work.lr(0))
        _step(work, state, batch, (False,), lambda _: None, stream.fetch)
        times.append(time.perf_counter() - started)
    stream.close()
    per_step = _seconds_per_step(times, first, burst)
    sample = min(3, len(work.validation))
    work.objective.judge(work.model, islice(work.validation, 1), us, work.precision)  # because the first one is slow
    started = time.perf_counter()
    work.objective.judge(work.model, islice(work.validation, sample), us, work.precision)
    judging = (time.perf_counter() - started) * len(work.validation) / sample
    left = 0.9 * (seconds - (time.perf_counter() - began)) - judging
    total = int(by_main(left / (per_step + judging / work.every)))
    if total < 1:
        raise ValueError(
            f"a step takes about {per_step:.1f} s and an evaluation {judging:.1f} s, so not even one step fits into "
            f"the {seconds:.0f} s that are left; give more time, or take a smaller model"
        )
    if us.main:
        (console or Console(stderr=True)).print(
            f"{min(total, work.total)} of the recipe's {work.total} steps fit into the time", highlight=False
        )
    if total >= work.total:
        return recipe
    shorter = replace(recipe.schedule, total=steps(total), warmup=steps(round(work.warmup * total / work.total)))
    return replace(recipe, schedule=shorter)


def _seconds_per_step(times: list[float], first: int, burst: int) -> float:
    """The mean over the whole bursts of steps from the `first` on; if there is none, over all but the two first steps,
    which start things, although loaders then gave some batches that they had made ahead."""
    whole = (len(times) - first) // burst * burst
    return statistics.fmean(times[first : first + whole] if whole > 0 else times[2:])


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
