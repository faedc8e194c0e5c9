"""Changes of colour and shape drawn from a list: RandAugment, AutoAugment, 3-Augment and colour jitter.

`OPERATIONS` says what each operation does, and the rest says what is drawn. Names, lists, strengths and the order of
the draws are those of timm (`timm/data/auto_augment.py`), whose `rand-m9-mstd0.5-inc1` is the paper's RandAugment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from deit.recipe import AutoAugment, Jitter, RandAugment, ThreeAugment

Fill = tuple[int, ...]
SubPolicy = tuple[tuple[str, float, float], ...]
"""Operations in order, each with its probability and its strength."""

HIGHEST = 10.0  # strength of an operation


class Operation(NamedTuple):
    """A change to an image. `argument` turns a strength, 0 to 10, into the argument of `apply`. A `signed` operation
    also takes strengths from -10 to 0."""

    apply: Callable[[Image.Image, float, Fill], Image.Image]
    argument: Callable[[float], float] = lambda strength: strength
    signed: bool = False


def _moved(image: Image.Image, matrix: tuple[float, ...], fill: Fill) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BICUBIC, fillcolor=fill
    )


def _mapped(image: Image.Image, table: list[int]) -> Image.Image:
    """Replaces every value of every channel by its entry in `table`."""
    return image.point(table * len(image.getbands()))


def _posterize(image: Image.Image, bits: float, _: Fill) -> Image.Image:
    """Keeps the highest `bits` bits of each value. With 0 bits, the image is black. Pillow's own `posterize` refuses 0
    bits, which stops timm's `inc1` whenever a strength reaches 10."""
    dropped = (1 << (8 - int(bits))) - 1
    return _mapped(image, [value & ~dropped for value in range(256)])


def _solarize_add(image: Image.Image, amount: float, _: Fill) -> Image.Image:
    return _mapped(image, [min(255, value + int(amount)) if value < 128 else value for value in range(256)])


