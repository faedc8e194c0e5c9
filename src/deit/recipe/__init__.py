"""A recipe is the complete description of an experiment: model, data, augmentation, objective, optimisation, seed.

It is frozen data, with no behaviour except checks and arithmetic. The rooms that act on each part import it from here.
`to_dict` and `from_dict` convert to and from the JSON of `recipe.json`. `override` implements `--set` of the command
line.
"""

from deit.recipe.learning import (
    LAMB,
    MICRO_BATCHES_REFUSED,
    SGD,
    AdamW,
    Compute,
    Cosine,
    Distilled,
    Duration,
    HeadOnly,
    LastBlocks,
    LinearProbe,
    LoRA,
    MaskedImage,
    Muon,
    Objective,
    Optimizer,
    Supervised,
    Tuning,
    epochs,
    steps,
)
from deit.recipe.settings import override
from deit.recipe.views import (
    Affine,
    Augment,
    AutoAugment,
    Data,
    Erase,
    Jitter,
    Mix,
    RandAugment,
    ResizedCrop,
    SimpleCrop,
    ThreeAugment,
)
from deit.recipe.whole import Recipe, difference, is_code

__all__ = [
    "AdamW",
    "Affine",
    "Augment",
    "AutoAugment",
    "Compute",
    "Cosine",
    "Data",
    "difference",
    "Distilled",
    "Duration",
    "epochs",
    "Erase",
    "HeadOnly",
    "is_code",
    "Jitter",
    "LAMB",
    "LastBlocks",
    "LinearProbe",
    "LoRA",
    "MaskedImage",
    "MICRO_BATCHES_REFUSED",
    "Mix",
    "Muon",
    "Objective",
    "Optimizer",
    "override",
    "RandAugment",
    "Recipe",
    "ResizedCrop",
    "SGD",
    "SimpleCrop",
    "steps",
    "Supervised",
    "ThreeAugment",
    "Tuning",
]
