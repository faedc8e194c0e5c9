"""A classifier as a page: in Node against the model and Python's preprocessing, in a browser against `Predictor`."""

import base64
import io
import json
import os
import shutil
import stat
import subprocess
import threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.checks import raises_saying
from support.models import build, small
from test_export import KINDS, OUTPUTS, model_of, pixels_for, tampering

import deit
from deit import files
from deit.evaluate.calibration import Calibration, HeadCalibration
from deit.export import formats, web
from deit.export import write as export
from deit.export.web import Page
from deit.image.decode import load_image
from deit.image.processor import DeiTImageProcessor
from deit.model.load import load_model
from deit.model.network import head_probabilities
from deit.predict.predictor import Predictor

SOURCE = Path(deit.__file__).parent / "web"
TARBALL = f"onnxruntime-web-{web.VERSION}.tgz"


@pytest.fixture(scope="module")
def page():
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    try:
        return Page()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def package(page):
    """The tarball of onnxruntime-web."""
    return web._package()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        model = model_of(kind)
        model.save_pretrained(root / kind)
        DeiTImageProcessor.paper(model.config.image_hw).save_pretrained(root / kind)
    calibration(0.5).save(root / "distilled")
    return root


@pytest.fixture(scope="module")
def exported(page, models, tmp_path_factory):
    """What `export` returns for a kind; each is made once, and not to be changed."""
    root, done = tmp_path_factory.mktemp("exported"), {}

    def get(kind):
        if kind not in done:
            done[kind] = export.export(models / kind, "web", root / kind)
        return done[kind]

    return get


def calibration(threshold, temperature=1.5):
    head = HeadCalibration(temperature=temperature, threshold=threshold, nll=(1.0, 0.9), answered=0.5)
    return Calibration(error_rate=0.05, images=100, data="none", heads={"fused": head})


def noise(height, width, channels=3, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8))


def smooth(height, width, seed=0):
    return noise(9, 12, seed=seed).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


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
    "cut": {"size": {"shortest_edge": 30000}, "crop_size": 160},  # of which only the middle is computed
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


def test_a_grey_model(page, tmp_path):
    build("classification", small(num_channels=1)).save_pretrained(tmp_path / "m")
    processor = DeiTImageProcessor(size=18, crop_size=16, image_mean=(0.4,), image_std=(0.3,))
    processor.save_pretrained(tmp_path / "m")
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
    assert not cache.exists()


def test_another_package_is_refused(models, tmp_path, programs):
    cache = programs(node="exit 0", npm=f"echo another > {TARBALL}")
    with raises_saying(
        files.CheckpointError, "npm gave an onnxruntime-web", f"expected {web.INTEGRITY}", "npm config get registry"
    ):
        export.export(models / "plain", "web", tmp_path / "out")
    assert not cache.exists()


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


# -------------------------------------------------------------------------------------------------------- in a browser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
AXE = Path(os.environ.get("AXE", "node_modules/axe-core/axe.min.js"))


