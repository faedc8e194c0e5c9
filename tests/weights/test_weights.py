import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.checks import assert_close, raises_saying
from support.models import CLASS_OF, build, shrink, small

from deit import weights
from deit.config import VARIANTS, DeiTConfig
from deit.weights.names import _fold, detect

COUNTS = {
    "deit-tiny-patch16-224": 5_717_416,
    "deit-small-patch16-224": 22_050_664,
    "deit-base-patch16-224": 86_567_656,
    "deit-tiny-distilled-patch16-224": 5_910_800,
    "deit-small-distilled-patch16-224": 22_436_432,
    "deit-base-distilled-patch16-224": 87_338_192,
    "deit-base-patch16-384": 86_859_496,
    "deit-base-distilled-patch16-384": 87_630_032,
}
"""Touvron et al. 2020, table 1, to the last parameter."""


def kind_for(config):
    return "with_teacher" if config.distillation_token else "classification"


def kinds_for(config):
    return [kind for kind in CLASS_OF if kind != "with_teacher" or config.distillation_token]


def cat(parts):
    return np.concatenate(parts) if isinstance(parts[0], np.ndarray) else torch.cat(parts)


def arrays(config, kind, **options):
    """Random tensors as the manifest lists them."""
    generator = np.random.default_rng(0)
    return {name: generator.normal(size=shape) for name, shape in weights.manifest(config, kind, **options).items()}


def read(tensors):
    return weights.to_ours(tensors, join=cat, file="f.bin")


# ---------------------------------------------------------------------------------------------------------- manifest


@pytest.mark.parametrize("variant", VARIANTS)
def test_manifest_is_the_state_dict(variant):
    config = VARIANTS[variant]
    for kind in kinds_for(config):
        options = {"add_pooling_layer": True, "use_mask_token": True} if kind == "backbone" else {}
        with torch.device("meta"):
            model = CLASS_OF[kind](config, **options)
        listed = weights.manifest(config, kind, pooler=kind == "backbone", mask_token=kind == "backbone")
        assert listed == {name: tuple(t.shape) for name, t in model._tensors().items()}


def test_manifest_of_options():
    config = small(
        qkv_bias=False, num_labels=0, pooler_output_size=9, num_channels=1, image_size=(13, 24), patch_size=(4, 3)
    )
    for kind, options in (("backbone", {}), ("backbone", {"add_pooling_layer": True}), ("classification", {})):
        model = CLASS_OF[kind](config, **({"add_pooling_layer": False} if kind == "backbone" else {}) | options)
        listed = weights.manifest(config, kind, pooler=bool(options))
        assert listed == {name: tuple(t.shape) for name, t in model._tensors().items()}


@pytest.mark.parametrize("variant", COUNTS)
def test_published_counts(variant):
    listed = weights.manifest(VARIANTS[variant], kind_for(VARIANTS[variant]))
    assert sum(map(math.prod, listed.values())) == COUNTS[variant]


def test_every_deit_has_a_published_count():
    assert set(COUNTS) == {name for name in VARIANTS if name.startswith("deit-")}


# ---------------------------------------------------------------------------------------------------------- dialects


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dialect", weights.DIALECTS)
def test_there_and_back(variant, dialect):
    config = shrink(VARIANTS[variant])
    if dialect in ("hf", "hf5", "ours"):
        cases = [(kind, {"pooler": kind == "backbone", "mask_token": kind == "backbone"}) for kind in kinds_for(config)]
    else:
        cases = [(kind_for(config), {})]
    for kind, options in cases:
        ours = arrays(config, kind, **options)
        for prefix in ("deit.", "vit.", "") if kind == "backbone" and dialect == "hf" else ("deit.",):
            named = weights.from_ours(ours, dialect, prefix=prefix)
            if dialect != "ours":
                same = ("classifier", "cls_cl", "distill")
                assert not set(named) & {name for name in ours if not name.startswith(same)}
            again = read({f"module._orig_mod.{name}": value for name, value in named.items()})
            assert set(again) == set(ours)
            assert all(np.array_equal(again[name], ours[name]) for name in ours)
        assert weights.kind_of(again) == kind


@pytest.mark.parametrize("dialect", weights.DIALECTS)
def test_every_tensor_has_a_line(dialect):
    """A name that a dialect cannot express is written None, not left out."""
    config = VARIANTS["deit-tiny-distilled-patch16-224"].replace(layer_scale_init_value=1.0)
    folded = {
        _fold(name)[0] for kind in CLASS_OF for name in weights.manifest(config, kind, pooler=True, mask_token=True)
    }
    assert folded == set(weights.DIALECTS[dialect])


def test_split_qkv():
    named = weights.from_ours({"deit.blocks.11.attention.qkv.weight": torch.arange(12.0).view(6, 2)}, "hf")
    assert_close(
        named,
        {
            f"deit.encoder.layer.11.attention.attention.{name}.weight": torch.arange(4.0).view(2, 2) + 4 * i
            for i, name in enumerate(("query", "key", "value"))
        },
    )


@pytest.mark.parametrize(
    ("dialect", "name"), [("timm", "deit.mask_token"), ("timm", "deit.pooler.weight"), ("original", "decoder.bias")]
)
def test_inexpressible(dialect, name):
    with raises_saying(ValueError, f"{dialect} has no name for {name}; convert a classification model"):
        weights.from_ours({name: torch.zeros(1)}, dialect)


