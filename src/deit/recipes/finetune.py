"""Fine-tuning on a folder of a few thousand photos. Begin with these recipes. All their numbers are ours."""

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
        # Milder than in pre-training, because a few thousand steps must not make the model unlearn whole photos.
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
    """A published DeiT, fine-tuned on the labels of your own folder of photos.

    `variant` names the architecture and its checkpoint: facebook/deit-{tiny,small,base}-patch16-224.

    Source: ours.
    Expected: nothing published for these settings.
    Ours: not run at full scale.
    """
    return _finetune("finetune", variant, Supervised(smoothing=_SMOOTHING))


def finetune_dinov2(variant: str = "dinov2-small") -> Recipe:
    """A published DINOv2, fine-tuned on the labels of your own folder of photos.

    For a few hundred photos, train a part of it alone: `--set "tuning=LastBlocks(count=2)"` or
    `--set "tuning=LoRA(rank=8)"`. `variant` names the architecture and its checkpoint: facebook/dinov2-{small,base}.

    Source: ours; the weights are those of Oquab et al. 2023.
    Expected: nothing published for these settings.
    Ours: not run at full scale.
    """
    return _finetune("finetune_dinov2", variant, Supervised(smoothing=_SMOOTHING))


def finetune_distilled(variant: str = "deit-tiny-distilled-patch16-224", teacher: str = "") -> Recipe:
    """A published distilled DeiT, fine-tuned on your own folder of photos with a teacher that knows its classes.

    The model learns from the labels of the photos and from the teacher. Name the teacher with
    `--set objective.teacher=RUN/model`. It can be an earlier run on the same photos, such as `finetune` with a larger
    variant, or a FILE.py:FUNCTION that returns a model. If `deit teach` has stored the teacher's labels, use
    `--set objective.cache=FOLDER` instead. `variant` names the architecture and its checkpoint, as in `finetune`:
    facebook/deit-{tiny,small,base}-distilled-patch16-224.

    Source: ours; both tokens learn during fine-tuning too, as in Touvron et al. 2020, section 4.
    Expected: nothing published for these settings.
    Ours: not run at full scale.
    """
    return _finetune("finetune_distilled", variant, Distilled(teacher=teacher, smoothing=_SMOOTHING))
