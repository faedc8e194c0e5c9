"""Puts the report of a run or an evaluation together, as one HTML file that needs no network or other file."""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console

from deit import files, host, locks
from deit.data.folders import Split, read_data
from deit.evaluate.models import Evaluation, examine_files, examine_split
from deit.evaluate.scores import Accuracy
from deit.image.decode import load_image
from deit.machine import resolve_device
from deit.report import evaluation as report_evaluation
from deit.report import maps as report_maps
from deit.report import run as report_run
from deit.report.evaluation import cells, deciding, images_of, picture
from deit.report.maps import Maps
from deit.report.markup import (
    Html,
    Section,
    date,
    element,
    english,
    isolated,
    joined,
    named,
    phrase,
    scrolled,
    shortened,
)
from deit.report.run import counted
from deit.train.records import MODEL, RECIPE, Record, is_number, span
from deit.words import Said, Text, plural, said, series

FILE = "report.html"
_SHARE = 0.1
"""Largest number of images that are evaluated at the end of a training, for each view that the training showed. A view
costs at least three times as much as an image, because of its backward pass, so this adds at most 4 % to the run."""
_RELOAD = 30
"""Seconds after which the page of an unfinished run loads itself again."""
Figure = tuple[Text, Image.Image]
"""A caption and a picture."""


def page(
    record: Record | None,
    evaluation: Evaluation | None,
    *,
    maps: Maps | None = None,
    figures: Sequence[Figure] = (),
    missing: Text = "",
    first: Sequence[Section] = (),
    unfinished: bool = False,
    beware: Sequence[Text] = (),
) -> str:
    """Returns the report as HTML. It needs a record or an evaluation.

    The page is in English. A script in it shows it in Chinese if the browser's language is Chinese.

    Args:
        record: the record of the run; None for a model outside a run.
        evaluation: the evaluation of the model.
        maps: what `report_maps.explained` returned for that evaluation.
        figures: more pictures to show, each with its caption.
        missing: a sentence that says why there is no evaluation.
        first: sections before all others.
        unfinished: whether the run still trains. The page then says so in its title, and loads itself again.
        beware: more warnings.
    """
    assert record is not None or evaluation is not None
    sections = [*first, *_sections(record, evaluation, maps, figures, missing, unfinished, beware)]
    shown = [section for section in sections if section.body]
    main, rest = _title(record, evaluation)
    name: Text = shortened(main)
    if rest:
        kinds = series(", ", (each if isinstance(each, Said) else shortened(each) for each in rest))
        name = series(": ", [name, kinds])
    title = said("Unfinished run: {name}", name=name) if unfinished else said("Report: {name}", name=name)
    contents = element(
        "nav",
        element("ul", *(element("li", element("a", section.title, href=f"#{section.key}")) for section in shown)),
        aria_label=said("Contents"),
    )
    body = element(
        "body",
        element("a", said("Skip to the content"), href="#content", class_="skip"),
        _header(record, evaluation, contents),
        element("main", *(section.html for section in shown), id="content"),
        element(
            "footer",
            element(
                "p",
                said(
                    "Written {date} by deit {version}. Intervals are Wilson's, at 95 %; that of the balanced accuracy "
                    "takes the effective number of images.",
                    date=date(datetime.now(UTC).isoformat()),
                    version=host.VERSION,
                ),
            ),
        ),
        element("script", Html(_part("report.js"))),
    )
    return f"<!DOCTYPE html>\n{element('html', _head(title, unfinished), body, lang='en')}\n"


def _sections(
    record: Record | None,
    evaluation: Evaluation | None,
    maps: Maps | None,
    figures: Sequence[Figure],
    missing: Text,
    unfinished: bool,
    beware: Sequence[Text],
) -> Iterator[Section]:
    """The sections of a page, in order. Those without a body are not shown."""
    yield report_run.alarms(record, evaluation, beware)
    if evaluation:
        yield report_evaluation.accuracy(evaluation.main.report)
    elif record:
        yield report_run.unevaluated(record, missing, unfinished)
    if record:
        yield report_run.training(record)
    if evaluation:
        yield from report_evaluation.sections(evaluation)
        if maps:
            yield report_maps.section(evaluation, maps)
    if record:
        yield report_run.recipe(record)
    yield report_run.data(record, evaluation)
    if record:
        yield report_run.machine(record)
    if figures:
        pictures = (
            picture(
                image, caption if isinstance(caption, Said) else isolated(caption), element("p", named(caption)), 640
            )
            for caption, image in figures
        )
        yield Section("pictures", said("Pictures"), element("div", *pictures, class_="figures"))
    yield _repeat(record, evaluation)


