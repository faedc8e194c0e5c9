"""Maps of what an answer rests on, against the formulas written out, naive loops and models whose reasons are known."""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from support.checks import assert_close, raises_saying
from support.models import CLASS_OF, build, images, small
from torch import nn

from deit import weights
from deit.cli import main
from deit.config import ConvNetConfig
from deit.explain.explanation import Explanation, Map, explain_file, explain_pixels, explained_model, seen_by
from deit.explain.maps import METHODS, deletion_insertion, explain, occlusion, random_order
from deit.explain.picture import colours, figure, overlay
from deit.image.processor import DeiTImageProcessor
from deit.model.convnet import ConvNet
from deit.predict.predictor import Predictor

PAGE = Path(__file__).parents[2] / "docs" / "explain.md"
LABELS = dict(enumerate(["ant", "bee", "cat", "dog", "eel"]))

SHAPES = pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("with_teacher", {}),
        ("with_teacher", {"image_size": (8, 20)}),
        ("with_teacher", {"num_hidden_layers": 1}),
        ("with_teacher", {"image_size": (13, 11), "patch_size": (2, 5), "num_channels": 1, "num_attention_heads": 1}),
        ("classification", {"image_size": (20, 8), "distillation_token": False}),
        ("classification", {}),  # a second token that no head reads
        (
            "classification",
            {
                "image_size": (8, 12),
                "distillation_token": False,
                "layer_scale_init_value": 0.1,
                "position_on_class_token": False,
            },
        ),
    ],
)


class Spelled(nn.Module):
    """Attention of one head after the other, which keeps its weights and their gradients."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x, head_mask=None, need_weights=False, read=None):
        own, width = self.attention, self.attention.head_width
        q, k, v = own.qkv(x).chunk(3, -1)
        self.weights = []
        for head in range(own.heads):
            part = slice(head * width, (head + 1) * width)
            self.weights.append(torch.softmax(q[..., part] @ k[..., part].mT / width**0.5, -1))
            self.weights[-1].retain_grad()
        mixed = [w @ v[..., i * width : (i + 1) * width] for i, w in enumerate(self.weights)]
        return own.out(torch.cat(mixed, -1))[:, :read], None


def logits_of(out):
    """By token, and the number of its row among all tokens."""
    if "cls_logits" in out:
        return {"class": (0, out.cls_logits), "distillation": (1, out.distillation_logits)}
    return {"class": (0, out.logits)}


def spelled_out(model, x, token, target=None):
    """For each image, each block's weights and their gradients, (H, N, N) in float64."""
    model = copy.deepcopy(model)
    for block in model.deit.blocks:
        block.attention = Spelled(block.attention)
    _, logits = logits_of(model(x))[token]
    chosen = logits.argmax(-1) if target is None else torch.as_tensor(target).expand(len(x))
    sum(row[c] for row, c in zip(logits, chosen, strict=True)).backward()
    kept = [
        [(w.detach()[b].double().numpy(), w.grad[b].double().numpy()) for w in block.attention.weights]
        for b in range(len(x))
        for block in model.deit.blocks
    ]
    depth = len(model.deit.blocks)
    return [
        [tuple(np.stack(parts) for parts in zip(*heads, strict=True)) for heads in kept[i : i + depth]]
        for i in range(0, len(kept), depth)
    ]


def rollout_of(blocks):
    joint = np.eye(blocks[0][0].shape[-1])
    for attention, _ in blocks:
        mixed = 0.5 * attention.mean(0) + 0.5 * np.eye(len(joint))
        joint = (mixed / mixed.sum(-1, keepdims=True)) @ joint
    return joint


def relevance_of(blocks):
    relevance = np.eye(blocks[0][0].shape[-1])
    for attention, gradient in blocks:
        relevance = relevance + np.maximum(attention * gradient, 0).mean(0) @ relevance
    return relevance


BY_HAND = {"rollout": rollout_of, "relevance": relevance_of, "attention": lambda blocks: blocks[-1][0].mean(0)}


def map_by_hand(matrix, place, config):
    """The row of a token over the patches, each put where its pixels are."""
    found = np.zeros(config.grid)
    for row in range(config.grid[0]):
        for column in range(config.grid[1]):
            found[row, column] = matrix[place, config.num_prefix_tokens + row * config.grid[1] + column]
    return found


