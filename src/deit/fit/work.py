"""Carries out a plan: step after step, within its time, and on from where it was stopped."""

from __future__ import annotations

import math
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from deit import files, locks
from deit.choices import Prefer
from deit.data.folders import Split, fingerprint, has_split, matched, read_data, read_examples
from deit.fit.judging import Fitted, judge, recommend, section, show
from deit.fit.plan import FILE, Plan, StepName, looked, make_plan
from deit.predict.calibrate import calibrate_split
from deit.recipe import Distilled, LinearProbe, Recipe
from deit.report import document
from deit.report.live import LivePage
from deit.report.markup import Section, english, table
from deit.terminal import shown
from deit.train.budget import TooShort
from deit.train.labels import teach
from deit.train.loop import train
from deit.train.records import METRICS, MODEL, Record, span
from deit.words import Said, Text, said

_STATE, RESULT, _LABELS = "state.json", "result.json", "labels"
_STEPS = (said("step of the plan"), said("state"), said("validation accuracy"), said("what it does"))
_ONWARD = "the same command goes on"
_TRIED = (4, 16)
"""Numbers of batches whose labels are timed before it is decided how many are stored."""


@dataclass
class _State:
    """What is done of a plan. The content of `RUN/state.json`."""

    seconds: dict[str, float] = field(default_factory=dict)
    """Time of each step that is done."""
    scores: dict[str, float] = field(default_factory=dict)
    """Validation accuracy of each model."""
    epochs: float | None = None
    """Epochs of stored labels."""
    begun: float = 0.0
    """Time that the storing of labels took before it was stopped."""

    @classmethod
    def read(cls, out: Path) -> _State:
        try:
            return cls(**files.read_json(out / _STATE))
        except FileNotFoundError:
            return cls()

    def write(self, out: Path) -> None:
        files.write_json(out / _STATE, vars(self))


def fit(
    data: str | Path,
    out: str | Path,
    *,
    minutes: float | None = None,
    prefer: Prefer | None = None,
    seed: int | None = None,
    device: str = "auto",
    only_plan: bool = False,
    console: Console | None = None,
) -> Fitted | None:
    """Finds the best classifier for a folder or list of labelled images, and writes it to `out/model`.

    The first call plans, unless `out` holds a plan already, and then carries the plan out. The same call goes on from
    where it was stopped.

    Args:
        minutes: the time for everything, 30 by default; it is exceeded by a tenth at most, apart from a baseline, which
            needs one pass over some images.
        prefer: what the recommended model is chosen by, `accuracy` by default.
        seed: of the images that are held out, the weights and the order of images; 0 by default.
        only_plan: writes the plan, prints it and returns None.
        console: where progress is shown; standard error if it is None.

    Raises `ValueError` if `out` holds a plan for other images or other options, and the errors of `read_data`, `train`
    and `teach`.
    """
    out = Path(out)
    console = console or Console(stderr=True)
    _refuse_inside(data, out)
    with locks.held(out, lock=locks.beside(out.absolute())):
        asked = {"minutes": minutes, "prefer": prefer, "seed": seed}
        plan = Plan.read(out) if (out / FILE).exists() else None
        if plan is None and out.exists() and any(out.iterdir()):
            raise FileExistsError(
                f"expected {out} to be empty or to hold a plan, found other files; give another --out"
            )
        if plan is not None:
            _refuse_another(plan, out, data, asked)
        holdout, drawn = (plan.first.data.holdout, plan.first.seed) if plan else (0.1, seed or 0)
        splits = read_data(data, holdout=holdout, seed=drawn)
        test = read_examples(data, "test")[0] if has_split(data, "test") else None
        if test is not None:
            matched(test, splits[0].classes)  # or the fit would only end with it
        _say(console, *looked(data, splits, test, device))
        if plan is None:
            plan = make_plan(
                data,
                splits,
                out,
                minutes=30.0 if minutes is None else minutes,
                prefer=prefer or "accuracy",
                seed=drawn,
                device=device,
            )
            plan.write(out)
        state = _State.read(out)
        _say(console, *plan.lines(_left(plan, state, out), state.seconds))
        _say(console, f"the plan is {out / FILE}")
        if only_plan:
            return None
        return carry_out(plan, splits, test, out, device=device, console=console)


def _refuse_inside(data: str | Path, out: Path) -> None:
    """Refuses to write among the images, where the next call would take the models' folders for classes."""
    place = Path(data).resolve()
    if place.is_dir() and (out.resolve() == place or place in out.resolve().parents):
        raise ValueError(f"--out {out} lies in the folder of the images, {data}; choose a folder outside of it")