def _part(name: str) -> str:
    return resources.files("deit.report").joinpath(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _head(title: Text, unfinished: bool) -> Html:
    style = _part("report.css")
    policy = (
        f"default-src 'none'; img-src data:; style-src {_digest(style)}; script-src {_digest(_part('report.js'))}; "
        "base-uri 'none'; form-action 'none'"
    )
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        *([element("meta", http_equiv="refresh", content=_RELOAD)] if unfinished else []),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Html(style)),
    )


def write(
    file: str | Path,
    record: Record | None,
    evaluation: Evaluation | None,
    *,
    maps: Maps | None = None,
    figures: Sequence[Figure] = (),
    missing: Text = "",
    first: Sequence[Section] = (),
    unfinished: bool = False,
    beware: Sequence[Text] = (),
) -> Path:
    """Writes the report as a whole or not at all. The arguments are those of `page`."""
    options: dict[str, Any] = {"first": first, "unfinished": unfinished, "beware": beware}
    files.write_text(Path(file), page(record, evaluation, maps=maps, figures=figures, missing=missing, **options))
    return Path(file)


def of_training(run: str | Path, val_split: Split, *, device: str = "auto") -> Path:
    """Writes `RUN/report.html` at the end of a training.

    The model is examined on the validation images if that costs little beside the training.
    """
    with locks.turn(Path(run) / FILE):
        return _of_training(run, val_split, device)


def _of_training(run: str | Path, val_split: Split, device: str) -> Path:
    record, evaluation = Record.read(run), None
    missing: Text = ""
    if record.labelled and len(val_split) > _SHARE * (record.last("images") or 0):
        missing = said(
            "The training was so short that the model was not evaluated again on its {count:,} validation images.",
            count=len(val_split),
        )
    elif record.labelled:
        folder = record.about.data if record.about else ""
        evaluation, missing = _examined(record, lambda: (val_split, folder), device, Console(quiet=True))
    return write(
        record.folder / FILE,
        record,
        evaluation,
        maps=_explained(evaluation, device),
        figures=_reconstruction(record),
        missing=missing,
    )


def of_run(
    run: str | Path, data: str | Path | None = None, *, device: str = "auto", console: Console | None = None
) -> Path:
    """Writes `RUN/report.html` again.

    `data` are the images to judge the model by, as for `deit eval`. None takes the run's own validation images, if they
    are still there. Raises `FileNotFoundError` if there is no run, and the errors of `examine_files` for `data`.
    """
    Record.read(run)  # or a lock would make the folder of a run that isn't there
    with locks.turn(Path(run) / FILE):
        return _of_run(run, data, device, console)


def _of_run(run: str | Path, data: str | Path | None, device: str, console: Console | None) -> Path:
    record, evaluation = Record.read(run), None
    missing: Text = ""
    if data is not None:
        evaluation = examine_files(record.folder / MODEL, data, device=device, console=console)
    elif record.labelled:
        evaluation, missing = _examined(record, lambda: _validation(record), device, console)
    return write(
        record.folder / FILE,
        record,
        evaluation,
        maps=_explained(evaluation, device),
        figures=_reconstruction(record),
        missing=missing,
    )


def _examined(
    record: Record, images: Callable[[], tuple[Split, str]], device: str, console: Console | None
) -> tuple[Evaluation | None, Text]:
    """Evaluates the run's model on its validation images, or says in a sentence why that is not possible."""
    try:
        split, folder = images()
        return examine_split(record.folder / MODEL, split, folder, "val", device=device, console=console), ""
    except (ValueError, OSError, RuntimeError) as error:
        return None, phrase("The run's validation images were not evaluated: {error}.", error=english(error))


def _explained(evaluation: Evaluation | None, device: str) -> Maps | None:
    """Returns the maps for an evaluation. If they fail, a sentence says why, because the report must not fail."""
    try:
        return report_maps.explained(evaluation, resolve_device(device)) if evaluation else None
    except Exception as error:
        return Maps(missing=phrase("What the answers rest on could not be shown: {error}.", error=english(error)))


