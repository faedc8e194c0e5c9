"""Objectives: what a run minimises and how it is judged, as objects that the loop calls. B images, C classes.

`objective(model, batch, depth_draws)` returns the loss of a micro-batch and the numbers to log. `objective.judge(...)`
scores a model on the validation images. The loop knows nothing else about them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from deit import recipe as r
from deit.config import DeiTConfig
from deit.data.batches import Batch, EvaluationBatches, hidden_patches, processor_for
from deit.data.counts import balanced_weights, class_counts, remarks
from deit.data.draws import Stream, draws
from deit.data.folders import Split
from deit.evaluate.models import evaluate_by_class
from deit.evaluate.scores import Accuracy
from deit.image.pixels import Normalisation
from deit.machine import Processes, Rows
from deit.model.losses import binary_cross_entropy, cosub_loss, cross_entropy, distillation_loss, masked_image_loss
from deit.train import guidance
from deit.train.labels import LabelCache
from deit.train.teacher import Teacher, expand


@dataclass(frozen=True)
class Verdict:
    """The result of an evaluation."""

    score: float
    """Score that chooses the best model. Higher is better."""
    numbers: dict[str, float]
    """Numbers to log."""
    picture: Image.Image | None = None
    """Picture of the results, if the objective paints one."""


class Objective(Protocol):
    passes: int
    """Number of forward passes over each batch, each with its own stochastic depth."""
    cycle: int | None
    """Number of steps after which the batches repeat; None if they never do."""

    @property
    def teacher(self) -> Accuracy | None:
        """Accuracy of the teacher on validation images, once it is introduced; None if there is no teacher at hand."""
        ...

    def introduction(self, model: nn.Module, validation: Split, us: Processes) -> Iterable[str]:
        """Sentences for people, before the first step of `model`. Only the main process calls it."""
        ...

    def __call__(self, model: nn.Module, batch: Batch, depth_draws: Tensor | None) -> dict[str, Tensor]:
        """Means over the micro-batch, as scalars. `loss` has the gradient, and the others are only logged.

        `depth_draws` (passes * B, blocks, 2) decides stochastic depth; None if the model has none.
        """
        ...

    def validation(self, split: Split, us: Processes) -> EvaluationBatches:
        """This process's share of the validation images."""
        ...

    def judge(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        us: Processes,
        precision: torch.dtype,
        rows: Rows | None = None,
    ) -> Verdict:
        """Scores a model. A collective operation: each process calls it with its share and gets the verdict on all.

        `rows` decides how many images are computed at once, and remembers it for the next time.
        """
        ...


def _forward(model: nn.Module, pixels: Tensor, depth_draws: Tensor | None) -> Any:
    return model(pixels) if depth_draws is None else model(pixels, depth_draws=depth_draws)


