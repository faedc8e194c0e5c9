"""DeiT III: Touvron et al. 2022, "DeiT III: Revenge of the ViT", as README_revenge.md of facebookresearch/deit runs it.

The floor of the learning rate is the default of main.py there. Evaluation uses whole images (crop ratio 1.0), as
deit/README.md of naver-ai/rope-vit does when it repeats these results.
"""

from dataclasses import replace
from typing import Literal

from deit.config import VARIANTS, DeiTConfig
from deit.recipe import (
    LAMB,
    AdamW,
    Augment,
    Cosine,
    Data,
    Jitter,
    Mix,
    Recipe,
    ResizedCrop,
    SimpleCrop,
    Supervised,
    ThreeAugment,
    epochs,
)
from deit.recipes.deit import AUGMENT, REPEATS, SMOOTHING, WARMUP

Size = Literal["small", "medium", "base", "large", "huge"]

_THREE = Augment(
    crop=ResizedCrop(),
    flip=0.5,
    policy=ThreeAugment(),
    jitter=Jitter(brightness=0.3, contrast=0.3, saturation=0.3),
    mix=Mix(mixup=0.8, cutmix=1.0),
)


def _model(size: Size, pixels: int, drop_path: float) -> DeiTConfig:
    patch = 14 if size == "huge" else 16
    return VARIANTS[f"deit3-{size}-patch{patch}-224"].replace(num_labels=2, image_size=pixels, drop_path_rate=drop_path)


def _pretrain(
    name: str, size: Size, pixels: int, lr: float, drop_path: float, *, length: int = 800, weight_decay: float = 0.05
) -> Recipe:
    return Recipe(
        name=name,
        model=_model(size, pixels, drop_path),
        data=Data(batch=2048, repeats=REPEATS, crop_ratio=1.0),
        augment=_THREE,
        objective=Supervised(loss="binary"),
        optim=LAMB(lr=lr, per_images=2048, weight_decay=weight_decay),
        schedule=Cosine(total=epochs(length), warmup=WARMUP, floor=1e-5, start=1e-6),
    )


def _short(name: str, size: Size, pixels: int, drop_path: float, start: str) -> Recipe:
    """20 epochs at the target resolution. The learning rate equals its floor, so it is constant after the warm-up."""
    return Recipe(
        name=name,
        model=_model(size, pixels, drop_path),
        data=Data(batch=512, crop_ratio=1.0),
        augment=replace(AUGMENT, erase=None),
        objective=Supervised(smoothing=SMOOTHING),
        optim=AdamW(lr=1e-5, per_images=512, weight_decay=0.1),
        schedule=Cosine(total=epochs(20), warmup=WARMUP, floor=1e-5, start=1e-6),
        start=start,
    )


def _labels_of_21k(name: str, drop_path: float, lr: float, length: int) -> Recipe:
    """Both stages of ImageNet-21k: cross-entropy, CutMix without Mixup, simple crops, no repeated augmentation."""
    recipe = _pretrain(name, "base", 224, lr, drop_path, length=length, weight_decay=0.02)
    return replace(
        recipe,
        data=replace(recipe.data, repeats=1),
        objective=Supervised(smoothing=SMOOTHING),
        augment=replace(_THREE, crop=SimpleCrop(padding=4), mix=Mix(cutmix=1.0)),
    )


def deit3_small() -> Recipe:
    """ViT-S, 800 epochs at 224 pixels.

    Source: README_revenge.md of facebookresearch/deit.
    Expected: 81.4 ImageNet top-1.
    Ours: not run at full scale.
    """
    return _pretrain("deit3_small", "small", 224, 4e-3, 0.05)


def deit3_medium() -> Recipe:
    """ViT-M, 800 epochs at 224 pixels.

    Source: README_revenge.md of facebookresearch/deit gives the result but no command; the learning rate (ViT-B's) and
        the stochastic depth (between ViT-S's and ViT-B's) are our choice.
    Expected: 83.0 ImageNet top-1.
    Ours: not run at full scale.
    """
    return _pretrain("deit3_medium", "medium", 224, 3e-3, 0.1)


def deit3_base() -> Recipe:
    """ViT-B, 800 epochs at 192 pixels; `deit3_base_224` follows.

    Source: README_revenge.md of facebookresearch/deit.
    Expected: 83.8 ImageNet top-1 after the fine-tuning.
    Ours: not run at full scale.
    """
    return _pretrain("deit3_base", "base", 192, 3e-3, 0.2)


def deit3_large() -> Recipe:
    """ViT-L, 800 epochs at 192 pixels; `deit3_large_224` follows.

    Source: README_revenge.md of facebookresearch/deit.
    Expected: 84.9 ImageNet top-1 after the fine-tuning.
    Ours: not run at full scale.
    """
    return _pretrain("deit3_large", "large", 192, 3e-3, 0.45)