def of_evaluation(
    file: str | Path,
    evaluation: Evaluation,
    *,
    device: str = "auto",
    first: Sequence[Section] = (),
    beware: Sequence[Text] = (),
) -> Path:
    """Writes the report of an evaluation. If the model belongs to a run, the run's record is part of it. `first` and
    `beware` are as for `page`."""
    record, maps = report_run.record_of(evaluation), _explained(evaluation, device)
    with locks.turn(Path(file)):
        return write(file, record, evaluation, maps=maps, first=first, beware=beware)


def _validation(record: Record) -> tuple[Split, str]:
    """The validation images of a run, and the folder that they lie in."""
    about, data, seed = record.about, record.recipe.get("data"), record.recipe.get("seed")
    if about is None or not about.data or not isinstance(data, dict) or not isinstance(seed, int):
        raise ValueError("the run does not say where they are; give images with --data DATA")
    holdout = data.get("holdout")
    split = read_data(about.data, holdout=holdout if isinstance(holdout, float) else 0.0, seed=seed)[1]
    counts = np.bincount(split.labels, minlength=len(split.classes)).tolist()
    if (split.classes, tuple(counts)) != (about.classes, about.val):
        raise ValueError(
            f"the images in {about.data} are not those of the run any more; give other images with --data DATA"
        )
    return split, about.data


def _reconstruction(record: Record) -> list[Figure]:
    """The latest picture that a run of masked images painted."""
    for path in sorted((record.folder / "reconstructions").glob("update-*.png"), reverse=True):
        try:
            return [
                (
                    said(
                        "Validation images, the parts that the model saw, and what it painted in the hidden patches "
                        "({file})",
                        file=isolated(path.name),
                    ),
                    load_image(path),
                )
            ]
        except ValueError:
            continue
    return []


def _header(record: Record | None, evaluation: Evaluation | None, contents: Html) -> Html:
    lines = []
    if record:
        lines.append(_story(record))
    if evaluation:
        lines.append(_judged(evaluation))
    about = record.about if record else None
    main, rest = _title(record, evaluation)
    when = [element("p", said("Trained {date}", date=date(about.began)), class_="when")] if about else []
    names = [named(main), *([joined(map(named, rest), said(", "))] if rest else [])]
    return element(
        "header",
        *when,
        element("h1", joined(names, said(": "))),
        *(element("p", line, class_="lead") for line in lines),
        _headline(record, evaluation),
        contents,
    )


def _title(record: Record | None, evaluation: Evaluation | None) -> tuple[str, Sequence[Text]]:
    """The main name of the page and the names that follow it: a run's data and its classes, or a model."""
    if record:
        return report_run.title(record)
    return evaluation.main.model if evaluation else "", ()


def _story(record: Record) -> Html:
    """A sentence about the training."""
    steps, epoch, about = record.last("step"), record.last("epoch"), record.about
    told = said("a run that has not written any metrics")
    if steps is not None:
        told = said("{steps:,.0f} steps", steps=steps)
        if epoch is not None:
            told = said("{steps}, {epochs:,.4g} epochs", steps=told, epochs=epoch)
        if about:
            told = said("{steps}, on {images:,} images", steps=told, images=sum(about.train))
            if record.labelled:
                told = said("{images} of {classes:,} classes", images=told, classes=len(about.classes))
    facts = [told]
    if skipped := record.last("skipped"):
        facts.append(
            said("{count:,.0f} steps were skipped because their loss or gradient was not finite", count=skipped)
        )
    if bad := record.last("bad_images"):
        facts.append(said("{count:,.0f} training images can't be read", count=bad))
    folder, all_facts = element("code", named(record.folder)), series("; ", facts)
    if not record.recipe.get("name"):
        return phrase("{folder}: {facts}.", folder=folder, facts=all_facts)
    recipe = element("code", named(record.name))
    return phrase("{folder}: the recipe {recipe}, {facts}.", folder=folder, recipe=recipe, facts=all_facts)


def _judged(evaluation: Evaluation) -> Html:
    main, report = evaluation.main, evaluation.main.report
    height, width = main.image_size
    shown = sum(each.support > 0 for each in report.by_class)
    classes: Text = f"{len(report.classes):,}"
    if shown != len(report.classes):
        classes = said("{shown:,} of the model's {all:,}", shown=shown, all=len(report.classes))
    size = said("{height} by {width} pixels", height=height, width=width)
    if main.crop_ratio is not None:
        size = said("{size} and crop ratio {ratio:.4g}", size=size, ratio=main.crop_ratio)
    judged = phrase(
        "Judged by {count:,} {images} of {classes} classes, at {size}.",
        count=report.images,
        images=images_of(evaluation),
        classes=classes,
        size=size,
    )
    if not report.unreadable:
        return judged
    return joined([judged, said("{count:,} more can't be read and are left out.", count=len(report.unreadable))], " ")


