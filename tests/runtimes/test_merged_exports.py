"""Exports of models that merge tokens: their values, and the number of tokens that the accuracy allows."""

import json

import numpy as np
import pytest
import torch
from support.checks import raises_saying
from support.exports import FLOAT, calibration, needs, pixels_for, softmax, tampering
from support.models import build, saved, small, trained_folder

from deit.cli import main
from deit.data.folders import write_digits
from deit.export import checking, write
from deit.export.engines import load_engine
from deit.image.processor import DeiTImageProcessor
from deit.model.load import load_model
from deit.predict.predictor import Predictor


@pytest.fixture(scope="module")
def merging(tmp_path_factory):
    """A model with an odd number of patches, 35, of which each block merges 6."""
    return trained_folder(
        tmp_path_factory.mktemp("merging") / "m", image_size=(20, 28), merge=6, num_hidden_layers=4, seed=1
    )


def correct(folder, root, **options):
    """The number of correct labels on the test digits."""
    paths = sorted((root / "data" / "test").rglob("*.png"))
    pixels = DeiTImageProcessor.paper(16, crop_ratio=1.0)(paths, return_tensors="pt").pixel_values
    labels = torch.tensor([int(path.parent.name) for path in paths])
    with torch.inference_mode():
        return int((load_model(folder, **options)(pixels).logits.argmax(-1) == labels).sum())


