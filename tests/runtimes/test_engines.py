"""Other runtimes behind `Predictor`: exported folders, and trained ones that are exported on the way."""

import json
import os
import pickle
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from support.checks import raises_saying, run_python
from support.models import build, saved

import deit
from deit import files
from deit.cli import main
from deit.config import VARIANTS
from deit.evaluate.calibration import Calibration, HeadCalibration
from deit.explain.explanation import explain_file
from deit.explain.maps import explain
from deit.export import cache as exporting
from deit.export.cache import cached_engine
from deit.export.engines import load_engine
from deit.export.write import export
from deit.model.load import load_classifier, load_model
from deit.predict import fastest
from deit.predict import predictor as predict
from deit.predict.predictor import Predictor
from deit.serve.app import create_app
from deit.serve.limits import Service

PHOTOS = Path(__file__).parents[3] / "shared/data/imagenet_sample.tar"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty one for each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "deit" / "engines"


def float32(monkeypatch):
    """A CPU with bfloat16 lets OpenVINO compute in it."""
    monkeypatch.setattr(exporting, "load_engine", lambda folder, **_: load_engine(folder, precision="float32"))


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
    with raises_saying(ValueError, "is an exported model, which needs the device cpu, found cuda"):
        Predictor(exported, device="cuda")
    with raises_saying(ValueError, "is an exported model, whose inside can't be seen"):
        explain_file(exported, photos[0])
    with TestClient(create_app(Predictor(exported), Service(), "m"), "http://localhost") as web:
        assert web.get("/model").json()["explain"] is False
        answer = web.post("/v1/explain", content=photos[0].read_bytes(), headers={"Content-Type": "image/png"})
        assert answer.status_code == 501
        assert "whose inside can't be seen" in answer.json()["error"]
    if Path("/proc/self/maps").exists():  # a mapped file that someone writes over would end the process
        loaded = Predictor(exported)
        assert str(exported) not in Path("/proc/self/maps").read_text()
        assert loaded(photos)[0][0]["label"] == Predictor(distilled)(photos)[0][0]["label"]
    other = "onnx" if to == "torch" else "torch"
    with raises_saying(ValueError, f"is exported for {to}, but engine is {other}"):
        Predictor(exported, engine=other)
    assert Predictor(exported, engine=to).engine == Predictor(exported, engine="auto").engine


@pytest.mark.parametrize("engine", ["openvino", "onnx"])
def test_engines_agree_on_a_trained_folder(distilled, photos, monkeypatch, engine):
    """The same rows in float32 within 1e-4, calibration included."""
    float32(monkeypatch)
    heads = {
        name: HeadCalibration(temperature=0.5 + i, threshold=0.3, nll=(1.0, 1.0), answered=0.5)
        for i, name in enumerate(("fused", "class", "distillation", "softmax"))
    }
    Calibration(error_rate=0.1, images=9, data="", heads=heads).save(distilled)
    for head in heads:
        expected, found = Predictor(distilled, head=head), Predictor(distilled, head=head, engine=engine)
        assert expected.engine == "torch"
        assert found.engine.startswith({"openvino": "openvino, f", "onnx": "onnxruntime"}[engine])
        for row, other in zip(found.stream(photos), expected.stream(photos), strict=True):
            assert row.sure is other.sure
            assert [entry["label"] for entry in row.labels] == [entry["label"] for entry in other.labels]
            assert [entry["score"] for entry in row.labels] == pytest.approx(
                [entry["score"] for entry in other.labels], abs=1e-4
            )
    pixels = torch.from_numpy(np.stack([found.prepared(photo) for photo in photos]))
    for token, values in explain(expected.model, pixels, "relevance").items():  # which needs the model's inside
        torch.testing.assert_close(explain(found.model, pixels, "relevance")[token], values)


def test_who_needs_the_same_engine_waits_for_it(distilled, photos, cache, monkeypatch):
    """Many servers may start at once. Also, what a killed one left is removed."""
    written, found = [], []
    write = exporting.write_float
    monkeypatch.setattr(exporting, "write_float", lambda *given: written.append(given[1]) or write(*given))
    classifier = load_classifier(distilled)
    name = cached_engine(classifier, "onnx").folder.name
    [folder] = cache.iterdir()
    assert folder.name == name
    folder.rename(cache / f".{name}.0123abcd")
    threads = [
        threading.Thread(target=lambda: found.append(cached_engine(load_classifier(distilled), "onnx").folder))
        for _ in range(3)
    ]
    for each in threads:
        each.start()
    for each in threads:
        each.join(100)
    assert found == [folder] * 3
    assert written == ["onnx"] * 2
    assert list(cache.iterdir()) == [folder]


