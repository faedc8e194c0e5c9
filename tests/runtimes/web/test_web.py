"""A classifier as a page: in Node against the model and Python's preprocessing, what is refused, its runtime."""

import json
import shutil
import stat
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from support.checks import raises_saying
from support.exports import KINDS, OUTPUTS, calibration, noise, pixels_for, smooth, tampering
from support.models import build, saved, small

import deit
from deit import files
from deit.evaluate.calibration import Calibration
from deit.export import formats, web
from deit.export import write as export
from deit.image.processor import DeiTImageProcessor
from deit.model.heads import head_probabilities
from deit.model.load import load_model
from deit.predict.predictor import Predictor

SOURCE = Path(deit.__file__).parent / "web"
TARBALL = f"onnxruntime-web-{web.VERSION}.tgz"


# -------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in ("distilled", "convnet") else pytest.mark.slow) for kind in KINDS]
)
def test_the_page_answers_as_the_model(page, models, exported, kind):
    """Every output, batches of sizes that the export never saw, in the page's own runtime."""
    done, model = exported(kind), load_model(models / kind)
    with page.running(done.folder, done.description) as engine:
        for count in (1, 2, 7):
            pixels = pixels_for(model, count, seed=count)
            with torch.inference_mode():
                expected = model(pixels)
            found = engine(pixels.numpy())
            assert list(found) == OUTPUTS[kind]
            for name, values in found.items():
                torch.testing.assert_close(torch.from_numpy(values), expected[name], rtol=1e-5, atol=1e-5)
    assert done.description["agreement"]["labels"] == 1.0
    assert 0 <= done.description["agreement"]["difference"] <= formats.TOLERANCE
    assert done.description["preprocessing"] == {"images": 32, "difference": 0.0}


def test_the_folder_is_whole(models, exported):
    done = exported("distilled")
    beside = {"config.json", "preprocessor_config.json", "calibration.json", "export.json"}
    assert {path.name for path in done.folder.iterdir()} == set(done.description["files"]) | beside
    assert set(done.description["files"]) == {
        "index.html",
        "page.css",
        "page.js",
        "shown.css",
        "shown.js",
        "words.js",
        "worker.js",
        "picture.js",
        "pixels.js",
        "answer.js",
        "model.onnx",
        "ort.wasm.bundle.min.js",
        "ort-wasm-simd-threaded.wasm",
        "onnxruntime-LICENSE",
    }
    assert done.description["versions"]["onnxruntime-web"] == web.VERSION
    assert Calibration.of_model(done.folder) == Calibration.of_model(models / "distilled")
    again = Predictor(done.folder), Predictor(models / "distilled")
    for one, other in zip(*(each([noise(30, 50), noise(50, 30)]) for each in again), strict=True):
        assert [entry["label"] for entry in one] == [entry["label"] for entry in other]
        assert [entry["score"] for entry in one] == pytest.approx([entry["score"] for entry in other], abs=1e-4)


def test_nothing_in_the_page_has_another_address(exported):
    for name in set(exported("convnet").description["files"]) - {
        "ort.wasm.bundle.min.js",
        "ort-wasm-simd-threaded.wasm",
        "model.onnx",
        "onnxruntime-LICENSE",
    }:
        text = (exported("convnet").folder / name).read_text()
        assert "https:" not in text
        assert "//" not in text.replace("http://localhost:8000", "").replace("// ", "").replace("//\n", ""), name


SHAPES = [(480, 640), (97, 41), (31, 50), (1, 1), (1, 900), (900, 2), (7, 513), (64, 64), (700, 600), (13, 154)]
PAPER = {
    "size": {"shortest_edge": 64},
    "crop_size": 56,
    "image_mean": (0.485, 0.456, 0.406),
    "image_std": (0.229, 0.224, 0.225),
}
OPTIONS = {
    **{f"paper-{name}": PAPER | {"resample": name} for name in ("bicubic", "bilinear", "lanczos", "box", "hamming")},
    **{
        f"squashed-{name}": {"size": (40, 96), "resample": name, "crop_size": (31, 77)}
        for name in ("bicubic", "bilinear", "lanczos", "hamming")
    },
    "enlarged": PAPER | {"size": {"shortest_edge": 224}, "crop_size": 224},
    "cut": {"size": {"shortest_edge": 16000}, "crop_size": 160},  # of which only the middle is computed
    "crop larger than the image": PAPER | {"crop_size": (100, 301)},
    "longest edge": PAPER | {"size": {"shortest_edge": 30, "longest_edge": 77}, "crop_size": 64},
    "no crop": {"size": 48, "do_center_crop": False},
    "no resize": {"do_resize": False, "crop_size": (33, 100)},
    "no normalize": PAPER | {"do_normalize": False},
    "no rescale": PAPER | {"do_rescale": False, "image_mean": 3.0, "image_std": 2.0},
    "other factor": PAPER | {"rescale_factor": 0.007, "do_convert_rgb": True},
    "grey": PAPER | {"image_mean": (0.4,), "image_std": (0.3,)},
}


