"""Models of each kind that is exported, pictures for them, and what their exports are held to."""

import importlib.util

import pytest
import torch
from PIL import Image
from support import pictures
from support.models import LABELS, build, scramble, shrink, small

from deit.config import VARIANTS, ConvNetConfig
from deit.evaluate.calibration import Calibration, HeadCalibration
from deit.export import formats
from deit.export.engines import Engine
from deit.export.web import Page
from deit.model.convnet import ConvNet

FLOAT = ("torch", "onnx", "openvino")
INT8 = ("onnx-int8", "openvino-int8")
KINDS = ("distilled", "plain", "deit3", "convnet")
OUTPUTS = {kind: ["logits", *(["cls_logits", "distillation_logits"] if kind == "distilled" else [])] for kind in KINDS}


def needs(to):
    """Skips the test if a format can't be written here."""
    for package in formats._PACKAGES[to]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{to} needs {package}, which is not installed")
    if to == "web":
        try:
            Page()
        except FileNotFoundError as error:
            pytest.skip(str(error))


def model_of(kind):
    labels = {"id2label": LABELS, "num_labels": None}
    if kind == "convnet":
        model = scramble(ConvNet(ConvNetConfig(widths=(6, 8), depth=1, image_size=(16, 24), id2label=LABELS)))
        for layer in model.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.running_mean.uniform_(-0.5, 0.5)
                layer.running_var.uniform_(0.5, 2)
        return model.eval()
    if kind == "deit3":
        return build("classification", shrink(VARIANTS["deit3-small-patch16-224"], image_size=(32, 48), **labels))
    if kind == "plain":
        return build("classification", small(distillation_token=False, image_size=(16, 24), **labels))
    return build("with_teacher", small(image_size=(24, 16), hidden_act="quick_gelu", **labels))


def pixels_for(model, count, seed=0):
    shape = (count, model.config.num_channels, *model.config.image_hw)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def softmax(values):
    return torch.as_tensor(values).double().softmax(-1)


def tampering(monkeypatch, change):
    """Every runtime's answers go through `change`."""

    def run(self, pixels):
        return change(dict(zip(self.outputs, self._run(pixels), strict=True)))

    monkeypatch.setattr(Engine, "__call__", run)


def calibration(threshold, temperature=1.5):
    head = HeadCalibration(temperature=temperature, threshold=threshold, nll=(1.0, 0.9), answered=0.5)
    return Calibration(error_rate=0.05, images=100, data="none", heads={"fused": head})


def noise(height, width, channels=3, seed=0):
    return Image.fromarray(pictures.noise(height, width, channels, seed))


def smooth(height, width, seed=0):
    return noise(9, 12, seed=seed).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, kind="PNG", **options):
    return pictures.encode(image, kind, **options)