# -------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("to", FLOAT)
def test_every_format_merges_half_of_the_patches(tmp_path, to):
    """So that no source stays."""
    needs(to)
    folder = trained_folder(tmp_path / "m", "plain", image_size=16, merge=100)
    engine = load_engine(write.export(folder, to, tmp_path / "out").folder, precision="float32")
    pixels = pixels_for(load_model(folder), 3)
    with torch.inference_mode():
        expected = softmax(load_model(folder)(pixels).logits)
    torch.testing.assert_close(softmax(engine(pixels.numpy())["logits"]), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("to", FLOAT)
def test_every_format_merges_as_the_model(merging, tmp_path, to):
    needs(to)
    done, model = write.export(merging, to, tmp_path / "out"), load_model(merging)
    assert done.description["merge"] == 6
    assert "merge=6" in str(done)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["merge"] == 6
    engine = load_engine(done.folder, precision="float32")
    halved = done.description.get("weights") == "float16"
    plain = load_model(merging, merge=0)
    for count in (1, 2, 7):
        pixels = pixels_for(model, count, seed=count)
        with torch.inference_mode():
            expected, unmerged = model(pixels), plain(pixels)
        found = engine(pixels.numpy())
        assert list(found) == ["logits", "cls_logits", "distillation_logits"]
        for name, values in found.items():
            if halved:
                torch.testing.assert_close(softmax(values), softmax(expected[name]), rtol=0, atol=2e-3)
            else:
                torch.testing.assert_close(torch.from_numpy(values), expected[name], rtol=1e-5, atol=1e-5)
        assert (expected.logits - unmerged.logits).abs().max() > 1e-2


def test_the_page_merges(merging, tmp_path):
    needs("web")
    done = write.export(merging, "web", tmp_path / "out")
    assert done.description["merge"] == 6
    assert done.description["agreement"]["labels"] == 1.0


def test_openvino_keeps_attention_in_one_operation(merging, tmp_path):
    needs("openvino")
    folder = write.export(merging, "openvino", tmp_path / "out").folder
    import openvino

    kinds = [node.get_type_name() for node in openvino.Core().read_model(folder / "model.xml").get_ops()]
    assert kinds.count("ScaledDotProductAttention") == 4


def test_equal_matches_go_by_their_numbers_in_every_format(tmp_path):
    """Keys that are all zero, so that every pair is equally alike, and tokens that are not."""
    model = build("classification", small(merge=3, image_size=(12, 20)))
    with torch.no_grad():
        for block in model.deit.blocks:
            block.attention.qkv.weight[24:48], block.attention.qkv.bias[24:48] = 0.0, 0.0
    saved(model, tmp_path / "m")
    pixels = pixels_for(model, 3)
    for to in FLOAT:
        needs(to)
        engine = load_engine(write.export(tmp_path / "m", to, tmp_path / to).folder, precision="float32")
        found = softmax(engine(pixels.numpy())["logits"])
        torch.testing.assert_close(found, softmax(model(pixels).logits.detach()), rtol=0, atol=2e-3)


def test_a_folder_with_merging_is_predicted_by_every_engine(merging):
    needs("openvino")
    model = load_model(merging)
    picture = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    pixels = DeiTImageProcessor.from_pretrained(merging)([picture], return_tensors="pt").pixel_values
    expected = model(pixels).logits.softmax(-1)[0].tolist()
    for engine in ("torch", "onnx", "openvino"):
        answer = Predictor(merging, engine=engine)([picture], top_k=5)[0]
        found = {one["label"]: one["score"] for one in answer}
        for number, label in model.config.id2label.items():
            assert found[label] == pytest.approx(expected[number], abs=0.02)  # bfloat16, where it is quicker


# ------------------------------------------------------------------------------------------------------------- the gate


def test_auto_takes_the_largest_number_that_keeps_the_accuracy(digits, tmp_path):
    done = write.export(digits / "distilled", "torch", tmp_path / "out", calibrate=digits / "data", merge="auto")
    right = {count: correct(digits / "distilled", digits, merge=count) for count in range(6)}
    allowed = [count for count, found in right.items() if right[0] - found <= 0.005 * 360]
    assert done.description["merge"] == max(allowed) > 0
    assert max(allowed) < 5  # so that the gate has decided
    found = done.description["accuracy"]
    assert (found["images"], found["source"]) == (360, f"{digits / 'data'}, test")
    assert found["float"]["correct"] == right[0]
    assert found["merged"]["correct"] == right[max(allowed)]
    assert found["merged"]["low"] < found["merged"]["value"] < found["merged"]["high"]
    assert f"accuracy {right[max(allowed)] / 360:.4f} after {right[0] / 360:.4f} on 360 images (95 % int" in str(done)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["merge"] == max(allowed)


def test_where_no_number_keeps_the_accuracy_nothing_is_merged(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(checking, "LOSS", -1.0)
    done = write.export(digits / "distilled", "torch", tmp_path / "out", calibrate=digits / "data", merge="auto")
    assert "merge" not in done.description
    assert done.description["accuracy"]["merged"] == done.description["accuracy"]["float"]
    assert "merge" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_a_number_that_costs_too_much_is_refused_on_images_and_taken_without(digits, tmp_path):
    with raises_saying(
        ValueError, "merging was not kept: on 360 images", "with merge=5, by more than 0.5%", "take --merge auto"
    ):
        write.export(digits / "distilled", "torch", tmp_path / "out", calibrate=digits / "data", merge=5)
    assert list(tmp_path.iterdir()) == []
    done = write.export(digits / "distilled", "torch", tmp_path / "out", merge=5)
    assert done.description["merge"] == 5
    assert "accuracy" not in done.description


def test_int8_and_merging_together_stay_within_the_gate(digits, tmp_path):
    needs("openvino-int8")
    done = write.export(
        digits / "distilled", "openvino-int8", tmp_path / "out", calibrate=digits / "data", merge="auto"
    )
    found = done.description["accuracy"]
    plain = correct(digits / "distilled", digits)
    assert found["float"]["correct"] == plain
    assert found["merged"]["correct"] == correct(digits / "distilled", digits, merge=done.description["merge"])
    assert found["int8"]["correct"] >= plain - 0.005 * 360
    engine = load_engine(done.folder, precision="float32")
    paths = sorted((digits / "data" / "test").rglob("*.png"))
    pixels = DeiTImageProcessor.paper(16, crop_ratio=1.0)(paths, return_tensors="np").pixel_values
    labels = np.array([int(path.parent.name) for path in paths])
    assert int((engine(pixels)["logits"].argmax(-1) == labels).sum()) == found["int8"]["correct"]


def test_int8_that_fails_with_much_merging_is_tried_with_less(digits, tmp_path, monkeypatch):
    needs("openvino-int8")
    real, tried = write.write_int8, []

    def stumbling(subject, *rest):
        tried.append(subject.merge)
        if subject.merge > 1:
            raise checking.TooInaccurate("too inaccurate")
        return real(subject, *rest)

    monkeypatch.setattr(write, "write_int8", stumbling)
    done = write.export(
        digits / "distilled", "openvino-int8", tmp_path / "out", calibrate=digits / "data", merge="auto"
    )
    assert tried[0] > 1 >= tried[-1]
    assert tried == sorted(tried, reverse=True)
    assert done.description.get("merge", 0) == tried[-1]


def test_calibration_goes_along_only_where_the_answers_stay(tmp_path):
    folder = trained_folder(tmp_path / "m", "plain")
    calibration(0.5).save(folder)
    for merge, kept in ((None, True), (0, True), (2, False)):
        write.export(folder, "torch", tmp_path / "out", merge=merge)
        assert (tmp_path / "out" / "calibration.json").exists() == kept


# -------------------------------------------------------------------------------------------- choices within rounding


def close_call(model):
    """Pixels between two images at which the model changes from one match to another."""
    first, last = (pixels_for(model, 1, seed) for seed in (0, 1))

    def pixels(share):
        return first + share * (last - first)

    def matched(share):
        return model(pixels(share), output_hidden_states=True).token_of_patch[1]  # the last block's change no answer

    low, high = 0.0, 1.0
    assert not torch.equal(matched(low), matched(high))
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if torch.equal(matched(middle), matched(0.0)) else (low, middle)
    return pixels(low).numpy()


def test_a_choice_within_rounding_may_be_either_and_is_counted(tmp_path):
    """The engine answers as the model does to pixels that are rounded otherwise."""
    folder = saved(build("classification", small(merge=1, num_hidden_layers=2)), tmp_path / "m")
    subject = write.Subject(write.load_classifier(folder))
    pixels = close_call(subject.model)
    checked = checking.Checked(subject, None)
    checked.batches, checked.images = [pixels], 1
    checked.expected = [checking._scores(subject(pixels), "softmax")]
    answers = {}
    for seed in range(40):
        noise = np.random.default_rng(seed).uniform(-1e-6, 1e-6, pixels.shape).astype(np.float32)
        logits = subject(pixels * (1 + noise))["logits"]
        answers.setdefault(round(float(logits[0, 0]), 3), logits)
    assert len(answers) == 2  # the two choices
    found = [checked.agreement(lambda _, logits=logits: {"logits": logits}, 1e-4) for logits in answers.values()]
    assert all(one.labels == 1.0 and one.difference <= 1e-4 for one in found)
    assert sorted(one.undecided for one in found) == [0, 1]
    neither = checked.agreement(lambda _: {"logits": sum(answers.values()) / 2}, 1e-4)
    assert neither.difference > 1e-4
    assert neither.undecided == 0


def test_a_wrong_answer_is_no_rounding(merging, tmp_path, monkeypatch):
    needs("torch")

    def tamper(answers):
        logits = answers["logits"].copy()
        logits[:, 0] += 0.01
        return answers | {"logits": logits}

    tampering(monkeypatch, tamper)
    with raises_saying(ValueError, "torch was not kept"):
        write.export(merging, "torch", tmp_path / "out")


# ------------------------------------------------------------------------------------------------------------ refusals


def test_refusals(models, tmp_path, capsys):
    with raises_saying(ValueError, "--merge auto needs images", "--calibrate DATA"):
        write.export(models / "plain", "torch", tmp_path / "out", merge="auto")
    for wrong in (-1, 1.5, True, "much"):
        with raises_saying(ValueError, f"at least 0, or auto, found {wrong!r}"):
            write.export(models / "plain", "torch", tmp_path / "out", merge=wrong)
    with raises_saying(ValueError, "has no tokens to merge", "leave --merge out"):
        write.export(models / "convnet", "torch", tmp_path / "out", merge=2)
    regression = trained_folder(tmp_path / "m", "plain", problem_type="regression")
    write_digits(tmp_path / "data", side=16)
    with raises_saying(ValueError, "gives a regression, and merging needs one class"):
        write.export(regression, "torch", tmp_path / "out", calibrate=tmp_path / "data", merge=2)
    with pytest.raises(SystemExit):
        main(["export", str(models / "plain"), "--to", "torch", "--out", str(tmp_path / "out"), "--merge", "some"])
    assert "at least 0, or auto, found 'some'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command(models, tmp_path, capsys):
    main(["export", str(models / "plain"), "--to", "torch", "--out", str(tmp_path / "out"), "--merge", "3"])
    assert "torch, 16 of 16 images labelled" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "export.json").read_text())["merge"] == 3
