"""What a model sees: the images of a batch, and how each view of them is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from deit.config import IMAGENET_MEAN, IMAGENET_STD
from deit.plain import check, within


@dataclass(frozen=True, kw_only=True)
class Data:
    """How images become batches. The model sets the image size."""

    batch: int
    """Number of images per step, over all processes together."""
    repeats: int = 1
    """Number of views of an image in one batch: repeated augmentation (Hoffer et al. 2020). An epoch keeps as many
    views as there are images, so it shows 1/repeats of the images, and `repeats` epochs show all of them."""
    holdout: float = 0.1
    """Share of each class's training images that is held out for validation if the folder has no validation images."""
    crop_ratio: float = 0.875
    """Side of the centre crop in evaluation, of a rectangle its longer one, divided by the shortest edge of the image
    (224/256 in the paper)."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        check(
            self.batch >= 1 and self.repeats >= 1,
            f"batch and repeats must be at least 1, found batch={self.batch}, repeats={self.repeats}",
        )
        within(self, 0.0, 0.9, "holdout")
        within(self, 0.01, 1.0, "crop_ratio")
        check(
            len(self.mean) == len(self.std) and min(self.std) > 0,
            f"mean and std need one entry per channel and std must be positive, found mean={self.mean}, std={self.std}",
        )


# ------------------------------------------------------------------------------------------------------- augmentation


@dataclass(frozen=True, kw_only=True)
class ResizedCrop:
    """A random rectangle of the image, resized to the model's size (bicubic)."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the image's area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width divided by height; drawn uniformly in the logarithm."""

    def __post_init__(self) -> None:
        check(
            0 < self.scale[0] <= self.scale[1] <= 1,
            f"scale must be (smallest, largest), above 0 and up to 1, found {self.scale}",
        )
        check(
            0 < self.ratio[0] <= self.ratio[1],
            f"ratio must be (smallest, largest), both positive, found {self.ratio}",
        )


@dataclass(frozen=True, kw_only=True)
class SimpleCrop:
    """A random crop after resizing the shortest edge to the model's size and padding by mirroring (DeiT III)."""

    padding: int = 4
    """Width of the padding on every side, in pixels."""

    def __post_init__(self) -> None:
        check(self.padding >= 0, f"padding must be at least 0, found {self.padding}")


@dataclass(frozen=True, kw_only=True)
class Affine:
    """A random affine map about the image's centre. Each part is drawn uniformly, and uncovered pixels are black."""

    rotate: float = 0.0
    """Largest rotation to either side, in degrees."""
    shear: float = 0.0
    """Largest shear to either side along each axis, in degrees."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Smallest and largest magnification."""
    shift: float = 0.0
    """Largest shift in either direction of each axis, as a fraction of the image's side."""


@dataclass(frozen=True, kw_only=True)
class RandAugment:
    """Random operations from a list (Cubuk et al. 2019). timm names such settings `rand-m9-mstd0.5-inc1`."""

    magnitude: float = 9.0
    """Strength of the operations, 0 to 10."""
    std: float = 0.0
    """Standard deviation of the strength. The varied strength is clipped to 0 to 10."""
    layers: int = 2
    """Number of operations drawn for each image, with replacement."""
    probability: float = 0.5
    """Probability that a drawn operation is applied."""
    increasing: bool = True
    """Whether to use the operations whose effect grows with the strength (timm's `inc1`)."""

    def __post_init__(self) -> None:
        within(self, 0.0, 10.0, "magnitude")
        within(self, 0.0, 1.0, "probability")
        check(self.layers >= 0 and self.std >= 0, f"layers and std can't be negative, found {self}")


@dataclass(frozen=True, kw_only=True)
class AutoAugment:
    """One of 25 learnt pairs of operations for each image (Cubuk et al. 2018)."""

    policy: Literal["original", "v0"] = "original"
    """timm's name of the policy: `original` for ImageNet, or `v0`."""
    std: float = 0.0
    """Standard deviation of each operation's strength, as for `RandAugment`."""

    def __post_init__(self) -> None:
        check(self.std >= 0, f"std can't be negative, found {self.std}")


@dataclass(frozen=True, kw_only=True)
class ThreeAugment:
    """One of grey, solarise (half the range) and Gaussian blur (radius 0.1 to 2), equally likely (DeiT III)."""


@dataclass(frozen=True, kw_only=True)
class Jitter:
    """Random changes of brightness, contrast and saturation, in random order.

    Each is multiplied by a factor drawn from 1 - strength to 1 + strength. The fields are the strengths, 0 to 1.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0

    def __post_init__(self) -> None:
        within(self, 0.0, 1.0, "brightness", "contrast", "saturation")


@dataclass(frozen=True, kw_only=True)
class Erase:
    """Random erasing (Zhong et al. 2017): fills a rectangle of the normalised image with normally distributed noise,
    drawn for each pixel."""

    probability: float = 0.25
    """Probability that an image gets an erased rectangle."""
    area: tuple[float, float] = (0.02, 1 / 3)
    """Smallest and largest share of the image's area."""
    ratio: tuple[float, float] = (0.3, 1 / 0.3)
    """Smallest and largest height divided by width; drawn uniformly in the logarithm."""

    def __post_init__(self) -> None:
        within(self, 0.0, 1.0, "probability")
        check(
            0 < self.area[0] <= self.area[1] < 1,
            f"area must be (smallest, largest), both above 0 and below 1, found {self.area}",
        )
        check(
            0 < self.ratio[0] <= self.ratio[1],
            f"ratio must be (smallest, largest), both positive, found {self.ratio}",
        )


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Mixup (Zhang et al. 2017) and CutMix (Yun et al. 2019): mixes an image and its label with its partner.

    The partner is the image at the mirrored place in the batch.
    """

    mixup: float = 0.0
    """alpha of the Beta distribution that Mixup's share is drawn from; 0 turns Mixup off."""
    cutmix: float = 0.0
    """alpha of the Beta distribution that CutMix's area is drawn from; 0 turns CutMix off."""
    probability: float = 1.0
    """Probability that a batch is mixed at all."""
    switch: float = 0.5
    """Probability of CutMix if both are on."""
    mode: Literal["batch", "pair", "element"] = "batch"
    """Images that share one draw: the whole batch, an image and its partner, or none."""

    def __post_init__(self) -> None:
        within(self, 0.0, 1.0, "probability", "switch")
        check(
            min(self.mixup, self.cutmix) >= 0 and max(self.mixup, self.cutmix) > 0,
            "mixing needs a positive mixup or cutmix alpha and no negative one, "
            f"found mixup={self.mixup}, cutmix={self.cutmix}; to turn mixing off, set augment.mix to None",
        )


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Changes to training images only, in this order."""

    crop: ResizedCrop | SimpleCrop | None = None
    """Random crop; None takes the resize and centre crop of evaluation."""
    flip: float = 0.0
    """Probability of a horizontal flip."""
    affine: Affine | None = None
    policy: RandAugment | AutoAugment | ThreeAugment | None = None
    jitter: Jitter | None = None
    erase: Erase | None = None
    mix: Mix | None = None
    on: Literal["loader", "device"] = "loader"
    """Where the flip and what follows is computed: by the loader processes, image by image, or on the device that
    trains, for all images of a batch together, which suits a GPU that waits for its loaders. What is drawn is the same,
    and hardly a pixel differs. Erasing and mixing are always done on the device."""

    def __post_init__(self) -> None:
        within(self, 0.0, 1.0, "flip")
        check(self.on in ("loader", "device"), f"on must be loader or device, found {self.on!r}")
