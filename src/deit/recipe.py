"""A recipe is the complete record of an experiment: model, data, augmentation, objective, optimisation, seed.

Frozen data and no behaviour but checks and arithmetic; the rooms that act on each part import it from here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from deit.config import IMAGENET_MEAN, IMAGENET_STD, ConvNetConfig, DeiTConfig


@dataclass(frozen=True)
class Duration:
    """A length of training with its unit; `epochs(5)` or `steps(500)` make one."""

    amount: float
    unit: Literal["epochs", "steps"]

    def __post_init__(self) -> None:
        if self.amount < 0:
            raise ValueError(f"a duration can't be negative, found {self.amount} {self.unit}")

    def in_steps(self, steps_per_epoch: int) -> int:
        return round(self.amount * steps_per_epoch) if self.unit == "epochs" else round(self.amount)


def epochs(amount: float) -> Duration:
    """Passes over the training images."""
    return Duration(amount, "epochs")


def steps(amount: float) -> Duration:
    """Updates of the weights."""
    return Duration(amount, "steps")


@dataclass(frozen=True, kw_only=True)
class Data:
    """How images become batches. Their size is the model's."""

    batch: int
    """Images per update."""
    crop_ratio: float = 0.875
    """Evaluation: side of the centre crop over the shortest edge it is cut from (224/256 in the paper)."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    workers: int = 0
    """Loader processes; 0 loads in the training process. The batches do not depend on it."""


@dataclass(frozen=True, kw_only=True)
class Affine:
    """A random affine map about the image's centre, each part drawn uniformly; uncovered pixels are black."""

    rotate: float = 0.0
    """Degrees, to either side."""
    shear: float = 0.0
    """Degrees, to either side, along each axis."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Smallest and largest magnification."""
    shift: float = 0.0
    """Fraction of the image's side, in either direction of each axis."""


@dataclass(frozen=True, kw_only=True)
class Augment:
    """What happens to training images only."""

    affine: Affine | None = None


@dataclass(frozen=True, kw_only=True)
class Supervised:
    """Cross-entropy against the labels."""

    smoothing: float = 0.0
    """Label smoothing, 0 to <1."""


@dataclass(frozen=True, kw_only=True)
class Distilled:
    """Labels for the class token, a teacher for the distillation token (Touvron et al. 2020, section 4)."""

    teacher: str = ""
    """Folder of a trained model."""
    kind: Literal["hard", "soft"] = "hard"
    weight: float | None = None
    """The teacher's share of the loss, 0 to 1; None is the paper's for this kind."""
    temperature: float | None = None
    """Of soft distillation; None is the paper's."""
    smoothing: float = 0.0
    """Smoothing of the labels, 0 to <1; the teacher's decisions are never smoothed."""


Objective = Supervised | Distilled


@dataclass(frozen=True, kw_only=True)
class AdamW:
    lr: float
    """Peak learning rate for a batch of `per_images`; scaled in proportion to the batch."""
    per_images: int
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    decay_distillation_token: bool = True
    """Whether weight decay acts on the distillation token: it does in the original code, not in timm."""

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.per_images < 1:
            raise ValueError(f"lr and per_images must be positive, found lr={self.lr}, per_images={self.per_images}")


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """Learning rate by step: linear warm-up from `start`, then half a cosine down to `floor`."""

    total: Duration
    warmup: Duration = field(default_factory=lambda: epochs(0))
    floor: float = 1e-5
    start: float = 1e-6


@dataclass(frozen=True, kw_only=True)
class Recipe:
    name: str
    model: DeiTConfig | ConvNetConfig
    data: Data
    objective: Objective
    optim: AdamW
    schedule: Cosine
    augment: Augment = field(default_factory=Augment)
    ema: float = 0.0
    """Exponential moving average of the weights: its decay per update, 0 to <1. The average is what is evaluated and
    saved; 0 takes the weights themselves."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the forward and backward pass; auto is bfloat16 where the hardware computes with it, else float32."""
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.objective, Distilled) and not getattr(self.model, "distillation_token", False):
            raise ValueError(f"recipe {self.name}: distillation needs a model with a distillation token")
        if not 0.0 <= self.ema < 1.0:
            raise ValueError(f"recipe {self.name}: ema must be at least 0 and below 1, found {self.ema}")

    def to_dict(self) -> dict[str, Any]:
        """The whole record as JSON types; alternatives carry their class name as `kind_of`."""
        record = asdict(self)
        record["model"] = self.model.to_dict()
        for part in ("objective", "optim", "schedule"):
            record[part]["kind_of"] = type(getattr(self, part)).__name__
        return record