@contextmanager
def served(folder, *, isolated=False, slow=()):
    """The address of a plain file server, and the paths that it is asked for. `slow`: names whose answers wait for an
    event, after a part."""
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(self.path)

        def end_headers(self):
            if isolated:
                self.send_header("Cross-Origin-Opener-Policy", "same-origin")
                self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
            super().end_headers()

        def copyfile(self, source, outputfile):
            event = dict(slow).get(self.path.lstrip("/"))
            if event is not None:
                outputfile.write(source.read(100_000))
                event.wait(60)
            super().copyfile(source, outputfile)

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not BROWSER:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser, address, *, ready=True, **options):
    """The page, and what the console said but that there is no calibration."""
    context = browser.new_context(**options)
    page, said = context.new_page(), []
    page.on("console", lambda message: said.append(message.text) if "404" not in message.text else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(address)
    if ready:
        page.wait_for_selector("#about:has-text('labels apart')")
    yield page, said
    context.close()


def chosen(content, name="x.png"):
    return {"name": name, "mimeType": "image/png", "buffer": content}


def shown(page):
    """Heading and labels once they are there; and they are gone then, so that the next ones can be waited for."""
    page.wait_for_selector("#labels li:nth-child(5)")
    rows = page.eval_on_selector_all("#labels li", "rows => rows.map(row => [...row.children].map(x => x.textContent))")
    bars = page.eval_on_selector_all(
        ".bar > span", "bars => bars.map(bar => bar.offsetWidth / bar.parentElement.offsetWidth)"
    )
    found = page.inner_text("#heading"), [(name, float(share[:-2])) for name, share, _ in rows]
    assert bars == pytest.approx([share / 100 for _, share in found[1]], abs=0.02)
    page.evaluate("document.querySelector('#labels').replaceChildren()")
    return found


def expected_of(answer):
    heading = "I don\u2019t know" if answer.sure is False else answer.labels[0]["label"]
    return heading, [(each["label"], pytest.approx(100 * each["score"], abs=0.151)) for each in answer.labels]


DROP = """([bytes, type]) => { const transfer = new DataTransfer();
    transfer.items.add(new File([new Uint8Array(bytes)], "d.png", {type}));
    document.querySelector("#drop").dispatchEvent(new DragEvent("drop", {dataTransfer: transfer, bubbles: true,
        cancelable: true})) }"""
PASTE = """bytes => { const transfer = new DataTransfer();
    transfer.items.add(new File([new Uint8Array(bytes)], "p.png", {type: "image/png"}));
    document.dispatchEvent(new ClipboardEvent("paste", {clipboardData: transfer})) }"""


@pytest.fixture(scope="module")
def calibrated(exported, models, tmp_path_factory):
    """A page's folder whose model is sure of some pictures only, and its answers: of a sure one, and of another."""
    folder = Path(shutil.copytree(exported("distilled").folder, tmp_path_factory.mktemp("page") / "calibrated"))
    tops = sorted(
        (answer.labels[0]["score"], seed)
        for seed in range(12)
        for answer in Predictor(models / "distilled").stream([encoded(noise(30, 40, seed=seed))])
    )
    calibration((tops[5][0] + tops[6][0]) / 2).save(folder)
    answers = {
        answer.sure: (encoded(noise(30, 40, seed=seed)), answer)
        for _, seed in tops
        for answer in Predictor(folder).stream([encoded(noise(30, 40, seed=seed))])
    }
    assert set(answers) == {True, False}
    return folder, answers


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 360])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_in_a_browser(calibrated, chromium, scheme, width):
    """Labels and probabilities are the Predictor's, for every way in, offline; no other address is ever asked."""
    folder, answers = calibrated
    window = {"color_scheme": scheme, "viewport": {"width": width, "height": 900}}
    with served(folder) as (address, asked), opened(chromium, address, **window) as (page, said):
        requests = []
        page.on("request", lambda request: requests.append(request.url))
        loaded = sorted(asked)
        page.context.set_offline(True)
        assert page.inner_text("#about") == "It tells 5 labels apart."
        assert "nothing is sent anywhere" in page.inner_text("main")
        for sure, (content, answer) in answers.items():
            page.set_input_files("#file" if sure else "#camera", chosen(content))
            assert shown(page) == expected_of(answer)
            note = "Sure: at most 5.0 %" if sure else "No single label is certain enough."
            assert page.inner_text("#note").startswith(note)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        content, answer = answers[True]
        for way, argument in ((DROP, [[*content], "image/png"]), (PASTE, [*content])):
            page.evaluate(way, argument)
            assert shown(page) == expected_of(answer)
        for wrong in (b"%PDF-1.7 no image", b"", b"<svg xmlns='http://www.w3.org/2000/svg'/>", content[:60]):
            page.set_input_files("#file", chosen(wrong))
            page.wait_for_selector("#error:not(:empty)")
            assert page.inner_text("#error") == (
                "This browser can\u2019t read that as an image. Choose a JPEG, PNG or WebP file."
            )
            assert page.inner_text("#labels") == ""
            page.set_input_files("#file", chosen(content))
            assert shown(page) == expected_of(answer)
            assert page.inner_text("#error") == ""
        page.evaluate("document.dispatchEvent(new ClipboardEvent('paste', {clipboardData: new DataTransfer()}))")
        assert page.inner_text("#error") == "That was not an image file. Choose one from this device."
        assert said == []  # a breach of the policy would be said there
        assert [url for url in requests if not url.startswith(f"blob:{address}")] == []
        assert sorted(asked) == loaded
        assert set(loaded) <= {f"/{path.name}" for path in folder.iterdir()} | {"/"}
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(251, 250, 248)") == (scheme == "light")