def test_a_model_is_exported_once_and_again_where_it_changed(distilled, photos, cache, monkeypatch):
    written = []
    write = exporting.write_float
    monkeypatch.setattr(exporting, "write_float", lambda *given: written.append(given[1]) or write(*given))
    first = Predictor(distilled, engine="onnx")(photos)
    assert Predictor(distilled, engine="onnx")(photos) == first
    assert written == ["onnx"]
    [folder] = cache.iterdir()
    (folder / "model.onnx").write_bytes(b"damaged")
    assert Predictor(distilled, engine="onnx")(photos) == first
    assert written == ["onnx"] * 2
    os.utime(folder, times=(time.time() - 31 * 24 * 3600,) * 2)
    model = load_model(distilled)
    model.cls_classifier.bias.data[0] += 5
    model.save_pretrained(distilled)
    assert Predictor(distilled, engine="onnx")(photos) != first
    assert written == ["onnx"] * 3
    assert folder not in list(cache.iterdir())  # nobody had used it for a month
    [folder] = cache.iterdir()
    os.utime(folder, times=(time.time() + 10**9,) * 2)  # written while the clock was ahead
    files.forget_unused(cache)
    assert abs(time.time() - folder.stat().st_mtime) < 60
    os.utime(folder, times=(0, 0))
    Predictor(distilled, engine="onnx")
    assert time.time() - folder.stat().st_mtime < 60
    assert written == ["onnx"] * 3


def test_a_command_says_that_it_exports(distilled, photos, cache, capsys):
    command = ["predict", str(distilled), str(photos[0]), "--engine", "onnx"]
    said = "deit predict: exporting the model for ONNX Runtime and checking it, once; this can take a minute\n"
    assert main(command) == 0
    first = capsys.readouterr()
    assert first.err == said
    assert main(command) == 0
    again = capsys.readouterr()
    assert (again.out, again.err) == (first.out, "")


def test_two_that_export_at_once_both_have_their_engine(distilled, cache, monkeypatch):
    write, calls = exporting.write_float, []

    def late(*given):
        """Another process is quicker, on a file system without locks."""
        calls.append(given)
        if len(calls) == 1:
            digest = exporting._digest(classifier.model, "onnx")
            exporting._written(classifier, "onnx", files.cache_folder("engines") / f"onnx-{digest}")
            monkeypatch.setattr(exporting, "refuse_occupied", refuse)
        return write(*given)

    def refuse(folder):
        raise FileExistsError(folder)

    monkeypatch.setattr(exporting, "write_float", late)
    classifier = load_classifier(distilled)
    engine = cached_engine(classifier, "onnx")
    pixels = np.zeros((3, 3, 16, 16), np.float32)
    assert engine(pixels)["logits"].shape == (3, 5)
    assert len(list(cache.iterdir())) == 1


def test_auto_is_openvino_where_it_is_to_be_had(distilled, photos, monkeypatch, cache):
    pytest.importorskip("openvino")
    monkeypatch.setattr(fastest, "measured", lambda *_: {"torch": 1.0, "engine": 2.0})
    assert Predictor(distilled, engine="auto").engine.startswith("openvino")
    assert Predictor(distilled, device="meta", engine="auto").engine == "torch"
    with monkeypatch.context() as patch:
        patch.setattr(predict, "find_spec", lambda name: None)
        assert Predictor(distilled, engine="auto").engine == "torch"
    with monkeypatch.context() as patch:  # no home that can be written to
        patch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
        with pytest.warns(UserWarning, match="using PyTorch because OpenVINO can't be used"):
            predictor = Predictor(distilled, engine="auto")
        assert predictor.engine == "torch"
        assert predictor(photos) == Predictor(distilled)(photos)
        with pytest.raises(OSError):
            Predictor(distilled, engine="openvino")
    with raises_saying(ValueError, "engine openvino needs the device cpu, found cuda; leave one of them out"):
        Predictor(distilled, device="cuda", engine="openvino")
    with raises_saying(ValueError, "engine is 'tensorrt', expected one of auto, torch, openvino, onnx"):
        Predictor(distilled, engine="tensorrt")


