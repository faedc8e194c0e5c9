"""The arms, the experiments and the claims that are judged, as data.

An arm is the base recipe with some settings changed, as `deit train --set` changes them. An experiment is a group of
arms, each compared to one of them. A claim says which difference the paper found (Touvron et al. 2020, arXiv
2012.12877).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from deit.config import ConvNetConfig, DeiTConfig
from deit.recipe import (
    AdamW,
    Augment,
    Compute,
    Cosine,
    Data,
    Distilled,
    Erase,
    Mix,
    RandAugment,
    Recipe,
    SimpleCrop,
    Supervised,
    override,
    steps,
)

UPDATES = 800
"""Number of steps of every student. All other lengths follow from it."""
TRAIN, FEWER, VAL = 5000, 1000, 1000
"""Numbers of images. The arms in `FEW` see only `FEWER` of the training images. The test folder is used as a whole."""

# --------------------------------------------------------------------------------------------------------------- arms

_FINETUNING = UPDATES // 3
# 16 patches of 8 pixels, not 64 of 4, because a student then sees about four times as many images in the same time: ten
# passes over them, not two or three.
STUDENT = DeiTConfig(
    hidden_size=96,
    num_hidden_layers=6,
    num_attention_heads=3,
    intermediate_size=384,
    layer_norm_eps=1e-6,
    image_size=32,
    patch_size=8,
    encoder_stride=8,
    distillation_token=False,
    drop_path_rate=0.05,
)
# Each run has one process with one thread, so that runs side by side do not disturb each other.
_COMPUTE = Compute(workers=0, save_minutes=0.5)


def _every(updates: int) -> str:
    """The setting for five evaluations in a run. They are few because they cost time."""
    return f"evaluate=steps({max(1, updates // 5)})"


def _lasting(updates: int) -> list[str]:
    return [f"schedule.total=steps({updates})", f"schedule.warmup=steps({updates // 20})", _every(updates)]


# The paper's kinds of augmentation, at strengths for ten passes instead of 300. Validation accuracy after 300 steps was
# 0.32 with crop and flip alone. It was 0.24 with RandAugment at 9, Mixup or CutMix on half of the batches, erasing at
# 0.25 and three views of an image. With the strengths below it was 0.26 with three views and 0.30 with one.
BASE = Recipe(
    name="none",
    model=STUDENT,
    data=Data(batch=64, repeats=2, crop_ratio=1.0, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    augment=Augment(
        crop=SimpleCrop(padding=4),
        flip=0.5,
        policy=RandAugment(magnitude=5, std=0.5, layers=1),
        erase=Erase(probability=0.1),
        mix=Mix(mixup=0.8, cutmix=1.0, probability=0.25),
    ),
    objective=Supervised(smoothing=0.1),
    optim=AdamW(lr=1e-3, per_images=64, weight_decay=0.05),
    schedule=Cosine(total=steps(UPDATES), warmup=steps(UPDATES // 20)),
    evaluate=steps(max(1, UPDATES // 5)),
    compute=_COMPUTE,
)
_TEACHER = replace(
    BASE,
    name="convnet",
    model=ConvNetConfig(widths=(16, 32, 64), depth=2, image_size=32),
    data=replace(BASE.data, repeats=1),
    augment=Augment(crop=SimpleCrop(padding=4), flip=0.5),
    optim=AdamW(lr=2e-3, per_images=64, weight_decay=0.05),
)
ARMS: dict[str, Recipe] = {}
"""The recipes of the arms by name. A teacher or start "@NAME" is the model of that arm, with the same seed unless the
arm is one of `ONCE`."""


def _arm(name: str, base: Recipe, *settings: str) -> Recipe:
    ARMS[name] = replace(override(base, settings), name=name)
    return ARMS[name]


_arm("none", BASE)
_arm("convnet", _TEACHER, *_lasting(2 * UPDATES))
_arm("convnet_24", ARMS["convnet"], "model.image_size=24")
_arm("transformer", BASE, *_lasting(3 * UPDATES))
MATCHES = [
    _arm(f"convnet_{width}", _TEACHER, f"model.widths=({width}, {2 * width}, {4 * width})").name
    for width in (3, 4, 6, 8)
]
"""ConvNets. "@matched" is the one whose validation accuracy is nearest to the transformer's."""
ONCE = ("convnet", "convnet_24", "transformer", *MATCHES)
"""Teachers. They are trained with seed 0 only, and teach the students of all seeds."""