@SHAPES
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("target", [None, 2, [4, 0]])
def test_maps_by_hand(kind, changes, method, target):
    model = build(kind, small(**changes))
    config, x = model.config, images(model.config)
    found = explain(model, x, method, torch.tensor(target) if isinstance(target, list) else target)
    places = {token: place for token, (place, _) in logits_of(model(x)).items()}
    assert list(found) == list(places)
    for token, place in places.items():
        blocks = spelled_out(model, x, token, target)
        expected = np.stack([map_by_hand(BY_HAND[method](each), place, config) for each in blocks])
        assert expected.max() > 1e-3
        assert_close(found[token].double(), torch.tensor(expected), 1e-5)
        assert found[token].min() >= 0
        assert not found[token].requires_grad
    if len(places) == 2:
        assert (found["class"] - found["distillation"]).abs().max() > 1e-3


def test_maps_from_the_attentions_of_transformers(quiet_transformers):
    ours = build("with_teacher", small(image_size=(8, 20)))
    fields = {
        key: value
        for key, value in ours.config.to_dict().items()
        if key
        not in (
            "distillation_token",
            "drop_path_rate",
            "drop_path_schedule",
            "layer_scale_init_value",
            "position_on_class_token",
            "model_type",
        )
    }
    theirs = quiet_transformers.DeiTForImageClassificationWithTeacher(
        quiet_transformers.DeiTConfig(**fields, attn_implementation="eager")
    ).eval()
    theirs.load_state_dict(weights.from_ours(ours._tensors(), "hf5", prefix="deit."))
    x = images(ours.config, 1)
    out = theirs(x, output_attentions=True)
    for token, (place, logits) in logits_of(out).items():
        slopes = torch.autograd.grad(logits.max(), out.attentions, retain_graph=True)
        blocks = [
            (a.detach()[0].double().numpy(), s[0].double().numpy()) for a, s in zip(out.attentions, slopes, strict=True)
        ]
        for method in METHODS:
            expected = map_by_hand(BY_HAND[method](blocks), place, ours.config)
            assert_close(explain(ours, x, method)[token][0].double(), torch.tensor(expected), 1e-5)


# ------------------------------------------------------------------------------------------ from outside, and scores


def answer(model, x, token, target):
    with torch.no_grad():
        return float(torch.softmax(logits_of(model(x[None]))[token][1][0], -1)[target])


def hide(x, row, column, config):
    (height, width), x = config.patch_hw, x.clone()
    x[:, row * height : (row + 1) * height, column * width : (column + 1) * width] = 0
    return x


@SHAPES
def test_occlusion_by_hand(kind, changes):
    model = build(kind, small(**changes))
    config, x = model.config, images(model.config)
    for target in (None, 3):
        for token, drops in occlusion(model, x, target).items():
            for b in range(2):
                own = logits_of(model(x))[token][1][b].argmax().item() if target is None else target
                whole = answer(model, x[b], token, own)
                expected = [
                    [
                        whole - answer(model, hide(x[b], row, column, config), token, own)
                        for column in range(config.grid[1])
                    ]
                    for row in range(config.grid[0])
                ]
                assert_close(drops[b], torch.tensor(expected), 1e-5)


def areas_by_hand(model, x, token, target, order):
    """Probability against fraction, where 32 steps or fewer take the patches in `order`; grey is 0."""
    config, patches = model.config, len(order)
    steps = min(patches, 32)
    fractions, removed, revealed = [], [], []
    for step in range(steps + 1):
        count = round(step * patches / steps)
        turned, rest = order[:count], order[count:]
        fractions.append(count / patches)
        for curve, hidden in ((removed, turned), (revealed, rest)):
            shown = x
            for patch in hidden:
                shown = hide(shown, *divmod(int(patch), config.grid[1]), config)
            curve.append(answer(model, shown, token, target))
    return np.trapezoid(removed, fractions), np.trapezoid(revealed, fractions)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("with_teacher", {"image_size": (8, 20)}),
        ("with_teacher", {"image_size": (13, 11), "patch_size": (2, 2)}),
        ("with_teacher", {"image_size": (20, 28)}),  # 35 patches: more than steps
        ("classification", {"distillation_token": False}),
    ],
)
def test_deletion_and_insertion_by_hand(kind, changes):
    model = build(kind, small(**changes))
    x = images(model.config)
    maps = occlusion(model, x, 1)
    maps["class"] = (5 * maps["class"]).round()  # with equal values, which go in the order of reading
    found = deletion_insertion(model, x, maps, 1)
    assert list(found) == list(maps)
    for token, (deletion, insertion) in found.items():
        for b in range(2):
            order = np.argsort(-maps[token][b].flatten().numpy(), kind="stable")
            expected = areas_by_hand(model, x[b], token, 1, order)
            assert (deletion[b].item(), insertion[b].item()) == pytest.approx(expected, abs=1e-5)