def test_auto_is_what_was_measured_to_be_faster(distilled, monkeypatch, cache):
    """Once for a model and a machine; again if the file is damaged, or another machine wrote it."""
    pytest.importorskip("openvino")
    calls = []

    def rates(torch, engine):
        def measured(backends, shape):
            calls.append(shape)
            assert {name: str(each).partition(",")[0] for name, each in backends.items()} == {
                "torch": "torch",
                "engine": "openvino",
            }
            return {"torch": torch, "engine": engine}

        monkeypatch.setattr(fastest, "measured", measured)

    def chosen():
        return Predictor(distilled, engine="auto").engine.partition(",")[0]

    rates(3.0, 2.0)
    assert [chosen(), chosen()] == ["torch", "torch"]
    assert calls == [(3, 16, 16)]
    [place] = cache.glob("openvino-*/speed.json")
    rates(2.0, 3.0)
    for content in ("{", "[]", place.read_text().replace("core", "kernel")):
        place.write_text(content)
        assert [chosen(), chosen()] == ["openvino", "openvino"]
    assert len(calls) == 4

    def read_only(*_):
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(fastest.files, "write_json", read_only)
        place.unlink()
        assert chosen() == "openvino"
    assert not place.exists()


def test_rates_are_those_of_the_back_ends(monkeypatch):
    def backend(seconds):
        return lambda pixels: time.sleep(seconds * len(pixels))

    found = fastest.measured({"torch": backend(0.002), "engine": backend(0.004)}, (3, 4, 4))
    assert 300 < found["torch"] < 501
    assert 150 < found["engine"] < 251


def test_the_command_prepares_an_engine_where_there_is_much_to_do(distilled, tmp_path, monkeypatch, capsys):
    pytest.importorskip("openvino")
    monkeypatch.setattr("deit.predict.bulk.MANY", 4)
    monkeypatch.setattr(fastest, "measured", lambda *_: {"torch": 1.0, "engine": 2.0})
    for i in range(4):
        Image.new("RGB", (20, 20), (60 * i, 9, 9)).save(tmp_path / f"{i}.png")
    names = [str(tmp_path / f"{i}.png") for i in range(4)]
    for given, options, engine in (
        (names[:3], [], "torch"),
        (names, [], "openvino, f32"),
        (names, ["--engine", "torch"], "torch"),
        (names[:2], ["--engine", "onnx"], "onnxr"),
        (names, ["--shard", "1/2"], "torch"),
    ):
        assert main(["predict", str(distilled), *given, "--device", "cpu", "--json", *options]) == 0
        captured = capsys.readouterr()
        rows = [json.loads(line)["image"] for line in captured.out.splitlines()]
        assert rows == (given[::2] if "--shard" in options else given)
        assert f"({engine}" in captured.err.replace("bf16", "f32")


@pytest.mark.slow
def test_engines_agree_on_photos_at_full_size(tmp_path, monkeypatch, capsys):
    """DeiT-Ti and 120 photos: the same labels, all probabilities in float32 within 1e-4."""
    if not PHOTOS.is_file():
        pytest.skip("the photos are not at hand")
    import tarfile

    with tarfile.open(PHOTOS) as archive:
        archive.extractall(tmp_path / "photos", filter="data")
    images = sorted((tmp_path / "photos").rglob("*.JPEG"))
    saved(build("with_teacher", VARIANTS["deit-tiny-distilled-patch16-224"]), tmp_path / "m")
    float32(monkeypatch)
    first = Predictor(tmp_path / "m")
    pixels = np.stack([first.prepared(image) for image in images])
    expected = first.scores(pixels)
    for engine in ("openvino", "onnx"):
        found = Predictor(tmp_path / "m", engine=engine).scores(pixels)
        with capsys.disabled():
            print(f"\n{engine}: {np.abs(found - expected).max():.1e} over {len(images)} photos")
        assert (found.argmax(1) == expected.argmax(1)).all()
        assert np.abs(found - expected).max() < 1e-4


@pytest.mark.parametrize("engine", [None, "onnx", "openvino", "exported"])
def test_sent_to_another_process(distilled, cache, tmp_path, photos, engine):
    """A predictor and a pipeline that were pickled answer the same in a fresh interpreter."""
    model = distilled
    if engine == "exported":
        export(distilled, "torch", tmp_path / "out")
        model, engine = tmp_path / "out", None
    pipe = deit.pipeline(model=model, engine=engine, head="distillation")
    (tmp_path / "pipe").write_bytes(pickle.dumps(pipe))
    shown = run_python(
        "import pickle, json\n"
        f"pipe = pickle.loads(open({str(tmp_path / 'pipe')!r}, 'rb').read())\n"
        f"print(json.dumps([pipe({str(photos[0])!r}), pipe.predictor([{str(photos[0])!r}])]))"
    )
    found, [predicted] = json.loads(shown.splitlines()[-1])
    assert found == predicted
    expected = pipe(str(photos[0]))
    assert [each["label"] for each in found] == [each["label"] for each in expected]
    assert [each["score"] for each in found] == pytest.approx([each["score"] for each in expected], abs=1e-5)