@pytest.mark.slow
def test_the_keyboard_is_enough(calibrated, chromium):
    folder, answers = calibrated
    content, answer = answers[True]
    with served(folder) as (address, _), opened(chromium, address) as (page, _):
        page.on("filechooser", lambda chooser: chooser.set_files(chosen(content)))
        for name, key in (("file", "Enter"), ("camera", "Space")):
            page.keyboard.press("Tab")
            assert page.evaluate("document.activeElement.id") == name
            outline = page.evaluate("getComputedStyle(document.activeElement.nextElementSibling).outlineStyle")
            assert outline == "solid"
            page.keyboard.press(key)
            assert shown(page) == expected_of(answer)
        assert page.get_attribute("section", "aria-live") == "polite"


@pytest.mark.slow
def test_neither_the_page_nor_its_worker_can_send_anything(calibrated, chromium, tmp_path):
    """The policy holds in both: a server elsewhere is never asked."""
    folder, _ = calibrated
    with (
        served(folder) as (address, _),
        served(tmp_path) as (elsewhere, asked),
        opened(chromium, address) as (page, said),
    ):
        [worker] = page.workers
        for scope in (page, worker):
            for way in (
                "fetch(url, {method: 'POST', mode: 'no-cors', body: 'x'}).then(() => 'sent', () => 'refused')",
                "import(url).then(() => 'sent', () => 'refused')",
            ):
                assert scope.evaluate(f"url => {way}", f"{elsewhere}/x.js") == "refused"
        assert said[0].startswith(f"Connecting to '{elsewhere}/x.js' violates")
        assert asked == []


@pytest.mark.slow
def test_loading_is_seen_and_an_image_can_wait_for_it(calibrated, chromium):
    folder, answers = calibrated
    content, answer = answers[False]
    go = threading.Event()
    size = (folder / "ort-wasm-simd-threaded.wasm").stat().st_size + (folder / "model.onnx").stat().st_size
    with (
        served(folder, slow={"ort-wasm-simd-threaded.wasm": go}) as (address, _),
        opened(chromium, address, ready=False) as (page, said),
    ):
        page.wait_for_selector(f"#amount:has-text('of {size / 1e6:.1f} MB')")
        assert 0 < page.evaluate("document.querySelector('#progress').value") < 0.1
        assert page.inner_text("label[for=progress]") == "Loading the model"
        for other in (answers[True][0], content):  # the first is never answered
            page.set_input_files("#file", chosen(other))
        assert page.inner_text("#heading") == "Waiting for the model\u2026"
        go.set()
        assert shown(page) == expected_of(answer)
        assert page.is_hidden("#loading")
        assert said == []


OBSERVE = """() => { window.shown = [];
    new MutationObserver(() => shown.push(document.querySelector("#labels").innerText)).observe(
        document.querySelector("#labels"), {childList: true}) }"""


