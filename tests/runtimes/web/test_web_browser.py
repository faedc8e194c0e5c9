"""A classifier as a page: in a browser against `Predictor`."""

import base64
import os
import shutil
import threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.browser import AXE, BROWSER, LATIN_WORDS
from support.exports import calibration, encoded, noise, smooth
from support.pictures import exif

from deit.image.decode import load_image
from deit.image.processor import DeiTImageProcessor
from deit.predict.predictor import Predictor


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
        assert page.inner_text("#about") == "This model tells 5 labels apart."
        assert page.inner_text("#names li:nth-child(2)") == Predictor(folder).labels[1]
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
        page.keyboard.press("Tab")  # the list of the labels
        for name, key in (("file", "Enter"), ("camera", "Space")):
            page.keyboard.press("Tab")
            assert page.evaluate("document.activeElement.id") == name
            outline = page.evaluate("getComputedStyle(document.activeElement.nextElementSibling).outlineStyle")
            assert outline == "solid"
            page.keyboard.press(key)
            assert shown(page) == expected_of(answer)
        assert page.get_attribute("section", "aria-live") == "polite"


@pytest.mark.slow
def test_the_page_in_chinese(calibrated, chromium, tmp_path):
    folder, answers = calibrated
    with served(folder) as (address, _), opened(chromium, address, ready=False, locale="zh-CN") as (page, said):
        page.wait_for_selector("#about:has-text('此模型可区分 5 个标签。')")
        assert page.evaluate("document.documentElement.lang") == "zh-CN"
        for sure, (content, answer) in answers.items():
            page.set_input_files("#file", chosen(content))
            heading, rows = shown(page)
            assert (heading, rows) == (answer.labels[0]["label"] if sure else "无法确定", expected_of(answer)[1])
        page.set_input_files("#file", chosen(b"x"))  # which the worker says
        page.wait_for_selector("#error:has-text('此浏览器无法将该文件读取为图片')")
        assert LATIN_WORDS.findall(page.inner_text("main")) == []
        assert said == []


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
        f"JPEG, orientation {number}": encoded(smooth(40, 61), "JPEG", quality=95, exif=exif(number))
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
