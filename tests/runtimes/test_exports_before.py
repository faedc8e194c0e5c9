"""Exports that were written before the package had rooms still open, and answer as they did."""

import pytest
from support.before import BEFORE, difference

from deit import Predictor


@pytest.mark.parametrize(("to", "atol"), [("onnx", 1e-5), ("openvino", 0.02)])
def test_exports_answer_as_they_did(monkeypatch, to, atol):
    """OpenVINO computes in bfloat16 where the processor has it."""
    pytest.importorskip({"onnx": "onnxruntime"}.get(to, to))
    monkeypatch.chdir(BEFORE)
    files = sorted(str(path.relative_to(BEFORE)) for path in BEFORE.glob("data/val/*/*.png"))
    assert difference([answer.to_dict() for answer in Predictor(to).stream(files)]) < atol
