"""Exported folders: every format against the PyTorch model, and what is refused."""

import json
import shutil
import sys
import threading
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from support.checks import raises_saying
from support.exports import FLOAT, INT8, KINDS, OUTPUTS, needs, pixels_for, softmax, tampering
from support.models import NAMES, build, saved, small, trained_folder
from support.runs import photos

from deit import files
from deit.cli import main
from deit.cli.arguments import parser
from deit.export import engines, formats, write
from deit.export.engines import ENGINES, load_engine
from deit.image.processor import DeiTImageProcessor
from deit.model.load import load_model
from deit.predict.predictor import Predictor


@pytest.fixture
def copied(exported, tmp_path):
    """The folder of an export, to be damaged."""
    return lambda kind, to: Path(shutil.copytree(exported(kind, to).folder, tmp_path / "copy"))


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
    model = build("classification", small(num_labels=0)) if kind == "headless" else build(kind, small())
    saved(model, tmp_path / "m")
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


# ------------------------------------------------------------------------------------------------------------- command


def test_the_command(models, tmp_path, capsys):
    assert main(["export", str(models / "plain"), "--to", "torch", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{tmp_path / 'out'}: torch, 16 of 16 images labelled as by the PyTorch model")
    assert main(["export", str(models / "plain"), "--to", "onnx-int8", "--out", str(tmp_path / "int8")]) == 1
    assert "deit export: onnx-int8 needs images" in capsys.readouterr().err
    [verbs] = [action for action in parser()._actions if action.dest == "verb"]
    [to] = [action for action in verbs.choices["export"]._actions if action.dest == "to"]
    assert set(to.choices) == set(get_args(formats.Format)) == set(ENGINES)


@pytest.mark.parametrize("to", ["torch", "onnx", "openvino"])
@pytest.mark.parametrize(
    ("kind", "changes", "scoring"),
    [
        ("with_teacher", {"problem_type": "multi_label_classification"}, "sigmoid"),
        ("classification", {"labels": ["ant"]}, "sigmoid"),
        ("classification", {"problem_type": "regression"}, "none"),
    ],
)
def test_scores_that_are_no_softmax_go_along(tmp_path, to, kind, changes, scoring):
    """Several labels, a single output and a regression: the export scores as the model does."""
    model = trained_folder(tmp_path / "m", kind, **changes)
    done = write.export(model, to, tmp_path / "out")
    assert done.description["scoring"] == scoring
    assert "softmax" not in done.description["heads"]
    assert done.description["agreement"]["labels"] == 1.0
    pixels = np.random.default_rng(0).standard_normal((3, 3, 16, 16)).astype(np.float32)
    ours, theirs = (Predictor(folder).scores(pixels) for folder in (model, tmp_path / "out"))
    # OpenVINO computes in bfloat16 if the CPU does.
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=5e-2 if to == "openvino" else 1e-4)
    logits = load_model(model)(torch.from_numpy(pixels)).logits.detach()
    np.testing.assert_allclose(ours, logits.sigmoid() if scoring == "sigmoid" else logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_onnx_file_speaks_for_itself(models, exported, kind):
    """The batch axis has its name, weights have the model's, transposed or not, and the metadata says the rest."""
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(exported(kind, "onnx").folder / "model.onnx")
    for value in (*graph.graph.input, *graph.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    model = load_model(models / kind)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    found = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    matrices = {name for name in state if name.endswith(".weight") and state[name].ndim == 2}
    assert all(name in found or f"{name}.T" in found for name in matrices)
    for name in matrices:  # a normalisation is folded into the convolution before it
        np.testing.assert_array_equal(found[name] if name in found else found[f"{name}.T"].T, state[name])
    told = {entry.key: entry.value for entry in graph.metadata_props}
    assert json.loads(told["labels"]) == list(model.config.id2label.values())
    assert json.loads(told["preprocessing"]) == DeiTImageProcessor.from_pretrained(models / kind).to_dict()
    assert told["scoring"] == "softmax"
