"""Temperatures, thresholds, and what predictions make of them."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from support.checks import raises_saying
from support.models import trained_folder
from support.reports import ABOUT

from deit.cli import main
from deit.evaluate.calibration import Calibration, HeadCalibration, fit
from deit.image.processor import DeiTImageProcessor
from deit.model.heads import fuse_heads
from deit.model.network import DeiTForImageClassificationWithTeacher
from deit.predict.calibrate import calibrate
from deit.predict.predictor import Predictor


def draws(count, sharpness, seed=0, classes=6):
    """Logits and labels drawn from the softmax of the logits divided by `sharpness`: that is the right temperature."""
    rng = np.random.default_rng(seed)
    logits = sharpness * rng.normal(0, 2, (count, classes))
    honest = np.exp(logits / sharpness)
    honest /= honest.sum(1, keepdims=True)
    return logits, (honest.cumsum(1) > rng.random((count, 1))).argmax(1)


def softmax_at(logits):
    return lambda t: torch.from_numpy(logits / t).softmax(-1).numpy()


@pytest.mark.parametrize("sharpness", [0.4, 1.0, 3.0])
def test_the_temperature_is_that_of_the_data(sharpness):
    logits, labels = draws(20_000, sharpness)
    found = fit(softmax_at(logits), labels, 0.1)
    assert found.temperature == pytest.approx(sharpness, rel=0.05)
    assert found.nll[1] <= found.nll[0]
    grid = np.exp(np.linspace(-3, 3, 400))
    lowest = min(grid, key=lambda t: -np.log(softmax_at(logits)(t)[np.arange(len(labels)), labels]).mean())
    assert found.temperature == pytest.approx(lowest, rel=0.02)


@pytest.mark.parametrize("error_rate", [0.02, 0.1, 0.3])
def test_the_promise_is_kept_on_new_images(error_rate):
    """Over 200 calibrations of 300 images, the mean share of new images with one sure and wrong label."""
    wrong, covered = [], []
    for seed in range(200):
        logits, labels = draws(800, 2.0, seed)
        found = fit(softmax_at(logits[:300]), labels[:300], error_rate)
        probabilities = softmax_at(logits[300:])(found.temperature)
        calibration = Calibration(error_rate=error_rate, images=300, data="", heads={"fused": found})
        sure = np.array(calibration.sure(probabilities, "fused"))
        wrong.append((sure & (probabilities.argmax(1) != labels[300:])).mean())
        covered.append((probabilities[np.arange(500), labels[300:]] >= found.threshold).mean())
    assert np.mean(wrong) <= error_rate
    assert np.mean(covered) == pytest.approx(1 - error_rate, abs=0.012)


def test_the_threshold_is_a_rank():
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.4, 0.6]])
    found = fit(lambda t: probabilities, np.array([0, 0, 0, 0]), 0.25)  # rank ceil(5 * 0.75) = 4 of 4
    assert found.threshold == 0.4
    assert found.answered == 0.75  # of the last one both labels reach it
    assert fit(lambda t: probabilities, np.array([0, 0, 0, 0]), 0.4).threshold == 0.7
    with raises_saying(
        ValueError, "4 images are too few for an error rate of 0.1; give at least 9 images, or a higher rate"
    ):
        fit(lambda t: probabilities, np.array([0, 0, 0, 0]), 0.1)
    with raises_saying(ValueError, "error_rate must be above 0 and below 1, found 1"):
        fit(lambda t: probabilities, np.array([0, 0, 0, 0]), 1)


@pytest.fixture
def folder(tmp_path):
    trained_folder(tmp_path / "m")
    rng = np.random.default_rng(0)
    for label in "abcde":
        place = tmp_path / "data/val" / label
        place.mkdir(parents=True)
        for i in range(8):
            Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(place / f"{i}.png")
    (tmp_path / "data/val/a/bad.png").write_bytes(b"no image")
    return tmp_path


def test_calibrated_predictions(folder, capsys):
    """The command against the images' logits by hand; then predictions use it and say so."""
    paths = sorted((folder / "data/val").glob("*/?.png"))
    pixels = DeiTImageProcessor.from_pretrained(folder / "m")(paths, return_tensors="pt").pixel_values
    with torch.no_grad():
        out = DeiTForImageClassificationWithTeacher.from_pretrained(folder / "m")(pixels)
    truth = np.repeat(np.arange(5), 8)
    assert main(["calibrate", str(folder / "m"), "--data", str(folder / "data"), "--error-rate", "0.4", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == json.loads((folder / "m/calibration.json").read_text())
    assert (shown["images"], shown["error_rate"]) == (40, 0.4)
    for head, found in shown["heads"].items():
        expected = fit(
            lambda t, head=head: fuse_heads(out.cls_logits / t, out.distillation_logits / t, head).numpy(), truth, 0.4
        )
        assert found["temperature"] == pytest.approx(expected.temperature, rel=1e-3)
        assert found["threshold"] == pytest.approx(expected.threshold, rel=1e-3)
        predictor = Predictor(folder / "m", head=head)
        probabilities = fuse_heads(
            out.cls_logits / found["temperature"], out.distillation_logits / found["temperature"], head
        ).numpy()
        for answer, row in zip(predictor.stream(paths, top_k=5), probabilities, strict=True):
            assert {e["label"]: pytest.approx(e["score"], abs=1e-6) for e in answer.labels} == dict(
                zip("abcde", row.tolist(), strict=True)
            )
            assert answer.sure == ((row >= found["threshold"]).sum() == 1)
    assert main(["predict", str(folder / "m"), str(paths[0])]) == 0
    shown = capsys.readouterr()
    assert shown.err.startswith("calibrated on 40 images; at most 0.4 of images like these")
    unsure = not next(Predictor(folder / "m").stream(paths[:1])).sure
    assert ("I don't know (" in shown.out) == unsure
    assert main(["predict", str(folder / "m"), str(paths[0]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sure"] is not unsure


def test_refusals(folder, capsys):
    assert main(["calibrate", str(folder / "m"), "--data", str(folder / "data"), "--error-rate", "0.01"]) == 1
    assert "40 images are too few for an error rate of 0.01; give at least 99" in capsys.readouterr().err
    assert not (folder / "m/calibration.json").exists()
    assert main(["calibrate", "facebook/deit-tiny", "--data", str(folder / "data")]) == 1
    assert "the calibration is stored in the model's folder; check the path, or save" in capsys.readouterr().err
    for text in ('{"heads": {}}', "[]", '{"heads": {"fused": {"temperature": -1}}}'):
        (folder / "m/calibration.json").write_text(text)
        with raises_saying(ValueError, "calibration.json"):
            Predictor(folder / "m")
    good = HeadCalibration(temperature=2.0, threshold=0.5, nll=(1.0, 0.9), answered=0.5)
    Calibration(error_rate=0.1, images=20, data="x", heads={"class": good}).save(folder / "m")
    assert Calibration.of_model(folder / "m").heads == {"class": good}
    with raises_saying(ValueError, "the calibration has no head 'fused'; choose one of class"):
        Predictor(folder / "m")([folder / "data/val/a/0.png"])
    assert math.isclose(Predictor(folder / "m", head="class").calibration.temperature("class"), 2.0)


def test_training_images_are_warned_of(folder):
    """Of which a run's about.json tells, or which are called so. Its validation images are no reason."""
    about = replace(ABOUT, data=str(folder / "data/val"))
    (folder / "about.json").write_text(json.dumps(about.to_dict()))
    shutil.copytree(folder / "data/val", folder / "data/train")
    options = {"error_rate": 0.4, "device": "cpu"}
    calibrate(folder / "m", folder / "data", **options)
    for place, part in (("data/val", None), ("data", "train")):
        with pytest.warns(
            UserWarning, match="and more than 0.4 of new images may get one label that is sure and wrong"
        ):
            calibrate(folder / "m", folder / place, split=part, **options)
    (folder / "about.json").write_text("[]")
    calibrate(folder / "m", folder / "data/val", **options)


@pytest.mark.parametrize("to", ["torch", "onnx"])
def test_an_export_takes_the_calibration_along(folder, to):
    """And a folder with one can be exported anew; what is exported can be calibrated itself."""
    pytest.importorskip({"torch": "torch", "onnx": "onnxruntime"}[to])
    from deit.export.write import export

    calibrate(folder / "m", folder / "data", error_rate=0.4, device="cpu")
    for _ in range(2):
        exported = export(folder / "m", to, folder / "out").folder
        assert (exported / "calibration.json").read_text() == (folder / "m/calibration.json").read_text()
    paths = sorted((folder / "data/val").glob("*/?.png"))
    expected = [answer.sure for answer in Predictor(folder / "m").stream(paths)]
    assert [answer.sure for answer in Predictor(exported).stream(paths)] == expected
    (exported / "calibration.json").unlink()
    again = calibrate(exported, folder / "data", error_rate=0.4, device="cpu")
    before = Calibration.of_model(folder / "m").heads["fused"]
    assert again.heads["fused"].temperature == pytest.approx(before.temperature, rel=1e-2)
