"""The section of a report that shows what answers rest on: maps over a few images, for each token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from deit.choices import Method
from deit.evaluate.models import Evaluation
from deit.evaluate.scores import Report
from deit.explain.explanation import Explanation, explain_pixels
from deit.explain.maps import checked
from deit.explain.picture import fitted, overlay
from deit.image.decode import ImageError
from deit.model.load import load_classifier
from deit.report.evaluation import answered, told, wrong_and_doubtful
from deit.report.markup import Html, Section, element, isolated, joined, named, phrase, pictured, sentence
from deit.words import Text, said

_METHOD: Method = "relevance"
"""The method of the maps. Of those that look inside the model it scores best (docs/explain.md), and it tells classes
apart."""
_TITLE = said("What answers rest on")
_GROUPS = (said("Most wrong"), said("Most doubtful"), said("Surest right answers"))
_TOKENS = {"class": said("class token"), "distillation": said("distillation token")}
_PLACES = {
    str(place): place
    for place in (
        said("in the upper left"),
        said("at the top"),
        said("in the upper right"),
        said("on the left"),
        said("in the middle"),
        said("on the right"),
        said("in the lower left"),
        said("at the bottom"),
        said("in the lower right"),
        said("nowhere more than elsewhere"),
    )
}
_SIDE = 160
"""Longer side of a picture, in pixels."""


@dataclass(frozen=True)
class Maps:
    """Explanations of answers by the image's row in the evaluation, or a sentence that says why there are none."""

    found: Mapping[int, Explanation] = field(default_factory=dict)
    missing: Text = ""


def explained(evaluation: Evaluation, device: str | torch.device = "cpu") -> Maps | None:
    """Computes maps over the images that `section` shows, one by one. Images that can't be read are left out.

    Returns None for a model that can't be explained, and if the files of the images are not known.
    """
    main = evaluation.main
    classifier = load_classifier(main.model)
    model, processor = classifier.model, classifier.processor
    try:
        checked(model)
    except ValueError:
        return None
    if len(evaluation.files) != len(main.report.labels):
        return None
    model.to(device)
    if main.crop_ratio is not None and main.crop_ratio != processor.crop_ratio:
        processor = processor.with_crop_ratio(main.crop_ratio)
    found = {}
    for row in (int(row) for rows in _chosen(main.report) for row in rows):
        try:
            pixels = processor([evaluation.files[row]], return_tensors="pt").pixel_values
        except ImageError:
            continue
        found[row] = explain_pixels(model, processor, pixels.to(device), methods=[_METHOD])
    return Maps(found)


def _chosen(report: Report) -> list[np.ndarray]:
    """The rows of the images in each of `_GROUPS`."""
    wrong, doubtful = wrong_and_doubtful(report)
    right = np.setdiff1d(np.flatnonzero(report.read & (report.labels == report.predicted)), doubtful[:2])
    return [wrong[:4], doubtful[:2], right[np.argsort(-report.confidence[right], kind="stable")][:2]]


def section(evaluation: Evaluation, maps: Maps) -> Section:
    """The section with the maps. It is empty if there is nothing to show."""
    report, parts = evaluation.main.report, []
    for title, rows in zip(_GROUPS, _chosen(report), strict=True):
        drawn = [_example(evaluation, int(row), maps.found[int(row)]) for row in rows if int(row) in maps.found]
        if drawn:
            parts += [element("h3", title), element("div", *drawn, class_="looked")]
    if not parts:
        return Section("maps", _TITLE, sentence(maps.missing) if maps.missing else Html())
    two = any(len(explanation.answers) > 1 for explanation in maps.found.values())
    about = phrase(
        "Gradient-weighted relevance ({source}) follows attention through all blocks, as far as it supports the answer "
        "of {head}. Each map lies over the image as the model saw it, in grey. You can compare colours within a map, "
        "but not between maps. {command} draws other methods too, and scores them.",
        source=element("a", "Chefer, Gur and Wolf 2021", href="https://arxiv.org/abs/2103.15679", lang="en"),
        head=said("each token\u2019s own head") if two else said("the model"),
        command=element("code", "deit explain"),
    )
    scale = element("span", class_="scale", role="img", aria_label=said("from violet to yellow"))
    legend = element("p", phrase("counts least {scale} counts most", scale=scale), class_="soft")
    return Section("maps", _TITLE, joined([element("p", about), legend, *parts]))


def _example(evaluation: Evaluation, row: int, explanation: Explanation) -> Html:
    report = evaluation.main.report
    seen = fitted(explanation.seen, _SIDE)
    cells = [
        element(
            "figure",
            pictured(seen, told(report, row)),
            element("figcaption", element("p", said("as the model saw it"), class_="soft")),
        )
    ]
    for answer in explanation.answers:
        for each in explanation.of(answer.token):
            alt = said(
                "Map of the {token}, which answers {answer}: strongest {strongest}",
                token=_TOKENS[each.token],
                answer=isolated(answer.label),
                strongest=_PLACES[each.strongest],
            )
            cells.append(
                element(
                    "figure",
                    pictured(overlay(seen, each.values), alt),
                    element(
                        "figcaption",
                        element("p", _TOKENS[each.token], class_="soft"),
                        element("p", element("b", named(answer.label, 40)), f" ({answer.probability:.2f})"),
                    ),
                )
            )
    file = element("p", named(evaluation.files[row].name, 48), class_="file")
    return element("figure", element("figcaption", answered(report, row), file), element("div", *cells, class_="maps"))
