"""How a model learns: from what, which part of it, with which steps, and how the machine computes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from deit.plain import check, within


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
        within(self, 0.0, 0.999, "smoothing")
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
        within(self, 0.0, 0.999, "smoothing")
        within(self, 0.0, 1000.0, "guidance")
        check(
            not self.guidance or self.token == "distillation",
            "guidance is for a student with a distillation token; set objective.token=distillation, or "
            "objective.guidance=0",
        )
        if self.weight is not None:
            within(self, 0.0, 1.0, "weight")
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
        within(self, 0.01, 0.99, "ratio")


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
    """Largest number of training images; None takes all. They are drawn at random, one of each class first."""
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
        within(self, 0.0, 0.999, "dropout")


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