def preprocessing(page, processor, folder):
    """An engine that has no model."""
    processor.save_pretrained(folder)
    page.write(folder)
    description = {"input": {"name": "pixel_values", "shape": [None, 3, 1, 1]}, "outputs": []}
    files.write_json(folder / "export.json", description)
    return page.running(folder, description)


@pytest.mark.parametrize("name", OPTIONS)
def test_preprocessing_is_pythons(page, tmp_path, name):
    """Pixel for pixel, in float32."""
    processor = DeiTImageProcessor(**OPTIONS[name])
    web.refuse_undone(processor)
    with preprocessing(page, processor, tmp_path) as engine:
        for seed, (height, width) in enumerate(SHAPES):
            for make in (noise, smooth):
                picture = make(height, width, seed=seed)
                [expected] = processor([picture]).pixel_values
                found = engine.pixel_values(picture)
                assert found.shape == expected.shape
                assert np.abs(found - expected).max() == 0, (height, width, make)
        transparent = noise(50, 60, 4)
        np.testing.assert_array_equal(engine.pixel_values(transparent), processor([transparent]).pixel_values[0])


def test_hamming_is_pillows_to_its_single_precision(page, tmp_path):
    """The picture has one value, of 262 thousand, that its constants in double precision would change."""
    processor = DeiTImageProcessor(size={"shortest_edge": 256}, resample="hamming", do_center_crop=False)
    picture = noise(480, 640, seed=4)
    with preprocessing(page, processor, tmp_path) as engine:
        np.testing.assert_array_equal(engine.pixel_values(picture), processor([picture]).pixel_values[0])


def in_node(page, code, tmp_path, **values):
    """The JSON that a script prints; it may import the page's files."""
    for path in SOURCE.glob("*.js"):
        shutil.copy(path, tmp_path)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    given = "".join(f"const {name} = {json.dumps(value)};\n" for name, value in values.items())
    (tmp_path / "test.js").write_text(f"{given}{code}")
    done = subprocess.run([page.node, tmp_path / "test.js"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.25, 0.4, 0.9, 1.0, "of a label", "by a hair"])
def test_sure_and_scores_are_the_predictors(page, tmp_path, threshold):
    rng = np.random.default_rng(0)
    logits = (4 * rng.standard_normal((60, 9))).astype(np.float32)
    logits[0], logits[1, :5], logits[2] = 0.0, 7.0, np.float32(1e4) * rng.standard_normal(9)
    # The page computes in double precision and rounds once. The last bit of PyTorch's float32 is the processor's.
    expected = (torch.from_numpy(logits).double() / 1.5).softmax(-1).float().numpy()
    predicted = head_probabilities({"logits": torch.from_numpy(logits)}, 1.5)["fused"].numpy()
    np.testing.assert_allclose(expected, predicted, rtol=0, atol=1e-6)
    if threshold == "of a label":
        threshold = float(np.sort(expected[7])[-2])
    elif threshold == "by a hair":  # above a label's, but not in single precision
        threshold = float(np.nextafter(float(expected[7].max()), 1))
    held = calibration(threshold)
    code = """import { answer } from "./answer.js";
        console.log(JSON.stringify(rows.map((row) => answer(Float32Array.from(row), names, calibration))));"""
    names = {str(i): f"name {i}" for i in range(9)}
    (tmp_path / "c").mkdir()
    held.save(tmp_path / "c")
    found = in_node(
        page,
        code,
        tmp_path,
        rows=logits.tolist(),
        names=names,
        calibration=files.read_json(tmp_path / "c" / "calibration.json"),
    )
    assert [each["sure"] for each in found] == held.sure(expected, "fused")
    best = np.argsort(-expected, axis=1, kind="stable")[:, :5]
    for row, order, each in zip(expected, best, found, strict=True):
        assert [entry["score"] for entry in each["labels"]] == pytest.approx(row[order].tolist(), abs=1e-6)
        assert [entry["label"] for entry in each["labels"]] == [f"name {i}" for i in order]
    plain = in_node(page, code, tmp_path, rows=logits.tolist(), names=names, calibration=None)
    assert {each["sure"] for each in plain} == {None}
    alone = head_probabilities({"logits": torch.from_numpy(logits)})["fused"].numpy().max(1)
    assert [each["labels"][0]["score"] for each in plain] == pytest.approx(alone.tolist(), abs=1e-6)


