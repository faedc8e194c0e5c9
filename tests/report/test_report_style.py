"""How a report looks: contrast by arithmetic, the rest in a browser."""

import re
from importlib import resources

import pytest
from PIL import Image
from support.browser import AXE, BROWSER
from support.reports import ABOUT, HOSTILE, evaluation, record
from support.runs import small_recipe

from deit.recipe import Cosine, steps
from deit.report import LivePage, document
from deit.report import maps as report_maps
from deit.train.records import Record


def luminance(colour):
    parts = [value / 255 for value in colour]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one, other):
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [0, 1, 2], ids=["light", "dark", "print"])
def test_contrast_of_text_and_of_lines(scheme):
    """WCAG 2.2 AA: 4.5 for text and 3 for lines. An automatic check of the page can't see through SVG."""
    style = resources.files("deit.report").joinpath("report.css").read_text(encoding="utf-8")
    blocks = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    assert len(blocks) == 3
    colours = {}
    for name, value in re.findall(r"--([\w]+): ([^;]+);", blocks[scheme]):
        digits = value[1:] if len(value) == 7 else "".join(2 * digit for digit in value[1:])
        colours[name] = tuple(map(int, value.split())) if value[0] != "#" else tuple(bytes.fromhex(digits))
    paper = colours["paper"]
    for text in ("ink", "soft", "link"):
        for ground in ("paper", "tint"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    for line in ("s0", "s1", "s2", "s3", "s4", "s5"):
        assert contrast(colours[line], paper) >= 3, line
    deepest = max(float(alpha) for alpha in re.findall(r"var\(--hue\) / ([.\d]+)", style))
    for hue in ("right", "wrong"):
        ground = [deepest * top + (1 - deepest) * below for top, below in zip(colours[hue], paper, strict=True)]
        assert contrast(colours["ink"], ground) >= 4.5, hue


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "language"), [("light", "en-US"), ("dark", "en-US"), ("light", "zh-CN")])
@pytest.mark.parametrize("width", [1200, 400])
def test_in_a_browser(scheme, language, width, tmp_path, trained, judged):
    """No violation that axe-core knows, no request, no complaint on the console, nothing wider than the page."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not BROWSER:
        pytest.skip("no Chromium is installed")
    if not AXE.is_file():
        pytest.skip(f"axe-core is not at {AXE}: npm install axe-core, or set AXE to its axe.min.js")
    Image.effect_noise((300, 200), 50).save(tmp_path / "noise.png")
    run = Record.read(record(tmp_path / "run", ABOUT))
    hostile = evaluation(names=HOSTILE, files=[tmp_path / "noise.png"] * 60)
    many = evaluation(count=3000, classes=100, heads=("fused", "class", "distillation", "softmax"))
    maps = document.write(tmp_path / "maps.html", None, judged, maps=report_maps.explained(judged))
    live = LivePage()
    live.begin(record(tmp_path / "live", ABOUT), small_recipe(schedule=Cosine(total=steps(1000))), 0)
    pages = [
        trained / "run" / document.FILE,
        maps,
        document.write(tmp_path / "hostile.html", run, hostile),
        document.write(tmp_path / "many.html", None, many),
        document.write(tmp_path / "run.html", run, None),
        tmp_path / "live" / document.FILE,
    ]
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        for file in pages:
            said, asked = [], []
            shown = {"color_scheme": scheme, "locale": language, "viewport": {"width": width, "height": 900}}
            context = browser.new_context(**shown)
            page = context.new_page()
            page.on("console", lambda message, said=said: said.append(message.text))
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.goto(file.as_uri())
            assert said == []  # a breach of the policy is said there
            assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]
            assert page.evaluate("document.documentElement.lang") == ("en" if language == "en-US" else language)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            background = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (background == "rgb(255, 255, 255)") == (scheme == "light")
            for pressed in range(1, 4):
                page.keyboard.press("Tab")
                assert page.evaluate("document.activeElement.tagName") == "A", pressed
            context.close()
            context = browser.new_context(**shown, bypass_csp=True)
            page = context.new_page()
            page.goto(file.as_uri())
            page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
            page.evaluate(AXE.read_text())
            found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
            if file.parent.name == "live":  # that it loads itself again is its purpose, and the page says so
                found = [each for each in found if each["id"] != "meta-refresh"]
            assert [(each["id"], each["nodes"][0]["html"]) for each in found] == []
            context.close()
        browser.close()