def _refuse_another(plan: Plan, out: Path, data: str | Path, asked: dict[str, Any]) -> None:
    if Path(plan.data).resolve() != Path(data).resolve():
        raise ValueError(f"{out} holds a plan for {plan.data}, found {data}; choose another --out")
    theirs = {"minutes": plan.minutes, "prefer": plan.prefer, "seed": plan.first.seed}
    for name, value in asked.items():
        if value is not None and value != theirs[name]:
            raise ValueError(
                f"{out} holds a plan with {name}={theirs[name]}, found {name}={value}; edit {out / FILE}, or choose "
                "another --out"
            )


def _left(plan: Plan, state: _State, out: Path) -> float:
    """Seconds that are left, infinity without a limit. A step that was stopped has used what its run says."""
    if plan.minutes is None:
        return math.inf
    begun = 0.0 if "labels" in state.seconds else state.begun
    for step in plan.steps:
        if step.name not in state.seconds and (out / step.name / METRICS).exists():
            begun += Record.read(out / step.name).last("seconds") or 0.0
    return 60 * plan.minutes - sum(state.seconds.values()) - begun


def carry_out(
    plan: Plan,
    splits: tuple[Split, Split],
    test: Split | None,
    out: Path,
    *,
    device: str,
    console: Console,
    onward: str = _ONWARD,
) -> Fitted:
    """Does what is left of a plan. Each step writes into a folder of its name in `out`. `onward` is as for `train`."""
    state = _State.read(out)
    if fingerprint(splits[0]) != plan.fingerprint:
        raise ValueError(
            f"the training images in {plan.data} are not those that {out / FILE} is for (names, sizes or contents "
            "differ); restore them, or choose another --out"
        )
    work = _Work(plan, splits, out, device, console, state, onward)
    for step in plan.steps[:-1]:
        if step.name in state.seconds:
            continue
        _say(console, f"{step.name}: {step.why}")
        work.begin(step.name)
        began, left = time.perf_counter(), _left(plan, state, out)
        earlier = work.take(step.name, plan.seconds(step.name, left))
        state.seconds[step.name] = earlier + time.perf_counter() - began
        state.write(out)
    if (out / _LABELS).exists():
        shutil.rmtree(out / _LABELS)  # they are large, and only the student needed them
    work.begin("judge")
    return work.judge(test)