@pytest.mark.slow
def test_an_answer_that_comes_too_late_is_not_shown(calibrated, chromium):
    folder, answers = calibrated
    content, answer = answers[False]
    with served(folder) as (address, _), opened(chromium, address) as (page, said):
        page.evaluate(OBSERVE)
        page.set_input_files("#file", chosen(FILES["large"]))
        page.set_input_files("#file", chosen(content))
        assert shown(page) == expected_of(answer)
        page.set_input_files("#file", chosen(content))  # the late one would come before this one's
        assert shown(page) == expected_of(answer)
        assert len({text for text in page.evaluate("shown") if text}) == 1
        assert said == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        ("missing", "The model can\u2019t be loaded (model.onnx: 404). Reload the page to try again."),
        ("cut", "The model can\u2019t be loaded ("),
        ("script", "The model can\u2019t be started: a file of this page is missing"),
        ("WebAssembly", "This browser can\u2019t run the model: it has no WebAssembly, or is too old."),
    ],
)
def test_what_keeps_the_model_from_running_is_said(calibrated, chromium, tmp_path, damage, sentence):
    folder = Path(shutil.copytree(calibrated[0], tmp_path / "copy"))
    whole = (folder / "model.onnx").read_bytes()
    if damage == "missing":
        (folder / "model.onnx").unlink()
    elif damage == "cut":
        (folder / "model.onnx").write_bytes(whole[:1000])
    elif damage == "script":
        (folder / "pixels.js").unlink()
    with served(folder) as (address, _), opened(chromium, "about:blank", ready=False) as (page, _):
        if damage == "WebAssembly":
            page.add_init_script("delete globalThis.WebAssembly")
        page.goto(address)
        page.wait_for_selector("#error:not(:empty)")
        assert page.inner_text("#error").startswith(sentence)
        assert page.is_hidden("#loading")
        page.set_input_files("#file", chosen(calibrated[1][True][0]))
        assert page.inner_text("#error").startswith(sentence)


@pytest.mark.slow
def test_a_file_that_is_opened_says_how_to_serve_it(calibrated, chromium):
    with opened(chromium, (calibrated[0] / "index.html").as_uri(), ready=False) as (page, _):
        assert page.is_hidden("#unstarted")  # at first: no script may have come yet
        page.wait_for_selector("#unstarted", state="visible")
        assert "python -m http.server" in page.inner_text("#unstarted")


@pytest.mark.slow
def test_threads_where_the_server_isolates_the_page(calibrated, chromium):
    folder, answers = calibrated
    with served(folder, isolated=True) as (address, _), opened(chromium, address) as (page, said):
        assert page.evaluate("crossOriginIsolated")
        threads = page.evaluate("Math.min(4, navigator.hardwareConcurrency)")
        assert len(page.workers) == threads  # ours, and one for each thread but the first
        for content, answer in answers.values():
            page.set_input_files("#file", chosen(content))
            assert shown(page) == expected_of(answer)
        assert said == []


@pytest.mark.slow
def test_no_calibration(exported, chromium):
    with served(exported("convnet").folder) as (address, _), opened(chromium, address) as (page, said):
        content = encoded(smooth(30, 40))
        [answer] = Predictor(exported("convnet").folder).stream([content])
        page.set_input_files("#file", chosen(content))
        assert shown(page) == expected_of(answer)
        assert page.is_hidden("#note")
        assert said == []


# What the page makes of a file: its pixels as they are decoded, and pixel_values.
DECODE = """async text => {
    const { decoded } = await import("./picture.js"), { pixelValues } = await import("./pixels.js");
    const options = await (await fetch("preprocessor_config.json")).json();
    const picture = await decoded(new Blob([Uint8Array.from(atob(text), (c) => c.charCodeAt(0))]));
    const values = pixelValues(picture, options);
    const packed = ({ buffer }) => {
        let found = "";
        for (let i = 0; i < buffer.byteLength; i += 8192) {
            found += String.fromCharCode(...new Uint8Array(buffer, i, Math.min(8192, buffer.byteLength - i)));
        }
        return btoa(found);
    };
    return [[picture.height, picture.width], packed(picture.data), values.dims, packed(values.data)] }"""


def upright(number):
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


