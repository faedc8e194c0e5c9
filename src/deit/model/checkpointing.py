"""Recomputing blocks in the backward pass instead of keeping their activations."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

_OPTIONS = [name for name in signature(checkpoint).parameters if name not in ("function", "args", "kwargs")]


@dataclass(frozen=True)
class Checkpointing:
    """Which blocks are recomputed, and how."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """The options of `torch.utils.checkpoint.checkpoint`."""
    every: int = 1
    """Every so many blocks are recomputed, the first included."""
    offload: bool = False
    """Whether what the recomputation starts from is kept in the CPU's memory."""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.options if name not in _OPTIONS]:
            raise ValueError(
                f"torch.utils.checkpoint.checkpoint has no option {', '.join(unknown)}; it has {', '.join(_OPTIONS)}"
            )
        if not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"every_n_layers must be a whole number of at least 1, found {self.every!r}")

    def __call__(self, number: int, block: nn.Module, *inputs: Any) -> Any:
        """What the block with this number makes of its inputs."""
        if number % self.every:
            return block(*inputs)
        with save_on_cpu(pin_memory=torch.cuda.is_available()) if self.offload else nullcontext():
            return checkpoint(block, *inputs, **{"use_reentrant": False, **self.options})
