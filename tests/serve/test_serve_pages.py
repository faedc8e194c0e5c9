"""The server's page in a browser."""

from contextlib import contextmanager

import pytest
import torch
from PIL import Image
from support.browser import AXE, BROWSER, LATIN_WORDS
from support.models import trained_folder
from support.serving import SVG, calibrated, picture, server

from deit.explain.explanation import explain_pixels
from deit.explain.picture import overlay
from deit.predict.predictor import Predictor
from deit.report.markup import data_uri


@contextmanager
def opened(engine, address, *, about="labels apart", **options):
    """The page, what the console said, and every address that was asked."""
    browser = engine.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
    page = browser.new_page(**options)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.wait_for_selector(f"#about:has-text('{about}')")
    try:
        yield page, said, asked
    finally:
        browser.close()


@pytest.fixture
def engine():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not BROWSER:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as found:
        yield found


def chosen(content):
    return {"name": "x.png", "mimeType": "image/png", "buffer": content}


PASTE = """bytes => { const transfer = new DataTransfer();
    transfer.items.add(new File([new Uint8Array(bytes)], "p.png", {type: "image/png"}));
    document.dispatchEvent(new ClipboardEvent("paste", {clipboardData: transfer})) }"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 360])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_in_a_browser(scheme, width, tmp_path, engine):
    """Upload, result, "I don't know", paste, error, and the way of the Tab key; no other address is asked."""
    folder = calibrated(trained_folder(tmp_path))
    predictor = Predictor(folder)
    answers = {answer.sure: (seed, answer) for seed in range(40) for answer in predictor.stream([picture(seed)])}
    assert set(answers) == {True, False}
    window = {"color_scheme": scheme, "viewport": {"width": width, "height": 900}}
    with server(folder) as (_, address), opened(engine, address, **window) as (page, said, asked):
        for sure, (seed, answer) in answers.items():
            page.set_input_files("#file" if sure else "#camera", chosen(picture(seed)))
            page.wait_for_selector("#labels li:nth-child(5)")
            assert page.inner_text("#heading") == (answer.labels[0]["label"] if sure else "I don\u2019t know")
            shown = page.eval_on_selector_all(
                "#labels li", "rows => rows.map(row => [...row.children].map(each => each.textContent))"
            )
            assert [(name, float(share[:-2])) for name, share, _ in shown] == [
                (each["label"], pytest.approx(100 * each["score"], abs=0.051)) for each in answer.labels
            ]
            bars = page.eval_on_selector_all(
                ".bar > span", "bars => bars.map(bar => bar.offsetWidth / bar.parentElement.offsetWidth)"
            )
            assert bars == pytest.approx([each["score"] for each in answer.labels], abs=0.02)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            page.evaluate("document.querySelector('#labels').replaceChildren()")
        names = page.eval_on_selector_all("#names li", "names => names.map(each => each.innerText)")
        assert names == list(predictor.labels)
        page.evaluate(PASTE, [*picture(3)])
        page.wait_for_selector("#labels li")
        assert said == []  # a breach of the policy would be said there
        page.set_input_files("#file", chosen(SVG))
        page.wait_for_selector("#error:not(:empty)")
        assert page.inner_text("#error").startswith("The image is not a JPEG, PNG, WebP")
        assert page.inner_text("#labels") == ""
        assert [url for url in asked if not url.startswith((address, f"blob:{address}", "data:"))] == []
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(251, 250, 248)") == (scheme == "light")
        focused = set()
        for _ in range(6):
            page.keyboard.press("Tab")
            focused.add(page.evaluate("document.activeElement.id || document.activeElement.href"))
        assert {"file", "camera", f"{address}/api"} <= focused


@pytest.mark.slow
def test_the_page_in_chinese(tmp_path, engine):
    """A browser that prefers Chinese sees no English but what the server says."""
    folder = calibrated(trained_folder(tmp_path, labels="uvwxyz"))
    predictor = Predictor(folder)
    answers = {answer.sure: (seed, answer) for seed in range(40) for answer in predictor.stream([picture(seed)])}
    chinese = {"locale": "zh-CN", "about": "此模型可区分 6 个标签。"}
    with server(folder) as (_, address), opened(engine, address, **chinese) as (page, said, _):
        assert page.evaluate("document.documentElement.lang") == "zh-CN"
        assert "这张图片里是什么" in page.title()
        for sure, (seed, answer) in answers.items():
            page.set_input_files("#file", chosen(picture(seed)))
            page.wait_for_selector("#labels li:nth-child(5)")
            assert page.inner_text("#heading") == (answer.labels[0]["label"] if sure else "无法确定")
            page.click("#why")
            page.wait_for_selector("#looked:visible")
            assert page.inner_text("#said").startswith("类别 token 的回答是")
            assert LATIN_WORDS.findall(page.inner_text("body") + page.get_attribute("#map", "alt")) == []
            page.evaluate("document.querySelector('#labels').replaceChildren()")
        assert said == []


DROP = """bytes => { const transfer = new DataTransfer();
    if (bytes) transfer.items.add(new File([new Uint8Array(bytes)], "d.png", {type: "image/png"}));
    else transfer.items.add("text", "text/plain");
    const place = document.getElementById("drop");
    const taken = (name) => !place.dispatchEvent(
        new DragEvent(name, {dataTransfer: transfer, bubbles: true, cancelable: true}));
    const shown = () => place.classList.contains("over");
    return [taken("dragover"), shown(), taken("dragleave") || shown(), taken("dragover"), shown(), taken("drop"),
        shown()] }"""


@pytest.mark.slow
def test_an_image_dropped_on_the_page(folder, engine):
    """The browser would leave the page for it, unless the page takes it; and its place is marked while it hovers."""
    with server(folder) as (_, address), opened(engine, address) as (page, said, _):
        for seed in (4, 5):
            assert page.evaluate(DROP, [*picture(seed)]) == [True, True, False, True, True, True, False]
            page.wait_for_selector("#labels li:nth-child(5)")
            names = page.eval_on_selector_all("#labels .name", "names => names.map(each => each.textContent)")
            assert names == [each["label"] for each in Predictor(folder)([picture(seed)])[0]]
            assert page.evaluate("document.getElementById('preview').naturalWidth") == 24
            page.evaluate("document.querySelector('#labels').replaceChildren()")
        assert page.evaluate(DROP, None)[-2:] == [True, False]
        assert page.inner_text("#error") == "That was not an image file. Choose one from this device."
        assert page.is_hidden("#why")
        assert said == []
        assert page.url == f"{address}/"


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 360])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_map_on_the_page(scheme, width, folder, engine):
    """By the keyboard alone: the button, the map of either token in words and in colours, and away again."""
    predictor = Predictor(folder)
    pixels = torch.from_numpy(predictor.prepared(picture(0)))[None]
    expected = explain_pixels(predictor.model, predictor.processor, pixels, methods=["relevance"])
    seen = expected.seen.resize((224, 224), Image.Resampling.NEAREST)
    window = {"color_scheme": scheme, "viewport": {"width": width, "height": 900}}
    with server(folder) as (_, address), opened(engine, address, **window) as (page, said, asked):

        def focused():
            return page.evaluate("document.activeElement.id")

        def asked_for(path):
            return sum(url == address + path for url in asked)

        assert page.is_hidden("#why")
        page.set_input_files("#file", chosen(picture(0)))
        page.wait_for_selector("#labels li")
        assert page.is_hidden("#looked")
        assert asked_for("/v1/explain") == 0  # unless somebody wants to know
        while focused() != "why":
            page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.wait_for_selector("#looked:visible")
        assert (focused(), page.inner_text("#why")) == ("why", "Hide what it looked at")
        page.keyboard.press("Tab")
        for answer, each in zip(expected.answers, expected.maps, strict=True):
            assert focused() == each.token
            assert page.get_attribute("#seen", "src") == data_uri(seen)
            assert page.get_attribute("#map", "src") == data_uri(overlay(seen, each.values))
            assert page.get_attribute("#map", "alt") == f"Map over the image, strongest {each.strongest}"
            assert page.inner_text("#said") == (
                f"The {each.token} token answers \u201c{answer.label}\u201d. Its map is strongest {each.strongest}."
            )
            assert page.eval_on_selector_all("#looked img", "all => all.map(each => each.naturalWidth)") == [224, 224]
            page.keyboard.press("ArrowRight")
        assert focused() == "class"
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.keyboard.press("Shift+Tab")
        for hidden in (True, False):
            page.keyboard.press("Enter")
            assert page.is_hidden("#looked") == hidden
        assert (asked_for("/v1/classify"), asked_for("/v1/explain")) == (1, 1)
        page.set_input_files("#file", chosen(picture(1)))
        page.wait_for_selector("#why:visible")
        assert page.is_hidden("#looked")
        page.click("#why")
        page.wait_for_selector("#looked:visible")
        assert page.get_attribute("#seen", "src") != data_uri(seen)
        assert asked_for("/v1/explain") == 2
        assert said == []


@pytest.mark.slow
def test_maps_that_are_not_to_be_had_on_the_page(tmp_path, folder, engine):
    with server(folder) as (_, address), opened(engine, address) as (page, _, _):
        page.set_input_files("#file", chosen(picture(0)))
        page.wait_for_selector("#why:visible")
        page.route(
            "**/v1/explain",
            lambda route: route.fulfill(status=503, json={"error": "too many images wait already; try again in 1 s"}),
        )
        page.click("#why")
        page.wait_for_selector("#map-error:not(:empty)")
        assert page.inner_text("#map-error") == "Too many images wait already; try again in 1 s."
        assert (page.is_hidden("#looked"), page.inner_text("#why")) == (True, "Show what it looked at")
        assert page.locator("#labels li").count() == 5
        page.unroute("**/v1/explain")
        page.click("#why")
        page.wait_for_selector("#looked:visible")
        assert page.inner_text("#map-error") == ""
        page.set_input_files("#file", chosen(SVG))
        page.wait_for_selector("#error:not(:empty)")
        assert page.is_hidden("#looked")
        assert page.is_hidden("#why")
    for name in ("plain", "convnet"):
        with server(trained_folder(tmp_path / name, name)) as (_, address), opened(engine, address) as (page, _, _):
            page.set_input_files("#file", chosen(picture(0)))
            page.wait_for_selector("#labels li")
            assert page.is_visible("#why") == (name == "plain")
            if name == "plain":
                page.click("#why")
                page.wait_for_selector("#looked:visible")
                assert page.is_hidden("#tokens")
                assert page.inner_text("#said").startswith("The class token answers")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_for_everyone(scheme, tmp_path, engine):
    """No violation that axe-core knows: at first, without a key, with a result and its map, with an error, in the API's
    list."""
    if not AXE.is_file():
        pytest.skip(f"axe-core is not at {AXE}: npm install axe-core, or set AXE to its axe.min.js")
    (tmp_path / "keys").write_text("the key\n")
    folder = calibrated(trained_folder(tmp_path / "m"))

    def violations():
        page.evaluate(AXE.read_text())
        found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
        return [(each["id"], each["nodes"][0]["html"]) for each in found]

    with (
        server(folder, "--api-key-file", str(tmp_path / "keys")) as (_, address),
        opened(engine, address, color_scheme=scheme, bypass_csp=True) as (page, _, _),
    ):
        assert violations() == []
        page.set_input_files("#file", chosen(picture(0)))
        page.wait_for_selector("#error:not(:empty)")
        assert page.inner_text("#error") == "This needs a key; send it as Authorization: Bearer KEY."
        page.fill("#key", "the key")
        page.keyboard.press("Enter")
        page.set_input_files("#file", chosen(picture(0)))
        page.wait_for_selector("#labels li")
        assert violations() == []
        page.click("#why")
        page.wait_for_selector("#looked:visible")
        assert violations() == []
        page.set_input_files("#file", chosen(SVG))
        page.wait_for_selector("#error:not(:empty)")
        assert violations() == []
        page.goto(f"{address}/api")
        assert violations() == []
