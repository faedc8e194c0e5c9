"""Training-time changes to images. Every choice is a function of (seed, epoch, image, repeat), not of what came before.

So a batch depends neither on the number of loader processes nor on where a run was stopped.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from deit.recipe import Affine, Augment


def draws(seed: int, epoch: int, index: int, repeat: int = 0) -> np.random.Generator:
    """The random numbers of one appearance of one image.

    Philox (Salmon et al. 2011) counts in its first 64-bit word, which starts at 0; the others name the stream.
    """
    return np.random.Generator(np.random.Philox(key=[seed, 0], counter=[0, epoch, index, repeat]))


def augment(image: Image.Image, recipe: Augment, rng: np.random.Generator) -> Image.Image:
    """One training view of an image that already has the model's size."""
    if recipe.affine is not None:
        image = random_affine(image, recipe.affine, rng)
    return image


def random_affine(image: Image.Image, recipe: Affine, rng: np.random.Generator) -> Image.Image:
    width, height = image.size
    rotate, shear_x, shear_y = np.radians(rng.uniform(-1, 1, 3) * (recipe.rotate, recipe.shear, recipe.shear))
    scale = rng.uniform(*recipe.scale)
    shift = rng.uniform(-recipe.shift, recipe.shift, 2) * (width, height)
    turn = np.array([[math.cos(rotate), -math.sin(rotate)], [math.sin(rotate), math.cos(rotate)]])
    forward = scale * turn @ np.array([[1.0, math.tan(shear_x)], [math.tan(shear_y), 1.0]])
    back = np.linalg.inv(forward)  # Pillow asks, for each output pixel, where it comes from
    centre = np.array([width / 2, height / 2])
    offset = centre - back @ (centre + shift)
    return image.transform(image.size, Image.Transform.AFFINE, (*back[0], offset[0], *back[1], offset[1]),
                           resample=Image.Resampling.BICUBIC)
