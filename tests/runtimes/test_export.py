"""Exported folders: every format against the PyTorch model, int8 against its accuracy, and what is refused."""

import importlib.util
import json
import math
import re
import shutil
import sys
import threading
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from support.checks import raises_saying
from support.models import build, scramble, shrink, small
from support.runs import photos

from deit import files
from deit.cli import _parser, main
from deit.config import VARIANTS, ConvNetConfig, DeiTConfig
from deit.data.folders import write_digits
from deit.export import checking, engines, formats, write
from deit.export.checking import Examples
from deit.export.engines import ENGINES, Engine, load_engine
from deit.export.subject import Subject
from deit.export.web import Page
from deit.image.processor import DeiTImageProcessor
from deit.model.convnet import ConvNet
from deit.model.load import load_classifier, load_model
from deit.model.network import DeiTForImageClassificationWithTeacher

PAGE = Path(__file__).parents[2] / "docs" / "export.md"
NAMES = ("ant", "bee", "cat", "dog", "eel")
FLOAT = ("torch", "onnx", "openvino")
INT8 = ("onnx-int8", "openvino-int8")
KINDS = ("distilled", "plain", "deit3", "convnet")
OUTPUTS = {kind: ["logits", *(["cls_logits", "distillation_logits"] if kind == "distilled" else [])] for kind in KINDS}


def needs(to):
    for package in formats._PACKAGES[to]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{to} needs {package}, which is not installed")
    if to == "web":
        try:
            Page()
        except FileNotFoundError as error:
            pytest.skip(str(error))


def model_of(kind):
    labels = {"id2label": dict(enumerate(NAMES)), "num_labels": None}
    if kind == "convnet":
        model = scramble(
            ConvNet(ConvNetConfig(widths=(6, 8), depth=1, image_size=(16, 24), id2label=dict(enumerate(NAMES))))
        )
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


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        model = model_of(kind)
        model.save_pretrained(root / kind)
        DeiTImageProcessor.paper(model.config.image_hw).save_pretrained(root / kind)
    return root


@pytest.fixture(scope="module")
def exported(models, tmp_path_factory):
    """What `export` returns for a kind and a format; each is made once, and not to be changed."""
    root, done = tmp_path_factory.mktemp("exported"), {}

    def get(kind, to):
        needs(to)
        if (kind, to) not in done:
            done[kind, to] = write.export(models / kind, to, root / f"{kind}-{to}")
        return done[kind, to]

    return get


@pytest.fixture
def copied(exported, tmp_path):
    """The folder of an export, to be damaged."""
    return lambda kind, to: Path(shutil.copytree(exported(kind, to).folder, tmp_path / "copy"))


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


# -------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("to", FLOAT)
def test_every_format_answers_as_the_model(models, exported, to, kind):
    """Non-square images, every output, batches of sizes that the export never saw."""
    done, model = exported(kind, to), load_model(models / kind)
    engine = load_engine(done.folder, precision="float32")
    halved = done.description.get("weights") == "float16"
    for count in (1, 2, 7):
        pixels = pixels_for(model, count, seed=count)
        with torch.inference_mode():
            expected = model(pixels)
        found = engine(pixels.numpy())
        assert list(found) == OUTPUTS[kind]
        for name, values in found.items():
            assert values.dtype == np.float32
            if halved:
                torch.testing.assert_close(softmax(values), softmax(expected[name]), rtol=0, atol=2e-3)
            else:
                torch.testing.assert_close(torch.from_numpy(values), expected[name], rtol=1e-5, atol=1e-5)
    assert done.description["outputs"] == OUTPUTS[kind]
    assert done.description["heads"] == (
        ["fused", "class", "distillation", "softmax"] if kind == "distilled" else ["fused", "class"]
    )
    assert done.description["input"]["shape"] == [None, 3, *model.config.image_hw]
    assert done.description["agreement"]["labels"] == 1.0
    assert 0 <= done.description["agreement"]["difference"] <= formats.TOLERANCE


@pytest.mark.parametrize("to", FLOAT)
def test_the_folder_is_whole(models, tmp_path, to):
    needs(to)
    done = write.export(models / "convnet", to, tmp_path / "a" / "out")
    folder = tmp_path / "a" / "out"
    named = {"torch": {"model.pt2"}, "onnx": {"model.onnx"}, "openvino": {"model.xml", "model.bin"}}[to]
    assert {path.name for path in folder.iterdir()} == named | {
        "config.json",
        "preprocessor_config.json",
        "export.json",
    }
    assert [path.name for path in folder.parent.iterdir()] == ["out"]
    assert json.loads((folder / "export.json").read_text()) == done.description
    assert set(done.description["files"]) == named
    assert json.loads((folder / "config.json").read_text())["id2label"] == {str(i): n for i, n in enumerate(NAMES)}
    assert DeiTImageProcessor.from_pretrained(folder) == DeiTImageProcessor.from_pretrained(models / "convnet")
    (folder.parent / "ordinary").mkdir()
    assert folder.stat().st_mode == (folder.parent / "ordinary").stat().st_mode  # not for its owner alone
    assert set(done.description["versions"]) == {"deit", "torch", *formats._PACKAGES[to]}


