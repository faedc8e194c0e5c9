"""Maps in a report: those of `explain`, of the images that say most."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from support.models import trained_folder
from support.reports import QUIET, checked

from deit.evaluate.models import examine_files
from deit.explain.explanation import Map, seen_by
from deit.explain.maps import explain
from deit.explain.picture import overlay
from deit.image.processor import DeiTImageProcessor
from deit.model.load import load_model
from deit.report import document
from deit.report import maps as report_maps
from deit.report.markup import data_uri


def rows_shown(numbers):
    """Four wrong answers, two doubtful ones, two right ones, each from its end."""
    order = np.argsort(numbers.confidence, kind="stable")
    order = [i for i in order if numbers.read[i]]
    wrong = [i for i in order[::-1] if numbers.labels[i] != numbers.predicted[i]]
    doubtful = [i for i in order if i not in wrong[:12]]
    right = [i for i in order[::-1] if numbers.labels[i] == numbers.predicted[i] and i not in doubtful[:2]]
    return wrong[:4], doubtful[:2], right[:2]


@pytest.mark.parametrize("ratio", [None, 0.5])
def test_maps_are_those_of_explain(judged, ratio):
    if ratio:
        judged = examine_files(judged.main.model, judged.data, crop_ratio=ratio, device="cpu", console=QUIET)
    numbers, model = judged.main.report, load_model(judged.main.model)
    processor = DeiTImageProcessor.from_pretrained(judged.main.model)
    processor = processor.with_crop_ratio(ratio) if ratio else processor
    maps = report_maps.explained(judged)
    groups = rows_shown(numbers)
    assert [len(rows) for rows in groups] == [4, 2, 2]
    assert list(maps.found) == [row for rows in groups for row in rows]
    page = checked(document.page(None, judged, maps=maps))
    expected = []
    for row in maps.found:
        pixels = processor([judged.files[row]], return_tensors="pt").pixel_values
        [seen] = seen_by(model.config, pixels, processor)
        large = seen.resize((144, 96), Image.Resampling.NEAREST)
        expected.append(
            (
                data_uri(large),
                f"True label \u2068{'abcde'[numbers.labels[row]]}\u2069; predicted \u2068"
                f"{'abcde'[numbers.predicted[row]]}\u2069 with probability {numbers.confidence[row]:.2f}",
            )
        )
        out = model(pixels)
        for token, logits in (("class", out.cls_logits), ("distillation", out.distillation_logits)):
            values = explain(model, pixels, "relevance")[token][0].numpy()
            said = "abcde"[int(logits.argmax())]
            expected.append(
                (
                    data_uri(overlay(large, values)),
                    f"Map of the {token} token, which answers \u2068{said}"
                    f"\u2069: strongest {Map(token, 'relevance', values).strongest}",
                )
            )
            page.sees(f"{token} token{said} ({logits.softmax(-1).max():.2f})")
    images = [(image[1]["src"], image[1]["alt"]) for image in page.all("img")]
    gallery = 24 if len(numbers.labels) > 24 else len(numbers.labels)
    assert images[-len(expected) :] == expected
    assert len(images) <= gallery + len(expected)
    [link] = [entry for entry in page.all("a") if entry[1]["href"] == "#maps"]
    assert link[2] == "What answers rest on"
    page.sees("Most wrong", "Most doubtful", "Surest right answers", "the answer of each token\u2019s own head")
    assert len(document.page(None, judged, maps=maps)) - len(document.page(None, judged)) < 300_000


def test_maps_are_over_the_crop_that_was_asked_for(judged, tmp_path):
    """A side of 29, of which the ratio 20 / 29 that the report shows would make 28."""
    model = trained_folder(tmp_path / "m", image_size=20)
    found = examine_files(model, judged.data, crop_ratio=0.68, device="cpu", console=QUIET)
    processor = DeiTImageProcessor.from_pretrained(model).with_crop_ratio(0.68)
    assert (processor.size, int(20 / found.main.crop_ratio)) == ({"shortest_edge": 29}, 28)
    for row, explanation in report_maps.explained(found).found.items():
        pixels = processor([found.files[row]], return_tensors="pt").pixel_values
        [seen] = seen_by(load_model(model).config, pixels, processor)
        assert np.array_equal(np.asarray(explanation.seen), np.asarray(seen))


def test_images_without_a_map_are_left_out(judged, tmp_path):
    maps = report_maps.explained(judged)
    first, *others = maps.found
    files = list(judged.files)
    files[first] = tmp_path / "gone.png"
    assert list(report_maps.explained(replace(judged, files=tuple(files))).found) == others
    assert report_maps.explained(replace(judged, files=())) is None
    assert "What answers rest on" not in document.page(None, judged, maps=report_maps.Maps())


def test_models_that_can_not_be_explained_have_no_maps(judged, tmp_path):
    found = examine_files(trained_folder(tmp_path / "c", "convnet"), judged.data, device="cpu", console=QUIET)
    assert report_maps.explained(found) is None
    file = document.of_evaluation(tmp_path / "page.html", found, device="cpu")
    assert "What answers rest on" not in file.read_text()


def test_maps_that_fail_lose_no_report(judged, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "deit.report.maps.explain_pixels", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("out of <memory>"))
    )
    page = checked(document.of_evaluation(tmp_path / "page.html", judged, device="cpu").read_text())
    page.sees("What the answers rest on could not be shown: out of <memory>.", "Accuracy of each head")
