"""How good a classifier is: the accuracy of each of its heads, with its interval."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from deit.data import Batch
from deit.model import Head, head_probabilities


@dataclass(frozen=True)
class Accuracy:
    """Share of correct decisions, and Wilson's 95 % interval for it (Wilson 1927)."""

    correct: int
    total: int

    @property
    def value(self) -> float:
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        z = 1.959963984540054  # two-sided 95 % of the normal distribution
        n, p = self.total, self.value
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, centre - half), min(1.0, centre + half)


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Iterable[Batch], device: torch.device | str = "cpu") -> dict[Head, Accuracy]:
    """Accuracy of each head over all batches, in evaluation mode; the model's mode is restored."""
    device = torch.device(device)
    training = model.training
    model.eval()
    correct: dict[Head, int] = {}
    total = 0
    for batch in batches:
        batch = batch.to(device)
        for head, probabilities in head_probabilities(model(batch.pixels)).items():
            correct[head] = correct.get(head, 0) + int((probabilities.argmax(-1) == batch.labels).sum())
        total += len(batch.labels)
    model.train(training)
    if not total:
        raise ValueError("there is no image to evaluate on")
    return {head: Accuracy(count, total) for head, count in correct.items()}
