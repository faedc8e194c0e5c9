"""int8: its accuracy, the layers that it hurts, and the images that it needs."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from support.checks import raises_saying
from support.exports import INT8, OUTPUTS, needs, tampering
from support.models import saved
from support.runs import photos

from deit.config import TimmConfig
from deit.export import checking, formats, write
from deit.export.checking import Examples
from deit.export.engines import load_engine
from deit.export.subject import Subject
from deit.image.processor import DeiTImageProcessor
from deit.model.load import load_classifier, load_model
from deit.model.timm_classifier import TimmClassifier

PAGE = Path(__file__).parents[2] / "docs" / "export.md"


def accuracy_by_hand(answer, root):
    paths = sorted((root / "data" / "test").rglob("*.png"))
    pixels = DeiTImageProcessor.paper(16, crop_ratio=1.0)(paths, return_tensors="np").pixel_values
    labels = np.array([int(path.parent.name) for path in paths])
    return float((answer(pixels).argmax(-1) == labels).mean())


def weights_in_int8(folder, to):
    """Numbers of the weights that the file holds in 8 bits."""
    if to == "onnx-int8":
        import onnx

        return sum(
            math.prod(tensor.dims)
            for tensor in onnx.load(folder / "model.onnx").graph.initializer
            if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1
        )
    import openvino

    model = openvino.Core().read_model(folder / "model.xml")
    return sum(
        math.prod(node.shape)
        for node in model.get_ops()
        if node.get_type_name() == "Constant"
        and node.get_element_type().get_type_name() in ("i8", "u8")
        and len(node.shape) > 1
    )


@pytest.mark.parametrize(
    ("to", "kind"),
    [
        ("onnx-int8", "convnet"),
        ("openvino-int8", "convnet"),
        ("openvino-int8", "distilled"),
        pytest.param("onnx-int8", "distilled", marks=pytest.mark.slow),
    ],
)
def test_int8_keeps_the_accuracy_and_reports_it(digits, tmp_path, to, kind):
    needs(to)
    done = write.export(digits / kind, to, tmp_path / "out", calibrate=digits / "data")
    model, found = load_model(digits / kind), done.description["accuracy"]
    with torch.inference_mode():
        before = accuracy_by_hand(lambda pixels: model(torch.from_numpy(pixels)).logits.numpy(), digits)
    engine = load_engine(done.folder, precision="float32")
    after = accuracy_by_hand(lambda pixels: engine(pixels)["logits"], digits)
    assert before > 0.9
    assert found["images"] == 360
    assert found["calibrated"] == 300
    assert found["float"]["value"] == pytest.approx(before)
    assert found["int8"]["value"] == pytest.approx(after)
    assert after >= before - 0.005
    layers = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)]
    kept = [model.get_submodule(name).weight for name in found["float_layers"]]
    assert weights_in_int8(done.folder, to) == sum(w.numel() for w in layers) - sum(w.numel() for w in kept)
    assert list(engine(np.zeros((3, 3, 16, 16), np.float32))) == OUTPUTS[kind]
    assert f"accuracy {after:.4f} after {before:.4f} on 360 images" in str(done)


@pytest.mark.parametrize("to", INT8)
def test_int8_that_costs_too_much_is_refused_with_the_layers_to_blame(digits, tmp_path, monkeypatch, to):
    needs(to)
    monkeypatch.setattr(checking, "LOSS", -1.0)
    monkeypatch.setattr(checking, "_CALIBRATED", 20)
    monkeypatch.setattr(formats, "_SHARES", (0.0, 0.5))
    monkeypatch.setattr(formats, "by_sensitivity", lambda *_: ["features.4", "classifier"])
    with raises_saying(
        ValueError,
        f"{to} was not kept",
        "on 360 images",
        "even with 1 of 2 layers in float",
        "are features.4, classifier",
        f"take {to.removesuffix('-int8')}",
    ):
        write.export(digits / "convnet", to, tmp_path / "out", calibrate=digits / "data")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", INT8)
def test_layers_that_8_bits_hurt_stay_in_float(digits, tmp_path, monkeypatch, to):
    """An engine that stumbles over one layer in 8 bits: the next attempt has it in float, and says so."""
    needs(to)
    name = "features.4"
    attempts = []
    monkeypatch.setattr(checking, "_CALIBRATED", 20)
    monkeypatch.setattr(formats, "by_sensitivity", lambda *_: [name, *(f"other{i}" for i in range(7))])
    monkeypatch.setattr(formats, "_SHARES", (0.0, 1 / 8))
    monkeypatch.setattr(checking, "LOSS", 0.05)
    quantise = {"onnx-int8": "_quantise_onnx", "openvino-int8": "_quantise_openvino"}[to]
    real = getattr(formats, quantise)

    def counted(classifier, folder, calibration, kept):
        attempts.append(list(kept))
        return real(classifier, folder, calibration, kept)

    monkeypatch.setattr(formats, quantise, counted)
    tampering(monkeypatch, lambda answers: answers if attempts[-1] else {k: -v for k, v in answers.items()})
    done = write.export(digits / "convnet", to, tmp_path / "out", calibrate=digits / "data")
    assert attempts == [[], [name]]
    assert done.description["accuracy"]["float_layers"] == [name]
    model = load_model(digits / "convnet")
    whole = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d))
    assert weights_in_int8(done.folder, to) == whole - model.get_submodule(name).weight.numel()


@pytest.mark.parametrize("to", INT8)
def test_depthwise_convolutions_are_in_8_bits_and_what_is_not_is_named(tmp_path, monkeypatch, to):
    """The convnets of `deit fit` have them. OpenVINO keeps their weights in five dimensions, and in ONNX, NNCF leaves
    squeeze-and-excitation in float."""
    needs(to)
    pytest.importorskip("timm")
    torch.manual_seed(0)
    model = TimmClassifier(
        TimmConfig(architecture="test_efficientnet", image_size=32, id2label={0: "bee", 1: "eel"})
    ).eval()
    folder = saved(model, tmp_path / "m", DeiTImageProcessor.paper(32, crop_ratio=1.0))
    data = photos(tmp_path / "data", classes=("bee", "eel"), count=4, split="all")
    monkeypatch.setattr(checking, "LOSS", 1.0)
    done = write.export(folder, to, tmp_path / "out", calibrate=data / "all")
    found = done.description["accuracy"]
    layers = {n: each for n, each in model.named_modules() if isinstance(each, torch.nn.Linear | torch.nn.Conv2d)}
    in_8_bits = {name: layer for name, layer in layers.items() if name not in found["float_layers"]}
    assert all(".se." in name for name in found["float_layers"])
    assert any(getattr(layer, "groups", 1) > 1 for layer in in_8_bits.values())
    held, whole = (sum(layer.weight.numel() for layer in each.values()) for each in (in_8_bits, layers))
    assert weights_in_int8(done.folder, to) == held
    assert found["int8_weights"] == pytest.approx(held / whole)


def test_layers_are_ranked_by_what_8_bits_do_to_the_logits(digits):
    classifier = Subject(load_classifier(digits / "distilled"))
    examples = Examples(digits / "data", classifier)
    calibration = examples.pixels(checking._spread(examples.calibration, 8))
    model = classifier.model
    layers = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert sorted(formats.by_sensitivity(classifier.logits, classifier.layers(), calibration)) == sorted(layers)
    with torch.no_grad():  # one input of the layer outweighs all others, and meets weights of zero
        block = model.deit.blocks[1]
        block.norm2.weight[0], block.norm2.bias[0], block.mlp.fc1.weight[:, 0] = 0.0, 1e4, 0.0
    assert formats.by_sensitivity(classifier.logits, classifier.layers(), calibration)[0] == "deit.blocks.1.mlp.fc1"
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if "blocks.1" not in name)


def test_examples_without_splits_are_divided(models, tmp_path):
    classifier = Subject(load_classifier(models / "plain"))
    photos(tmp_path, classes=("bee", "eel"), count=4, split="all")
    examples = Examples(tmp_path / "all", classifier)
    assert [path.name for path in examples.judged.files] == ["1.png", "3.png"] * 2
    assert [path.name for path in examples.calibration.files] == ["0.png", "2.png"] * 2
    assert examples.judged.labels == (1, 1, 4, 4)
    photos(tmp_path / "half", classes=("bee", "eel"), count=4)
    halves = Examples(tmp_path / "half", classifier)
    assert (len(halves.judged), len(halves.calibration)) == (4, 4)
    assert halves.source == f"{tmp_path / 'half'}, every other image of train"
    (tmp_path / "list.csv").write_text(f"path,label\n{tmp_path}/all/bee/0.png,bee\n")
    with raises_saying(ValueError, "single image"):
        Examples(tmp_path / "list.csv", classifier)
    with raises_saying(ValueError, "no class 'yak'"):
        Examples(photos(tmp_path / "other", classes=("yak",), split="test"), classifier)


def keys_of(value, path=""):
    if isinstance(value, dict) and path not in {"files", "versions"}:
        for key, entry in value.items():
            yield from keys_of(entry, f"{path}.{key}" if path else key)
    else:
        yield path


def test_the_page_has_every_key(digits, tmp_path):
    needs("openvino-int8")
    needs("web")
    documented = set(re.findall(r"^\| `([a-z0-9_.]+)` \|", PAGE.read_text().split("## export.json")[1], re.MULTILINE))
    found = set()
    for to in ("openvino", "openvino-int8", "web"):
        done = write.export(digits / "convnet", to, tmp_path / to, calibrate=digits / "data")
        found |= set(keys_of(done.description))
    done = write.export(digits / "distilled", "torch", tmp_path / "m", calibrate=digits / "data", merge="auto")
    assert found | set(keys_of(done.description)) == documented
