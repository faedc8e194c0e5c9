"""Exported folders behind `Predictor`."""

import pytest
from conftest import raises_saying

from deit.explain import explain_file
from deit.export import export
from deit.predict import Predictor


@pytest.mark.parametrize("to", ["torch", "onnx", "openvino"])
def test_an_exported_folder_predicts_the_same(distilled, photos, tmp_path, to):
    """Each runtime from files to labels: float32 within 1e-4, and the same labels first."""
    pytest.importorskip({"torch": "torch", "onnx": "onnxruntime", "openvino": "openvino"}[to])
    exported = export(distilled, to, tmp_path / "exported").folder
    for head in ("fused", "class", "distillation", "softmax"):
        found, expected = (Predictor(each, head=head)(photos) for each in (exported, distilled))
        for row, other in zip(found, expected, strict=True):
            assert [entry["label"] for entry in row] == [entry["label"] for entry in other]
            # A CPU with bfloat16 lets OpenVINO compute in it.
            atol = 2e-2 if to == "openvino" else 1e-4
            assert [entry["score"] for entry in row] == pytest.approx([entry["score"] for entry in other], abs=atol)
    with raises_saying(ValueError, "is an exported model, which runs on the CPU here, and device is cuda"):
        Predictor(exported, device="cuda")
    with raises_saying(ValueError, "is an exported model, whose inside can't be seen"):
        explain_file(exported, photos[0])
