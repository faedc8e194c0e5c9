"""The parts and the state of a run: builds, saves and restores them."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deit import files, host, locks
from deit.config import TimmConfig
from deit.data.batches import EvaluationBatches, TrainingBatches, processor_for, steps_per_epoch
from deit.data.folders import Split, fingerprint
from deit.evaluate.calibration import FILE as CALIBRATION
from deit.image.jpeg import reader
from deit.machine import Processes, described, resolve_precision, whole
from deit.recipe import MICRO_BATCHES_REFUSED, Cosine, Duration, LoRA, Optimizer, Recipe, difference, epochs
from deit.train import checkpoint, compiling, objectives, optim, tuning
from deit.train.build import build_model
from deit.train.records import ABOUT, ADAPTER, MODEL, RECIPE, About


@dataclass
class State:
    """The state of a run after `step` steps, apart from its tensors."""

    step: int = 0
    evaluated: int = 0
    """The step after which the model was last evaluated."""
    best: float | None = None
    improved: int = 0
    """The step after which the score was `best`."""
    seconds: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    """Sums of the logged numbers over the `counted` steps since the last row of metrics."""
    counted: int = 0
    written: int = 0
    """Number of bytes of metrics.jsonl."""
    faults: Any = None
    data: str = ""
    """Fingerprint of the training images."""


@dataclass(frozen=True)
class Unread:
    """The numbers of a step that the device may still be computing."""

    step: int
    """The number of the step, counted from 1."""
    names: list[str]
    values: Tensor
    """The numbers and then the wishes of all processes, in main memory once `ready` has come."""
    ready: torch.cuda.Event | None

    @classmethod
    def of(cls, step: int, names: list[str], values: Tensor) -> Unread:
        """Begins to copy the numbers from a GPU, without waiting for them."""
        if values.device.type != "cuda":
            return cls(step, names, values, None)
        kept = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        kept.copy_(values, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        return cls(step, names, kept, ready)

    def read(self) -> tuple[dict[str, float], list[bool]]:
        """Waits for the numbers. Returns them by name, and for each wish whether any process has it."""
        if self.ready is not None:
            self.ready.synchronize()
        found = self.values.tolist()
        return dict(zip(self.names, found, strict=False)), [wish > 0 for wish in found[len(self.names) :]]


@dataclass
class Work:
    """The parts of a run."""

    recipe: Recipe
    us: Processes
    model: nn.Module
    computing: nn.Module
    """The module that training calls: the model, or a wrapper that spreads it over the processes."""
    tuned: tuning.Tuned
    objective: objectives.Objective
    optimizers: optim.Optimizers
    average: optim.EMA | None
    batches: TrainingBatches
    validation: EvaluationBatches
    precision: torch.dtype
    total: int
    warmup: int
    every: float
    """Number of steps between evaluations."""
    accumulate: int
    """Number of parts in which this process computes its share of a batch."""
    compiled: bool
    decides: bool
    """Whether the device decides by itself to skip a step. The host then reads its numbers one step late."""
    unread: Unread | None = None
    """The last step, if its numbers are not read yet."""

    @property
    def optim(self) -> Optimizer:
        assert self.recipe.optim is not None
        return self.recipe.optim

    @property
    def schedule(self) -> Cosine:
        assert self.recipe.schedule is not None
        return self.recipe.schedule

    def lr(self, step: int) -> float:
        peak = optim.peak_lr(self.optim, self.recipe.data.batch)
        return optim.learning_rate(self.schedule, peak, step, self.total, self.warmup)

    def due(self, step: int, every: float) -> bool:
        """Whether an event that happens once every `every` steps happens after this step."""
        return step == self.total or int(step / every) > int((step - 1) / every)


@dataclass(frozen=True)
class Stopped:
    """A stopped run, as its newest readable checkpoint describes it."""

    tensors: dict[str, Tensor]
    """The tensors of the model, its average and the optimizers. The prefix of each name tells the part."""
    state: State
    schedule: Cosine
    """The schedule that the run began with. A time budget may have shortened it."""
    evaluate: Duration | None
    """Its interval between evaluations. A time budget may have lengthened it."""
    problems: list[str]
    """One sentence for each newer checkpoint, which says why it could not be read."""


@contextmanager
def held(out: Path, us: Processes) -> Iterator[None]:
    """Keeps other trainings out of `out`, and removes the half-written files of those that were killed.

    The main process has the lock. Raises `locks.InUse` in every process if another training has it.
    """
    with ExitStack() as stack:
        refused: locks.InUse | None = None
        if us.main:
            try:
                stack.enter_context(locks.held(out))
            except locks.InUse as error:
                refused = error
        if refused := us.gather(refused)[0]:
            raise refused
        if us.main:
            files.sweep(out, RECIPE, ABOUT)
            files.sweep(out / MODEL, "*.safetensors*", "config.json", "preprocessor_config.json")
            files.sweep(out / ADAPTER, "*")
            files.sweep(out / "checkpoints", "*")
            files.sweep(out / "reconstructions", "*")
        yield


def find(out: Path, recipe: Recipe, resume: bool, planned: bool) -> Stopped | None:
    """The run in `out` to resume. None if there is none, and a new run begins.

    If `planned`, the schedule comes from a time budget, so it may differ from the run's.

    Raises `FileExistsError` if `out` holds a run and `resume` is False, and `ValueError` if the run has another recipe.
    """
    folder = out / "checkpoints"
    if not resume:
        if checkpoint.saved(folder) or (out / "metrics.jsonl").exists():
            raise FileExistsError(
                f"{out} already holds a run; continue it with --resume (in Python resume=True), or choose another --out"
            )
        return None
    found = checkpoint.restore(folder)
    if found is None:
        return None
    tensors, values, problems = found
    theirs = Recipe.from_dict(files.read_json(out / "recipe.json"))
    same = replace(
        recipe,
        compute=theirs.compute,
        schedule=theirs.schedule if planned else recipe.schedule,
        evaluate=theirs.evaluate if recipe.evaluate is None else recipe.evaluate,
    )
    if changed := difference(theirs.to_dict(), same.to_dict()):
        raise ValueError(
            f"{out} holds a run of another recipe: {changed}; continue with its own recipe "
            f"({out / 'recipe.json'}), or choose another --out"
        )
    assert theirs.schedule is not None
    return Stopped(tensors, State(**values), theirs.schedule, theirs.evaluate, problems)


def prepare(
    recipe: Recipe, train_split: Split, val_split: Split, us: Processes, found: Stopped | None
) -> tuple[Work, State]:
    """Builds the parts of a run and restores the state that was found into them, in this order."""
    data = fingerprint(train_split)
    tensors, state = (found.tensors, found.state) if found else ({}, State(data=data))
    if state.data != data:
        raise ValueError(
            "the training images are not those that the run began with (names, sizes or contents differ); "
            "restore them, or choose another --out"
        )
    assert recipe.optim is not None
    assert recipe.schedule is not None
    per_epoch = steps_per_epoch(train_split, recipe)
    total = max(1, recipe.schedule.total.in_steps(per_epoch))
    # 1. The model, before it is spread over the processes.
    model = build_model(_fresh(recipe) if found else recipe, train_split.classes)
    tuned = tuning.tune(model, recipe.tuning, recipe.statistics)
    model.to(us.device)
    if found:
        model.load_state_dict(_part(tensors, "model."))
    if isinstance(recipe.model, TimmConfig) and tuning.normalises_batches(model, tuned):
        _refuse_other_statistics(recipe)
    if recipe.compute.checkpoint_blocks:
        model.gradient_checkpointing_enable()  # type: ignore[operator]
    compiled = compiling.wanted(recipe.compute.compile, model, us, total)
    if compiled:
        compiling.compile_parts(model)
    computing = us.spread(model, recipe.compute.parallel)
    # 2. The optimizers and the average, which refer to the model's parameters.
    optimizers = optim.build(model, recipe.optim)
    average = optim.EMA(model, recipe.ema) if recipe.ema else None
    if found:
        optimizers.load_state(_part(tensors, "optim."))
        if average:
            average.load_state(_part(tensors, "ema."))
    # 3. The objective and the images. Their stream begins at `state.step`.
    objective = objectives.build(recipe, train_split, us.device)
    batches = TrainingBatches(
        train_split, recipe, rank=us.rank, world=us.world, cycle=objective.cycle, device=us.device
    )
    interval = epochs(1) if recipe.evaluate is None else recipe.evaluate
    every = max(1.0, interval.amount * (per_epoch if interval.unit == "epochs" else 1))
    return Work(
        recipe,
        us,
        model,
        computing,
        tuned,
        objective,
        optimizers,
        average,
        batches,
        objective.validation(val_split, us),
        resolve_precision(recipe.compute.precision, us.device),
        total,
        recipe.schedule.warmup.in_steps(per_epoch),
        every,
        recipe.compute.accumulate,
        compiled,
        us.device.type == "cuda" and optimizers.can_skip,
    ), state


def _refuse_other_statistics(recipe: Recipe) -> None:
    if recipe.compute.accumulate > 1:
        raise ValueError(
            f"compute.accumulate is {recipe.compute.accumulate}, but {MICRO_BATCHES_REFUSED}; set compute.accumulate=1"
        )
    if recipe.compute.checkpoint_blocks:
        raise ValueError(
            "compute.checkpoint_blocks computes each block twice, and batch normalisation would count the images twice "
            "in its running statistics, so it would train another model; leave it out"
        )


def write_about(
    us: Processes,
    precision: torch.dtype,
    data: str,
    train_split: Split,
    val_split: Split,
    out: Path,
    *,
    resumed: bool = False,
) -> About:
    """Writes `about.json`, which says what the recipe does not. `data` is the fingerprint of the training images. A
    resumed run keeps the date of its beginning and what its teacher was found to be worth."""
    try:
        before = About.from_dict(files.read_json(out / ABOUT)) if resumed else None
    except (OSError, ValueError):
        before = None
    counts = [
        np.bincount(split.labels, minlength=len(train_split.classes)).tolist() for split in (train_split, val_split)
    ]
    try:
        folder = (
            os.path.commonpath({os.path.dirname(file) for split in (train_split, val_split) for file in split.files})
            or os.curdir
        )
    except ValueError:  # relative and absolute paths, or two drives
        folder = ""
    about = About(
        began=before.began if before else datetime.now(UTC).isoformat(timespec="seconds"),
        data=train_split.source or folder,
        fingerprint=data,
        classes=train_split.classes,
        train=tuple(counts[0]),
        val=tuple(counts[1]),
        device=described(us.device),
        processes=us.world,
        precision=str(precision).removeprefix("torch."),
        versions={
            "deit": host.VERSION,
            "Python": platform.python_version(),
            "PyTorch": str(torch.__version__),
            "JPEG reader": reader(),
            "system": platform.platform(),
        },
        teacher=before.teacher if before else None,
    )
    files.write_json(out / ABOUT, about.to_dict())
    return about


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def save(work: Work, state: State, out: Path) -> None:
    tensors = {f"model.{name}": whole(value) for name, value in work.model.state_dict().items()}
    tensors |= {f"optim.{name}": value for name, value in work.optimizers.state().items()}
    tensors |= {f"ema.{name}": value for name, value in work.average.state().items()} if work.average else {}
    if work.us.main:
        checkpoint.save(out / "checkpoints", state.step, tensors, asdict(state))


def save_model(work: Work, folder: Path) -> None:
    """Writes a folder that is enough for prediction: weights, config with labels, and preprocessing.

    Adapters are merged into the weights there, and written by themselves into the folder `adapter` beside it.
    """
    model: Any = work.model
    adapted = isinstance(work.recipe.tuning, LoRA)
    if adapted or (work.recipe.compute.parallel == "shard" and work.us.world > 1):
        tensors = {name: whole(value) for name, value in model.state_dict().items()}
        with torch.device("meta"):
            model = build_model(_fresh(work.recipe), list(model.config.id2label.values()))
            tuned = tuning.tune(model, work.recipe.tuning)
        if adapted:  # because they are merged in place
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        model.load_state_dict(tensors, assign=True)
        if adapted and work.us.main:
            tuning.save_adapters(tuned, folder.parent / ADAPTER, work.recipe.start or "")
            model = tuning.merged(tuned)
    if work.us.main:
        save_classifier(model, work.recipe, folder)


def save_classifier(model: Any, recipe: Recipe, folder: Path) -> None:
    (folder / CALIBRATION).unlink(missing_ok=True)  # it was of the model before
    model.save_pretrained(folder)
    processor_for(recipe).save_pretrained(folder)


def _fresh(recipe: Recipe) -> Recipe:
    """A recipe whose model takes no weights, because it gets them from elsewhere."""
    return replace(recipe, start="", tuning=None, statistics="batch")
