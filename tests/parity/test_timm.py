"""Every published size against `timm`, by value, and checkpoints from and to it and the original repository."""

import argparse
import json
import math

import pytest
import torch
from support.checks import assert_close, raises_saying
from support.models import CLASS_OF, build, images, scramble, shrink

from deit import weights
from deit.config import VARIANTS, DeiTConfig
from deit.export.convert import convert

timm = pytest.importorskip("timm")

UNPUBLISHED = {"deit3-medium-patch16-384", "deit3-huge-patch14-384"}
"""Sizes that timm has at 224 pixels only."""


DINOV2 = {"dinov2-small": "vit_small_patch14_dinov2", "dinov2-base": "vit_base_patch14_dinov2"}
"""What timm lists among its ViTs."""


def timm_name(variant: str) -> str:
    if variant in DINOV2:
        return DINOV2[variant]
    return (variant.replace("-384", "-224") if variant in UNPUBLISHED else variant).replace("-", "_")


def timm_model(variant: str, config: DeiTConfig, **options):
    sizes = {
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "num_classes": config.num_labels,
        "img_size": config.image_size,
    }
    return timm.create_model(timm_name(variant), **sizes, **options).eval()


def kind_for(config: DeiTConfig) -> str:
    return "with_teacher" if config.distillation_token else "classification"


def pair(variant: str, config: DeiTConfig, seed: int = 0):
    ours = build(kind_for(config), config, seed)
    theirs = timm_model(variant, config)
    theirs.load_state_dict(weights.from_ours(ours._tensors(), "timm"), strict=True)
    return ours, theirs


def both_heads(model, x):
    """timm's two heads apart; in evaluation it answers with their mean."""
    model.set_distilled_training(True)
    return dict(zip(("cls_logits", "distillation_logits"), model.train()(x), strict=True))


@pytest.fixture(params=VARIANTS)
def variant(request):
    return request.param


@torch.no_grad()
def agree(ours, theirs, implementations=("sdpa",)) -> None:
    """Logits of both modes and all heads, and the tokens after the final norm."""
    x = images(ours.config, 2)
    logits, tokens = theirs.eval()(x), theirs.forward_features(x)
    assert logits.abs().max() > 0.1
    heads = both_heads(theirs, x) if ours.config.distillation_token else {}
    for implementation in implementations:
        ours.set_attn_implementation(implementation)
        trace = {}
        found = ours.train(implementation == "eager")(x, trace=trace)
        assert_close(found.logits, logits)
        assert_close(trace["norm"], tokens)
        assert_close({key: found[key] for key in heads}, heads)


def test_values(variant):
    agree(*pair(variant, shrink(VARIANTS[variant])), ("eager", "sdpa", "auto"))


def test_gradients(variant):
    ours, theirs = pair(variant, shrink(VARIANTS[variant]))
    x = images(ours.config, 1)
    ours(x).logits.square().sum().backward()
    theirs(x).square().sum().backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    assert_close(weights.from_ours({name: p.grad for name, p in ours.named_parameters()}, "timm"), expected, 1e-4)


def test_architecture_of_full_size(variant):
    """Names, shapes and so the parameter counts, and what shapes don't tell: heads and the norms' epsilon."""
    config = VARIANTS[variant]
    with torch.device("meta"):
        options = {"num_classes": 1000} if variant in DINOV2 else {}  # published without a classifier
        theirs = timm.create_model(timm_name(variant), img_size=config.image_size, **options)
        ours = CLASS_OF[kind_for(config)](config)
    shapes = {
        name: torch.empty(shape, device="meta") for name, shape in weights.manifest(config, kind_for(config)).items()
    }
    assert {name: tuple(t.shape) for name, t in weights.from_ours(shapes, "timm").items()} == {
        name: tuple(p.shape) for name, p in theirs.named_parameters()
    }
    assert (
        sum(map(math.prod, weights.manifest(config, kind_for(config)).values()))
        == ours.num_parameters()
        == sum(p.numel() for p in theirs.parameters())
    )
    assert theirs.blocks[0].attn.num_heads == config.num_attention_heads
    assert {m.eps for m in theirs.modules() if isinstance(m, torch.nn.LayerNorm)} == {config.layer_norm_eps}