FILES = {
    "RGB": encoded(noise(50, 71)),
    "RGBA": encoded(noise(50, 71, 4)),
    "grey": encoded(noise(40, 41).convert("L")),
    "grey, alpha": encoded(noise(40, 41, 4).convert("LA")),
    "palette": encoded(noise(40, 41).quantize(16)),
    "palette, transparent": encoded(noise(40, 41).quantize(16), transparency=3),
    "GIF": encoded(noise(40, 41).quantize(16), "GIF"),
    "WebP": encoded(noise(40, 41), "WEBP", lossless=True),
    "WebP, alpha": encoded(noise(40, 41, 4), "WEBP", lossless=True, exact=True),
    "large": encoded(noise(1500, 3001)),
    "large, alpha": encoded(noise(1500, 3001, 4)),
    **{
        f"JPEG, orientation {number}": encoded(smooth(40, 61), "JPEG", quality=95, exif=upright(number))
        for number in range(1, 9)
    },
    "grey JPEG": encoded(smooth(40, 61).convert("L"), "JPEG"),
}


NO_WEBGL = """() => {
    const real = OffscreenCanvas.prototype.getContext;
    OffscreenCanvas.prototype.getContext = function (kind, ...rest) {
        return kind === "webgl" ? null : real.call(this, kind, ...rest);
    } }"""


@pytest.mark.slow
@pytest.mark.parametrize("webgl", [True, False])
def test_files_become_the_pixels_that_python_makes_of_them(calibrated, chromium, webgl):
    """Without WebGL those without transparency."""
    processor = DeiTImageProcessor.from_pretrained(calibrated[0])
    with served(calibrated[0]) as (address, _), opened(chromium, address) as (page, said):
        if not webgl:
            page.evaluate(NO_WEBGL)
        for name, content in FILES.items():
            if not webgl and any(word in name for word in ("alpha", "transparent", "RGBA")):
                continue
            size, pixels, dims, values = page.evaluate(DECODE, base64.b64encode(content).decode())
            pixels = np.frombuffer(base64.b64decode(pixels), np.uint8).reshape(*size, 4)[..., :3].astype(int)
            expected = np.asarray(load_image(content)).astype(int)
            assert pixels.shape == expected.shape, name
            # A JPEG is as its decoder makes it, and may differ by a rounding of its transform and of its colours.
            assert np.abs(pixels - expected).max() <= (2 if "JPEG" in name else 0), name
            values = np.frombuffer(base64.b64decode(values), np.float32).reshape(dims)
            [other] = processor([Image.fromarray(pixels.astype(np.uint8))]).pixel_values
            np.testing.assert_array_equal(values, other, err_msg=name)
        assert said == []


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_for_everyone(calibrated, chromium, scheme, tmp_path):
    """No violation that axe-core knows: while it loads, at first, with either answer, with an error, as a file."""
    if not AXE.is_file():
        pytest.skip(f"axe-core is not at {AXE}: npm install axe-core, or set AXE to its axe.min.js")
    folder, answers = calibrated
    pictures = Path(os.environ.get("SCREENSHOTS", tmp_path))

    def violations(name):
        page.screenshot(path=pictures / f"{scheme}-{name}.png")
        page.evaluate(AXE.read_text())
        found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
        return [(each["id"], each["nodes"][0]["html"]) for each in found]

    go, window = threading.Event(), {"color_scheme": scheme, "bypass_csp": True}
    with (
        served(folder, slow={"model.onnx": go}) as (address, _),
        opened(chromium, address, ready=False, **window) as (page, _),
    ):
        page.wait_for_selector("#amount:has-text('of')")
        assert violations("loading") == []
        go.set()
        page.wait_for_selector("#about:has-text('labels apart')")
        assert violations("ready") == []
        for sure, (content, _) in answers.items():
            page.set_input_files("#file", chosen(content))
            page.wait_for_selector("#labels li")
            assert violations(f"sure-{sure}") == []
            page.evaluate("document.querySelector('#labels').replaceChildren()")
        page.set_input_files("#file", chosen(b"x"))
        page.wait_for_selector("#error:not(:empty)")
        assert violations("error") == []
    with opened(chromium, (folder / "index.html").as_uri(), ready=False, **window) as (page, _):
        page.wait_for_selector("#unstarted", state="visible")
        assert violations("file") == []
