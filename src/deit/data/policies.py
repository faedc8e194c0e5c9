"""Changes of colour and shape drawn from a list: RandAugment, AutoAugment, 3-Augment and colour jitter.

`OPERATIONS` says what each operation does, and the rest says what is drawn. Names, lists, strengths and the order of
the draws are those of timm (`timm/data/auto_augment.py`), whose `rand-m9-mstd0.5-inc1` is the paper's RandAugment.
Everything is drawn before anything is applied, so that `deit.data.on_device` can apply it to a whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from deit.recipe import AutoAugment, Jitter, RandAugment, ThreeAugment

Fill = tuple[int, ...]
Matrix = tuple[float, ...]
"""a, b, c, d, e, f: the pixel at (x, y) comes from (a x + b y + c, d x + e y + f), counted from the top left corner."""
SubPolicy = tuple[tuple[str, float, float], ...]
"""Operations in order, each with its probability and its strength."""

HIGHEST = 10.0  # strength of an operation


class Kind(IntEnum):
    """What an operation needs to know of an image, which decides how a batch is computed."""

    MIRROR = 0
    TABLE = 1
    """Each level has another one in its place, for all images the same."""
    MAP = 2
    """Each pixel comes from another place."""
    AUTO_CONTRAST = 3
    EQUALIZE = 4
    BRIGHTNESS = 5
    CONTRAST = 6
    COLOR = 7
    SHARPNESS = 8
    GREY = 9
    BLUR = 10


class Operation(NamedTuple):
    """A change to an image. `argument` turns a strength, 0 to 10, into the argument of `apply`. A `signed` operation
    also takes strengths from -10 to 0."""

    apply: Callable[[Image.Image, float, Fill], Image.Image]
    kind: Kind
    argument: Callable[[float], float] = lambda strength: strength
    signed: bool = False
    table: Callable[[float], list[int]] = lambda _: []
    """From the argument to the 256 levels of a `TABLE`."""
    matrix: Callable[[float, int, int], Matrix] = lambda *_: ()
    """From the argument and the image's width and height to the matrix of a `MAP`."""
    black: bool = False
    """Whether a `MAP` leaves uncovered pixels black."""


class Change(NamedTuple):
    """An operation that was drawn for an image."""

    operation: Operation
    argument: float = 0.0

    def apply(self, image: Image.Image, fill: Fill) -> Image.Image:
        return self.operation.apply(image, self.argument, fill)


def moved(image: Image.Image, matrix: Matrix, fill: Fill | None) -> Image.Image:
    """The image with its pixels at other places. Uncovered pixels have the colour `fill`, or are black."""
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BICUBIC, fillcolor=fill
    )


def _map(matrix: Callable[[float, int, int], Matrix], argument: Callable[[float], float]) -> Operation:
    def apply(image: Image.Image, by: float, fill: Fill) -> Image.Image:
        return moved(image, matrix(by, *image.size), fill)

    return Operation(apply, Kind.MAP, argument, signed=True, matrix=matrix)


def _table(table: Callable[[float], list[int]], argument: Callable[[float], float] = lambda s: s) -> Operation:
    """Replaces every value of every channel by its entry in a table."""
    return Operation(
        lambda image, by, _: image.point(table(by) * len(image.getbands())), Kind.TABLE, argument, table=table
    )


def _turned(degrees: float, width: int, height: int) -> Matrix:
    """A rotation about the centre, with the rounding of Pillow's `rotate`."""
    angle = -math.radians(degrees % 360.0)
    cosine, sine = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = width / 2, height / 2
    return cosine, sine, cosine * -x + sine * -y + x, -sine, cosine, -sine * -x + cosine * -y + y


def _posterized_levels(bits: float) -> list[int]:
    """Keeps the highest `bits` bits of each value. With 0 bits, the image is black. Pillow's own `posterize` refuses 0
    bits, which stops timm's `inc1` whenever a strength reaches 10."""
    dropped = (1 << (8 - int(bits))) - 1
    return [value & ~dropped for value in range(256)]


def _solarized_levels(threshold: float) -> list[int]:
    return [value if value < int(threshold) else 255 - value for value in range(256)]


def _solarize_add_levels(amount: float) -> list[int]:
    return [min(255, value + int(amount)) if value < 128 else value for value in range(256)]


def _enhancement(
    name: Callable[[Image.Image], ImageEnhance._Enhance], kind: Kind, argument: Callable[[float], float], signed: bool
) -> Operation:
    return Operation(lambda image, factor, _: name(image).enhance(factor), kind, argument, signed)


def _enhanced(name: Callable[[Image.Image], ImageEnhance._Enhance], kind: Kind) -> Operation:
    """An enhancement by a factor of 0.1 to 1.9."""
    return _enhancement(name, kind, lambda s: s / HIGHEST * 1.8 + 0.1, signed=False)


def _increasingly(name: Callable[[Image.Image], ImageEnhance._Enhance], kind: Kind) -> Operation:
    """An enhancement by a factor that moves away from 1 to either side, as far as 0.1 and 1.9."""
    return _enhancement(name, kind, lambda s: max(0.1, 1.0 + s / HIGHEST * 0.9), signed=True)


