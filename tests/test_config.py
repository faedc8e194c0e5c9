import copy
import json
import pickle
from dataclasses import FrozenInstanceError, fields

import pytest
from support.checks import raises_saying, run_python

from deit.config import VARIANTS, ConvNetConfig, DeiTConfig, ViTConfig

OURS_ONLY = {
    "distillation_token",
    "drop_path_rate",
    "drop_path_schedule",
    "layer_scale_init_value",
    "position_on_class_token",
    "merge",
    "extra",
}
BOTH = pytest.mark.parametrize("name", ["DeiTConfig", "ViTConfig"])


def ours_of(name):
    return {"DeiTConfig": DeiTConfig, "ViTConfig": ViTConfig}[name]


# --------------------------------------------------------------------------------------- agreement with transformers


@BOTH
def test_defaults(name, quiet_transformers):
    ours, theirs = ours_of(name)(), getattr(quiet_transformers, name)()
    for field in {f.name for f in fields(ours)} - OURS_ONLY - {"pooler_output_size"}:
        assert getattr(ours, field) == getattr(theirs, field), field
    assert ours.pooler_output_size is None
    assert ours.pooler_width == theirs.pooler_output_size
    assert ours.model_type == theirs.model_type
    architecture = set(type(theirs).__annotations__) - {"model_type"}
    assert architecture <= {f.name for f in fields(ours)}


@BOTH
def test_file_of_theirs(name, quiet_transformers, tmp_path):
    theirs = getattr(quiet_transformers, name)(
        hidden_size=48,
        num_attention_heads=4,
        image_size=[32, 48],
        patch_size=[8, 4],
        qkv_bias=False,
        pooler_output_size=5,
        layer_norm_eps=1e-5,
        id2label={0: "cat", 1: "dog", 2: "owl"},
        output_attentions=True,
        label2id={"cat": 0, "dog": 1, "owl": 2},
        problem_type="regression",
        favourite="tea",
    )
    theirs.save_pretrained(tmp_path)
    ours = DeiTConfig.from_pretrained(tmp_path)
    for field in {f.name for f in fields(ours)} - OURS_ONLY - {"image_size", "patch_size"}:
        assert getattr(ours, field) == getattr(theirs, field), field
    assert (ours.image_size, ours.patch_size) == ((32, 48), (8, 4))
    assert ours.distillation_token == (name == "DeiTConfig")
    assert ours.favourite == "tea"
    ours.save_pretrained(tmp_path / "again")
    again = getattr(quiet_transformers, name).from_pretrained(tmp_path / "again")
    kept = set(theirs.to_dict())
    assert {k: v for k, v in again.to_dict().items() if k in kept} == theirs.to_dict()


@pytest.mark.parametrize(
    "config",
    [
        DeiTConfig(num_labels=3),
        DeiTConfig(id2label={0: "a", 1: "b"}, image_size=(32, 64)),
        ViTConfig(num_labels=1),
        ViTConfig(num_labels=0),
        DeiTConfig(distillation_token=False, pooler_output_size=7, problem_type="regression"),
    ],
    ids=str,
)
def test_file_of_ours(config, quiet_transformers, tmp_path):
    config.save_pretrained(tmp_path)
    theirs = quiet_transformers.AutoConfig.from_pretrained(tmp_path)
    assert theirs.model_type == config.model_type == ("deit" if config.distillation_token else "vit")
    assert theirs.num_labels == config.num_labels
    assert theirs.id2label == config.id2label
    assert theirs.label2id == config.label2id
    assert theirs.pooler_output_size == config.pooler_width
    assert DeiTConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize("changes", [{"layer_scale_init_value": 1e-4}, {"position_on_class_token": False}])
def test_what_transformers_cannot_compute_it_does_not_load(changes, quiet_transformers, tmp_path):
    config = DeiTConfig(distillation_token=False, **changes)
    config.save_pretrained(tmp_path)
    assert config.model_type == "deit3"
    with pytest.raises(ValueError, match="deit3"):
        quiet_transformers.AutoConfig.from_pretrained(tmp_path)
    assert DeiTConfig.from_pretrained(tmp_path) == config


