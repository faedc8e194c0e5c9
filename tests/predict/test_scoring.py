"""What turns logits into scores, and answers that are not numbers: one rule, wherever labels come out."""

import json

import numpy as np
import pytest
import torch
from support.checks import raises_saying
from support.models import LABELS, build, small

import deit
from deit.cli import main
from deit.evaluate.models import examine_files
from deit.export.write import export
from deit.image.processor import DeiTImageProcessor
from deit.model.convnet import ConvNet
from deit.model.load import NotFinite
from deit.predict.calibrate import calibrate
from deit.predict.predictor import Predictor
from deit.serve.limits import Service
from deit.serve.server import serve

KINDS = pytest.mark.parametrize("kind", ["classification", "with_teacher"])
PROBLEMS = {
    "several labels": {"problem_type": "multi_label_classification"},
    "one output": {"id2label": {0: "ant"}},
    "regression": {"problem_type": "regression"},
    "one regression": {"problem_type": "regression", "id2label": {0: "age"}},
}


def folder_of(model, folder):
    model.save_pretrained(folder)
    DeiTImageProcessor.paper(16).save_pretrained(folder)
    return folder


def saved(folder, kind, **changes):
    return folder_of(build(kind, small(**{"id2label": LABELS, "num_labels": None, **changes})), folder)


@KINDS
@pytest.mark.parametrize("problem", PROBLEMS)
def test_scores_are_those_of_transformers(tmp_path, photos, kind, problem, quiet_transformers):
    model = saved(tmp_path / "m", kind, **PROBLEMS[problem])
    processor = quiet_transformers.AutoImageProcessor.from_pretrained(model, backend="pil")
    theirs = quiet_transformers.pipeline("image-classification", str(model), image_processor=processor, device="cpu")
    [found], expected = (
        Predictor(model)(photos[:1]),
        theirs(str(photos[0])),
    )  # a JPEG is decoded at a smaller scale here
    assert [each["label"] for each in found] == [each["label"] for each in expected]
    assert [each["score"] for each in found] == pytest.approx([each["score"] for each in expected], abs=1e-5)
    assert deit.pipeline(model=model)(str(photos[0])) == found


@pytest.mark.parametrize("head", ["fused", "class", "distillation"])
def test_each_head_of_a_distilled_model(tmp_path, photos, head):
    predictor = Predictor(saved(tmp_path / "m", "with_teacher", **PROBLEMS["several labels"]), head=head)
    pixels = predictor.processor(photos).pixel_values
    out = predictor.model(torch.from_numpy(np.stack(pixels)))
    name = {"fused": "logits", "class": "cls_logits", "distillation": "distillation_logits"}[head]
    np.testing.assert_allclose(predictor.scores(np.stack(pixels)), out[name].sigmoid().detach(), rtol=0, atol=1e-6)


def test_no_mean_of_softmaxes_without_softmaxes(tmp_path):
    model = saved(tmp_path / "m", "with_teacher", **PROBLEMS["several labels"])
    with raises_saying(ValueError, "no head 'softmax'; it has fused, class, distillation"):
        Predictor(model, head="softmax")


@pytest.mark.parametrize("problem", PROBLEMS)
def test_what_needs_one_class_for_each_image(tmp_path, photos, problem):
    model = saved(tmp_path / "m", "classification", **PROBLEMS[problem])
    for name in Predictor(model).labels:
        (tmp_path / "data" / name).mkdir(parents=True)
        for i, photo in enumerate(photos):
            (tmp_path / "data" / name / f"{i}{photo.suffix}").write_bytes(photo.read_bytes())
    for what, act in {
        "calibration": lambda: calibrate(model, tmp_path / "data", device="cpu"),
        "an evaluation": lambda: examine_files(model, tmp_path / "data", device="cpu"),
        "onnx-int8": lambda: export(model, "onnx-int8", tmp_path / "out", calibrate=tmp_path / "data"),
    }.items():
        with raises_saying(ValueError, model, f"and {what} needs one class for each image"):
            act()
    assert not (model / "calibration.json").exists()
    assert not (tmp_path / "out").exists()
    (model / "calibration.json").write_text(
        '{"error_rate": 0.1, "images": 9, "data": "", "heads": {"fused": {"temperature": 1.0, "threshold": 0.5, '
        '"nll": [1, 1], "answered": 1}}}'
    )
    with raises_saying(ValueError, "its calibration.json needs one class for each image"):
        Predictor(model)


def damaged(kind, folder):
    if kind == "convnet":
        from deit.config import ConvNetConfig

        model = ConvNet(ConvNetConfig(widths=(4, 4), depth=1, image_size=16, id2label=LABELS))
        model.classifier.bias.data[0] = float("nan")
    else:
        model = build(kind, small(id2label=LABELS, num_labels=None))
        (model.cls_classifier if kind == "with_teacher" else model.classifier).bias.data[0] = float("inf")
    return folder_of(model, folder)


@pytest.mark.parametrize("kind", ["classification", "with_teacher", "convnet"])
def test_answers_that_are_not_numbers(tmp_path, photos, kind, capsys):
    """Nothing is answered, stored or written; every way says the same."""
    model = damaged(kind, tmp_path / "m")
    for name in LABELS.values():
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "0.png").write_bytes(photos[0].read_bytes())
    said = "is not a number; its weights are damaged, or its training diverged: take another checkpoint"
    for act in (
        lambda: Predictor(model)(photos),
        lambda: list(Predictor(model).stream(photos)),
        lambda: deit.pipeline(model=model)(str(photos[0])),
        lambda: deit.pipeline(model=model)(str(photos[0]), function_to_apply="none"),
        lambda: calibrate(model, tmp_path / "data", device="cpu"),
        lambda: examine_files(model, tmp_path / "data", device="cpu"),
        lambda: export(model, "torch", tmp_path / "out"),
        lambda: serve(lambda: Predictor(model), Service(), "m", host="127.0.0.1", port=0, listening=print),
    ):
        with raises_saying(NotFinite, said):
            act()
    assert main(["predict", str(model), str(photos[0]), "--json"]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert said in shown.err
    assert {path.name for path in model.iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    assert not (tmp_path / "out").exists()


def test_rows_of_several_labels_are_json(tmp_path, photos, capsys):
    model = saved(tmp_path / "m", "classification", **PROBLEMS["several labels"])
    assert main(["predict", str(model), str(photos[0]), "--json", "--top-k", "5"]) == 0
    [row] = map(json.loads, capsys.readouterr().out.splitlines())
    [expected] = Predictor(model)(photos[:1])
    assert row["labels"] == expected