_arm("soft", BASE, "objective=Distilled(teacher='@convnet', kind='soft', token='class', smoothing=0.1)")
_arm("soft_elements", ARMS["soft"], "objective.normalisation=elements")
_arm("hard", BASE, "objective=Distilled(teacher='@convnet', token='class', smoothing=0.1)")
_distilled = _arm(
    "distilled", BASE, "objective=Distilled(teacher='@convnet', smoothing=0.1)", "model.distillation_token=True"
)
_arm("distilled_by_matched", _distilled, "objective.teacher=@matched")
_arm("distilled_by_transformer", _distilled, "objective.teacher=@transformer")

_small = _arm("distilled_24", _distilled, "model.image_size=24", "objective.teacher=@convnet_24")
# A fifth of the learning rate, because fine-tuning adapts the weights and does not begin anew.
_finetuned = _arm("finetuned_24", _small, "start=@distilled_24", "optim.lr=2e-4", *_lasting(_FINETUNING))
_arm("finetuned_32_teacher_24", _finetuned, "model.image_size=32")
_arm("finetuned_32", ARMS["finetuned_32_teacher_24"], "objective.teacher=@convnet")
_arm("finetuned_32_labels", ARMS["finetuned_32"], "objective.weight=0.0")

FEW = (
    _arm("few", BASE).name,
    *(
        _arm(name, BASE, setting).name
        for name, setting in {
            "no_randaugment": "augment.policy=None",
            "no_mixup": "augment.mix.mixup=0.0",
            "no_cutmix": "augment.mix.cutmix=0.0",
            "no_mixing": "augment.mix=None",
            "no_erasing": "augment.erase=None",
            "no_stochastic_depth": "model.drop_path_rate=0.0",
            "no_repeats": "data.repeats=1",
            # Validation accuracy after 200 steps at the rates 0.01, 0.03 and 0.1: 0.28, 0.27, 0.22 (AdamW: 0.26).
            "sgd": "optim=SGD(lr=0.01, per_images=64, weight_decay=1e-4)",
            "dropout": "model.hidden_dropout_prob=0.1",
            # The average's half-life is 4.6 % of the run. The original code's 0.99996 has the same share of 300 epochs.
            "ema": f"ema={0.5 ** (1 / max(1.0, 0.046 * UPDATES)):.4f}",
        }.items()
    ),
)
"""The arms of table 8. They see a fifth of the images, five times as often, because the paper's recipe keeps 300 epochs
from learning the images by heart. A few passes over all images can't learn them by heart anyway."""
_arm(
    "masked",
    BASE,
    "objective=MaskedImage(ratio=0.6, unit=8)",
    "augment.mix=None",
    "augment.erase=None",
    "augment.policy=None",
    "data.repeats=1",
    "model.drop_path_rate=0.0",
)
_arm("masked_finetuned", BASE, "start=@masked")
_arm("none_twice", BASE, *_lasting(2 * UPDATES))

# -------------------------------------------------------------------------------------------------------- experiments

Task = tuple[str, int]
"""A run: an arm and a seed."""
Reading = tuple[str, str]
"""An arm and the name of one of its numbers: a head's test accuracy, or a number that `agreement` found."""
Expected = Literal["above", "below", "equal"]


@dataclass(frozen=True)
class Claim:
    """What the paper found for `one` minus `other`: above 0, below 0, or within a point of 0 (`equal`)."""

    text: str
    source: str
    one: Reading
    other: Reading
    expected: Expected = "above"