# ---------------------------------------------------------------------------------------------------- as an object


@pytest.mark.parametrize("config", [*VARIANTS.values(), DeiTConfig(image_size=(30, 50), patch_size=(3, 5))])
def test_round_trip(config):
    assert DeiTConfig.from_dict(json.loads(config.to_json_string())) == config
    assert ViTConfig.from_dict(config.replace(distillation_token=False).to_dict()).hidden_size == config.hidden_size


def test_unknown_keys():
    config = DeiTConfig.from_dict({"model_type": "deit", "favourite": "tea", "nested": {"a": [1]}})
    assert config.favourite == "tea"
    assert config.to_dict()["nested"] == {"a": [1]}
    assert config.replace(hidden_size=12).extra == config.extra
    with raises_saying(AttributeError, "DeiTConfig has no field 'height'"):
        config.height  # noqa: B018
    with raises_saying(ValueError, "DeiTConfig has no field 'hiden_size'; it has ", "hidden_size, "):
        DeiTConfig.from_dict({}, hiden_size=3)


def test_frozen_and_keyword_only():
    with pytest.raises(FrozenInstanceError):
        DeiTConfig().hidden_size = 3
    with raises_saying(TypeError, "positional"):
        DeiTConfig(768)


def test_copies():
    config = DeiTConfig(id2label={0: "cat", 1: "dog"}, extra={"favourite": "tea"})
    for again in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert again == config
        assert again.favourite == "tea"


def test_replace():
    named = DeiTConfig(id2label={0: "cat", 1: "dog", 2: "owl"})
    assert named.replace(hidden_size=12).id2label == {0: "cat", 1: "dog", 2: "owl"}
    assert named.replace(num_labels=2).id2label == {0: "LABEL_0", 1: "LABEL_1"}
    assert named.replace(id2label={0: "x"}).label2id == {"x": 0}
    assert named.replace(label2id={"x": 0, "y": 1}).num_labels == 2
    assert type(ViTConfig().replace(num_labels=4)) is ViTConfig


def test_labels():
    assert DeiTConfig().id2label == {0: "LABEL_0", 1: "LABEL_1"}
    assert DeiTConfig(num_labels=0).id2label == {}
    assert DeiTConfig(id2label={"1": "dog", "0": "cat"}).id2label == {0: "cat", 1: "dog"}
    assert DeiTConfig(label2id={"cat": 0, "dog": 1}).id2label == {0: "cat", 1: "dog"}
    assert DeiTConfig(id2label={0: "LABEL_0", 1: "LABEL_1"}, num_labels=5).num_labels == 5
    assert DeiTConfig(id2label={0: "cat", 1: "dog", 2: "owl"}, label2id={"LABEL_0": 0, "LABEL_1": 1}).label2id == {
        "cat": 0,
        "dog": 1,
        "owl": 2,
    }


def test_sizes():
    config = DeiTConfig(hidden_size=48, num_attention_heads=4, image_size=(50, 21), patch_size=(16, 4))
    assert (config.image_hw, config.patch_hw, config.grid, config.num_patches) == ((50, 21), (16, 4), (3, 5), 15)
    assert (config.head_width, config.pooler_width) == (12, 48)
    assert config.grid_of(33, 9) == (2, 2)
    prefixes = {
        (distilled, on_class): DeiTConfig(distillation_token=distilled, position_on_class_token=on_class)
        for distilled in (True, False)
        for on_class in (True, False)
    }
    assert {key: (c.num_prefix_tokens, c.num_prefix_positions) for key, c in prefixes.items()} == {
        (True, True): (2, 2),
        (True, False): (2, 0),
        (False, True): (1, 1),
        (False, False): (1, 0),
    }


@pytest.mark.parametrize(
    ("depth", "schedule", "rates"),
    [(4, "linear", [0, 0.1, 0.2, 0.3]), (4, "constant", [0.3] * 4), (1, "linear", [0.3])],
)
def test_drop_path_rates(depth, schedule, rates):
    config = DeiTConfig(num_hidden_layers=depth, drop_path_rate=0.3, drop_path_schedule=schedule)
    assert config.drop_path_rates == pytest.approx(rates)


