"""SimMIM: Xie et al. 2021, "SimMIM: A Simple Framework for Masked Image Modeling"; pre-training without labels.

The numbers are those of configs/vit_base__800ep and config.py in microsoft/SimMIM. Its learning rates, warm-up starts
and floors are for 512 images. The model is ours: a plain ViT-B with learnt positions and a class token. Theirs has
LayerScale and relative positions shared by all blocks, and it classifies the mean over the patches.
"""

from deit.config import VARIANTS
from deit.recipe import AdamW, Augment, Cosine, Data, MaskedImage, Recipe, ResizedCrop, Supervised, epochs
from deit.recipes.deit import AUGMENT, SMOOTHING

_BATCH = 2048
_MODEL = VARIANTS["deit-base-patch16-224"].replace(num_labels=2, drop_path_rate=0.1)


def _schedule(length: int, warmup: int, floor: float, start: float) -> Cosine:
    """A cosine; `floor` and `start` are for 512 images."""
    scale = _BATCH / 512
    return Cosine(total=epochs(length), warmup=epochs(warmup), floor=floor * scale, start=start * scale)


def simmim() -> Recipe:
    """A ViT-B that learns to fill in hidden squares of 32 pixels, for 800 epochs; `simmim_finetune` follows.

    The cosine is ours. The repository keeps the learning rate constant and divides it by ten at epoch 700.

    Source: microsoft/SimMIM, configs/vit_base__800ep/simmim_pretrain__vit_base__img224__800ep.yaml, and its README for
        the batch of 16 x 128.
    Expected: 83.8 ImageNet top-1 after the fine-tuning, with their model.
    Ours: not run at full scale.
    """
    return Recipe(
        name="simmim",
        model=_MODEL,
        data=Data(batch=_BATCH),
        augment=Augment(crop=ResizedCrop(scale=(0.67, 1.0)), flip=0.5),
        objective=MaskedImage(ratio=0.6, unit=32),
        optim=AdamW(lr=1e-4, per_images=512, weight_decay=0.05, clip=5.0),
        schedule=_schedule(800, 10, floor=5e-6, start=5e-7),
    )


def simmim_finetune(start: str = "runs/simmim/model") -> Recipe:
    """`simmim` fine-tuned on ImageNet's labels.

    `start` is the model of that run. If it is elsewhere, use `--set start=RUN/model`.

    Source: microsoft/SimMIM, configs/vit_base__800ep/simmim_finetune__vit_base__img224__800ep.yaml.
    Expected: 83.8 ImageNet top-1, with their model.
    Ours: not run at full scale.
    """
    return Recipe(
        name="simmim_finetune",
        model=_MODEL,
        data=Data(batch=_BATCH),
        augment=AUGMENT,
        objective=Supervised(smoothing=SMOOTHING),
        optim=AdamW(lr=1.25e-3, per_images=512, weight_decay=0.05, layer_decay=0.65, clip=5.0),
        schedule=_schedule(100, 20, floor=2.5e-7, start=2.5e-7),
        start=start,
    )
