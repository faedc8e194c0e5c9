"""Exported folders behind `Predictor`."""

import numpy as np
import pytest
from conftest import build, raises_saying, small
from PIL import Image

from deit.explain import explain_file
from deit.export import export
from deit.image import DeiTImageProcessor
from deit.predict import Predictor

LABELS = {0: "ant", 1: "bee", 2: "cat", 3: "dog", 4: "eel"}


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    paths = [tmp_path / "small.png", tmp_path / "wide.jpg"]
    for path, size in zip(paths, [(20, 30, 3), (90, 160, 3)], strict=True):
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(path)
    return paths


@pytest.fixture
def folder(tmp_path):
    build("with_teacher", small(id2label=LABELS, num_labels=None)).save_pretrained(tmp_path / "model")
    DeiTImageProcessor.paper(16).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("to", ["torch", "onnx", "openvino"])
def test_an_exported_folder_predicts_the_same(folder, photos, tmp_path, to):
    """Each runtime from files to labels: float32 within 1e-4, and the same labels first."""
    pytest.importorskip({"torch": "torch", "onnx": "onnxruntime", "openvino": "openvino"}[to])
    exported = export(folder, to, tmp_path / "exported").folder
    for head in ("fused", "class", "distillation", "softmax"):
        found, expected = (Predictor(each, head=head)(photos) for each in (exported, folder))
        for row, other in zip(found, expected, strict=True):
            assert [entry["label"] for entry in row] == [entry["label"] for entry in other]
            # A CPU with bfloat16 lets OpenVINO compute in it.
            atol = 2e-2 if to == "openvino" else 1e-4
            assert [entry["score"] for entry in row] == pytest.approx([entry["score"] for entry in other], abs=atol)
    with raises_saying(ValueError, "is an exported model, which runs on the CPU here, and device is cuda"):
        Predictor(exported, device="cuda")
    with raises_saying(ValueError, "is an exported model, whose inside can't be seen"):
        explain_file(exported, photos[0])