def test_labels_as_published():
    """ImageNet's names repeat ("crane"), and transformers' example scripts write numbers as strings."""
    labels = {"id2label": {"0": "crane", "1": "tench", "2": "crane"}}
    assert DeiTConfig.from_dict(labels).id2label == {0: "crane", 1: "tench", 2: "crane"}
    for number in (0, 2):
        config = DeiTConfig.from_dict({**labels, "label2id": {"crane": number, "tench": 1}})
        assert config.label2id == {"crane": number, "tench": 1}
        assert DeiTConfig.from_dict(config.to_dict()) == config
    assert DeiTConfig.from_dict({"label2id": {"a": "1", "b": "0"}}).id2label == {0: "b", 1: "a"}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hidden_size": 0}, "hidden_size must be a whole number of at least 1, found 0"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers must be a whole number of at least 1, found 1.5"),
        ({"hidden_size": 100}, "hidden_size=100 cannot be divided among num_attention_heads=12; choose a multiple"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob must be at least 0 and below 1, found 1.0"),
        ({"drop_path_rate": -0.1}, "drop_path_rate must be at least 0 and below 1, found -0.1"),
        ({"hidden_act": "mish"}, "hidden_act='mish' is not known; choose one of gelu, "),
        ({"pooler_act": "mish"}, "pooler_act='mish' is not known; choose one of gelu, "),
        ({"problem_type": "ranking"}, "problem_type='ranking' is not known; choose one of regression, "),
        ({"drop_path_schedule": "cosine"}, "drop_path_schedule='cosine' is not known; choose linear or constant"),
        ({"image_size": 8}, "image_size=8 is smaller than patch_size=16; an image must hold at least one patch"),
        ({"image_size": (8, 8, 3)}, "image_size must be a positive number of pixels or a pair"),
        ({"patch_size": -4}, "patch_size must be a positive number of pixels or a pair"),
        ({"encoder_stride": "16"}, "encoder_stride must be a positive number of pixels or a pair"),
        ({"num_labels": -1}, "num_labels must be 0 or more, found -1"),
        ({"layer_norm_eps": "1e-6"}, "layer_norm_eps must be a number of at least 0, found '1e-6'"),
        ({"hidden_dropout_prob": None}, "hidden_dropout_prob must be at least 0 and below 1, found None"),
        ({"qkv_bias": "no"}, "qkv_bias must be true or false, found 'no'"),
        ({"pooler_output_size": -1}, "pooler_output_size must be a whole number or None, found -1"),
        ({"layer_scale_init_value": "small"}, "layer_scale_init_value must be a number or None, found 'small'"),
        ({"id2label": ["a", "b"]}, "id2label must be a dictionary, found ['a', 'b']"),
        ({"num_labels": "3"}, "num_labels must be a whole number, found '3'"),
        ({"id2label": {0: "a", 2: "b"}}, "id2label must number its 2 labels 0 to 1, found 0, 2; number the classes"),
        ({"id2label": {0: "a", 1: "a"}, "label2id": {"a": 2}}, "label2id is not the inverse of id2label; give one of"),
        ({"id2label": {0: "a", 1: "b"}, "num_labels": 3}, "num_labels=3 contradicts id2label, which names 2 classes"),
        ({"id2label": {0: "a"}, "label2id": {"b": 0}}, "label2id is not the inverse of id2label; give one of the two"),
    ],
)
def test_refusals(changes, sentence):
    with raises_saying(ValueError, sentence):
        DeiTConfig(**changes)


def test_refused_distillation_token():
    with raises_saying(ValueError, "ViTConfig describes a model without a distillation token, found", "use DeiTConfig"):
        ViTConfig(distillation_token=True)
    with raises_saying(ValueError, "ViTConfig describes a model without"):
        ViTConfig.from_dict(DeiTConfig().to_dict())


def test_refused_model_type():
    with raises_saying(ValueError, "model_type is 'bert'; this package reads deit, vit, deit3 and dinov2"):
        DeiTConfig.from_dict({"model_type": "bert"})