@pytest.mark.parametrize("scoring", ["sigmoid", "none"])
def test_scores_that_are_no_softmax(page, tmp_path, scoring):
    logits = (4 * np.random.default_rng(0).standard_normal((20, 3))).astype(np.float32)
    expected = torch.from_numpy(logits).double().sigmoid().float().numpy() if scoring == "sigmoid" else logits
    found = in_node(
        page,
        """import { answer } from "./answer.js";
        console.log(JSON.stringify(rows.map((row) => answer(Float32Array.from(row), names, null, scoring))));""",
        tmp_path,
        rows=logits.tolist(),
        names={str(i): f"name {i}" for i in range(3)},
        scoring=scoring,
    )
    for row, each in zip(expected, found, strict=True):
        order = np.argsort(-row, kind="stable")
        assert [entry["label"] for entry in each["labels"]] == [f"name {i}" for i in order]
        assert [entry["score"] for entry in each["labels"]] == pytest.approx(row[order].tolist(), abs=1e-6)


def test_a_grey_model(page, tmp_path):
    processor = DeiTImageProcessor(size=18, crop_size=16, image_mean=(0.4,), image_std=(0.3,))
    saved(build("classification", small(num_channels=1)), tmp_path / "m", processor)
    done = export.export(tmp_path / "m", "web", tmp_path / "out")
    assert done.description["input"]["shape"] == [None, 1, 16, 16]
    assert done.description["preprocessing"]["difference"] == 0


def test_real_images_are_preprocessed_too(page, models, tmp_path):
    (tmp_path / "data" / "ant").mkdir(parents=True)
    for seed in range(4):
        smooth(40 + seed, 300, seed).save(tmp_path / "data" / "ant" / f"{seed}.jpg")
    done = export.export(models / "convnet", "web", tmp_path / "out", calibrate=tmp_path / "data")
    assert done.description["agreement"]["images"] == 2
    assert done.description["preprocessing"] == {"images": 34, "difference": 0.0}


# ------------------------------------------------------------------------------------------------------------ refusals


