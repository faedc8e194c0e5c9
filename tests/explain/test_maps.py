"""Maps of what an answer rests on, and their scores, against the formulas written out and naive loops."""

import copy

import numpy as np
import pytest
import torch
from support.checks import assert_close, raises_saying
from support.models import build, images, logits_of, small
from torch import nn

from deit import weights
from deit.config import ConvNetConfig
from deit.explain.maps import METHODS, deletion_insertion, explain, occlusion, random_order
from deit.model.convnet import ConvNet

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

    def forward(self, x, head_mask=None, need_weights=False, read=None, sizes=None, need_keys=False):
        own, width = self.attention, self.attention.head_width
        q, k, v = own.qkv(x).chunk(3, -1)
        self.weights = []
        for head in range(own.heads):
            part = slice(head * width, (head + 1) * width)
            scores = q[..., part] @ k[..., part].mT / width**0.5
            self.weights.append(torch.softmax(scores if sizes is None else scores + sizes.log().unsqueeze(1), -1))
            self.weights[-1].retain_grad()
        mixed = [w @ v[..., i * width : (i + 1) * width] for i, w in enumerate(self.weights)]
        keys = k.unflatten(-1, (own.heads, width)).transpose(1, 2) if need_keys else None
        return own.out(torch.cat(mixed, -1))[:, :read], None, keys


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


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["with_teacher", "classification"])
def test_maps_of_merged_tokens_by_hand(kind, method):
    """Each merge is a matrix of means between the blocks, so the maps are over the patches that went in."""
    model = build(kind, small(merge=5, image_size=(12, 20), num_hidden_layers=4))
    config, x = model.config, images(model.config)
    with torch.no_grad():
        held = model(x, output_attentions=True).token_of_patch
    found, prefix = explain(model, x, method), config.num_prefix_tokens
    for token, (place, _) in logits_of(model(x)).items():
        for image, blocks in enumerate(spelled_out(model, x, token)):
            joint = np.eye(prefix + config.num_patches)
            for level, (attention, gradient) in enumerate(blocks):
                weights = attention.mean(0)
                if method == "rollout":
                    joint = (0.5 * weights + 0.5 * np.eye(len(weights))) @ joint
                elif method == "relevance":
                    joint = joint + np.maximum(attention * gradient, 0).mean(0) @ joint
                elif level == len(blocks) - 1:
                    joint = weights @ joint
                before, after = (list(range(prefix)) + held[level + i][image].tolist() for i in (0, 1))
                mean = np.zeros((max(after) + 1, max(before) + 1))
                for old, new in zip(before, after, strict=True):
                    mean[new, old] += 1
                joint = mean / mean.sum(1, keepdims=True) @ joint
            assert_close(found[token][image].double(), torch.tensor(map_by_hand(joint, place, config)))
            assert found[token][image].max() > 1e-3


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
