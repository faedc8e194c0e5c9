"""What a run minimises, as objects the loop calls: `objective(model, batch) -> (loss, its parts)`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from deit import recipe as r
from deit.data import Batch
from deit.losses import cross_entropy, distillation_loss
from deit.teacher import Teacher


class Objective(Protocol):
    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to minimise (scalar, with gradient) and named quantities to log (scalars, without)."""
        ...


class Supervised:
    """Cross-entropy of the model's logits against the labels."""

    def __init__(self, recipe: r.Supervised):
        self.recipe = recipe

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        logits = model(batch.pixels).logits
        loss = cross_entropy(logits.float(), batch.labels, self.recipe.smoothing)
        return loss, {"accuracy": _agreement(logits, batch.labels)}


class Distilled:
    """Labels for the class token's head, the teacher for the distillation token's."""

    def __init__(self, recipe: r.Distilled, teacher: Teacher):
        self.recipe, self.teacher = recipe, teacher

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        taught = self.teacher(batch.pixels).float()
        out = model(batch.pixels)
        loss = distillation_loss(out.cls_logits.float(), out.distillation_logits.float(), batch.labels, taught,
                                 kind=self.recipe.kind, weight=self.recipe.weight,
                                 temperature=self.recipe.temperature, smoothing=self.recipe.smoothing)
        return loss, {"accuracy": _agreement(out.logits, batch.labels),
                      "agreement": _agreement(out.distillation_logits, taught.argmax(-1))}


def _agreement(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.detach().argmax(-1) == labels).float().mean()


def build(recipe: r.Recipe, classes: Sequence[str], device: torch.device) -> Objective:
    """The objective of a recipe; a teacher is loaded and checked against `classes`."""
    match recipe.objective:
        case r.Supervised():
            return Supervised(recipe.objective)
        case r.Distilled(teacher=folder):
            if not folder:
                raise ValueError(f"recipe {recipe.name} distils without naming a teacher; give objective.teacher the "
                                 "folder of a trained model")
            return Distilled(recipe.objective, Teacher.from_folder(folder, classes, recipe.data).to(device))