def test_an_answer_that_differs_is_refused_and_nothing_is_left(page, models, tmp_path, monkeypatch):
    tampering(monkeypatch, lambda answers: answers | {"logits": answers["logits"] + np.eye(5, dtype=np.float32)[0]})
    with raises_saying(ValueError, "web was not kept", "random pictures", "differ by at most 0.0001"):
        export.export(models / "convnet", "web", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "before", "after", "said"),
    [
        ("pixels.js", "a = -0.5", "a = -0.75", "its script makes pixels that differ by"),
        ("pixels.js", "crop.height, width: crop.width", "crop.height - 1, width: crop.width", "differ by inf"),
        ("pixels.js", "export function pixelValues", "function pixelValues", "failed in Node"),
        ("ort.wasm.bundle.min.js", "export{", "exporting{", "failed in Node"),
        ("ort-wasm-simd-threaded.wasm", "\0asm", "\0abc", "failed in Node"),
    ],
)
def test_scripts_that_fail_or_compute_something_else_are_refused(
    page, models, tmp_path, monkeypatch, name, before, after, said
):
    before, after = before.encode(), after.encode()
    assert before in page._files[name]
    monkeypatch.setitem(page._files, name, page._files[name].replace(before, after))
    monkeypatch.setattr(export, "Page", lambda: page)
    with raises_saying(ValueError, "web was not kept", said):
        export.export(models / "convnet", "web", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_former_page_is_replaced_only_by_one_that_passed(page, models, tmp_path, monkeypatch):
    out = tmp_path / "out"
    export.export(models / "convnet", "torch", out)
    with monkeypatch.context() as patched:
        tampering(patched, lambda answers: {name: -values for name, values in answers.items()})
        with raises_saying(ValueError, "was not kept"):
            export.export(models / "convnet", "web", out)
    assert (out / "model.pt2").is_file()
    for _ in range(2):
        export.export(models / "convnet", "web", out)
        assert not (out / "model.pt2").exists()
    (out / "notes.txt").write_text("mine")
    with raises_saying(FileExistsError, out, "holds notes.txt"):
        export.export(models / "convnet", "web", out)


def test_options_that_the_page_does_not_do_are_refused(page, models, tmp_path, monkeypatch):
    shutil.copytree(models / "convnet", tmp_path / "m")
    paper = DeiTImageProcessor.paper((16, 24))
    for option, value in (("resample", "nearest"), ("do_convert_rgb", False)):
        processor = DeiTImageProcessor.from_dict(paper.to_dict(), **{option: value})
        processor.save_pretrained(tmp_path / "m")
        with raises_saying(ValueError, f"{option} is {value}", "expected", "take another format"):
            export.export(tmp_path / "m", "web", tmp_path / "out")
    with raises_saying(ValueError, "data_format is channels_last"):
        web.refuse_undone(DeiTImageProcessor(data_format="channels_last"))
    web.refuse_undone(DeiTImageProcessor(do_resize=False, resample="nearest"))
    monkeypatch.setattr(formats, "_ONNX_BYTES", 1000)
    with raises_saying(ValueError, models / "convnet", "more than the 2 GiB"):
        export.export(models / "convnet", "web", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------------- the runtime


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A PATH of its own, and an empty cache: adds programs by their shell scripts, and returns the cache."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "bin").mkdir()

    def add(**scripts):
        for name, script in scripts.items():
            (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
            (tmp_path / "bin" / name).chmod(stat.S_IRWXU)
        return tmp_path / "cache" / "deit" / "packages"

    return add


def test_what_is_missing_is_named(models, tmp_path, programs, monkeypatch):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    cache = programs()
    with raises_saying(FileNotFoundError, "the program node is missing", "install Node.js"):
        export.export(models / "plain", "web", tmp_path / "out")
    programs(node="exit 0")
    with raises_saying(
        FileNotFoundError, "onnxruntime-web", web.VERSION, f"is not in {cache}", "npm", f"or put {TARBALL} there"
    ):
        export.export(models / "plain", "web", tmp_path / "out")
    programs(npm="echo 'npm error network offline' >&2; exit 1")
    with raises_saying(FileNotFoundError, "(network offline)", "connect to the internet", cache):
        export.export(models / "plain", "web", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(cache.iterdir())


def test_another_package_is_refused(models, tmp_path, programs):
    cache = programs(node="exit 0", npm=f"echo another > {TARBALL}")
    with raises_saying(
        files.CheckpointError, "npm gave an onnxruntime-web", f"expected {web.INTEGRITY}", "npm config get registry"
    ):
        export.export(models / "plain", "web", tmp_path / "out")
    assert not list(cache.iterdir())


def test_the_package_is_fetched_once_and_verified_each_time(package, programs, tmp_path):
    real = tmp_path / TARBALL
    real.write_bytes(package)
    cp = shutil.which("cp", path="/bin:/usr/bin")
    cache = programs(npm=f'echo "$@" > {tmp_path}/asked; {cp} {real} .')
    assert web._package() == package
    assert (tmp_path / "asked").read_text().split() == [
        "pack",
        "--loglevel=error",
        "--ignore-scripts",
        "--fetch-retries=0",
        f"onnxruntime-web@{web.VERSION}",
    ]
    assert [path.name for path in cache.iterdir()] == [TARBALL]
    (tmp_path / "bin" / "npm").unlink()
    assert web._package() == package  # from the cache
    damaged = bytearray(package)
    damaged[1000] ^= 1
    (cache / TARBALL).write_bytes(damaged)
    with raises_saying(FileNotFoundError, "is not in", "npm"):
        web._package()
    programs(npm=f"{cp} {real} .")
    assert web._package() == (cache / TARBALL).read_bytes() == package
