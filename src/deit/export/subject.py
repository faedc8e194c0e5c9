"""The subject of an export: a classifier with its preprocessing, as a graph that gives logits.

B images, C channels, H rows, W columns, K classes.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from deit.choices import Scoring
from deit.export.engines import import_openvino
from deit.image.processor import FILE_NAME
from deit.model.load import Classifier, refuse_not_finite
from deit.model.network import DeiTForImageClassificationWithTeacher, PreTrained
from deit.weights import hub


class _Logits(nn.Module):
    """A classifier that returns nothing but its logits, by name."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        both = isinstance(model, DeiTForImageClassificationWithTeacher)
        self.names = ("logits", "cls_logits", "distillation_logits") if both else ("logits",)
        self.options: dict[str, bool] = (
            {}
            if not isinstance(model, PreTrained)
            else {"output_attentions": False, "output_hidden_states": False, "return_dict": True}
        )

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        out = self.model(pixel_values, **self.options)
        return {name: out[name] for name in self.names}


class Subject:
    """A classifier to export.

    Raises `ValueError` if its preprocessing makes pixels of another shape than the model takes.
    """

    def __init__(self, classifier: Classifier):
        self.model, self.processor, self.name = classifier.model, classifier.processor, classifier.name
        self.classes, config = classifier.labels, classifier.model.config
        self.scoring: Scoring = config.scoring
        self.merge: int = getattr(config, "merge", 0)
        self.transformer = isinstance(self.model, PreTrained)
        if self.transformer:
            self.model.set_attn_implementation(
                "sdpa"
            )  # one operation in the graph, which runtimes recognise as attention
        # Files of programs hold weights in the order of their dimensions.
        self.logits = _Logits(self.model).eval().to(memory_format=torch.contiguous_format)
        self.shape = (config.num_channels, *config.image_hw)
        [made] = self.processor([Image.new("RGB", (8, 8))]).pixel_values
        if made.shape != self.shape:
            raise ValueError(
                f"the {FILE_NAME} of {self.name} makes pixels of {made.shape}, the model takes {self.shape}; correct "
                "size, crop_size or data_format in that file"
            )

    @torch.inference_mode()
    def __call__(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """Returns logits (B, K) by name for pixels (B, C, H, W). Raises `NotFinite` if they are not finite."""
        found = {name: value.numpy() for name, value in self.logits(torch.from_numpy(pixels)).items()}
        refuse_not_finite(found.values())
        return found

    def merging(self, count: int) -> Subject:
        """The same model, which merges `count` patch tokens in each block."""
        config, tensors = self.model.config.replace(merge=count), self.model.state_dict()
        model = type(self.model).from_checkpoint(hub.of_tensors(tensors, config), dtype="auto")  # of the same memory
        return Subject(Classifier(self.name, model, self.processor, self.classes))

    @property
    def bytes(self) -> int:
        """Size of the weights, in bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.logits.state_dict().values())

    def layers(self) -> dict[str, nn.Linear | nn.Conv2d]:
        """The layers that multiply with weights, by name."""
        return {name: layer for name, layer in self.model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}

    @cached_property
    def program(self) -> torch.export.ExportedProgram:
        """The graph, for batches of any size."""
        batch = torch.export.Dim("batch", min=1)
        with torch.no_grad():
            return torch.export.export(
                self.logits, (torch.zeros(2, *self.shape),), dynamic_shapes={"pixel_values": {0: batch}}
            )

    @cached_property
    def openvino_model(self) -> Any:
        """The graph in OpenVINO, with named input and outputs."""
        model = import_openvino().convert_model(self.program)
        model.inputs[0].get_tensor().set_names({"pixel_values"})
        for output, name in zip(model.outputs, self.logits.names, strict=True):
            output.get_tensor().set_names({name})
        return model