def test_folder_of_timm(variant, tmp_path):
    config = shrink(VARIANTS[variant])
    theirs = scramble(timm_model(variant, config))
    timm.models.save_for_hf(theirs, tmp_path, safe_serialization=True)
    ours, info = CLASS_OF[kind_for(config)].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert ours.config.replace(extra={}) == config
    agree(ours, theirs)


def test_checkpoint_of_timm(variant, tmp_path):
    config = shrink(VARIANTS[variant])
    theirs = scramble(timm_model(variant, config))
    torch.save({"epoch": 3, "arch": timm_name(variant), "state_dict": theirs.state_dict()}, tmp_path / "last.pth")
    agree(CLASS_OF[kind_for(config)].from_pretrained(tmp_path / "last.pth", config=config), theirs)


ORIGINAL = [variant for variant in VARIANTS if variant not in DINOV2]
"""The sizes of facebookresearch/deit."""


def original(theirs, path, **extra) -> None:
    """As facebookresearch/deit saves: under "model", with the command line beside it, LayerScale by its own names."""
    renamed = {
        name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): tensor
        for name, tensor in theirs.state_dict().items()
    }
    torch.save({"model": renamed, **extra}, path)


def test_checkpoint_of_the_original(variant, tmp_path):
    """No config: the architecture is told from the shapes, which fit a width of 64 for each head."""
    published = VARIANTS[variant]
    config = shrink(published, hidden_size=64, intermediate_size=256, num_attention_heads=1)
    theirs = scramble(timm_model(variant, config))
    original(theirs, tmp_path / "best.pth", args=argparse.Namespace(lr=5e-4, model=timm_name(variant)), epoch=299)
    with pytest.warns(UserWarning, match=r"best\.pth: args is a pickled object and was not read; the weights are"):
        ours = CLASS_OF[kind_for(config)].from_pretrained(tmp_path)
    assert ours.config.grid == config.grid
    agree(ours.resize_to(config.image_size), theirs)


def test_pooling_by_average_is_refused(tmp_path):
    """timm can classify by the mean of the patches; reading such a file as if by the class token would lie."""
    timm.models.save_for_hf(
        timm.create_model("deit_tiny_patch16_224", depth=1, global_pool="avg"), tmp_path, safe_serialization=True
    )
    with raises_saying(ValueError, "global_pool is 'avg'; this package classifies by the class token"):
        DeiTConfig.from_pretrained(tmp_path)


def test_wrapped_model(tmp_path):
    config = shrink(VARIANTS["deit3-small-patch16-224"])
    theirs = scramble(timm_model("deit3-small-patch16-224", config))
    torch.save({"state_dict": {f"module.{k}": v for k, v in theirs.state_dict().items()}}, tmp_path / "ddp.pth")
    agree(CLASS_OF["classification"].from_pretrained(tmp_path / "ddp.pth", config=config), theirs)


def test_distilled_backbone_alone(tmp_path):
    """`num_classes=0`: no head on either side."""
    config = shrink(VARIANTS["deit-tiny-distilled-patch16-224"], num_labels=0)
    theirs = scramble(timm_model("deit-tiny-distilled-patch16-224", config))
    timm.models.save_for_hf(theirs, tmp_path, safe_serialization=True)
    ours = CLASS_OF["backbone"].from_pretrained(tmp_path)
    x = images(config)
    with torch.no_grad():
        assert_close(ours(x).last_hidden_state, theirs.forward_features(x))


def test_full_size_tiny(tmp_path):
    variant = "deit-tiny-patch16-224"
    theirs = scramble(timm.create_model(timm_name(variant))).eval()
    original(theirs, tmp_path / "deit_tiny.pth")
    ours = CLASS_OF["classification"].from_pretrained(tmp_path / "deit_tiny.pth")
    assert ours.config == VARIANTS[variant]
    x = images(ours.config, 1)
    with torch.no_grad():
        assert_close(ours(x).logits, theirs(x))


# ------------------------------------------------------------------------------------------------------- conversion