def test_pictures_to_logits(models, exported):
    """The folder is all that is needed: its own preprocessing and engine give the model's answer."""
    folder = exported("plain", "onnx").folder
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 90, 3), dtype=np.uint8))
    pixels = DeiTImageProcessor.from_pretrained(folder)([picture], return_tensors="np").pixel_values
    expected = load_model(models / "plain")(torch.from_numpy(pixels)).logits
    torch.testing.assert_close(torch.from_numpy(load_engine(folder)(pixels)["logits"]), expected, rtol=0, atol=1e-5)


def test_openvino_keeps_attention_in_one_operation(models, exported):
    folder = exported("distilled", "openvino").folder
    import openvino

    kinds = [node.get_type_name() for node in openvino.Core().read_model(folder / "model.xml").get_ops()]
    assert kinds.count("ScaledDotProductAttention") == load_model(models / "distilled").config.num_hidden_layers


def test_openvino_weights_are_halved_only_where_that_agrees(models, tmp_path, monkeypatch):
    needs("openvino")
    monkeypatch.setattr(formats, "TOLERANCE", 1.0)
    loose = write.export(models / "convnet", "openvino", tmp_path / "loose")
    monkeypatch.setattr(formats, "TOLERANCE", 1e-6)
    strict = write.export(models / "convnet", "openvino", tmp_path / "strict")
    assert (loose.description["weights"], strict.description["weights"]) == ("float16", "float32")
    sizes = [(tmp_path / name / "model.bin").stat().st_size for name in ("loose", "strict")]
    assert sizes[0] < 0.7 * sizes[1]
    assert strict.description["agreement"]["difference"] < loose.description["agreement"]["difference"]


def test_openvino_says_what_its_own_precision_costs(exported):
    done = exported("plain", "openvino")
    native = done.description["native"]
    assert native["precision"] == load_engine(done.folder).inference_precision
    assert load_engine(done.folder, precision="float32").inference_precision == "f32"
    assert native["difference"] >= (0 if native["precision"] == "f32" else 1e-6)


@pytest.mark.parametrize("to", FLOAT)
def test_an_engine_serves_several_threads(models, exported, to):
    folder = exported("plain", to).folder
    engine, model = load_engine(folder, hint="throughput", precision="float32"), load_model(models / "plain")
    found = {}

    def work(seed):
        for _ in range(5):
            found[seed] = engine(pixels_for(model, 2, seed).numpy())["logits"]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(3):
        expected = softmax(model(pixels_for(model, 2, seed)).logits.detach())
        torch.testing.assert_close(softmax(found[seed]), expected, rtol=0, atol=2e-3)


