"""From files to labels."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.checks import raises_saying
from support.models import LABELS, build, small, trained_folder

from deit import weights
from deit.config import ConvNetConfig
from deit.export.convert import convert
from deit.image.processor import DeiTImageProcessor
from deit.model.convnet import ConvNet
from deit.model.heads import fuse_heads
from deit.model.load import load_model
from deit.model.network import (
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTForMaskedImageModeling,
    DeiTModel,
)
from deit.predict.predictor import Predictor
from deit.weights import hub


@pytest.mark.parametrize("head", ["fused", "class", "distillation", "softmax"])
def test_labels_and_scores(distilled, photos, head):
    """The processor, the model and the head by hand give the same."""
    found = Predictor(distilled, head=head)(photos, top_k=5)
    pixels = DeiTImageProcessor.from_pretrained(distilled)(photos, return_tensors="pt").pixel_values
    out = DeiTForImageClassificationWithTeacher.from_pretrained(distilled)(pixels)
    expected = fuse_heads(out.cls_logits, out.distillation_logits, head)
    for row, scores in zip(found, expected, strict=True):
        assert [entry["score"] for entry in row] == sorted((entry["score"] for entry in row), reverse=True)
        for entry in row:
            index = {name: i for i, name in LABELS.items()}[entry["label"]]
            assert entry["score"] == pytest.approx(scores[index].item(), abs=1e-6)
        assert len(row) == 5


def test_paths_bytes_and_pictures_agree(distilled, photos):
    predictor = Predictor(distilled)
    by_path = predictor(photos, top_k=1)
    assert predictor([path.read_bytes() for path in photos], top_k=1) == by_path
    assert predictor([photos[0], Image.open(photos[1])], top_k=1)[0] == by_path[0]
    assert predictor([], top_k=1) == []
    assert len(predictor(photos[:1], top_k=99)[0]) == 5


def test_a_model_with_one_head(tmp_path, photos):
    trained_folder(tmp_path, "classification")
    assert Predictor(tmp_path)(photos) == Predictor(tmp_path, head="class")(photos)
    with raises_saying(ValueError, "no head 'distillation'", "it has fused, class"):
        Predictor(tmp_path, head="distillation")(photos)


def test_a_folder_of_timm_predicts_the_same(distilled, photos, tmp_path):
    convert(distilled, "timm", tmp_path / "timm")
    for ours, theirs in zip(Predictor(distilled)(photos), Predictor(tmp_path / "timm")(photos), strict=True):
        assert [entry["label"] for entry in ours] == [entry["label"] for entry in theirs]
        assert [entry["score"] for entry in ours] == pytest.approx([entry["score"] for entry in theirs], abs=1e-6)


def test_unknown_preprocessing_is_refused(distilled):
    (distilled / "preprocessor_config.json").unlink()
    with raises_saying(FileNotFoundError, distilled, "holds no preprocessor_config.json", "save_pretrained(FOLDER)"):
        Predictor(distilled)
    ConvNet(ConvNetConfig(widths=(4,), depth=1)).save_pretrained(distilled / "convnet")
    with raises_saying(FileNotFoundError, distilled / "convnet", "save_pretrained(FOLDER)"):
        Predictor(distilled / "convnet")


@pytest.mark.parametrize("kind", ["backbone", "masked_image", "classification", "with_teacher"])
def test_the_class_is_told_from_the_files(tmp_path, kind):
    config = small()
    build(kind, config).save_pretrained(tmp_path)
    expected = {
        "backbone": DeiTModel,
        "masked_image": DeiTForMaskedImageModeling,
        "classification": DeiTForImageClassification,
        "with_teacher": DeiTForImageClassificationWithTeacher,
    }
    assert type(load_model(tmp_path)) is expected[kind]


def test_the_class_is_told_from_a_lone_weight_file(tmp_path):
    model = build("with_teacher", small(hidden_size=64, num_attention_heads=1))
    torch.save({"model": weights.from_ours(model._tensors(), "original")}, tmp_path / "deit.pth")
    found = load_model(tmp_path / "deit.pth")
    assert type(found) is DeiTForImageClassificationWithTeacher
    assert torch.equal(found.deit.position, model.deit.position)
    wider = load_model(tmp_path / "deit.pth", config=model.config, image_size=24, local_files_only=True)
    assert wider.config.image_size == 24


def test_the_built_in_convnet_is_loaded(tmp_path):
    ConvNet(ConvNetConfig(widths=(4,), depth=1)).save_pretrained(tmp_path)
    assert isinstance(load_model(tmp_path), ConvNet)
    with raises_saying(ValueError, "model_type is 'deit_convnet'"):
        hub.read_checkpoint(tmp_path)


def test_the_guide_runs(distilled, photos, tmp_path, monkeypatch, capsys):
    """The Python of docs/predict.md and of docs/clusters.md, as it stands."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/taught").mkdir(parents=True)
    distilled.rename(tmp_path / "runs/taught/model")
    photos[1].rename("photo.jpg")
    photos[0].rename("other.png")
    docs = Path(__file__).parents[2] / "docs"
    (tmp_path / "archive").mkdir()
    shutil.copy("photo.jpg", "archive")
    parts, pipelines = ((docs / page).read_text() for page in ("clusters.md", "predict.md"))
    [parts], [pipelines] = (re.findall(r"```python\n(.*?)```", page, re.DOTALL) for page in (parts, pipelines))
    exec(parts, {})
    [part] = (tmp_path / "labels").glob("*.jsonl")
    assert len(part.read_text().splitlines()) == 1
    capsys.readouterr()
    names = {}
    exec(pipelines, names)
    assert set(capsys.readouterr().out.split()) <= set(LABELS.values())
    assert np.array(names["features"]).shape == (1, 18, 24)


def test_lack_of_memory_changes_no_answer(distilled, photos, monkeypatch):
    """Of two images, one at once fits."""
    expected = Predictor(distilled)(photos)
    predictor = Predictor(distilled)
    honest = predictor.model.forward

    def limited(pixels):
        if len(pixels) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return honest(pixels)

    monkeypatch.setattr(predictor.model, "forward", limited)
    with pytest.warns(UserWarning, match="out of memory: 1 images are now computed at once instead of 2"):
        found = predictor(photos)
    for ours, theirs in zip(found, expected, strict=True):
        assert [each["label"] for each in ours] == [each["label"] for each in theirs]
        assert [each["score"] for each in ours] == pytest.approx([each["score"] for each in theirs], abs=1e-6)
    assert predictor(photos) == found  # without a warning, because it is remembered