def test_random_orders_are_the_mean_of_some():
    model = build("with_teacher", small(image_size=(8, 20)))
    x = images(model.config)
    found = random_order(model, x, 2, orders=3, seed=7)
    generator = torch.Generator().manual_seed(7)
    orders = [torch.rand(2, 10, generator=generator).argsort(-1) for _ in range(3)]
    for token in ("class", "distillation"):
        for b in range(2):
            areas = [areas_by_hand(model, x[b], token, 2, order[b].numpy()) for order in orders]
            assert found[token].deletion[b].item() == pytest.approx(np.mean([a for a, _ in areas]), abs=1e-5)
            assert found[token].insertion[b].item() == pytest.approx(np.mean([a for _, a in areas]), abs=1e-5)
    assert torch.equal(random_order(model, x, 2)["class"].deletion, random_order(model, x, 2)["class"].deletion)
    assert not torch.equal(random_order(model, x, 2, seed=1)["class"].deletion, random_order(model, x, 2)["class"][0])


# ------------------------------------------------------------------------------------------ a model of known reasons


def squares(count, seed, config):
    """Noise with one patch lit in one colour, which is the class; its place, (row, column)."""
    generator = torch.Generator().manual_seed(seed)
    x = 0.3 * torch.randn(count, 3, *config.image_hw, generator=generator)
    labels = torch.randint(3, (count,), generator=generator)
    places = torch.stack([torch.randint(side, (count,), generator=generator) for side in config.grid], 1)
    for b in range(count):
        light(x[b], labels[b], places[b])
    return x, labels, places


def light(x, label, place):
    row, column = (4 * int(each) for each in place)
    x[label, row : row + 4, column : column + 4] += 2