def test_real_images_are_used_where_there_are_some(models, tmp_path):
    needs("torch")
    photos(tmp_path / "data", classes=("ant", "cat"), count=5, split="test")
    done = write.export(models / "convnet", "torch", tmp_path / "out", calibrate=tmp_path / "data")
    assert done.description["agreement"]["images"] == 5
    assert done.description["agreement"]["source"] == f"{tmp_path / 'data'}, every other image of test"
    photos(tmp_path / "data", classes=("ant", "cat"), count=2)
    done = write.export(models / "convnet", "torch", tmp_path / "out", calibrate=tmp_path / "data")
    assert done.description["agreement"]["images"] == 10
    assert done.description["agreement"]["source"] == f"{tmp_path / 'data'}, test"


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("to", FLOAT)
@pytest.mark.parametrize("change", ["shift", "label", "nan", "shape"])
def test_an_answer_that_differs_is_refused_and_nothing_is_left(models, tmp_path, monkeypatch, to, change):
    needs(to)

    def tamper(answers):
        logits = answers["logits"].copy()
        if change == "shift":
            logits[:, 0] += 0.01
        elif change == "label":
            logits = np.roll(logits, 1, axis=-1)
        elif change == "nan":
            logits[0, 0] = np.nan
        else:
            logits = logits[:, 1:]
        return answers | {"logits": logits}

    tampering(monkeypatch, tamper)
    with raises_saying(
        ValueError,
        *(
            ["(1, 4), expected (1, 5)"]
            if change == "shape"
            else [f"{to} was not kept", "random pictures", "differ by at most 0.0001"]
        ),
    ):
        write.export(models / "convnet", to, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_each_output_is_held_to_the_model(models, tmp_path, monkeypatch):
    tampering(monkeypatch, lambda answers: answers | {"distillation_logits": answers["distillation_logits"][:, ::-1]})
    with raises_saying(ValueError, "torch was not kept"):
        write.export(models / "distilled", "torch", tmp_path / "out")


def test_a_former_export_is_replaced_only_by_one_that_passed(models, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    write.export(models / "convnet", "torch", out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with monkeypatch.context() as patched:
        tampering(patched, lambda answers: {name: -values for name, values in answers.items()})
        with raises_saying(ValueError, "was not kept"):
            write.export(models / "convnet", "torch", out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    write.export(models / "deit3", "torch", out)
    assert load_engine(out).shape == (3, 32, 48)
    assert list(tmp_path.iterdir()) == [out]


def test_other_files_are_never_replaced(models, tmp_path):
    out = write.export(models / "plain", "torch", tmp_path / "out").folder
    (out / "notes.txt").write_text("mine")
    with raises_saying(FileExistsError, out, "holds notes.txt", "give --out a new folder"):
        write.export(models / "plain", "torch", out)
    with raises_saying(FileExistsError, "model.safetensors"):
        write.export(models / "plain", "torch", models / "plain")
    (tmp_path / "file").write_text("")
    with raises_saying(FileExistsError, tmp_path / "file", "is a file"):
        write.export(models / "plain", "torch", tmp_path / "file")
    with raises_saying(FileExistsError, tmp_path / "file", "is a file"):
        write.export(models / "plain", "torch", tmp_path / "file" / "out")


@pytest.mark.parametrize("kind", ["backbone", "masked_image", "headless"])
def test_only_classifiers_are_exported(tmp_path, kind):
    if kind == "headless":
        build("classification", small(num_labels=0)).save_pretrained(tmp_path / "m")
    else:
        build(kind, small()).save_pretrained(tmp_path / "m")
    DeiTImageProcessor.paper(16).save_pretrained(tmp_path / "m")
    with raises_saying(ValueError, tmp_path / "m", "expected a classifier"):
        write.export(tmp_path / "m", "torch", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_int8_needs_images(models, tmp_path):
    for to in INT8:
        with raises_saying(ValueError, to, "needs images", "--calibrate DATA"):
            write.export(models / "plain", to, tmp_path / "out")
    with raises_saying(ValueError, "no format 'gif'", "choose torch, onnx"):
        write.export(models / "plain", "gif", tmp_path / "out")


def test_preprocessing_that_does_not_fit_is_refused(tmp_path):
    build("classification", small()).save_pretrained(tmp_path / "m")
    with raises_saying(FileNotFoundError, "holds no preprocessor_config.json"):
        write.export(tmp_path / "m", "torch", tmp_path / "out")
    DeiTImageProcessor.paper(24).save_pretrained(tmp_path / "m")
    with raises_saying(ValueError, "makes pixels of (3, 24, 24), the model takes (3, 16, 16)"):
        write.export(tmp_path / "m", "torch", tmp_path / "out")


@pytest.mark.parametrize("to", ["onnx", "openvino", *INT8])
def test_a_missing_package_is_named(models, tmp_path, monkeypatch, to):
    package = formats._PACKAGES[to][-1]
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    for name in formats._PACKAGES[to][:-1]:
        monkeypatch.setitem(sys.modules, name, sys.modules.get(name) or type(sys)(name))
    with raises_saying(ImportError, package, 'pip install "deit[export]"'):
        write.export(models / "plain", to, tmp_path / "out", calibrate=tmp_path)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------------- engines


@pytest.mark.parametrize("to", FLOAT)
def test_damaged_files_are_refused(copied, to):
    folder = copied("plain", to)
    description = json.loads((folder / "export.json").read_text())
    for name in description["files"]:
        whole = (folder / name).read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 1
        for damaged in (bytes(flipped), whole[:-10], b""):
            (folder / name).write_bytes(damaged)
            with raises_saying(files.CheckpointError, folder / name, "not the file that was exported"):
                load_engine(folder)
        (folder / name).unlink()
        with raises_saying(files.CheckpointError, folder / name):
            load_engine(folder)
        (folder / name).write_bytes(whole)
    name = next(iter(description["files"] if to != "openvino" else ["model.xml"]))
    (folder / name).write_bytes(b"no model")
    description["files"][name] = engines.sha256(folder / name)  # a file of another version, as it were
    files.write_json(folder / "export.json", description)
    with raises_saying(files.CheckpointError, folder / name, f"can't be read by {ENGINES[to].name}", "export it again"):
        load_engine(folder)


def test_damaged_records_are_refused(models, copied):
    with raises_saying(FileNotFoundError, models / "plain", "holds no export.json", "deit export"):
        load_engine(models / "plain")
    folder = copied("plain", "torch")
    description = json.loads((folder / "export.json").read_text())
    for broken in (
        description | {"format": "gif"},
        description | {"input": None},
        description | {"files": []},
        description | {"input": {"shape": [1]}},
    ):
        files.write_json(folder / "export.json", broken)
        with raises_saying(files.CheckpointError, folder / "export.json"):
            load_engine(folder)
    (folder / "export.json").write_text("{")
    with raises_saying(files.CheckpointError, folder / "export.json", "not valid JSON"):
        load_engine(folder)


@pytest.mark.parametrize("to", FLOAT)
def test_other_pixels_are_refused(exported, to):
    engine = load_engine(exported("plain", to).folder)
    for shape in [(3, 16, 24), (1, 3, 24, 16), (1, 1, 16, 24), (0, 3, 16, 24)]:
        with raises_saying(ValueError, "(images, 3, 16, 24) of float32", shape):
            engine(np.zeros(shape, np.float32))
    with raises_saying(ValueError, "float64"):
        engine(np.zeros((1, 3, 16, 24)))


# ---------------------------------------------------------------------------------------------------------------- int8


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The digits on disk, and a small distilled model and a ConvNet trained on them for seconds."""
    root = tmp_path_factory.mktemp("digits")
    write_digits(root / "data", side=16)
    processor = DeiTImageProcessor.paper(16, crop_ratio=1.0)
    paths = sorted((root / "data" / "train").rglob("*.png"))
    pixels = processor(paths, return_tensors="pt").pixel_values
    labels = torch.tensor([int(path.parent.name) for path in paths])
    config = DeiTConfig(
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=96,
        image_size=16,
        patch_size=4,
        encoder_stride=4,
        layer_norm_eps=1e-6,
        num_labels=10,
        initializer_range=0.06,
    )
    config = config.replace(id2label={i: str(i) for i in range(10)})
    torch.manual_seed(0)
    nets = {
        "distilled": DeiTForImageClassificationWithTeacher(config),
        "convnet": ConvNet(ConvNetConfig(widths=(16, 32), depth=1, image_size=16, id2label=config.id2label)),
    }
    for name, net in nets.items():
        net.train()
        optimizer = torch.optim.AdamW(net.parameters(), lr=2e-2 if name == "convnet" else 3e-3)
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=12)
        for _ in range(12):
            for rows in torch.randperm(len(labels)).split(64):
                out = net(pixels[rows])
                loss = F.cross_entropy(out.logits, labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            decay.step()
        net.eval().save_pretrained(root / name)
        processor.save_pretrained(root / name)
    return root


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
    monkeypatch.setattr(formats, "LOSS", -1.0)
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
    monkeypatch.setattr(formats, "LOSS", 0.05)
    quantise = {"onnx-int8": "_quantise_onnx", "openvino-int8": "_quantise_openvino"}[to]
    real = getattr(formats, quantise)

    def counted(classifier, folder, calibration, kept):
        attempts.append(list(kept))
        real(classifier, folder, calibration, kept)

    monkeypatch.setattr(formats, quantise, counted)
    tampering(monkeypatch, lambda answers: answers if attempts[-1] else {k: -v for k, v in answers.items()})
    done = write.export(digits / "convnet", to, tmp_path / "out", calibrate=digits / "data")
    assert attempts == [[], [name]]
    assert done.description["accuracy"]["float_layers"] == [name]
    model = load_model(digits / "convnet")
    whole = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d))
    assert weights_in_int8(done.folder, to) == whole - model.get_submodule(name).weight.numel()


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


# ------------------------------------------------------------------------------------------------------------- command


def test_the_command(models, tmp_path, capsys):
    assert main(["export", str(models / "plain"), "--to", "torch", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{tmp_path / 'out'}: torch, 16 of 16 images labelled as by the PyTorch model")
    assert main(["export", str(models / "plain"), "--to", "onnx-int8", "--out", str(tmp_path / "int8")]) == 1
    assert "deit export: onnx-int8 needs images" in capsys.readouterr().err
    [verbs] = [action for action in _parser()._actions if action.dest == "verb"]
    [to] = [action for action in verbs.choices["export"]._actions if action.dest == "to"]
    assert set(to.choices) == set(get_args(formats.Format)) == set(ENGINES)


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
    assert found == documented