@dataclass(frozen=True)
class Experiment:
    """Arms that differ in one thing each, and the claims about them."""

    title: str
    arms: tuple[str, ...]
    control: Reading
    """The reading that all rows of the table are compared to, seed by seed."""
    claims: tuple[Claim, ...]


_NONE, _FEW = ("none", "fused"), ("few", "fused")
EXPERIMENTS = {
    "distillation": Experiment(
        "Kinds of distillation (table 3)",
        ("none", "soft", "hard", "distilled"),
        _NONE,
        (
            Claim("hard distillation beats labels alone", "table 3: 83.0, 81.8", ("hard", "fused"), _NONE),
            Claim("hard distillation beats soft", "table 3: 83.0, 81.8", ("hard", "fused"), ("soft", "fused")),
            Claim(
                "soft distillation is no better than labels alone",
                "table 3: 81.8, 81.8",
                ("soft", "fused"),
                _NONE,
                "equal",
            ),
            Claim("the distillation token beats labels alone", "table 3: 83.4, 81.8", ("distilled", "fused"), _NONE),
            Claim(
                "the distillation token beats hard distillation of the class token",
                "table 3: 83.4, 83.0",
                ("distilled", "fused"),
                ("hard", "fused"),
            ),
            Claim(
                "of its two heads, the distillation head is better",
                "table 3: 83.1, 83.0",
                ("distilled", "distillation"),
                ("distilled", "class"),
            ),
            Claim(
                "both heads together beat the better one",
                "table 3: 83.4, 83.1",
                ("distilled", "fused"),
                ("distilled", "distillation"),
            ),
        ),
    ),
    "agreement": Experiment(
        "Which models decide alike (table 4)",
        ("agreement",),
        ("agreement", "convnet and none"),
        (
            Claim(
                "the class head decides more like the ConvNet than an undistilled DeiT does",
                "table 4: .112, .133",
                ("agreement", "convnet and class"),
                ("agreement", "convnet and none"),
                "below",
            ),
            Claim(
                "the distillation head decides more like the ConvNet than the class head does",
                "table 4: .100, .112",
                ("agreement", "convnet and distillation"),
                ("agreement", "convnet and class"),
                "below",
            ),
            Claim(
                "both tokens begin different and end alike",
                "section 4: cosine .06, .93",
                ("agreement", "cosine, last block"),
                ("agreement", "cosine, input"),
            ),
        ),
    ),
    "teachers": Experiment(
        "Choice of the teacher (table 2)",
        ("distilled_by_transformer", "distilled_by_matched", "distilled"),
        ("distilled_by_transformer", "fused"),
        (
            Claim(
                "a ConvNet teaches better than a transformer of the same accuracy",
                "table 2: 82.7, 81.9",
                ("distilled_by_matched", "fused"),
                ("distilled_by_transformer", "fused"),
            ),
            Claim(
                "a better ConvNet teaches better",
                "table 2: 83.1, 82.7",
                ("distilled", "fused"),
                ("distilled_by_matched", "fused"),
            ),
        ),
    ),
    "resolution": Experiment(
        "Fine-tuning at a higher resolution (sections 4 and 6)",
        ("distilled_24", "finetuned_24", "finetuned_32_teacher_24", "finetuned_32", "finetuned_32_labels"),
        ("finetuned_24", "fused"),
        (
            Claim(
                "a higher resolution helps", "table 5: 84.5, 83.4", ("finetuned_32", "fused"), ("finetuned_24", "fused")
            ),
            Claim(
                "the teacher at the higher resolution helps",
                "section 4",
                ("finetuned_32", "fused"),
                ("finetuned_32_teacher_24", "fused"),
            ),
            # Each arm is read from the head that was trained. Without the teacher's loss, that is the class head.
            Claim(
                "the teacher helps in fine-tuning too",
                "section 4",
                ("finetuned_32", "fused"),
                ("finetuned_32_labels", "class"),
            ),
        ),
    ),
    "normalisation": Experiment(
        "Soft distillation: equation 2 and the original code",
        ("soft", "soft_elements"),
        ("soft_elements", "fused"),
        (
            Claim(
                "the mean over images (equation 2) beats the original code's mean over images and classes",
                "ours: the paper does not compare them",
                ("soft", "fused"),
                ("soft_elements", "fused"),
            ),
        ),
    ),
    "masked": Experiment(
        "Pre-training on masked images (SimMIM, Xie et al. 2021)",
        ("none", "masked", "masked_finetuned", "none_twice"),
        _NONE,
        (
            Claim(
                "fine-tuning after masked images beats as many steps from scratch",
                "SimMIM: 83.8, DeiT-B: 81.8",
                ("masked_finetuned", "fused"),
                _NONE,
            ),
            Claim(
                "pre-training and fine-tuning together beat as many steps from scratch",
                "ours",
                ("masked_finetuned", "fused"),
                ("none_twice", "fused"),
            ),
        ),
    ),
    "ingredients": Experiment(
        "Leaving out or adding one ingredient (table 8)",
        FEW,
        _FEW,
        (
            Claim("RandAugment helps", "table 8: 79.6 without, 81.8", ("no_randaugment", "fused"), _FEW, "below"),
            Claim("Mixup helps", "table 8: 78.7 without, 81.8", ("no_mixup", "fused"), _FEW, "below"),
            Claim("CutMix helps", "table 8: 80.0 without, 81.8", ("no_cutmix", "fused"), _FEW, "below"),
            Claim(
                "Mixup and CutMix together help", "table 8: 75.8 without, 81.8", ("no_mixing", "fused"), _FEW, "below"
            ),
            Claim(
                "random erasing helps", "table 8: 4.3 (diverged) without, 81.8", ("no_erasing", "fused"), _FEW, "below"
            ),
            Claim(
                "stochastic depth helps",
                "table 8: 3.4 (diverged) without, 81.8",
                ("no_stochastic_depth", "fused"),
                _FEW,
                "below",
            ),
            Claim("repeated augmentation helps", "table 8: 76.5 without, 81.8", ("no_repeats", "fused"), _FEW, "below"),
            Claim("SGD is worse than AdamW", "table 8: 74.5, 81.8", ("sgd", "fused"), _FEW, "below"),
            Claim("dropout hurts", "table 8: 81.3, 81.8", ("dropout", "fused"), _FEW, "below"),
            Claim("the average of the weights changes little", "table 8: 81.9, 81.8", ("ema", "fused"), _FEW, "equal"),
        ),
    ),
}
"""The experiments, the most important first."""


