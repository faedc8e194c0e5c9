"""The picture of an explanation: colours, maps over the image, the figure."""

import numpy as np
import pytest
from PIL import Image

from deit.explain.explanation import Explanation, explain_file
from deit.explain.picture import colours, figure, overlay


def lightness(colour):
    """CIE L*, 0 to 100, of sRGB."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in np.asarray(colour) / 255]
    luminance = np.dot([0.2126, 0.7152, 0.0722], linear)
    return 116 * np.cbrt(luminance) - 16


def test_colours_differ_in_lightness_alone():
    """Even steps, so that no eye needs to tell hues."""
    steps = np.diff([lightness(c) for c in colours(np.linspace(0, 1, 41))])
    assert steps.min() > 1.2
    assert steps.max() < 2.8
    assert colours(np.array([0.0, 1.0])).tolist() == [[0x44, 0x01, 0x54], [0xFD, 0xE7, 0x25]]


def test_a_map_lies_over_its_patches():
    picture = Image.new("RGB", (100, 40), (80, 90, 100))
    values = np.zeros((2, 5))
    values[0, 3] = 7.0
    drawn = np.asarray(overlay(picture, values)).astype(int)
    assert drawn.shape == (40, 100, 3)
    yellow = np.abs(drawn - (0.3 * 89 + 0.7 * colours(np.array(1.0)))).sum(-1) < 30
    rows, columns = np.nonzero(yellow)
    assert (rows.max() < 20, columns.min() >= 60, columns.max() < 80) == (True, True, True)
    assert yellow[10, 70]
    signed = np.where(values > 0, values, -1000.0)  # a large negative drop does not drown what is positive
    assert np.array_equal(np.asarray(overlay(picture, signed)), drawn)
    for flat in (np.zeros((2, 5)), np.full((2, 5), 0.3), np.full((2, 5), -0.3)):
        assert len(np.unique(np.asarray(overlay(picture, flat)).reshape(-1, 3), axis=0)) == 1


def test_the_figure_holds_the_image_and_every_map(folder):
    found = explain_file(folder / "wide", folder / "photo.png")
    drawn = np.asarray(figure(found))
    picture = found.seen.resize((280, 112), Image.Resampling.BICUBIC)
    places = []
    for row in ("class", "distillation"):
        cells = [picture, *(overlay(picture, each.values) for each in found.maps if each.token == row)]
        for cell in map(np.asarray, cells):
            corners = (drawn[:, :-279] == cell[0, 0]) & (drawn[:, 279:] == cell[0, -1])
            hits = [
                (y, x) for y, x in np.argwhere(corners.all(-1)) if np.array_equal(drawn[y : y + 112, x : x + 280], cell)
            ]
            assert hits
            places.append(hits[0] if row == "class" else hits[-1])
    assert len(set(places)) == 10
    assert [y for y, _ in places] == [places[0][0]] * 5 + [places[5][0]] * 5
    assert [x for _, x in places[:5]] == [x for _, x in places[5:]] == sorted(x for _, x in places[:5])
    single = figure(explain_file(folder / "vit", folder / "photo.png", methods=["rollout"]))
    assert single.width < drawn.shape[1]


@pytest.mark.parametrize("label", ["a very long name, " * 20, "猫", "line\nbreak", ""])
def test_any_label_is_drawn(folder, label):
    found = explain_file(folder / "vit", folder / "photo.png", methods=["rollout"])
    named = Explanation(
        found.model,
        label,
        found.seen,
        tuple(type(a)(**{**vars(a), "label": label, "target": "x"}) for a in found.answers),
        found.maps,
    )
    assert figure(named).size == figure(found).size
