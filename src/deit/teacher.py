"""Who teaches: any trained classifier of ours, brought to the student's images and classes. B images, C classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deit.image import DeiTImageProcessor
from deit.predict import load_model
from deit.recipe import Data


class Teacher:
    """A frozen classifier that sees the student's batch with its own normalisation and resolution.

    The student's augmented, mixed batch is what the teacher decides on (Touvron et al. 2020, section 4); only the
    normalisation is undone and the teacher's applied, and the images resized where the resolutions differ.
    """

    def __init__(self, model: nn.Module, processor: DeiTImageProcessor, order: Tensor | None, student: Data):
        self.model = model.eval().requires_grad_(False)
        self.size: tuple[int, int] = model.config.image_hw  # type: ignore[union-attr, assignment]
        self.order = order
        mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
        self.gain = (torch.tensor(student.std) / std).view(-1, 1, 1)
        self.shift = ((torch.tensor(student.mean) - mean) / std).view(-1, 1, 1)

    @classmethod
    def from_folder(cls, folder: str | Path, classes: Sequence[str], student: Data) -> Teacher:
        """Loads a model folder; `classes` are the student's, in order.

        The teacher must know the same class names; where its order differs, its answers are permuted.
        """
        model = load_model(folder)
        theirs = list(model.config.id2label.values())
        if sorted(theirs) != sorted(classes):
            strange = sorted(set(classes) ^ set(theirs))
            reason = f"{strange[0]!r} is known to only one of them" if strange else "it gives a name to several classes"
            raise ValueError(f"teacher {folder} does not have the data's classes: {reason} ({len(theirs)} and "
                             f"{len(classes)} classes); choose a teacher of these classes")
        order = None if theirs == list(classes) else torch.tensor([theirs.index(name) for name in classes])
        return cls(model, DeiTImageProcessor.of_model(folder, model.config), order, student)

    def to(self, device: torch.device) -> Self:
        self.model.to(device)
        self.gain, self.shift = self.gain.to(device), self.shift.to(device)
        self.order = None if self.order is None else self.order.to(device)
        return self

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Logits (B, C) in the student's class order, for the student's batch (B, channels, height, width)."""
        pixels = pixels * self.gain + self.shift
        if tuple(pixels.shape[2:]) != self.size:
            pixels = F.interpolate(pixels, self.size, mode="bicubic", antialias=True)
        logits = self.model(pixels).logits
        return logits if self.order is None else logits[:, self.order]