def test_unknown_dialect_of_a_file():
    with raises_saying(ValueError, "f.bin: no DeiT or ViT checkpoint", "names its tensors like ['layer1.0"):
        read({"layer1.0.conv1.weight": torch.zeros(1)})


@pytest.mark.parametrize("dialect", weights.DIALECTS)
def test_key_without_a_rule(dialect):
    named = weights.from_ours(arrays(small(layer_scale_init_value=1.0), "with_teacher"), dialect)
    with raises_saying(ValueError, f"f.bin: no rule for tensor 'fc_norm.weight' (read as {dialect} names)"):
        read({**named, "fc_norm.weight": np.zeros(3)})


@pytest.mark.parametrize("dialect", weights.DIALECTS)
@pytest.mark.parametrize("prefix", ["model.", "net.student."])
def test_a_prefix_of_all_names_is_removed_and_said(dialect, prefix):
    ours = arrays(small(layer_scale_init_value=1.0), "with_teacher")
    named = {f"{prefix}{name}": value for name, value in weights.from_ours(ours, dialect).items()}
    with pytest.warns(UserWarning, match=f"f.bin: every name begins with '{prefix}', and is read without it"):
        again = read(named)
    assert again.keys() == ours.keys()
    assert all(np.array_equal(again[name], ours[name]) for name in ours)


@pytest.mark.parametrize("kind", CLASS_OF)
def test_our_own_state_dict_as_wrappers_write_it(kind):
    """torch.save of a model, of one whose blocks are compiled, of one under FSDP, and of a backbone alone."""
    model = build(kind, small())
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    assert detect(state) == "ours"
    expected = {name if kind != "backbone" else f"deit.{name}": value for name, value in state.items()}
    expected = {name.replace("deit.deit.", "deit."): value for name, value in expected.items()}
    for place, wrapper in (("attention.", "_orig_mod."), ("norm1.", "_fsdp_wrapped_module."), ("mlp.", "_orig_mod.")):
        again = read({name.replace(place, f"{wrapper}{place}"): value for name, value in state.items()})
        assert again.keys() == expected.keys()
        assert all(np.array_equal(again[name], expected[name]) for name in expected)


def test_missing_part_of_qkv():
    named = weights.from_ours(arrays(small(), "classification"), "hf")
    del named["deit.encoder.layer.1.attention.attention.key.bias"]
    with raises_saying(
        ValueError,
        "f.bin: deit.blocks.1.attention.qkv.bias is made of query, key and value, and the file has only 2 of the three",
    ):
        read(named)


# ------------------------------------------------------------------------------------------------ told from the shapes


@pytest.mark.parametrize("variant", VARIANTS)
def test_infer_config(variant):
    config = VARIANTS[variant]
    tensors = {
        name: torch.empty(shape, device="meta") for name, shape in weights.manifest(config, kind_for(config)).items()
    }
    found = weights.infer_config(tensors, file="f.pth")
    assert found.grid == config.grid  # of an image that patches don't cover, only the covered part shows
    assert found.replace(image_size=config.image_size) == config


@pytest.mark.parametrize(
    "changes",
    [
        {"qkv_bias": False},
        {"patch_size": (4, 2), "encoder_stride": 16, "image_size": (16, 8)},
        {"num_labels": 0},
        {"num_channels": 1},
        {"hidden_size": 128},
        {"distillation_token": False},
        {"image_size": 4},
        {"layer_scale_init_value": 1e-5, "position_on_class_token": True, "drop_path_schedule": "constant"},
    ],
)
def test_infer_config_of_options(changes):
    config = small(**{"hidden_size": 64, "num_attention_heads": changes.get("hidden_size", 64) // 64, **changes})
    found = weights.infer_config(build(kind_for(config), config)._tensors(), file="f.pth")
    assert found == config


def test_uninferable():
    whole = build("classification", small())._tensors()
    with raises_saying(ValueError, "f.pth: shapes don't tell the number of attention heads of a model of width 2"):
        weights.infer_config(whole, file="f.pth")
    with raises_saying(ValueError, "f.pth: tensor 'deit.patch.weight' is missing; this is not a whole model"):
        weights.infer_config({k: v for k, v in whole.items() if k != "deit.patch.weight"}, file="f.pth")
    with raises_saying(ValueError, "f.pth: 14 positions are not a square grid of patches; pass the model's con"):
        weights.infer_config({**whole, "deit.position": torch.zeros(1, 14, 24)}, file="f.pth")


# ----------------------------------------------------------------------------------------------------------- resizing


@pytest.mark.parametrize("old", [1, 2, 3, 5, 14, 24])
def test_resize_matrix(old):
    for new in (1, 2, 3, 4, 7, 14, 23, 24, 31):
        line = torch.randn(1, 1, old, old, dtype=torch.float64)
        matrix = torch.from_numpy(weights.resize_matrix(old, new))
        expected = F.interpolate(line, (new, new), mode="bicubic", align_corners=False)
        assert_close(matrix @ line @ matrix.T, expected, 1e-12)
        assert np.allclose(weights.resize_matrix(old, new).sum(1), 1)
    assert np.allclose(weights.resize_matrix(old, old), np.eye(old))


def test_config_without_head_has_none():
    assert not any(
        name.startswith("classifier") for name in weights.manifest(DeiTConfig(num_labels=0), "classification")
    )