def _agreement(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of equal decisions. A mixed image has the label of its larger part."""
    labels = labels.argmax(-1) if labels.dim() == 2 else labels
    return (logits.detach().argmax(-1) == labels).float().mean()


def _share(recipe: r.Recipe, split: Split, us: Processes, **options: Any) -> EvaluationBatches:
    """This process's share of the validation images."""
    return EvaluationBatches(
        split,
        processor_for(recipe),
        -(-recipe.data.batch // us.world),
        rank=us.rank,
        world=us.world,
        workers=recipe.compute.workers,
        device=us.device,
        **options,
    )


class ClassificationObjective:
    """The part that all classifiers share: the weights of the classes, and how they are judged."""

    cycle: int | None = None

    @property
    def teacher(self) -> Accuracy | None:
        return None

    def __init__(self, recipe: r.Recipe, weighting: str, split: Split, device: torch.device):
        """`weighting` is the recipe's `class_weights`, and `split` has the training images."""
        self.recipe, self.weighting, self.split = recipe, weighting, split
        self.class_weights: Tensor | None = None  # (C,) float32
        if weighting == "balanced":
            self.class_weights = torch.tensor(balanced_weights(split), dtype=torch.float32, device=device)

    def introduction(self, model: nn.Module, validation: Split, us: Processes) -> Iterable[str]:
        counts = (class_counts(split, len(self.split.classes)) for split in (self.split, validation))
        return map(str, remarks(self.split.classes, *counts, balanced=self.weighting == "balanced"))

    def validation(self, split: Split, us: Processes) -> EvaluationBatches:
        return _share(self.recipe, split, us)

    def judge(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        us: Processes,
        precision: torch.dtype,
        rows: Rows | None = None,
    ) -> Verdict:
        heads = evaluate_by_class(model, batches, us, precision, rows)
        score = heads["fused"].plain.value
        numbers = {"val_accuracy": score, "val_balanced_accuracy": heads["fused"].value}
        if len(heads) > 2:
            numbers |= {f"val_accuracy_{head}": heads[head].plain.value for head in ("class", "distillation")}
        return Verdict(score, numbers)


class SupervisedObjective(ClassificationObjective):
    """Learning from the labels alone."""

    def __init__(self, recipe: r.Recipe, settings: r.Supervised, split: Split, device: torch.device):
        super().__init__(recipe, settings.class_weights, split, device)
        self.settings = settings
        self.passes = 2 if settings.cosub else 1

    def __call__(self, model: nn.Module, batch: Batch, depth_draws: Tensor | None) -> dict[str, Tensor]:
        binary, smoothing, weights = self.settings.loss == "binary", self.settings.smoothing, self.class_weights
        logits = _forward(model, torch.cat([batch.pixels] * self.passes), depth_draws).logits.float()
        if self.settings.cosub:
            one, other = logits.chunk(2)
            loss = cosub_loss(one, other, batch.labels, binary=binary, smoothing=smoothing, class_weights=weights)
        else:
            one = logits
            loss = (
                binary_cross_entropy(one, batch.labels, weights)
                if binary
                else cross_entropy(one, batch.labels, smoothing, weights)
            )
        return {"loss": loss, "accuracy": _agreement(one, batch.labels)}


class DistilledObjective(ClassificationObjective):
    """Learning from the labels through the class token, and from a teacher through the distillation token (or the
    class token too).

    The teacher's answers come from the teacher itself or from a cache of them. On a CPU in float32, both are
    the same to the bit, and on a GPU up to rounding.
    """

    passes = 1

    def __init__(
        self,
        recipe: r.Recipe,
        settings: r.Distilled,
        split: Split,
        device: torch.device,
        source: Teacher | LabelCache,
    ):
        super().__init__(recipe, settings.class_weights, split, device)
        self.settings, self.source = settings, source
        if isinstance(source, LabelCache):
            self.cycle = source.steps

    @property
    def teacher(self) -> Accuracy | None:
        return self.source.judged

    def introduction(self, model: nn.Module, validation: Split, us: Processes) -> Iterable[str]:
        yield from super().introduction(model, validation, us)
        if isinstance(self.source, LabelCache):
            yield from self.source.introduction(validation)
            return
        alone = us.world == 1 or self.recipe.compute.parallel == "replicate"  # a share of a model can't answer
        learned = model if self.recipe.start and alone else None
        yield from self.source.introduction(self.recipe, validation, "validation", us.device, learned)

    def kept(self, batch: Batch) -> dict[str, Tensor]:
        """What is kept of the teacher's answers to a batch."""
        if isinstance(self.source, LabelCache):
            assert batch.positions is not None
            kept = self.source.kept(batch.step, batch.positions)
            return {name: value.to(batch.labels.device, non_blocking=True) for name, value in kept.items()}
        return self.source.kept(batch.pixels, self.settings)

    def __call__(self, model: nn.Module, batch: Batch, depth_draws: Tensor | None) -> dict[str, Tensor]:
        given, kept = self.settings, self.kept(batch)
        taught = expand(kept, len(self.split.classes))
        out = _forward(model, batch.pixels, depth_draws)
        student = out.distillation_logits if given.token == "distillation" else out.logits
        own = out.cls_logits if given.token == "distillation" else out.logits
        loss = distillation_loss(
            own.float(),
            student.float(),
            batch.labels,
            taught,
            kind=given.kind,
            weight=given.weight,
            temperature=given.temperature,
            normalisation=given.normalisation,
            smoothing=given.smoothing,
            class_weights=self.class_weights,
        )
        decided = taught if given.kind == "hard" else taught.argmax(-1)
        found = {"accuracy": _agreement(out.logits, batch.labels), "agreement": _agreement(student, decided)}
        if given.guidance:
            found["guidance"] = guidance.loss(out.hidden_states, kept)
            loss = loss + given.guidance * found["guidance"]
        return {"loss": loss, **found}


class MaskedImageObjective:
    """Predicting the pixels of hidden patches.

    A model is judged by the same loss on the validation images. Each has a mask of its own that never changes.
    """

    passes = 1
    cycle: int | None = None
    shown = 8
    """Number of validation images whose reconstructions are painted."""
    teacher: Accuracy | None = None

    def __init__(self, recipe: r.Recipe):
        self.recipe = recipe

    def introduction(self, model: nn.Module, validation: Split, us: Processes) -> Iterable[str]:
        return ()

    def __call__(self, model: nn.Module, batch: Batch, depth_draws: Tensor | None) -> dict[str, Tensor]:
        options = {} if depth_draws is None else {"depth_draws": depth_draws}
        return {"loss": model(batch.pixels, batch.mask, **options).loss}

    def validation(self, split: Split, us: Processes) -> EvaluationBatches:
        return _share(self.recipe, split, us, masks=self._mask)

    def _mask(self, index: int) -> np.ndarray:
        return hidden_patches(self.recipe, draws(self.recipe.seed, 0, index, 0, stream=Stream.JUDGED_MASKS))

    @torch.inference_mode()
    def judge(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        us: Processes,
        precision: torch.dtype,
        rows: Rows | None = None,
    ) -> Verdict:
        rows = rows or Rows(warnings.warn)

        def computed(pixels: Tensor, mask: Tensor) -> dict[str, Tensor]:
            with torch.autocast(us.device.type, precision, enabled=precision != torch.float32):
                return {"reconstruction": model(pixels, mask).reconstruction}

        training = model.training
        model.eval()
        totals = torch.zeros(2)
        picture = None
        for batch in batches:
            real = batch.labels >= 0
            batch = batch.to(us.device).finished()
            assert batch.mask is not None
            painted = rows(computed, batch.pixels, batch.mask)["reconstruction"].float()
            if picture is None:
                picture = self._paint(batch, painted)
            if real.any():
                counted = real.nonzero().squeeze(1).to(us.device)
                hidden = batch.mask[counted].unflatten(1, self.recipe.model.grid)  # type: ignore[union-attr]
                loss = masked_image_loss(batch.pixels[counted], painted[counted], hidden)
                totals += torch.tensor([float(loss) * len(counted), len(counted)])
        model.train(training)
        total, count = us.sum(totals.to(us.device)).tolist()
        if not count:
            raise ValueError("none of the validation images can be read; check them")
        return Verdict(-total / count, {"val_loss": total / count}, picture)

    def _paint(self, batch: Batch, painted: Tensor) -> Image.Image:
        """A picture with a row for each image: the original, what the model saw, and its reconstruction."""
        count = min(self.shown, len(batch.pixels))
        data, config = self.recipe.data, self.recipe.model
        assert isinstance(config, DeiTConfig)
        height, width = painted.shape[-2:]
        original = batch.pixels[:count, :, :height, :width].float()
        rows, columns = config.patch_hw
        mask = batch.mask[:count].unflatten(1, config.grid)  # type: ignore[index]
        mask = mask.repeat_interleave(rows, 1).repeat_interleave(columns, 2).unsqueeze(1)
        filled = torch.where(mask, painted[:count], original)
        strips = torch.stack([original, original.masked_fill(mask, 0.0), filled], dim=1)  # (count, 3, channels, h, w)
        painting = strips.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)  # (count * h, 3 * w, channels)
        grid = Normalisation(data.mean, data.std).undo(painting.cpu().numpy())
        return Image.fromarray(grid.squeeze(-1) if grid.shape[-1] == 1 else grid)


def build(recipe: r.Recipe, split: Split, device: torch.device) -> Objective:
    """Builds the objective of a recipe. Its teacher or cache is opened and checked against the data."""
    match recipe.objective:
        case r.Supervised() as settings:
            return SupervisedObjective(recipe, settings, split, device)
        case r.MaskedImage():
            return MaskedImageObjective(recipe)
        case r.Distilled(cache=cache) as settings if cache:
            return DistilledObjective(recipe, settings, split, device, LabelCache.open(cache, split, recipe))
        case r.Distilled(teacher=teacher) as settings if teacher:
            source = Teacher.load(teacher, split.classes, recipe).to(device)
            if settings.guidance:
                source.read_maps(recipe, split, device)
            return DistilledObjective(recipe, settings, split, device, source)
    assert isinstance(recipe.objective, r.Distilled)  # a linear probe has no steps
    raise ValueError(
        f"recipe {recipe.name} distils but names no teacher; use --set objective.teacher=timm:NAME, a trained "
        "model's folder or FILE.py:FUNCTION, or set objective.cache to a folder that deit teach wrote"
    )
