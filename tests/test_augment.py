"""Training views against torchvision's, and randomness that depends on nothing but its counters."""

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import functional as reference

from deit.augment import augment, draws, random_affine
from deit.recipe import Affine, Augment


class Fixed:
    """A generator that answers with the values given, in order."""

    def __init__(self, *values):
        self.values = list(values)

    def uniform(self, *_):
        return self.values.pop(0)


@pytest.fixture
def picture():
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (20, 28, 3), dtype=np.uint8)).resize((56, 40), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(("angle", "scale", "shift"), [(30.0, 1.0, (0, 0)), (-75.0, 0.8, (5, -3)), (0.0, 1.3, (0, 7))])
def test_affine_equals_torchvision(picture, angle, scale, shift):
    ours = random_affine(picture, Affine(rotate=1.0), Fixed(np.array([angle, 0, 0]), scale,
                                                            np.array(shift) / picture.size))
    theirs = reference.affine(picture, angle, shift, scale, [0.0, 0.0], reference.InterpolationMode.BICUBIC)
    np.testing.assert_allclose(np.asarray(ours, int), np.asarray(theirs, int), atol=1)


def test_shear_moves_rows_by_its_tangent():
    """A vertical line through the centre leans by tan(shear) pixels a row."""
    pixels = np.zeros((41, 41), np.uint8)
    pixels[:, 20] = 255
    leaning = random_affine(Image.fromarray(pixels), Affine(shear=1.0), Fixed(np.array([0, 20.0, 0]), 1.0, np.zeros(2)))
    rows = np.asarray(leaning, float)
    centre = (rows * np.arange(41)).sum(1) / rows.sum(1)
    np.testing.assert_allclose(np.diff(centre[10:31]).mean(), np.tan(np.radians(20)), atol=0.02)


def test_nothing_asked_nothing_done(picture):
    assert augment(picture, Augment(), draws(0, 0, 0)) is picture
    still = random_affine(picture, Affine(), draws(0, 0, 0))
    assert np.array_equal(np.asarray(still), np.asarray(picture))


def test_draws_stay_within_the_recipe():
    """The corners of a white square tell the map that was drawn; over many draws none leaves its range."""
    recipe = Affine(rotate=12, scale=(0.9, 1.1), shift=0.1)
    white = Image.new("L", (100, 100), 255)
    areas = [(np.asarray(random_affine(white, recipe, draws(0, 0, i))) > 127).sum() for i in range(200)]
    assert min(areas) > 0.9**2 * 100**2 * 0.8**2
    assert len(set(areas)) > 100


def test_draws_are_a_function_of_their_counters():
    first = draws(1, 2, 3, 4).random(8)
    assert np.array_equal(first, draws(1, 2, 3, 4).random(8))
    others = [draws(*key).random(8) for key in [(0, 2, 3, 4), (1, 1, 3, 4), (1, 2, 2, 4), (1, 2, 3, 3), (1, 3, 2, 4)]]
    for other in others:
        assert not np.intersect1d(first, other).size


def test_streams_do_not_overlap():
    """Long draws of neighbouring images share no value: the counter that runs is not the one that names."""
    long = [draws(0, 0, index).random(1000) for index in range(3)]
    assert len(np.unique(np.concatenate(long))) == 3000