@pytest.fixture(scope="module")
def spotter():
    """Both heads trained to name the colour of the square, wherever it is on a grid of 3 rows and 5 columns."""
    torch.manual_seed(0)
    model = CLASS_OF["with_teacher"](small(image_size=(12, 20), num_labels=3, num_hidden_layers=2)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(250):
        x, labels, _ = squares(64, 1000 + step, model.config)
        out = model(x)
        optimizer.zero_grad()
        (F.cross_entropy(out.cls_logits, labels) + F.cross_entropy(out.distillation_logits, labels)).backward()
        optimizer.step()
    return model.eval()


def strongest(values):
    """(row, column) of the largest value of each map."""
    places = values.flatten(1).argmax(-1)
    return torch.stack([places // values.shape[2], places % values.shape[2]], 1)


def test_the_reason_is_found(spotter):
    x, labels, places = squares(40, 1, spotter.config)
    out = spotter(x)
    assert (out.cls_logits.argmax(-1) == labels).all()
    assert (out.distillation_logits.argmax(-1) == labels).all()
    chance = random_order(spotter, x, labels)
    # Of 15 patches chance finds the right one in 0.07 of the images.
    for maps, share in (
        (explain(spotter, x, "rollout"), 0.95),
        (explain(spotter, x, "relevance"), 0.5),
        (explain(spotter, x, "attention"), 0.95),
        (occlusion(spotter, x), 0.95),
    ):
        scores = deletion_insertion(spotter, x, maps)
        for token, values in maps.items():
            assert (strongest(values) == places).all(1).float().mean() >= share
            assert (scores[token].deletion < chance[token].deletion).float().mean() >= 0.9
            assert (scores[token].insertion > chance[token].insertion).float().mean() >= 0.9
            assert (chance[token].deletion - scores[token].deletion).mean() > 0.1
            assert (scores[token].insertion - chance[token].insertion).mean() > 0.1


def test_the_reason_for_either_of_two_classes(spotter):
    """A red square and a blue one: relevance and occlusion tell which is the reason for which."""
    x, labels, places = squares(40, 2, spotter.config)
    others = (labels + 1) % 3
    elsewhere = torch.stack([(places[:, 0] + 1) % 3, (places[:, 1] + 2) % 5], 1)
    for each, label, place in zip(x, others, elsewhere, strict=True):
        light(each, label, place)
    rollout = explain(spotter, x, "rollout", labels)
    assert_close(explain(spotter, x, "rollout", others), rollout, 0)
    for target, where in ((labels, places), (others, elsewhere)):
        chance = random_order(spotter, x, target)
        for maps, share in ((explain(spotter, x, "relevance", target), 0.5), (occlusion(spotter, x, target), 0.6)):
            scores = deletion_insertion(spotter, x, maps, target)
            for token, values in maps.items():
                assert (strongest(values) == where).all(1).float().mean() >= share
                assert (chance[token].deletion - scores[token].deletion).mean() > 0.1
                assert (scores[token].insertion - chance[token].insertion).mean() > 0.05


# --------------------------------------------------------------------------------------------- the model stays itself


@pytest.mark.parametrize("method", METHODS)
def test_the_model_stays_as_it_was(method):
    model = build("with_teacher", small(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5, drop_path_rate=0.5))
    x = images(model.config)
    expected = explain(model, x, method)
    model.train()
    model.deit.blocks[1].eval()
    model.deit.position.requires_grad_(False)
    modes = [part.training for part in model.modules()]
    given = x.clone().requires_grad_()
    assert_close(explain(model, given, method), expected, 0)
    occlusion(model, given)
    random_order(model, given, orders=1)
    assert [part.training for part in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["deit.position"]
    assert given.grad is None
    assert given.requires_grad
    with pytest.raises(ValueError, match="pixel_values must be"):
        explain(model, x[0], method)
    assert [part.training for part in model.modules()] == modes


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_around(mode):
    model = build("with_teacher", small())
    x = images(model.config)
    expected = explain(model, x, "relevance")
    model.requires_grad_(False)
    assert_close(explain(model, x, "relevance"), expected, 0)
    with mode():
        assert_close(explain(model, x.clone(), "relevance"), expected, 0)


def test_options_of_the_config_and_other_types():
    model = build("with_teacher", small())
    x = images(model.config)
    other = build("with_teacher", small(return_dict=False, output_attentions=True, output_hidden_states=True))
    for method in METHODS:
        assert_close(explain(other, x, method), explain(model, x, method), 0)
    assert_close(occlusion(other, x), occlusion(model, x))
    half = copy.deepcopy(model).bfloat16()
    for method in METHODS:
        for token, values in explain(half, x, method, 1).items():
            assert values.dtype == torch.float32
            assert_close(values, explain(model, x, method, 1)[token], 0.05)


def test_what_is_refused():
    model = build("with_teacher", small())
    x = images(model.config)
    with raises_saying(ValueError, "method='saliency'", "rollout, relevance, attention"):
        explain(model, x, "saliency")
    for target in (5, -1, torch.tensor([0, 1, 2]), torch.tensor(0.5), torch.tensor([True, False])):
        for function in (
            lambda t: explain(model, x, "relevance", t),
            lambda t: occlusion(model, x, t),
            lambda t: random_order(model, x, t),
        ):
            with pytest.raises(ValueError, match="target must be an integer from 0 to 4, or one for each of 2 images"):
                function(target)
    for other, said in [
        (ConvNet(ConvNetConfig()), "a ConvNet can't"),
        (build("backbone", small()), "a DeiTModel can't"),
        (build("masked_image", small()), "a DeiTForMaskedImageModeling can't"),
    ]:
        with raises_saying(ValueError, said, "give a DeiT or ViT classifier"):
            explain(other, x, "rollout")
        with raises_saying(ValueError, said):
            occlusion(other, x)
        with raises_saying(ValueError, said):
            random_order(other, x)
    for count in (0, 1):
        with raises_saying(ValueError, f"the model has {count} outputs", "2 or more"):
            explain(build("classification", small(num_labels=count)), x, "rollout")
    maps = explain(model, x, "rollout")
    with raises_saying(ValueError, "class token is (1, 4, 4), expected (2, 4, 4) for the class and distillation token"):
        deletion_insertion(model, x, {"class": maps["class"][:1]})
    single = build("classification", small())
    with raises_saying(ValueError, "a map for the distillation token is (2, 4, 4), expected (2, 4, 4) for the class"):
        deletion_insertion(single, x, maps)


# ------------------------------------------------------------------------------------------------------------ figures


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


def lightness(colour):
    """CIE L*, 0 to 100, of sRGB."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in np.asarray(colour) / 255]
    luminance = np.dot([0.2126, 0.7152, 0.0722], linear)
    return 116 * np.cbrt(luminance) - 16


def test_colours_differ_in_lightness_alone():
    """Even steps, so that no eye needs to tell hues."""
    steps = np.diff([lightness(c) for c in colours(np.linspace(0, 1, 41))])
    assert steps.min() > 1.2
    assert steps.max() < 2.8
    assert colours(np.array([0.0, 1.0])).tolist() == [[0x44, 0x01, 0x54], [0xFD, 0xE7, 0x25]]


def test_a_map_lies_over_its_patches():
    picture = Image.new("RGB", (100, 40), (80, 90, 100))
    values = np.zeros((2, 5))
    values[0, 3] = 7.0
    drawn = np.asarray(overlay(picture, values)).astype(int)
    assert drawn.shape == (40, 100, 3)
    yellow = np.abs(drawn - (0.3 * 89 + 0.7 * colours(np.array(1.0)))).sum(-1) < 30
    rows, columns = np.nonzero(yellow)
    assert (rows.max() < 20, columns.min() >= 60, columns.max() < 80) == (True, True, True)
    assert yellow[10, 70]
    signed = np.where(values > 0, values, -1000.0)  # a large negative drop does not drown what is positive
    assert np.array_equal(np.asarray(overlay(picture, signed)), drawn)
    for flat in (np.zeros((2, 5)), np.full((2, 5), 0.3), np.full((2, 5), -0.3)):
        assert len(np.unique(np.asarray(overlay(picture, flat)).reshape(-1, 3), axis=0)) == 1


@pytest.fixture
def folder(tmp_path):
    for name, kind, changes in [
        ("m", "with_teacher", {}),
        ("vit", "classification", {"distillation_token": False}),
        ("wide", "with_teacher", {"image_size": (8, 20)}),
        ("backbone", "backbone", {}),
    ]:
        config = small(id2label=LABELS, num_labels=None, **changes)
        build(kind, config).save_pretrained(tmp_path / name)
        DeiTImageProcessor.paper(config.image_size).save_pretrained(tmp_path / name)
    ConvNet(ConvNetConfig(widths=(4,), depth=1)).save_pretrained(tmp_path / "convnet")
    DeiTImageProcessor.paper(16).save_pretrained(tmp_path / "convnet")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(tmp_path / "photo.png")
    return tmp_path


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
    with raises_saying(ValueError, "a ConvNet can't be explained"):
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


def test_the_figure_holds_the_image_and_every_map(folder):
    found = explain_file(folder / "wide", folder / "photo.png")
    drawn = np.asarray(figure(found))
    picture = found.seen.resize((280, 112), Image.Resampling.BICUBIC)
    places = []
    for row in ("class", "distillation"):
        cells = [picture, *(overlay(picture, each.values) for each in found.maps if each.token == row)]
        for cell in map(np.asarray, cells):
            corners = (drawn[:, :-279] == cell[0, 0]) & (drawn[:, 279:] == cell[0, -1])
            hits = [
                (y, x) for y, x in np.argwhere(corners.all(-1)) if np.array_equal(drawn[y : y + 112, x : x + 280], cell)
            ]
            assert hits
            places.append(hits[0] if row == "class" else hits[-1])
    assert len(set(places)) == 10
    assert [y for y, _ in places] == [places[0][0]] * 5 + [places[5][0]] * 5
    assert [x for _, x in places[:5]] == [x for _, x in places[5:]] == sorted(x for _, x in places[:5])
    single = figure(explain_file(folder / "vit", folder / "photo.png", methods=["rollout"]))
    assert single.width < drawn.shape[1]


@pytest.mark.parametrize("label", ["a very long name, " * 20, "猫", "line\nbreak", ""])
def test_any_label_is_drawn(folder, label):
    found = explain_file(folder / "vit", folder / "photo.png", methods=["rollout"])
    named = Explanation(
        found.model,
        label,
        found.seen,
        tuple(type(a)(**{**vars(a), "label": label, "target": "x"}) for a in found.answers),
        found.maps,
    )
    assert figure(named).size == figure(found).size


# ------------------------------------------------------------------------------------------------------------ command


def run(capsys, *arguments, status=0):
    assert main(["explain", *map(str, arguments)]) == status
    return capsys.readouterr()


def keys_of(value, path=""):
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from keys_of(inner, f"{path}.{name}".lstrip("."))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for inner in value:
            yield from keys_of(inner, f"{path}[]")
    else:
        yield path


def test_the_command(folder, capsys):
    out = folder / "new" / "figure.png"
    shown = run(capsys, folder / "m", folder / "photo.png", "--out", out, "--json", "--device", "cpu").out
    found = json.loads(shown)
    expected = explain_file(folder / "m", folder / "photo.png")
    assert found == json.loads(json.dumps({**expected.to_dict(), "figure": str(out)}))
    assert found["image_size"] == [16, 16]
    assert np.array_equal(np.asarray(Image.open(out)), np.asarray(figure(expected)))
    assert [path.name for path in out.parent.iterdir()] == ["figure.png"]
    documented = re.findall(r"^\| `([^`]+)` \|", PAGE.read_text().split("## The JSON")[1], re.MULTILINE)
    assert sorted(set(keys_of(found))) == sorted(documented)


def test_the_table_of_the_command(folder, capsys):
    shown = run(
        capsys, folder / "m", folder / "photo.png", "--out", folder / "f.PNG", "--method", "rollout", "--target", "bee"
    ).out
    found = explain_file(folder / "m", folder / "photo.png", methods=["rollout"], target="bee")
    rows = [line.split() for line in shown.splitlines()]
    for answer_ in found.answers:
        for each in (each for each in found.maps if each.token == answer_.token):
            assert [answer_.token, each.method, *(f"{score:.3f}" for score in each.score)] in rows
        assert [answer_.token, "random", "order", *(f"{score:.3f}" for score in answer_.chance)] in rows
        said = f"{answer_.token} token: {answer_.label} {answer_.probability:.3f}"
        said += "" if answer_.label == "bee" else f"; explained: bee {answer_.target_probability:.3f}"
        assert said in shown.splitlines()
    assert {answer_.label == "bee" for answer_ in found.answers} == {True, False}
    assert shown.splitlines()[-1] == str(folder / "f.PNG")


def test_what_the_command_refuses(folder, capsys):
    photo, out = folder / "photo.png", folder / "figure.png"
    out.write_bytes(b"as it was")
    (folder / "bad.png").write_bytes(b"no image")
    build("with_teacher", small(id2label={0: "crane", 1: "crane", 2: "tench"}, num_labels=None)).save_pretrained(
        folder / "cranes"
    )
    DeiTImageProcessor.paper(16).save_pretrained(folder / "cranes")
    broken = build("with_teacher", small())
    broken.cls_classifier.bias.data[0] = float("nan")
    broken.save_pretrained(folder / "nan")
    DeiTImageProcessor.paper(16).save_pretrained(folder / "nan")
    for arguments, said in [
        (("m", photo, "--target", "Ant"), "the model knows no class 'Ant'; it knows 'ant'"),
        (("cranes", photo, "--target", "crane"), "the model calls 2 of its classes 'crane'"),
        (("convnet", photo), "a ConvNet can't be explained"),
        (("backbone", photo), "holds a DeiTModel without classes; expected a classifier"),
        (("m", folder / "bad.png"), f"{folder / 'bad.png'} is not an image"),
        (("m", folder / "none.png"), "none.png"),
        (("nothing", photo), "does not exist"),
        (("nan", photo), "not a number"),
        (("m", photo, "--device", "abacus"), "abacus"),
    ]:
        shown = run(capsys, folder / arguments[0], *arguments[1:], "--out", out, status=1)
        assert shown.err.startswith("deit explain: ")
        assert said in shown.err
        assert shown.out == ""
        assert out.read_bytes() == b"as it was"
    assert "ends in .png" in run(capsys, folder / "m", photo, "--out", folder / "x.jpg", status=1).err
    before = photo.read_bytes()
    assert "is the image itself" in run(capsys, folder / "m", photo, "--out", photo, status=1).err
    assert photo.read_bytes() == before
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_the_python_of_the_guide(folder, monkeypatch):
    monkeypatch.chdir(folder)
    [block] = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names = {}
    exec(block.replace("runs/taught/model", "m").replace("photo.jpg", "photo.png"), names)
    assert names["maps"].keys() == names["drops"].keys() == names["scores"].keys() == {"class", "distillation"}
    assert names["better"].shape == (1,)
