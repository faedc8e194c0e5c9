"""An explanation of a file or of pixels: its answers, maps and words, and what can't be explained."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from support.checks import assert_close, raises_saying
from support.models import CLASS_OF, LABELS, build, images, logits_of, small

from deit.explain.explanation import Map, explain_file, explain_pixels, explained_model, seen_by
from deit.explain.maps import METHODS, deletion_insertion, explain, occlusion, random_order
from deit.explain.picture import figure, overlay
from deit.image.processor import DeiTImageProcessor
from deit.predict.predictor import Predictor


def test_the_model_saw_what_is_drawn():
    """As the processor leaves the pixels when it does not normalise."""
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8))
    for processor in (
        DeiTImageProcessor.paper((21, 30)),
        DeiTImageProcessor(crop_size=(21, 30), size=40),
        DeiTImageProcessor(crop_size=(21, 30), size=40, do_normalize=False),
        DeiTImageProcessor(crop_size=(21, 30), size=40, do_normalize=False, do_rescale=False),
    ):
        pixels = processor([picture], return_tensors="pt").pixel_values
        [seen] = seen_by(small(image_size=(21, 30)), pixels, processor)
        raw = processor([picture], do_normalize=False, do_rescale=False)["pixel_values"][0]
        assert seen.size == (28, 20)  # whole patches of 4
        assert np.array_equal(np.asarray(seen), raw.transpose(1, 2, 0)[:20, :28].astype(np.uint8))
    grey = DeiTImageProcessor(size=16, crop_size=16, image_mean=[0.4], image_std=[0.2])
    pixels = grey([picture], return_tensors="pt").pixel_values
    assert pixels.shape[1] == 1
    [seen] = seen_by(small(num_channels=1), pixels, grey)
    raw = grey([picture], do_normalize=False, do_rescale=False)["pixel_values"][0][0]
    assert np.array_equal(np.asarray(seen), np.repeat(raw[..., None], 3, -1).astype(np.uint8))


def test_a_file_explained(folder):
    found = explain_file(folder / "wide", folder / "photo.png", target="dog")
    model = CLASS_OF["with_teacher"].from_pretrained(folder / "wide")
    pixels = DeiTImageProcessor.from_pretrained(folder / "wide")(
        [folder / "photo.png"], return_tensors="pt"
    ).pixel_values
    out = model(pixels)
    chance = random_order(model, pixels, 3)
    for each, (token, (_, logits)) in zip(found.answers, logits_of(out).items(), strict=True):
        scores = logits[0].softmax(-1)
        assert (each.token, each.label, each.target) == (token, LABELS[scores.argmax().item()], "dog")
        assert (each.probability, each.target_probability) == pytest.approx((scores.max().item(), scores[3].item()))
        assert each.chance == pytest.approx([area.item() for area in chance[token]])
    assert [(each.method, each.token) for each in found.maps] == [
        (method, token) for method in (*METHODS, "occlusion") for token in ("class", "distillation")
    ]
    for each in found.maps:
        maps = occlusion(model, pixels, 3) if each.method == "occlusion" else explain(model, pixels, each.method, 3)
        assert each.values.shape == (2, 5)
        assert_close(each.values, maps[each.token][0].numpy())
        areas = deletion_insertion(model, pixels, maps, 3)[each.token]
        assert each.score == pytest.approx([area.item() for area in areas], abs=1e-5)
    decided = explain_file(folder / "wide", folder / "photo.png", methods=["relevance"])
    assert [each.target for each in decided.answers] == [each.label for each in decided.answers]
    assert {each.method for each in decided.maps} == {"relevance", "occlusion"}
    assert decided.of("distillation") == [each for each in decided.maps if each.token == "distillation"]


def test_pixels_explained_without_scores(folder):
    predictor = Predictor(folder / "m")
    pixels = torch.from_numpy(predictor.prepared(folder / "photo.png"))[None]
    found = explain_pixels(explained_model(predictor), predictor.processor, pixels, methods=["rollout"], target=1)
    scored = explain_file(folder / "m", folder / "photo.png", methods=["rollout"], target="bee")
    for each, other in zip(found.maps, scored.maps[:2], strict=True):
        assert (each.token, each.method, each.score) == (other.token, "rollout", None)
        assert np.array_equal(each.values, other.values)
    assert [replace(answer, chance=None) for answer in scored.answers] == list(found.answers)
    assert np.array_equal(np.asarray(found.seen), np.asarray(scored.seen))
    keys = {key for each in (*found.maps, *found.answers) for key in each.to_dict()}
    assert not keys & {"deletion", "insertion", "score", "chance"}
    assert "deletion" not in str(found)
    drawn = np.asarray(figure(found))
    assert drawn.shape[1] < np.asarray(figure(scored)).shape[1]
    for each in found.maps:
        assert holds(drawn, overlay(found.seen.resize((280, 280), Image.Resampling.BICUBIC), each.values))


def holds(drawn, picture):
    """Whether a figure shows a picture somewhere."""
    cell = np.asarray(picture)
    height, width = cell.shape[:2]
    corners = (drawn[:, : 1 - width] == cell[0, 0]) & (drawn[:, width - 1 :] == cell[0, -1])
    return any(np.array_equal(drawn[y : y + height, x : x + width], cell) for y, x in np.argwhere(corners.all(-1)))


def test_what_can_not_be_explained_is_said_before_it_is_tried(folder):
    predictor = Predictor(folder / "convnet")
    with raises_saying(ValueError, "a ConvNet can't be explained", "RUN/student/model"):
        explained_model(predictor)
    predictor.model = None
    with raises_saying(ValueError, "this is an exported model, whose inside can't be seen"):
        explained_model(predictor)
    broken = build("with_teacher", small())
    broken.cls_classifier.bias.data[0] = float("nan")
    with raises_saying(ValueError, "not a number", "take another checkpoint"):
        explain_pixels(broken, DeiTImageProcessor.paper(16), images(broken.config, 1), methods=["attention"])


@pytest.mark.parametrize(
    ("shape", "place", "said"),
    [
        ((3, 3), (0, 0), "in the upper left"),
        ((3, 3), (0, 1), "at the top"),
        ((3, 3), (0, 2), "in the upper right"),
        ((3, 3), (1, 0), "on the left"),
        ((3, 3), (1, 1), "in the middle"),
        ((3, 3), (1, 2), "on the right"),
        ((3, 3), (2, 0), "in the lower left"),
        ((3, 3), (2, 1), "at the bottom"),
        ((3, 3), (2, 2), "in the lower right"),
        ((14, 14), (4, 8), "at the top"),
        ((14, 14), (13, 4), "in the lower left"),
        ((1, 1), (0, 0), "nowhere more than elsewhere"),
        ((1, 2), (0, 1), "on the right"),
        ((1, 14), (0, 6), "in the middle"),
        ((2, 1), (1, 0), "at the bottom"),
    ],
)
def test_where_a_map_is_strongest_in_words(shape, place, said):
    values = np.full(shape, -1.0)
    values[place] = 0.5
    assert Map("class", "occlusion", values).strongest == said