def needs(arm: str) -> list[str]:
    """The arms that must be trained before this one."""
    if arm == "agreement":
        return ["convnet", "none", "distilled"]
    recipe = ARMS[arm]
    named = [recipe.start, recipe.objective.teacher if isinstance(recipe.objective, Distilled) else ""]
    return [arm for name in named if name for arm in ([*MATCHES, "transformer"] if name == "@matched" else [name[1:]])]


def updates_of(arm: str) -> int:
    """The number of steps in an arm's runs."""
    if arm == "agreement":
        return 0
    schedule = ARMS[arm].schedule
    assert schedule is not None
    return round(schedule.total.amount)


def task_of(arm: str, seed: int) -> Task:
    """The run of an arm for a seed. A teacher has the same run for all seeds."""
    return arm, 0 if arm in ONCE else seed


def plan(experiments: Iterable[str], seeds: Iterable[int]) -> list[Task]:
    """All runs, each once and after the runs that it needs."""
    order: dict[Task, None] = {}

    def add(task: Task) -> None:
        arm, seed = task
        for other in needs(arm):
            add(task_of(other, seed))
        order[task] = None

    for experiment in experiments:
        for seed in seeds:
            for arm in EXPERIMENTS[experiment].arms:
                add(task_of(arm, seed))
    return list(order)