def _posterized(argument: Callable[[int], int]) -> Operation:
    """Posterisation. `argument` turns a strength that is scaled to 0 to 4 into the number of bits to keep."""
    return _table(_posterized_levels, lambda s: argument(int(s / HIGHEST * 4)))


OPERATIONS: dict[str, Operation] = {
    "AutoContrast": Operation(lambda image, *_: ImageOps.autocontrast(image), Kind.AUTO_CONTRAST),
    "Equalize": Operation(lambda image, *_: ImageOps.equalize(image), Kind.EQUALIZE),
    "Invert": _table(lambda _: list(range(255, -1, -1))),
    "Rotate": _map(_turned, lambda s: s / HIGHEST * 30),
    "ShearX": _map(lambda by, *_: (1, by, 0, 0, 1, 0), lambda s: s / HIGHEST * 0.3),
    "ShearY": _map(lambda by, *_: (1, 0, 0, by, 1, 0), lambda s: s / HIGHEST * 0.3),
    "TranslateXRel": _map(lambda by, width, _: (1, 0, by * width, 0, 1, 0), lambda s: s / HIGHEST * 0.45),
    "TranslateYRel": _map(lambda by, _, height: (1, 0, 0, 0, 1, by * height), lambda s: s / HIGHEST * 0.45),
    "Posterize": _posterized(lambda bits: bits),
    "PosterizeIncreasing": _posterized(lambda bits: 4 - bits),
    "PosterizeOriginal": _posterized(lambda bits: 4 + bits),
    "Solarize": _table(_solarized_levels, lambda s: int(s / HIGHEST * 256)),
    "SolarizeIncreasing": _table(_solarized_levels, lambda s: 256 - int(s / HIGHEST * 256)),
    "SolarizeAdd": _table(_solarize_add_levels, lambda s: int(s / HIGHEST * 110)),
    "Color": _enhanced(ImageEnhance.Color, Kind.COLOR),
    "Contrast": _enhanced(ImageEnhance.Contrast, Kind.CONTRAST),
    "Brightness": _enhanced(ImageEnhance.Brightness, Kind.BRIGHTNESS),
    "Sharpness": _enhanced(ImageEnhance.Sharpness, Kind.SHARPNESS),
    "ColorIncreasing": _increasingly(ImageEnhance.Color, Kind.COLOR),
    "ContrastIncreasing": _increasingly(ImageEnhance.Contrast, Kind.CONTRAST),
    "BrightnessIncreasing": _increasingly(ImageEnhance.Brightness, Kind.BRIGHTNESS),
    "SharpnessIncreasing": _increasingly(ImageEnhance.Sharpness, Kind.SHARPNESS),
}
"""All operations that RandAugment and AutoAugment choose from. Translations are a share of the image's side. Geometric
operations resample with a bicubic kernel and paint uncovered pixels in the colour `fill`."""

MIRROR = Operation(lambda image, *_: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), Kind.MIRROR)
_GREY = Operation(lambda image, *_: image.convert("L").convert(image.mode), Kind.GREY)
_BLUR = Operation(lambda image, radius, _: image.filter(ImageFilter.GaussianBlur(radius)), Kind.BLUR)

RAND_AUGMENT = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "Posterize",
    "Solarize",
    "SolarizeAdd",
    "Color",
    "Contrast",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateXRel",
    "TranslateYRel",
)
RAND_AUGMENT_INCREASING = tuple(
    f"{name}Increasing" if f"{name}Increasing" in OPERATIONS else name for name in RAND_AUGMENT
)

