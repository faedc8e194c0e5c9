"""How good a classifier is: the accuracy of each of its heads, with its interval."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from deit.data import Batch
from deit.machine import Processes
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
def evaluate(model: nn.Module, batches: Iterable[Batch], us: Processes | None = None,
             precision: torch.dtype = torch.float32) -> dict[Head, Accuracy]:
    """Accuracy of each head over all batches, in evaluation mode; the model's mode is restored.

    With many processes each gives its share of the batches, and all get the result on the whole. Rows labelled -1
    (padding, unreadable images) do not count. Raises `ValueError` where nothing counts.
    """
    us = us or Processes(torch.device("cpu"))
    training = model.training
    model.eval()
    heads: list[Head] = []
    correct = torch.zeros(0, dtype=torch.int64, device=us.device)
    total = 0
    for batch in batches:
        real = batch.labels >= 0
        pixels, labels = batch.pixels.to(us.device, non_blocking=True), batch.labels.to(us.device, non_blocking=True)
        with torch.autocast(us.device.type, precision, enabled=precision != torch.float32):
            by_head = head_probabilities(model(pixels))
        found = torch.stack([(probabilities.argmax(-1) == labels).sum() for probabilities in by_head.values()])
        correct = found if not heads else correct + found
        heads, total = list(by_head), total + int(real.sum())
    model.train(training)
    counts = us.sum(torch.cat([correct, torch.tensor([total], device=us.device)])).tolist()
    if not counts[-1]:
        raise ValueError("there is no image to evaluate on")
    return {head: Accuracy(count, counts[-1]) for head, count in zip(heads, counts, strict=False)}
