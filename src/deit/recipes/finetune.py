"""Fine-tuning on a folder of a few thousand photos: the two recipes to begin with. All their numbers are ours."""

from deit.config import VARIANTS
from deit.recipe import (
    AdamW,
    Augment,
    Cosine,
    Data,
    Distilled,
    Mix,
    Objective,
    RandAugment,
    Recipe,
    ResizedCrop,
    Supervised,
    epochs,
)

_SMOOTHING = 0.1


def _finetune(name: str, variant: str, objective: Objective) -> Recipe:
    if variant not in VARIANTS:
        raise ValueError(f"there is no variant {variant!r}; choose one of {', '.join(VARIANTS)}")
    return Recipe(
        name=name,
        model=VARIANTS[variant].replace(num_labels=2, drop_path_rate=0.1),
        data=Data(batch=64),
        # Milder than pre-training's: in a few thousand updates the model must not unlearn what whole photos look like.
        augment=Augment(
            crop=ResizedCrop(scale=(0.35, 1.0)),
            flip=0.5,
            policy=RandAugment(magnitude=7, std=0.5),
            mix=Mix(mixup=0.2, cutmix=1.0, probability=0.5),
        ),
        objective=objective,
        optim=AdamW(lr=2.5e-4, per_images=64, weight_decay=0.05, layer_decay=0.75, clip=1.0),
        schedule=Cosine(total=epochs(30), warmup=epochs(2), floor=1e-6, start=1e-6),
        start=f"facebook/{variant}",
        ema=0.99,
    )


def finetune(variant: str = "deit-tiny-patch16-224") -> Recipe:
    """A published DeiT on your own folder of photos: the labels only.

    `variant` names the architecture and its checkpoint: facebook/deit-{tiny,small,base}-patch16-224.

    Source: ours.
    Expected: nothing published for these settings.
    Ours: not run at full scale.
    """
    return _finetune("finetune", variant, Supervised(smoothing=_SMOOTHING))


def finetune_distilled(variant: str = "deit-tiny-distilled-patch16-224", teacher: str = "") -> Recipe:
    """A published distilled DeiT on your own folder of photos: the labels, and a teacher that knows its classes.

    The teacher is named with `--set objective.teacher=RUN/model`: an earlier run on the same photos, such as `finetune`
    with a larger variant, or FILE.py:FUNCTION that returns one. Or its labels, stored by `deit teach`:
    `--set objective.cache=FOLDER`. `variant` as in `finetune`: facebook/deit-{tiny,small,base}-distilled-patch16-224.

    Source: ours; both tokens learn during fine-tuning too, as in Touvron et al. 2020, section 4.
    Expected: nothing published for these settings.
    Ours: not run at full scale.
    """
    return _finetune("finetune_distilled", variant, Distilled(teacher=teacher, smoothing=_SMOOTHING))