# ------------------------------------------------------------------------------------------------------------ timm


def test_timm_config():
    config = DeiTConfig.from_dict(
        {
            "architecture": "deit_tiny_distilled_patch16_224.fb_in1k",
            "num_classes": 3,
            "label_names": ["a", "b", "c"],
            "model_args": {"img_size": [64, 96], "embed_dim": 48, "mlp_ratio": 2.5, "qkv_bias": False},
            "pretrained_cfg": {"mean": [0.5, 0.5, 0.5]},
        }
    )
    expected = VARIANTS["deit-tiny-distilled-patch16-224"].replace(
        image_size=(64, 96),
        hidden_size=48,
        intermediate_size=120,
        qkv_bias=False,
        id2label={0: "a", 1: "b", 2: "c"},
        extra={"pretrained_cfg": {"mean": [0.5, 0.5, 0.5]}},
    )
    assert config == expected


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"architecture": "resnet50"}, "timm architecture 'resnet50' is not one of this family; known are deit_tiny"),
        (
            {"architecture": "deit_tiny_patch16_224", "model_args": {"qk_norm": True}},
            "timm's model_args set qk_norm=True; this package computes only qk_norm=False",
        ),
        ({"architecture": "deit_tiny_patch16_224", "global_pool": "avg"}, "timm's global_pool is 'avg'"),
    ],
)
def test_refused_timm_config(values, sentence):
    with raises_saying(ValueError, sentence):
        DeiTConfig.from_dict(values)


# ------------------------------------------------------------------------------------------------------ import cost


@pytest.mark.parametrize("code", ["import deit", "import deit; deit.DeiTConfig(); deit.VARIANTS; dir(deit)"])
def test_import_loads_no_framework(code):
    heavy = {"torch", "numpy", "PIL", "transformers", "huggingface_hub", "safetensors", "timm"}
    assert run_python(f"import sys; {code}; print(sorted({heavy} & set(sys.modules)))") == "[]"


def test_public_names():
    import deit

    for name in deit.__all__:
        if name not in ("Predictor", "load_model"):
            assert getattr(deit, name) is not None
    with raises_saying(AttributeError, "module 'deit' has no attribute 'DeitModel'; it has ", "DeiTModel"):
        deit.DeitModel  # noqa: B018


@pytest.mark.parametrize("cls", [DeiTConfig, ConvNetConfig])
def test_labels_follow_their_numbers(cls):
    """A config.json whose keys were sorted as text has label 10 before label 2."""
    names = {str(i): f"c{i}" for i in range(12)}
    config = cls.from_dict({**cls(id2label=names).to_dict(), "id2label": dict(sorted(names.items()))})
    assert list(config.id2label.items()) == [(i, f"c{i}") for i in range(12)]


@pytest.mark.parametrize("cls", [DeiTConfig, ConvNetConfig])
@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({0: "a", 2: "b"}, "number its 2 labels 0 to 1"),
        ({"1": "a", "01": "b"}, "number its 2 labels 0 to 1"),
        ({"first": "a"}, "the key 'first'"),
        (["a", "b"], "must be a dictionary"),
    ],
)
def test_labels_with_gaps_or_repeats(cls, names, said):
    with raises_saying(ValueError, "id2label", said):
        cls(id2label=names)


def test_merge_is_written_only_if_something_is_merged(tmp_path):
    """So a plain model's file stays that of other libraries."""
    plain = DeiTConfig(num_labels=3)
    assert "merge" not in plain.to_dict()
    assert "merge" not in plain.to_diff_dict()
    assert plain.replace(merge=0) == plain
    merging = plain.replace(merge=8)
    assert merging != plain
    assert hash(merging) != hash(plain)
    merging.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["merge"] == 8
    assert DeiTConfig.from_pretrained(tmp_path) == merging
    assert DeiTConfig.from_pretrained(tmp_path, merge=0) == plain
    for wrong in (-1, 1.5, True, "8", None):
        with raises_saying(ValueError, f"merge must be a whole number of at least 0, found {wrong!r}"):
            plain.replace(merge=wrong)
