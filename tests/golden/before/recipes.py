"""The recipes of the stored runs."""

from deit.config import ConvNetConfig, DeiTConfig
from deit.recipe import (
    SGD,
    AdamW,
    Augment,
    Compute,
    Cosine,
    Data,
    Distilled,
    Erase,
    RandAugment,
    Recipe,
    ResizedCrop,
    Supervised,
    steps,
)

MODEL = DeiTConfig(
    hidden_size=12,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=24,
    image_size=8,
    patch_size=4,
    encoder_stride=4,
    layer_norm_eps=1e-6,
    drop_path_rate=0.2,
)


def teacher():
    return Recipe(
        name="teacher",
        model=ConvNetConfig(widths=(4, 8), depth=1, image_size=8),
        data=Data(batch=4),
        objective=Supervised(),
        augment=Augment(flip=0.5),
        optim=SGD(lr=1e-2, per_images=4),
        schedule=Cosine(total=steps(6)),
        compute=Compute(precision="float32", workers=0),
        evaluate=steps(6),
    )


def student():
    return Recipe(
        name="student",
        model=MODEL,
        data=Data(batch=4, repeats=2),
        objective=Distilled(teacher="teacher/model"),
        augment=Augment(crop=ResizedCrop(), flip=0.5, policy=RandAugment(std=0.5), erase=Erase()),
        optim=AdamW(lr=1e-2, per_images=4, clip=1.0),
        schedule=Cosine(total=steps(12), warmup=steps(2)),
        ema=0.9,
        compute=Compute(precision="float32", workers=0),
        evaluate=steps(6),
    )
