"""timm's calls on our models, beside timm's models with the same weights."""

import pytest
import torch
from support.checks import assert_close, raises_saying
from support.models import build, images, small

from deit import weights
from deit.model.network import DeiTForImageClassification, DeiTForImageClassificationWithTeacher

timm = pytest.importorskip("timm")
from timm.models.deit import VisionTransformerDistilled  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402
from timm.optim import param_groups_layer_decay, param_groups_weight_decay  # noqa: E402


@pytest.fixture(params=["classification", "with_teacher"])
def pair(request):
    config = small(intermediate_size=96, distillation_token=request.param == "with_teacher")
    ours = build(request.param, config)
    kind = VisionTransformerDistilled if request.param == "with_teacher" else VisionTransformer
    theirs = kind(img_size=16, patch_size=4, embed_dim=24, depth=3, num_heads=3, num_classes=5).eval()
    theirs.load_state_dict(weights.from_ours(ours._tensors(), "timm"))
    return ours, theirs


def theirs_of(ours_name):
    """timm's name of one of our parameters."""
    [name] = weights.from_ours({ours_name: torch.zeros(3, 1)}, "timm")
    return name


def test_features_and_heads(pair):
    ours, theirs = pair
    x = images(ours.config)
    tokens = ours.forward_features(x)
    assert_close(tokens, theirs.forward_features(x))
    assert_close(ours.forward_head(tokens), theirs(x))
    assert_close(ours.forward_head(tokens, pre_logits=True), theirs.forward_head(tokens, pre_logits=True))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"indices": 2},
        {"indices": [0, -1], "norm": True},
        {"indices": [1], "return_prefix_tokens": True},
        {"output_fmt": "NLC", "intermediates_only": True},
    ],
    ids=str,
)
def test_intermediates(pair, options):
    ours, theirs = pair
    x = images(ours.config)
    assert_close(ours.forward_intermediates(x, **options), theirs.forward_intermediates(x, **options))


def test_refused_intermediates(pair):
    ours, _ = pair
    with raises_saying(ValueError, "has 3 blocks, found the number 3"):
        ours.forward_intermediates(images(ours.config), indices=[3])
    with raises_saying(ValueError, "output_fmt='NHWC' is not known; choose NCHW or NLC"):
        ours.forward_intermediates(images(ours.config), output_fmt="NHWC")


def test_weight_decay_of_timm_optim(pair):
    """The same tensors are decayed, though their names differ."""
    ours, _ = pair
    decayed = []
    for model in pair:
        free, held = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
        assert (free["weight_decay"], held["weight_decay"]) == (0.0, 0.05)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        decayed.append({names[id(parameter)] for parameter in held["params"]})
    assert len(decayed[0]) == len(decayed[1])
    assert {theirs_of(name) for name in decayed[0]} == decayed[1]
    assert ours.no_weight_decay() == {
        name for name, _ in ours.named_parameters() if name.endswith(("_token", "position"))
    }


def test_layer_decay_of_timm_optim(pair):
    scales = []
    for model in pair:
        groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.75)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        scales.append({names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]})
    assert {theirs_of(name): scale for name, scale in scales[0].items()} == pytest.approx(scales[1])


def test_an_optimizer_of_timm_trains(pair):
    ours, _ = pair
    optimizer = timm.optim.create_optimizer_v2(ours, "adamw", lr=1e-2, weight_decay=0.05, layer_decay=0.9)
    x, before = images(ours.config), ours.deit.position.detach().clone()
    ours.forward_head(ours.forward_features(x)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(ours.deit.position, before)


def test_another_head(pair):
    ours, theirs = pair
    ours.reset_classifier(9)
    theirs.reset_classifier(9)
    assert ours.config.num_labels == 9
    heads, their_heads = (
        each if isinstance(each, tuple) else (each,) for each in (ours.get_classifier(), theirs.get_classifier())
    )
    assert [head.weight.shape for head in heads] == [head.weight.shape for head in their_heads]
    assert ours(images(ours.config)).logits.shape == (2, 9)
    ours.reset_classifier(0)
    theirs.reset_classifier(0)
    x = images(ours.config)
    assert_close(ours.forward_head(ours.forward_features(x)), theirs(x))
    with raises_saying(ValueError, "global_pool='avg'", "by its tokens"):
        ours.reset_classifier(9, "avg")


def test_a_backbone_has_no_head():
    model = build("backbone", small())
    assert isinstance(model.get_classifier(), torch.nn.Identity)
    with raises_saying(ValueError, "a DeiTModel has no head to reset"):
        model.reset_classifier(3)


def test_checkpointing_and_sizes(pair, tmp_path):
    ours, _ = pair
    ours.set_grad_checkpointing()
    x = images(ours.config)
    plain = ours(x).logits
    assert_close(ours.train()(x).logits, plain)
    ours.set_grad_checkpointing(False)
    assert not ours.deit.gradient_checkpointing
    ours.eval().set_input_size(img_size=(24, 20))
    assert ours.config.image_hw == (24, 20)
    assert ours(images(ours.config)).logits.shape == (2, 5)
    with raises_saying(ValueError, "patch_size=8 differs from the model's 4"):
        ours.set_input_size(patch_size=8)
    ours.save_pretrained(tmp_path)
    kind = DeiTForImageClassificationWithTeacher if ours.kind == "with_teacher" else DeiTForImageClassification
    assert_close(kind.from_pretrained(tmp_path)(images(ours.config)).logits, ours(images(ours.config)).logits)