def _enhanced(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    """An enhancement by a factor of 0.1 to 1.9."""
    return Operation(lambda image, factor, _: kind(image).enhance(factor), lambda s: s / HIGHEST * 1.8 + 0.1)


def _increasingly(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    """An enhancement by a factor that moves away from 1 to either side, as far as 0.1 and 1.9."""
    return Operation(
        lambda image, factor, _: kind(image).enhance(factor), lambda s: max(0.1, 1.0 + s / HIGHEST * 0.9), signed=True
    )


def _solarized(image: Image.Image, threshold: float, _: Fill) -> Image.Image:
    return ImageOps.solarize(image, int(threshold))


def _posterized(argument: Callable[[int], int]) -> Operation:
    """Posterisation. `argument` turns a strength that is scaled to 0 to 4 into the number of bits to keep."""
    return Operation(_posterize, lambda s: argument(int(s / HIGHEST * 4)))


OPERATIONS: dict[str, Operation] = {
    "AutoContrast": Operation(lambda image, _, fill: ImageOps.autocontrast(image)),
    "Equalize": Operation(lambda image, _, fill: ImageOps.equalize(image)),
    "Invert": Operation(lambda image, _, fill: ImageOps.invert(image)),
    "Rotate": Operation(
        lambda image, degrees, fill: image.rotate(degrees, Image.Resampling.BICUBIC, fillcolor=fill),
        lambda s: s / HIGHEST * 30,
        signed=True,
    ),
    "ShearX": Operation(
        lambda image, by, fill: _moved(image, (1, by, 0, 0, 1, 0), fill), lambda s: s / HIGHEST * 0.3, signed=True
    ),
    "ShearY": Operation(
        lambda image, by, fill: _moved(image, (1, 0, 0, by, 1, 0), fill), lambda s: s / HIGHEST * 0.3, signed=True
    ),
    "TranslateXRel": Operation(
        lambda image, by, fill: _moved(image, (1, 0, by * image.width, 0, 1, 0), fill),
        lambda s: s / HIGHEST * 0.45,
        signed=True,
    ),
    "TranslateYRel": Operation(
        lambda image, by, fill: _moved(image, (1, 0, 0, 0, 1, by * image.height), fill),
        lambda s: s / HIGHEST * 0.45,
        signed=True,
    ),
    "Posterize": _posterized(lambda bits: bits),
    "PosterizeIncreasing": _posterized(lambda bits: 4 - bits),
    "PosterizeOriginal": _posterized(lambda bits: 4 + bits),
    "Solarize": Operation(_solarized, lambda s: int(s / HIGHEST * 256)),
    "SolarizeIncreasing": Operation(_solarized, lambda s: 256 - int(s / HIGHEST * 256)),
    "SolarizeAdd": Operation(_solarize_add, lambda s: int(s / HIGHEST * 110)),
    "Color": _enhanced(ImageEnhance.Color),
    "Contrast": _enhanced(ImageEnhance.Contrast),
    "Brightness": _enhanced(ImageEnhance.Brightness),
    "Sharpness": _enhanced(ImageEnhance.Sharpness),
    "ColorIncreasing": _increasingly(ImageEnhance.Color),
    "ContrastIncreasing": _increasingly(ImageEnhance.Contrast),
    "BrightnessIncreasing": _increasingly(ImageEnhance.Brightness),
    "SharpnessIncreasing": _increasingly(ImageEnhance.Sharpness),
}
"""All operations that RandAugment and AutoAugment choose from. Translations are a share of the image's side. Geometric
operations resample with a bicubic kernel and paint uncovered pixels in the colour `fill`."""

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


def apply_policy(
    image: Image.Image, settings: RandAugment | AutoAugment | ThreeAugment, rng: np.random.Generator, fill: Fill
) -> Image.Image:
    """Applies the operations that `rng` draws to `image`, RGB or grey. `fill` has one entry for each channel."""
    if isinstance(settings, ThreeAugment):
        return _three_augment(image, rng)
    if isinstance(settings, RandAugment):
        names = RAND_AUGMENT_INCREASING if settings.increasing else RAND_AUGMENT
        drawn: SubPolicy = tuple(
            (names[at], settings.probability, settings.magnitude)
            for at in rng.integers(len(names), size=settings.layers)
        )
    else:
        policy = AUTO_AUGMENT[settings.policy]
        drawn = policy[rng.integers(len(policy))]
    for name, probability, strength in drawn:
        if probability >= 1 or rng.random() < probability:
            image = _operate(image, OPERATIONS[name], strength, settings.std, rng, fill)
    return image


def _operate(
    image: Image.Image, operation: Operation, strength: float, std: float, rng: np.random.Generator, fill: Fill
) -> Image.Image:
    if std > 0:
        strength = min(max(rng.normal(strength, std), 0.0), HIGHEST)
    if operation.signed and rng.random() > 0.5:
        strength = -strength
    return operation.apply(image, operation.argument(strength), fill)


def _three_augment(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Always applies exactly one of three changes (Touvron et al. 2022, DeiT III, section 3)."""
    which = rng.integers(3)
    if which == 0:
        return image.convert("L").convert(image.mode)
    if which == 1:
        return ImageOps.solarize(image, 128)
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0)))


def jitter(image: Image.Image, settings: Jitter, rng: np.random.Generator) -> Image.Image:
    """Multiplies brightness, contrast and saturation by a random factor each, in random order."""
    parts = (
        (ImageEnhance.Brightness, settings.brightness),
        (ImageEnhance.Contrast, settings.contrast),
        (ImageEnhance.Color, settings.saturation),
    )
    order, factors = rng.permutation(3), rng.uniform(-1, 1, 3)
    for at in order:
        kind, strength = parts[at]
        if strength > 0:
            image = kind(image).enhance(1 + strength * factors[at])
    return image
