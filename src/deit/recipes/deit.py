"""DeiT on ImageNet: Touvron et al. 2020, "Training data-efficient image transformers & distillation through attention".

The numbers are those of table 9. If the table leaves a number out, it is the default of main.py in
facebookresearch/deit: the learning rate at the start of the warm-up, its floor, the variation of RandAugment's
strength, and the average of the weights, which gives 0.1 points in table 8. The original computed that average but
reported the weights themselves. Two differences are ours: the learning rate changes with every step, and images are
erased, mixed and drawn with random numbers that are computed from counters.
"""

from dataclasses import replace
from typing import Literal

from deit.config import VARIANTS
from deit.recipe import (
    AdamW,
    Augment,
    Cosine,
    Data,
    Distilled,
    Erase,
    Mix,
    Objective,
    RandAugment,
    Recipe,
    ResizedCrop,
    Supervised,
    epochs,
)

Size = Literal["tiny", "small", "base"]

AUGMENT = Augment(
    crop=ResizedCrop(),
    flip=0.5,
    policy=RandAugment(magnitude=9, std=0.5, layers=2),
    erase=Erase(probability=0.25),
    mix=Mix(mixup=0.8, cutmix=1.0),
)
"""Table 9."""
SMOOTHING = 0.1
DROP_PATH = 0.1
REPEATS = 3
WARMUP = epochs(5)

_SUPERVISED = Supervised(smoothing=SMOOTHING)
_TEACHER = "timm:regnety_160.deit_in1k"
"""RegNetY-16GF, trained by the authors on ImageNet with the same augmentation: 82.9 (table 2)."""
_HARD = Distilled(teacher=_TEACHER, smoothing=SMOOTHING)
_SOFT = Distilled(teacher=_TEACHER, kind="soft", smoothing=SMOOTHING)
"""Temperature 3 and a weight of 0.1 for the teacher are the objective's own defaults."""
_EMA = 0.99996


def _pretrain(name: str, size: Size, objective: Objective, length: int = 300) -> Recipe:
    """The recipe of table 9; the model has a distillation token if the objective needs one."""
    token = isinstance(objective, Distilled) and objective.token == "distillation"
    variant = VARIANTS[f"deit-{size}-{'distilled-' if token else ''}patch16-224"]
    return Recipe(
        name=name,
        model=variant.replace(num_labels=2, drop_path_rate=DROP_PATH),
        data=Data(batch=1024, repeats=REPEATS),
        augment=AUGMENT,
        objective=objective,
        optim=AdamW(lr=5e-4, per_images=512, weight_decay=0.05),
        schedule=Cosine(total=epochs(length), warmup=WARMUP, floor=1e-5, start=1e-6),
        ema=_EMA,
    )


def _larger(name: str, objective: Objective) -> Recipe:
    """The command of README_deit.md for 384 pixels: 30 epochs at a constant learning rate with full augmentation."""
    token = isinstance(objective, Distilled)
    variant = f"deit-base-{'distilled-' if token else ''}patch16-"
    return replace(
        _pretrain(name, "base", objective),
        model=VARIANTS[variant + "384"].replace(num_labels=2, drop_path_rate=DROP_PATH),
        data=Data(batch=512, repeats=REPEATS, crop_ratio=1.0),
        optim=AdamW(lr=5e-6, per_images=512, weight_decay=1e-8),
        schedule=Cosine(total=epochs(30), warmup=WARMUP, floor=5e-6, start=1e-6),
        start=f"facebook/{variant}224",
    )


def deit_tiny() -> Recipe:
    """DeiT-Ti from scratch, labels only.

    Source: Touvron et al. 2020, tables 5 and 9.
    Expected: 72.2 ImageNet top-1.
    Ours: not run at full scale.
    """
    return _pretrain("deit_tiny", "tiny", _SUPERVISED)


def deit_small() -> Recipe:
    """DeiT-S from scratch, labels only.

    Source: Touvron et al. 2020, tables 5 and 9.
    Expected: 79.8 ImageNet top-1.
    Ours: not run at full scale.
    """
    return _pretrain("deit_small", "small", _SUPERVISED)


def deit_base() -> Recipe:
    """DeiT-B from scratch, labels only.

    Source: Touvron et al. 2020, tables 5, 8 and 9.
    Expected: 81.8 ImageNet top-1; 81.9 with the average of the weights.
    Ours: not run at full scale.
    """
    return _pretrain("deit_base", "base", _SUPERVISED)


def deit_tiny_distilled() -> Recipe:
    """DeiT-Ti with a distillation token that learns a RegNetY-16GF's decisions.

    Source: Touvron et al. 2020, section 4, tables 3, 5 and 9.
    Expected: 74.5 ImageNet top-1 (fused heads).
    Ours: not run at full scale.
    """
    return _pretrain("deit_tiny_distilled", "tiny", _HARD)


def deit_small_distilled() -> Recipe:
    """DeiT-S with a distillation token that learns a RegNetY-16GF's decisions.

    Source: Touvron et al. 2020, section 4, tables 3, 5 and 9.
    Expected: 81.2 ImageNet top-1 (fused heads).
    Ours: not run at full scale.
    """
    return _pretrain("deit_small_distilled", "small", _HARD)


def deit_base_distilled() -> Recipe:
    """DeiT-B with a distillation token that learns a RegNetY-16GF's decisions.

    Source: Touvron et al. 2020, section 4, tables 3, 5 and 9.
    Expected: 83.4 ImageNet top-1 (fused heads).
    Ours: not run at full scale.
    """
    return _pretrain("deit_base_distilled", "base", _HARD)


