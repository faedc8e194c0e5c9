"""The back ends of a `Predictor`: a model in PyTorch, or an exported file in its runtime.

B images, C channels, H rows, W columns.
"""

from __future__ import annotations

import warnings
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from deit.choices import Head, Scoring
from deit.export.engines import Engine
from deit.machine import Rows, full_float32
from deit.model.load import Classifier, heads_of
from deit.model.outputs import DeiTForImageClassificationWithTeacherOutput, ImageClassifierOutput, ModelOutput


class Backend(Protocol):
    """A classifier, ready to compute."""

    heads: tuple[Head, ...]
    """The heads that can decide."""

    def __call__(self, pixels: np.ndarray) -> ModelOutput:
        """Returns the model's output for float32 pixels (B, C, H, W)."""

    def __str__(self) -> str:
        """The back end's name, for people to read."""


class TorchBackend:
    """A classifier in PyTorch, on a device.

    If memory runs out, it computes fewer images at once, and a warning says so.
    """

    def __init__(self, classifier: Classifier, device: torch.device):
        self.model: nn.Module = classifier.model.to(device)
        self.heads, self.device = classifier.heads, device
        self._rows = Rows(warnings.warn)
        # what a config.json asks for beside the logits, which nobody would read
        usual = {"output_attentions": False, "output_hidden_states": False, "return_dict": True}
        config = classifier.model.config
        self._options = {name: value for name, value in usual.items() if getattr(config, name, value) != value}

    @torch.inference_mode()
    def __call__(self, pixels: np.ndarray) -> ModelOutput:
        with full_float32():
            return self._rows(self._computed, torch.from_numpy(pixels))

    def _computed(self, pixels: Tensor) -> ModelOutput:
        return self.model(pixels.to(self.device), **self._options)

    def __str__(self) -> str:
        return "torch"


class EngineBackend:
    """An exported model in its runtime, on the CPU."""

    def __init__(self, engine: Engine, scoring: Scoring):
        self.engine = engine
        both = "cls_logits" in engine.outputs
        self.heads = heads_of(both, scoring)
        self._kind = DeiTForImageClassificationWithTeacherOutput if both else ImageClassifierOutput

    def __call__(self, pixels: np.ndarray) -> ModelOutput:
        logits: dict[str, Any] = {name: torch.from_numpy(value) for name, value in self.engine(pixels).items()}
        return self._kind(**logits)

    def __str__(self) -> str:
        return str(self.engine)