AUTO_AUGMENT: dict[str, tuple[SubPolicy, ...]] = {
    # Cubuk et al. 2018, table 9 (ImageNet)
    "original": (
        (("PosterizeOriginal", 0.4, 8), ("Rotate", 0.6, 9)),
        (("Solarize", 0.6, 5), ("AutoContrast", 0.6, 5)),
        (("Equalize", 0.8, 8), ("Equalize", 0.6, 3)),
        (("PosterizeOriginal", 0.6, 7), ("PosterizeOriginal", 0.6, 6)),
        (("Equalize", 0.4, 7), ("Solarize", 0.2, 4)),
        (("Equalize", 0.4, 4), ("Rotate", 0.8, 8)),
        (("Solarize", 0.6, 3), ("Equalize", 0.6, 7)),
        (("PosterizeOriginal", 0.8, 5), ("Equalize", 1.0, 2)),
        (("Rotate", 0.2, 3), ("Solarize", 0.6, 8)),
        (("Equalize", 0.6, 8), ("PosterizeOriginal", 0.4, 6)),
        (("Rotate", 0.8, 8), ("Color", 0.4, 0)),
        (("Rotate", 0.4, 9), ("Equalize", 0.6, 2)),
        (("Equalize", 0.0, 7), ("Equalize", 0.8, 8)),
        (("Invert", 0.6, 4), ("Equalize", 1.0, 8)),
        (("Color", 0.6, 4), ("Contrast", 1.0, 8)),
        (("Rotate", 0.8, 8), ("Color", 1.0, 2)),
        (("Color", 0.8, 8), ("Solarize", 0.8, 7)),
        (("Sharpness", 0.4, 7), ("Invert", 0.6, 8)),
        (("ShearX", 0.6, 5), ("Equalize", 1.0, 9)),
        (("Color", 0.4, 0), ("Equalize", 0.6, 3)),
        (("Equalize", 0.4, 7), ("Solarize", 0.2, 4)),
        (("Solarize", 0.6, 5), ("AutoContrast", 0.6, 5)),
        (("Invert", 0.6, 4), ("Equalize", 1.0, 8)),
        (("Color", 0.6, 4), ("Contrast", 1.0, 8)),
        (("Equalize", 0.8, 8), ("Equalize", 0.6, 3)),
    ),
    # from the EfficientNet code for TPUs
    "v0": (
        (("Equalize", 0.8, 1), ("ShearY", 0.8, 4)),
        (("Color", 0.4, 9), ("Equalize", 0.6, 3)),
        (("Color", 0.4, 1), ("Rotate", 0.6, 8)),
        (("Solarize", 0.8, 3), ("Equalize", 0.4, 7)),
        (("Solarize", 0.4, 2), ("Solarize", 0.6, 2)),
        (("Color", 0.2, 0), ("Equalize", 0.8, 8)),
        (("Equalize", 0.4, 8), ("SolarizeAdd", 0.8, 3)),
        (("ShearX", 0.2, 9), ("Rotate", 0.6, 8)),
        (("Color", 0.6, 1), ("Equalize", 1.0, 2)),
        (("Invert", 0.4, 9), ("Rotate", 0.6, 0)),
        (("Equalize", 1.0, 9), ("ShearY", 0.6, 3)),
        (("Color", 0.4, 7), ("Equalize", 0.6, 0)),
        (("Posterize", 0.4, 6), ("AutoContrast", 0.4, 7)),
        (("Solarize", 0.6, 8), ("Color", 0.6, 9)),
        (("Solarize", 0.2, 4), ("Rotate", 0.8, 9)),
        (("Rotate", 1.0, 7), ("TranslateYRel", 0.8, 9)),
        (("ShearX", 0.0, 0), ("Solarize", 0.8, 4)),
        (("ShearY", 0.8, 0), ("Color", 0.6, 4)),
        (("Color", 1.0, 0), ("Rotate", 0.6, 2)),
        (("Equalize", 0.8, 4), ("Equalize", 0.0, 8)),
        (("Equalize", 1.0, 4), ("AutoContrast", 0.6, 2)),
        (("ShearY", 0.4, 7), ("SolarizeAdd", 0.6, 7)),
        (("Posterize", 0.8, 2), ("Solarize", 0.6, 10)),
        (("Solarize", 0.6, 8), ("Equalize", 0.6, 1)),
        (("Color", 0.8, 6), ("Rotate", 0.4, 5)),
    ),
}


def drawn_policy(settings: RandAugment | AutoAugment | ThreeAugment, rng: np.random.Generator) -> list[Change]:
    """The operations that `rng` draws for an image, RGB or grey."""
    if isinstance(settings, ThreeAugment):
        return [_one_of_three(rng)]
    if isinstance(settings, RandAugment):
        names = RAND_AUGMENT_INCREASING if settings.increasing else RAND_AUGMENT
        chosen: SubPolicy = tuple(
            (names[at], settings.probability, settings.magnitude)
            for at in rng.integers(len(names), size=settings.layers)
        )
    else:
        policy = AUTO_AUGMENT[settings.policy]
        chosen = policy[rng.integers(len(policy))]
    return [
        _with_argument(OPERATIONS[name], strength, settings.std, rng)
        for name, probability, strength in chosen
        if probability >= 1 or rng.random() < probability
    ]


def _with_argument(operation: Operation, strength: float, std: float, rng: np.random.Generator) -> Change:
    if std > 0:
        strength = min(max(rng.normal(strength, std), 0.0), HIGHEST)
    if operation.signed and rng.random() > 0.5:
        strength = -strength
    return Change(operation, operation.argument(strength))


def _one_of_three(rng: np.random.Generator) -> Change:
    """Always exactly one of three changes (Touvron et al. 2022, DeiT III, section 3)."""
    which = rng.integers(3)
    if which == 0:
        return Change(_GREY)
    if which == 1:
        return Change(OPERATIONS["Solarize"], 128)
    return Change(_BLUR, rng.uniform(0.1, 2.0))


def drawn_jitter(settings: Jitter, rng: np.random.Generator) -> list[Change]:
    """Multiplies brightness, contrast and saturation by a random factor each, in random order."""
    parts = (
        (OPERATIONS["Brightness"], settings.brightness),
        (OPERATIONS["Contrast"], settings.contrast),
        (OPERATIONS["Color"], settings.saturation),
    )
    order, factors = rng.permutation(3), rng.uniform(-1, 1, 3)
    return [Change(parts[at][0], 1 + parts[at][1] * factors[at]) for at in order if parts[at][1] > 0]