def deit_tiny_distilled_1000() -> Recipe:
    """`deit_tiny_distilled` for 1000 epochs.

    Source: Touvron et al. 2020, table 5.
    Expected: 76.6 ImageNet top-1 (fused heads).
    Ours: not run at full scale.
    """
    return _pretrain("deit_tiny_distilled_1000", "tiny", _HARD, 1000)


def deit_small_distilled_1000() -> Recipe:
    """`deit_small_distilled` for 1000 epochs.

    Source: Touvron et al. 2020, table 5.
    Expected: 82.6 ImageNet top-1 (fused heads).
    Ours: not run at full scale.
    """
    return _pretrain("deit_small_distilled_1000", "small", _HARD, 1000)


def deit_base_distilled_1000() -> Recipe:
    """`deit_base_distilled` for 1000 epochs.

    Source: Touvron et al. 2020, table 5 and figure 3.
    Expected: 84.2 ImageNet top-1 (fused heads); then 85.2 at 384 pixels with `deit_base_distilled_384`.
    Ours: not run at full scale.
    """
    return _pretrain("deit_base_distilled_1000", "base", _HARD, 1000)


def deit_tiny_hard() -> Recipe:
    """DeiT-Ti whose class token learns from the labels and from a RegNetY-16GF's decisions in equal parts.

    Source: Touvron et al. 2020, table 3, third row.
    Expected: 74.3 ImageNet top-1.
    Ours: not run at full scale.
    """
    return _pretrain("deit_tiny_hard", "tiny", replace(_HARD, token="class"))


def deit_small_hard() -> Recipe:
    """DeiT-S whose class token learns from the labels and from a RegNetY-16GF's decisions in equal parts.

    Source: Touvron et al. 2020, table 3, third row.
    Expected: 80.9 ImageNet top-1.
    Ours: not run at full scale.
    """
    return _pretrain("deit_small_hard", "small", replace(_HARD, token="class"))


def deit_base_hard() -> Recipe:
    """DeiT-B whose class token learns from the labels and from a RegNetY-16GF's decisions in equal parts.

    Source: Touvron et al. 2020, table 3, third row.
    Expected: 83.0 ImageNet top-1.
    Ours: not run at full scale.
    """
    return _pretrain("deit_base_hard", "base", replace(_HARD, token="class"))


def deit_tiny_soft() -> Recipe:
    """DeiT-Ti whose class token learns from the labels and from a RegNetY-16GF's probabilities.

    The teacher's part of the loss follows equation 2, a mean over images. losses.py of facebookresearch/deit divides by
    images times classes. To repeat that, use `--set objective.normalisation=elements`.

    Source: Touvron et al. 2020, equation 2 and table 3, second row.
    Expected: 72.2 ImageNet top-1 in table 3; nothing published with the mean over images.
    Ours: not run at full scale.
    """
    return _pretrain("deit_tiny_soft", "tiny", replace(_SOFT, token="class"))


def deit_small_soft() -> Recipe:
    """DeiT-S whose class token learns from the labels and from a RegNetY-16GF's probabilities.

    Source: Touvron et al. 2020, equation 2 and table 3, second row; the mean is over images, as in `deit_tiny_soft`.
    Expected: 79.8 ImageNet top-1 in table 3; nothing published with the mean over images.
    Ours: not run at full scale.
    """
    return _pretrain("deit_small_soft", "small", replace(_SOFT, token="class"))


def deit_base_soft() -> Recipe:
    """DeiT-B whose class token learns from the labels and from a RegNetY-16GF's probabilities.

    Source: Touvron et al. 2020, equation 2 and table 3, second row; the mean is over images, as in `deit_tiny_soft`.
    Expected: 81.8 ImageNet top-1 in table 3; nothing published with the mean over images.
    Ours: not run at full scale.
    """
    return _pretrain("deit_base_soft", "base", replace(_SOFT, token="class"))


def deit_tiny_distilled_soft() -> Recipe:
    """DeiT-Ti with a distillation token that learns a RegNetY-16GF's probabilities.

    Source: ours, from equation 2 of Touvron et al. 2020 and the distillation token of its section 4.
    Expected: nothing published.
    Ours: not run at full scale.
    """
    return _pretrain("deit_tiny_distilled_soft", "tiny", _SOFT)


def deit_base_384() -> Recipe:
    """`deit_base` fine-tuned at 384 pixels.

    The published weights were fine-tuned without stochastic depth, because the code at that time kept the model in
    evaluation mode (`--train-mode` of main.py came later). Here stochastic depth is on. To start from your own weights,
    use `--set start=RUN/model`.

    Source: README_deit.md of facebookresearch/deit; Touvron et al. 2020, section 6 and table 5.
    Expected: 83.1 ImageNet top-1. For the published weights, timm measures 83.1 on whole images (crop ratio 1.0), as
        here, and README_deit.md gives 82.9 at a crop ratio of 0.875.
    Ours: not run at full scale.
    """
    return _larger("deit_base_384", _SUPERVISED)


def deit_base_distilled_384() -> Recipe:
    """`deit_base_distilled` fine-tuned at 384 pixels, with its RegNetY-16GF at 384 pixels too.

    This is the command of `deit_base_384` with the paper's distillation, which no public code does. To start from your
    own weights, such as those of `deit_base_distilled_1000`, use `--set start=RUN/model`.

    Source: Touvron et al. 2020, sections 4 and 6, table 5.
    Expected: 84.5 ImageNet top-1 (fused heads); 85.2 from `deit_base_distilled_1000`.
    Ours: not run at full scale.
    """
    return _larger("deit_base_distilled_384", replace(_HARD, resolution="student"))