@dataclass
class _Work:
    plan: Plan
    splits: tuple[Split, Split]
    out: Path
    device: str
    console: Console
    state: _State
    onward: str = _ONWARD
    now: StepName | None = None
    """The step that is being taken."""

    def __post_init__(self) -> None:
        self.live = LivePage(self.out / document.FILE, self.progress, said("fit"))

    def progress(self) -> Section:
        """The steps, for the page: what is done, what is being done, what is to come."""
        rows = []
        for step in self.plan.steps:
            seconds = self.state.seconds.get(step.name)
            done: Text = said("to come") if seconds is None else said("done in {time}", time=span(seconds))
            if step.name == self.now:
                done = said("now")
            score = self.state.scores.get(step.name)
            rows.append((step.name, done, "" if score is None else f"{score:.3f}", english(step.why)))
        return Section("steps", said("The steps of the fit"), table(said("Steps"), _STEPS, rows, hidden=True))

    def begin(self, name: StepName) -> None:
        """Shows on the page which step begins. A run shows it by itself."""
        self.now = name
        if self.plan.recipe(name) is None:
            with suppress(Exception):  # the page is not worth the fit
                self.live.write(said("No model trains in this step. The page shows the latest run."))

    def take(self, name: StepName, seconds: float) -> float:
        """Takes a step in about `seconds`. Returns the seconds that sessions before this one gave it."""
        if name in ("labels", "student") and self.is_untaught():
            _say(self.console, f"{name}: left out, because the model that was to teach the student was left out")
            return 0.0
        if name == "labels":
            began, earlier = time.perf_counter(), self.state.begun
            try:
                self.store_labels(seconds)
            finally:
                self.state.begun = earlier + time.perf_counter() - began
                self.state.write(self.out)
            return earlier
        recipe = self.plan.recipe(name)
        assert recipe is not None
        recipe = self.taught(recipe) if name == "student" else recipe
        minutes = None if isinstance(recipe.objective, LinearProbe) or math.isinf(seconds) else seconds / 60
        began = time.perf_counter()
        try:
            run = train(
                recipe,
                *self.splits,
                self.out / name,
                device=self.device,
                console=self.console,
                resume=True,
                minutes=minutes,
                receivers=[self.live],
                onward=self.onward,
            )
        except TooShort as error:
            _say(self.console, f"{name}: left out, because {error}")
            return 0.0
        self.state.scores[name] = run.score
        return max(0.0, run.seconds - (time.perf_counter() - began))

    def teacher(self) -> Path | None:
        """The model that the student learns from: the better of baseline and teacher on the validation images."""
        scores = {name: self.state.scores[name] for name in ("teacher", "frozen") if name in self.state.scores}
        return self.out / max(scores, key=lambda name: scores[name]) / MODEL if scores else None

    def learns_from_ours(self, recipe: Recipe) -> bool:
        """Whether the student's teacher is one of this fit's models."""
        objective = recipe.objective
        own = (self.out / "teacher" / MODEL).absolute()
        return isinstance(objective, Distilled) and Path(objective.teacher) == own

    def is_untaught(self) -> bool:
        """Whether no model is there that could teach the student, because no time was left for one."""
        recipe = self.plan.recipe("student")
        left_out = "teacher" in self.state.seconds and self.teacher() is None
        return left_out and recipe is not None and self.learns_from_ours(recipe)

    def taught(self, recipe: Recipe) -> Recipe:
        objective, best = recipe.objective, self.teacher()
        if not isinstance(objective, Distilled):
            return recipe
        return replace(
            recipe,
            objective=replace(
                objective,
                teacher=str(best) if self.learns_from_ours(recipe) and best is not None else objective.teacher,
                cache=objective.cache if self.state.epochs else "",
            ),
        )

    def store_labels(self, seconds: float) -> None:
        """Times a few batches, and then stores as many epochs as fit into the time and half of the free disk: none if
        there is no time at all."""
        recipe = self.plan.recipe("student")
        assert recipe is not None
        taught = self.taught(recipe)
        assert isinstance(taught.objective, Distilled)
        assert recipe.schedule is not None
        taught = replace(taught, objective=replace(taught.objective, cache=""))
        split, folder = self.splits[0], self.out / _LABELS

        def store(epochs: float) -> float:
            began = time.perf_counter()
            given: dict[str, Any] = {"validation": self.splits[1], "device": self.device, "console": self.console}
            teach(taught, split, folder, epochs=epochs, **given)
            return time.perf_counter() - began

        per_epoch = len(split) / recipe.data.batch
        most = recipe.schedule.total.in_steps(per_epoch) / per_epoch
        if self.state.epochs is None:
            stored, spent, rate = 0.0, 0.0, 0.0
            for batches in _TRIED:
                if stored == most or spent > seconds / 4:
                    break
                tried = min(most, batches / per_epoch)
                took = store(tried)
                stored, spent, rate = tried, spent + took, (tried - stored) / took
            fitting = min(most, stored + min(rate * (0.9 * seconds - spent), _room(folder, stored)))
            self.state.epochs = max(stored, math.floor(fitting) if fitting > 1 else fitting)  # whole ones, if possible
            self.state.write(self.out)
        if not self.state.epochs:
            _say(self.console, "labels: left out, because no time is left; the student asks its teacher itself")
            return
        store(self.state.epochs)

    def judge(self, test: Split | None) -> Fitted:
        began = time.perf_counter()
        folders = {name: self.out / name / MODEL for name in self.state.scores}
        if not folders:
            raise ValueError("no step of the plan fits into its time; give more --time, in another --out")
        options: dict[str, Any] = {"device": self.device, "console": self.console}
        candidates = judge(folders, self.plan.data, self.splits[1], test, **options)
        best, reason = recommend(candidates, self.plan.prefer)
        model = self.out / MODEL
        with files.replacing_folder(model, check=lambda _: None) as temporary:
            for file in best.folder.iterdir():
                shutil.copy2(file, temporary / file.name)
        beware: list[Said] = []
        try:
            beware = calibrate_split(model, self.splits[1], self.plan.data, **options).alarms()
        except ValueError as error:
            _say(self.console, f"the model is not calibrated: {error}")
        fitted = Fitted(
            model, best.name, reason, candidates, sum(self.state.seconds.values()), "val" if test is None else "test"
        )
        page = document.of_evaluation(
            self.out / document.FILE, best.judged, device=self.device, first=[section(fitted)], beware=beware
        )
        seconds = fitted.seconds + time.perf_counter() - began
        fitted = replace(fitted, seconds=seconds, report=page)
        files.write_json(self.out / RESULT, fitted.to_dict())
        show(fitted, self.console)
        _say(self.console, *best.judged.alarms(), *beware)
        _say(self.console, f"{page}", f"{span(seconds)} in all")
        return fitted


def _room(folder: Path, stored: float) -> float:
    """Epochs of labels that half of the free disk takes, by the size of those that are `stored` in the folder."""
    free, size = files.free_bytes(folder), sum(part.stat().st_size for part in folder.glob("labels-*"))
    return math.inf if free is None or not size else stored * free / 2 / size


def _say(console: Console, *sentences: Text) -> None:
    for sentence in sentences:
        console.print(shown(sentence), markup=False, highlight=False, soft_wrap=True)