def test_convert_to_timm(variant, tmp_path):
    config = shrink(VARIANTS[variant], id2label={i: f"kind {i}" for i in range(7)})
    ours = build(kind_for(config), config)
    ours.save_pretrained(tmp_path / "ours")
    assert convert(tmp_path / "ours", "timm", tmp_path / "timm") == tmp_path / "timm"
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    agree(ours, theirs)
    assert list(theirs.pretrained_cfg["input_size"]) == [3, *config.image_hw]
    assert theirs.pretrained_cfg["label_names"] == [f"kind {i}" for i in range(7)]
    back = CLASS_OF[kind_for(config)].from_pretrained(tmp_path / "timm")
    assert back.config.replace(extra={}, encoder_stride=config.encoder_stride) == config
    assert_close(back.state_dict(), ours.state_dict(), 0)


def test_convert_to_hf_and_back(variant, tmp_path):
    config = shrink(VARIANTS[variant])
    theirs = scramble(timm_model(variant, config))
    timm.models.save_for_hf(theirs, tmp_path / "timm", safe_serialization=True)
    convert(tmp_path / "timm", "hf", tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    agree(CLASS_OF[kind_for(config)].from_pretrained(tmp_path / "hf"), theirs)
    convert(tmp_path / "hf", "timm", tmp_path / "again")
    agree(
        CLASS_OF[kind_for(config)].from_pretrained(tmp_path / "hf"),
        timm.create_model(f"local-dir:{tmp_path / 'again'}", pretrained=True),
    )


@pytest.mark.parametrize("variant", ORIGINAL)
def test_convert_to_original(variant, tmp_path):
    config = shrink(VARIANTS[variant])
    ours = build(kind_for(config), config)
    ours.save_pretrained(tmp_path / "ours")
    path = convert(tmp_path / "ours", "original", tmp_path / "out")
    state = torch.load(path, weights_only=True)["model"]
    assert any("gamma_1" in name for name in state) == (config.layer_scale_init_value is not None)
    theirs = timm_model(variant, config)
    theirs.load_state_dict(
        {
            name.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma"): tensor
            for name, tensor in state.items()
        },
        strict=True,
    )
    agree(ours, theirs)


@pytest.mark.parametrize(
    ("kind", "changes", "parts"),
    [
        ("masked_image", {}, ["is a masked_image model; timm stores classifiers only, keep --to hf"]),
        ("classification", {}, ["has a distillation token and one head; timm's distilled models have two"]),
        ("with_teacher", {"hidden_act": "relu"}, ["timm's models compute with gelu", "has relu"]),
        ("with_teacher", {"merge": 2}, ["merge no tokens", "has merge=2, so it would answer differently"]),
        ("with_teacher", {"layer_norm_eps": 1e-3}, ["epsilon of 1e-6", "and 0.001, so it would answer differently"]),
        (
            "classification",
            {"distillation_token": False, "position_on_class_token": False},
            ["no published architecture combines this"],
        ),
    ],
)
def test_refused_conversion(kind, changes, parts, tmp_path):
    config = shrink(VARIANTS["deit-tiny-distilled-patch16-224"], encoder_stride=16, **changes)
    build(kind, config).save_pretrained(tmp_path / "ours")
    with raises_saying(ValueError, *parts):
        convert(tmp_path / "ours", "timm", tmp_path / "timm")
    assert not (tmp_path / "timm").exists()


def test_no_dinov2_in_the_original_project(tmp_path):
    build("classification", shrink(VARIANTS["dinov2-small"])).save_pretrained(tmp_path / "ours")
    with raises_saying(ValueError, "has LayerScale and a position for the class token", "convert --to timm"):
        convert(tmp_path / "ours", "original", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_source_is_never_replaced(tmp_path):
    build("classification", shrink(VARIANTS["deit-tiny-patch16-224"])).save_pretrained(tmp_path / "m")
    before = {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}
    for source in (tmp_path / "m", tmp_path / "m" / "model.safetensors", tmp_path / "m" / ".." / "m"):
        with raises_saying(ValueError, "would replace the files of", "; write to another folder"):
            convert(source, "timm", tmp_path / "m")
    assert {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()} == before
    convert(tmp_path / "m", "timm", tmp_path)  # the folder above is another folder


def test_unknown_format(tmp_path):
    build("classification", shrink(VARIANTS["deit-tiny-patch16-224"])).save_pretrained(tmp_path)
    with raises_saying(ValueError, "there is no format 'caffe'; choose hf, timm, original or keras"):
        convert(tmp_path, "caffe", tmp_path / "out")
