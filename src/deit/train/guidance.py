"""Locality guidance: the patch tokens of a student learn what a convolutional teacher sees at their places.

A transformer from scratch needs many images before it knows that near patches belong together. The feature maps of a
convnet say so for every patch of every view, so a view teaches far more than its label does (Li et al., ECCV 2022).
Here, three blocks of the student predict the last three maps of the teacher, through a linear layer each. These layers
are left out of the trained model.

B images, P patches, D the student's width, C channels of a map.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deit.config import DeiTConfig
from deit.model.convnet import ConvNet
from deit.model.network import DeiTForImageClassificationWithTeacher
from deit.model.outputs import DeiTForImageClassificationWithTeacherOutput
from deit.model.timm_classifier import TimmClassifier

VERSION = 1
"""Version of the maps. Raise it if they are computed in another way, so that older caches are refused."""
LEVELS = 3
"""Number of maps: those of a convnet's last three stages, at strides of 8, 16 and 32 for most."""
_STEPS = 16.0
"""Steps of a kept value for each standard deviation. Values beyond 8 standard deviations are cut off."""


class GuidedStudent(DeiTForImageClassificationWithTeacher):
    """A distilled DeiT that predicts the teacher's maps while it trains. Saved, it is an ordinary one."""

    def __init__(self, config: DeiTConfig):
        super().__init__(config)
        self.guide = nn.ModuleList(nn.Linear(config.hidden_size, config.hidden_size) for _ in range(LEVELS))

    def forward(self, *args: Any, **options: Any) -> Any:
        """In training, the output's `hidden_states` are the predicted maps, three times (B, P, D)."""
        if not self.training:
            return super().forward(*args, **options)
        out = super().forward(*args, **options | {"output_hidden_states": True})
        assert isinstance(out, DeiTForImageClassificationWithTeacherOutput)
        assert out.hidden_states is not None
        depth, prefix = self.config.num_hidden_layers, self.config.num_prefix_tokens
        after = (out.hidden_states[math.ceil(depth * (level + 1) / LEVELS)] for level in range(LEVELS))
        maps = tuple(layer(tokens[:, prefix:]) for layer, tokens in zip(self.guide, after, strict=True))
        return replace(out, hidden_states=maps)

    def _tensors(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in super()._tensors().items() if not name.startswith("guide.")}


def loss(predicted: Sequence[Tensor], kept: Mapping[str, Tensor]) -> Tensor:
    """Mean squared error of predicted maps, three times (B, P, D), over all elements of the maps that were kept."""
    errors = []
    for level, mine in enumerate(predicted):
        theirs = kept[_name(level)].float() / _STEPS
        errors.append(F.mse_loss(mine[..., : theirs.shape[-1]].float(), theirs))
    return torch.stack(errors).mean()


def shapes(channels: Sequence[int], patches: int) -> dict[str, tuple[int, int]]:
    """The shape (P, C) of each kept map of an image."""
    return {_name(level): (patches, count) for level, count in enumerate(channels)}


def _name(level: int) -> str:
    return f"map_{level}"


class MapReader:
    """Computes a teacher's logits and, at the student's patches, its maps.

    Each channel is standardised by its mean and standard deviation on some of the images. If there are more channels
    than the student is wide, they are projected onto as many random orthonormal directions, always the same ones.
    Values are kept as int8.

    Raises `ValueError` if the teacher has no maps, or gives other logits with them.
    """

    def __init__(self, model: nn.Module, name: str, config: DeiTConfig, pixels: Tensor, logits: Tensor):
        """`pixels` (B, channels, height, width) are images to measure the channels on, as the teacher takes them, and
        `logits` are what it says of them."""
        self.model, self.name, self.grid = model, name, config.grid
        found, maps = self._compute(pixels)
        if not torch.allclose(found.softmax(-1), logits.softmax(-1), atol=1e-3):
            raise ValueError(
                f"teacher {name} gives other logits when it gives feature maps, which objective.guidance needs; choose "
                "a convnet of timm, or set objective.guidance=0"
            )
        self.mean = [each.mean((0, 1)) for each in maps]
        self.std = [each.flatten(0, 1).std(0, unbiased=False).clamp(min=1e-5) for each in maps]
        self.onto = [_directions(len(mean), config.hidden_size).to(mean.device) for mean in self.mean]

    @property
    def channels(self) -> tuple[int, ...]:
        return tuple(onto.shape[1] for onto in self.onto)

    def __call__(self, pixels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (B, classes) and the maps, int8 (B, P, C)."""
        logits, maps = self._compute(pixels)
        kept = {}
        for level, (each, mean, std, onto) in enumerate(zip(maps, self.mean, self.std, self.onto, strict=True)):
            values = (each.float() - mean) / std
            values = values if onto.shape[0] == onto.shape[1] else values @ onto
            kept[_name(level)] = (values * _STEPS).round().clamp(-127, 127).to(torch.int8)
        return logits, kept

    def _compute(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits, and maps (B, P, C) at the student's patches."""
        model: Any = self.model.model if isinstance(self.model, TimmClassifier) else self.model
        if isinstance(model, ConvNet):
            logits, found = model.with_maps(pixels, LEVELS)
        elif hasattr(model, "forward_intermediates") and hasattr(model, "forward_head"):
            features, found = model.forward_intermediates(pixels, indices=LEVELS)
            logits = model.forward_head(features)
        else:
            found = []
        if len(found) != LEVELS or any(each.dim() != 4 for each in found):
            raise ValueError(
                f"teacher {self.name} gives no {LEVELS} feature maps, which objective.guidance needs; choose a convnet "
                "of timm, or set objective.guidance=0"
            )
        return logits, [_at_patches(each, self.grid) for each in found]


def _at_patches(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Maps (B, C, height, width) as (B, P, C): means over the patches, or interpolated if the patches are smaller."""
    larger = maps.shape[2] >= grid[0] and maps.shape[3] >= grid[1]
    resized = (
        F.interpolate(maps.float(), grid, mode="area") if larger else F.interpolate(maps.float(), grid, mode="bilinear")
    )
    return resized.flatten(2).transpose(1, 2)


def _directions(channels: int, width: int) -> Tensor:
    """Orthonormal columns, float32 (channels, min(channels, width)). Projections of independent, standardised channels
    onto them have a variance of 1 too."""
    if channels <= width:
        return torch.eye(channels)
    drawn = torch.randn(channels, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return torch.linalg.qr(drawn).Q.float()