def _headline(record: Record | None, evaluation: Evaluation | None) -> Html:
    tiles: list[tuple[Text, str, Sequence[Text]]] = []
    if evaluation:
        report = evaluation.main.report
        which = deciding(report)
        name = said("accuracy, {heads}", heads=which) if which else said("accuracy")
        tiles.append(_accuracy_tile(name, report.accuracy()))
        balanced = report.balanced()
        value, interval = cells(balanced)
        mean = plural(balanced.classes, "mean of {count:,} recall", "mean of {count:,} recalls")
        tiles.append((said("balanced accuracy"), f"{value:.3f}", [interval, mean]))
        if len(report.classes) > 5:
            tiles.append(_accuracy_tile(said("top-5 accuracy"), report.accuracy(top=5)))
        likelihood = said("negative log likelihood {nll:.3f}", nll=report.nll)
        tiles.append((said("calibration error"), f"{report.calibration_error:.3f}", [likelihood]))
    elif record and (best := record.best):
        after = [said("after step {step:,}", step=best["step"])]
        if is_number(best.get("val_loss")):
            tiles.append((said("loss on validation images"), f"{best['val_loss']:.4g}", after))
        elif found := counted(record, best["val_accuracy"]):
            tiles.append(_accuracy_tile(said("accuracy on validation images"), found))
        else:
            tiles.append((said("accuracy on validation images"), f"{best['val_accuracy']:.3f}", after))
    if record and (seconds := record.last("seconds")) is not None:
        memory = record.last("memory")
        most = [said("at most {memory:.1f} GiB of memory", memory=memory / 2**30)] if memory else []
        tiles.append((said("training time"), span(seconds), most))
    if record and (rate := record.last("images_per_second")):
        device = [english(record.about.device)] if record.about else []
        tiles.append((said("images/s in training"), f"{rate:,.0f}", device))
    shown = (
        element(
            "div",
            element("dt", name),
            element("dd", element("strong", value), *(element("small", note) for note in notes)),
        )
        for name, value, notes in tiles
    )
    return element("dl", *shown, class_="tiles") if tiles else Html()


def _accuracy_tile(name: Text, accuracy: Accuracy) -> tuple[Text, str, Sequence[Text]]:
    value, interval = cells(accuracy)
    correct = said("{correct:,} of {total:,}", correct=accuracy.correct, total=accuracy.total)
    return name, f"{value:.3f}", [interval, correct]


def _repeat(record: Record | None, evaluation: Evaluation | None) -> Section:
    """The section with the commands.

    It leaves out `deit eval` for the run's own validation images. `deit report` evaluates those itself, and `deit eval`
    can't find them if they were held out of the training images.
    """
    lines, about = [], record.about if record else None
    own = evaluation is not None and about is not None and (evaluation.data, evaluation.split) == (about.data, "val")
    if record:
        start = (
            ["deit"]
            if about is None or about.processes == 1
            else ["torchrun", "--nproc-per-node", str(about.processes), "-m", "deit"]
        )
        data = about.data if about and about.data else "DATA"
        lines = [
            [*start, "train", str(record.folder / RECIPE), "--data", data, "--out", "AGAIN"],
            [
                "deit",
                "report",
                str(record.folder),
                *(["--data", evaluation.data] if evaluation and not own and evaluation.data else []),
            ],
        ]
    main = evaluation.main if evaluation else None
    usual = main is not None and main.report.head == "fused" and main.crop_asked is None
    if evaluation and main and not (own and usual and evaluation.other is None):
        lines.append(
            [
                "deit",
                "eval",
                main.model,
                "--data",
                evaluation.data or "DATA",
                *(["--split", evaluation.split] if evaluation.split else []),
                *(["--head", main.report.head] if main.report.head != "fused" else []),
                *([] if main.crop_asked is None else ["--crop-ratio", str(main.crop_asked)]),
                *(["--compare", evaluation.other.model] if evaluation.other else []),
            ]
        )
    return Section(
        "repeat",
        said("How to repeat it"),
        scrolled(said("Commands"), element("pre", element("code", "\n".join(map(shlex.join, lines))))),
    )