def deit3_huge() -> Recipe:
    """ViT-H/14, 800 epochs at 160 pixels; `deit3_huge_224` follows.

    160 is not a multiple of 14. As in the original, the model sees 11 x 11 patches, and it does not see the last 6 rows
    and columns of pixels.

    Source: README_revenge.md of facebookresearch/deit.
    Expected: 85.2 ImageNet top-1 after the fine-tuning.
    Ours: not run at full scale.
    """
    return _pretrain("deit3_huge", "huge", 160, 3e-3, 0.6)


def deit3_small_400() -> Recipe:
    """ViT-S, 400 epochs at 224 pixels.

    Source: deit/README.md and issue 21 of naver-ai/rope-vit, on the DeiT III recipe of 400 epochs.
    Expected: 80.4 ImageNet top-1 (issue 214 of facebookresearch/deit).
    Ours: not run at full scale.
    """
    return _pretrain("deit3_small_400", "small", 224, 4e-3, 0.0, length=400, weight_decay=0.03)


def deit3_base_400() -> Recipe:
    """ViT-B, 400 epochs at 192 pixels; `deit3_base_224` follows.

    Source: deit/README.md and issue 21 of naver-ai/rope-vit, on the DeiT III recipe of 400 epochs.
    Expected: nothing published in these places.
    Ours: not run at full scale.
    """
    return _pretrain("deit3_base_400", "base", 192, 3e-3, 0.1, length=400, weight_decay=0.03)


def deit3_large_400() -> Recipe:
    """ViT-L, 400 epochs at 192 pixels; `deit3_large_224` follows.

    Source: deit/README.md and issue 21 of naver-ai/rope-vit, on the DeiT III recipe of 400 epochs.
    Expected: nothing published in these places.
    Ours: not run at full scale.
    """
    return _pretrain("deit3_large_400", "large", 192, 3e-3, 0.4, length=400, weight_decay=0.03)


def deit3_base_cosub() -> Recipe:
    """`deit3_base` as two submodels that teach each other, with twice the computation for each step.

    Source: Touvron et al. 2022, "Co-training 2^L submodels for visual recognition". README_cosub.md of
        facebookresearch/deit gives no command, so we chose to change only the objective of `deit3_base`.
    Expected: nothing published for these settings.
    Ours: not run at full scale.
    """
    recipe = deit3_base()
    return replace(recipe, name="deit3_base_cosub", objective=Supervised(loss="binary", cosub=True))


def deit3_base_224(start: str = "runs/deit3_base/model") -> Recipe:
    """`deit3_base` fine-tuned at 224 pixels.

    `start` is the model of that run. If it is elsewhere, use `--set start=RUN/model`.

    Source: README_revenge.md of facebookresearch/deit.
    Expected: 83.8 ImageNet top-1.
    Ours: not run at full scale.
    """
    return _short("deit3_base_224", "base", 224, 0.2, start)


def deit3_large_224(start: str = "runs/deit3_large/model") -> Recipe:
    """`deit3_large` fine-tuned at 224 pixels.

    `start` is the model of that run. If it is elsewhere, use `--set start=RUN/model`.

    Source: README_revenge.md of facebookresearch/deit.
    Expected: 84.9 ImageNet top-1.
    Ours: not run at full scale.
    """
    return _short("deit3_large_224", "large", 224, 0.45, start)


def deit3_huge_224(start: str = "runs/deit3_huge/model") -> Recipe:
    """`deit3_huge` fine-tuned at 224 pixels.

    `start` is the model of that run. If it is elsewhere, use `--set start=RUN/model`.

    Source: README_revenge.md of facebookresearch/deit.
    Expected: 85.2 ImageNet top-1.
    Ours: not run at full scale.
    """
    return _short("deit3_huge_224", "huge", 224, 0.55, start)


def deit3_small_384(start: str = "runs/deit3_small/model") -> Recipe:
    """`deit3_small` fine-tuned at 384 pixels.

    `start` is the model of that run. If it is elsewhere, use `--set start=RUN/model`.

    Source: README_revenge.md of facebookresearch/deit.
    Expected: 83.4 ImageNet top-1.
    Ours: not run at full scale.
    """
    return _short("deit3_small_384", "small", 384, 0.0, start)


def deit3_base_21k() -> Recipe:
    """ViT-B on ImageNet-21k, 240 epochs at 224 pixels; `deit3_base_21k_1k` follows.

    Source: README_revenge.md of facebookresearch/deit.
    Expected: 85.7 ImageNet top-1 after the fine-tuning.
    Ours: not run at full scale.
    """
    return _labels_of_21k("deit3_base_21k", 0.1, 1e-3, 240)


def deit3_base_21k_1k(start: str = "runs/deit3_base_21k/model") -> Recipe:
    """`deit3_base_21k` fine-tuned on ImageNet-1k, 50 epochs.

    `start` is the model of that run. If it is elsewhere, use `--set start=RUN/model`.

    Source: README_revenge.md of facebookresearch/deit.
    Expected: 85.7 ImageNet top-1.
    Ours: not run at full scale.
    """
    return replace(_labels_of_21k("deit3_base_21k_1k", 0.15, 3e-4, 50), start=start)
