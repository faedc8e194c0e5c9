"""Configs that code written for `transformers` builds, sets attributes on, and writes."""

import copy
import json
import pickle
from dataclasses import FrozenInstanceError

import pytest
import torch
from support.checks import raises_saying
from support.models import LABELS, build, images, small

from deit.config import VARIANTS, DeiTConfig, ViTConfig
from deit.files import CheckpointError

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("quiet_transformers")

OURS = {"DeiTConfig": DeiTConfig, "ViTConfig": ViTConfig}
BOTH = pytest.mark.parametrize("name", OURS)
FIELDS = {"hidden_size": 48, "num_attention_heads": 4, "qkv_bias": False, "pooler_output_size": 48}


@BOTH
def test_built_from_its_dictionary(name):
    """Unknown keywords are kept as unknown keys of a file are: in both libraries."""
    ours = OURS[name](**FIELDS, id2label=LABELS, image_size=(32, 48), favourite="tea", nested={"a": [1]})
    assert OURS[name](**ours.to_dict()) == OURS[name].from_dict(ours.to_dict()) == ours
    theirs = getattr(transformers, name)(**FIELDS, id2label=LABELS, image_size=(32, 48), favourite="tea")
    assert getattr(transformers, name)(**ours.to_dict()).favourite == theirs.favourite == ours.favourite == "tea"
    again = OURS[name](**theirs.to_dict())
    assert (again.hidden_size, again.id2label, again.image_size, again.favourite) == (48, LABELS, (32, 48), "tea")
    assert again.model_type == theirs.model_type
    assert ours.extra == {"favourite": "tea", "nested": {"a": [1]}}


def test_model_type_of_keywords():
    assert DeiTConfig(**ViTConfig(num_labels=3).to_dict()).distillation_token is False
    assert DeiTConfig(model_type="vit").distillation_token is False
    with raises_saying(ValueError, "model_type is 'bert'"):
        DeiTConfig(model_type="bert")
    with raises_saying(ValueError, "ViTConfig describes a model without"):
        ViTConfig(model_type="deit")


@BOTH
def test_attributes(name, tmp_path):
    """They can be set, read, written and deleted, as in `transformers`."""
    configs = OURS[name](**FIELDS), getattr(transformers, name)(**FIELDS)
    for i, config in enumerate(configs):
        config.use_cache = False
        config.favourite = "tea"
        config.save_pretrained(tmp_path / str(i))
        assert json.loads((tmp_path / str(i) / "config.json").read_text())["favourite"] == "tea"
        again = type(config).from_pretrained(tmp_path / str(i))
        assert again.favourite == config.favourite == "tea"
        assert config.use_cache is False
        del config.favourite
        assert not hasattr(config, "favourite")


def test_private_attributes():
    config = DeiTConfig()
    config._attn_implementation = "sdpa"
    assert config._attn_implementation == "sdpa"
    assert "_attn_implementation" not in config.to_dict()
    assert config == DeiTConfig()
    del config._attn_implementation
    assert not hasattr(config, "_attn_implementation")


def test_fields_do_not_change():
    config = DeiTConfig(favourite="tea")
    for name in ("hidden_size", "num_labels", "extra", "grid", "model_type", "to_dict"):
        with raises_saying(
            FrozenInstanceError, f"DeiTConfig does not change its {name}; use config.replace({name}=...), and give"
        ):
            setattr(config, name, 3)
    for name in ("hidden_size", "nothing"):
        with raises_saying(FrozenInstanceError, f"DeiTConfig keeps its {name}; attributes that were set"):
            delattr(config, name)
    assert config == DeiTConfig(favourite="tea")


def test_labels_do_not_change_in_place():
    """A name that changed on one side alone would leave a model that can't be saved, at the end of its training."""
    config = small(id2label=LABELS)
    changes = [
        lambda labels: labels.__setitem__(0, "fox"),
        lambda labels: labels.update({0: "fox"}),
        lambda labels: labels.pop(next(iter(labels))),
        lambda labels: labels.clear(),
        lambda labels: labels.__ior__({0: "fox"}),
    ]
    for again in (config, build("classification", config).config, copy.deepcopy(config)):
        for labels in (again.id2label, again.label2id):
            for change in changes:
                with raises_saying(FrozenInstanceError, "does not change its labels; use config.replace(id2label=..."):
                    change(labels)
        assert again.replace() == config
        assert pickle.loads(pickle.dumps(again)) == config
    written = config.to_dict()
    written["label2id"]["fox"] = 5
    written["id2label"]["5"] = "fox"
    assert DeiTConfig.from_dict(written).id2label == {**LABELS, 5: "fox"}
    assert config.id2label == LABELS


def test_update():
    config = DeiTConfig(id2label=LABELS)
    config.update(
        {"use_cache": False, "hidden_size": 768, "id2label": {"0": "ant", **{i: LABELS[i] for i in (1, 2, 3, 4)}}}
    )
    config.update(config.to_dict())
    config.update({"extra": {"favourite": "tea"}})
    assert (config.use_cache, config.favourite) == (False, "tea")
    before = copy.deepcopy(config)
    for changes, named in (
        ({"new": 1, "hidden_size": 12}, "hidden_size"),
        ({"num_labels": 2}, "num_labels"),
        ({"model_type": "vit"}, "model_type"),
    ):
        with raises_saying(FrozenInstanceError, f"does not change its {named}; use config.replace(...)"):
            config.update(changes)
        assert config == before
    theirs = transformers.DeiTConfig()
    theirs.update({"use_cache": False})
    assert theirs.use_cache is config.use_cache


def test_copies_are_apart():
    """Pickled, deeply copied, replaced: the same values, and no shared attributes."""
    config = DeiTConfig(id2label=LABELS, favourite="tea")
    config.use_cache = False
    for again in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), config.replace()):
        assert again == config
        assert hash(again) == hash(config)
        again.use_cache = True
        assert again != config
        assert config.use_cache is False


def test_equality_and_hashes():
    config, other = DeiTConfig(num_labels=3), DeiTConfig(num_labels=3)
    assert (config == other, hash(config) == hash(other)) == (True, True)
    assert config != DeiTConfig(num_labels=4)
    assert hash(config) != hash(DeiTConfig(num_labels=4))
    assert config != "a config"
    assert ViTConfig() != DeiTConfig(distillation_token=False)
    table = {config: "found"}
    config.use_cache = False  # the hash of a key must not change
    assert table[config] == "found"
    assert len({hash(variant) for variant in VARIANTS.values()}) == len(VARIANTS)


def test_a_model_keeps_its_attributes_to_itself():
    config = small()
    model = build("classification", config)
    model.config.use_cache = False
    assert not hasattr(config, "use_cache")
    assert model.deit.config.use_cache is False
    assert copy.deepcopy(model).config == model.config
    assert model(images(config)).logits.dtype == torch.float32


# --------------------------------------------------------------------------------------------------------------- files


@BOTH
@pytest.mark.parametrize("changes", [{}, {"id2label": LABELS, "output_attentions": True, "favourite": "tea"}])
def test_to_diff_dict(name, changes):
    ours = OURS[name](**FIELDS, **changes)
    theirs = getattr(transformers, name)(**FIELDS, **changes)
    found, expected = ours.to_diff_dict(), theirs.to_diff_dict()
    shared = set(ours.to_dict()) & set(theirs.to_dict())
    assert set(found) & shared == set(expected) & shared
    for key in set(found) & shared - {"id2label", "label2id"}:
        assert found[key] == expected[key], key
    assert {int(key): label for key, label in found.get("id2label", {}).items()} == expected.get("id2label", {})
    assert found.get("label2id") == (ours.label2id if "id2label" in changes else None)  # which theirs leaves at None
    assert OURS[name].from_dict(found) == ours


@BOTH
@pytest.mark.parametrize("use_diff", [False, True])
def test_json_files(name, use_diff, tmp_path):
    ours, theirs = OURS[name](**FIELDS, favourite="tea"), getattr(transformers, name)(**FIELDS, favourite="tea")
    ours.to_json_file(tmp_path / "ours.json", use_diff=use_diff)
    theirs.to_json_file(tmp_path / "theirs.json", use_diff=use_diff)
    assert (tmp_path / "ours.json").read_text() == ours.to_json_string(use_diff=use_diff)
    for path in tmp_path.iterdir():
        found = OURS[name].from_json_file(path)
        expected = getattr(transformers, name).from_json_file(path)
        assert found.replace(extra={}) == ours.replace(extra={})
        assert found.favourite == expected.favourite == "tea"
        assert (found.hidden_size, found.qkv_bias) == (expected.hidden_size, expected.qkv_bias)


def test_bad_json_files(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("{")
    with raises_saying(CheckpointError, path, "is not valid JSON"):
        DeiTConfig.from_json_file(path)
    path.write_text('{"hidden_size": 0}')
    with raises_saying(ValueError, f"{path}: hidden_size must be a whole number"):
        DeiTConfig.from_json_file(path)


def test_get_config_dict(tmp_path):
    config = transformers.DeiTConfig(**FIELDS, favourite="tea")
    config.save_pretrained(tmp_path)
    found, rest = DeiTConfig.get_config_dict(tmp_path, num_labels=3, revision="main")
    expected, theirs = transformers.DeiTConfig.get_config_dict(tmp_path, num_labels=3, revision="main")
    assert {key: expected[key] for key in found} == found
    assert rest == {key: value for key, value in theirs.items() if key == "num_labels"} == {"num_labels": 3}


def test_a_folder_that_merges_is_read_without_merging(tmp_path):
    ours = build("with_teacher", small(merge=3))
    ours.save_pretrained(tmp_path)
    theirs = transformers.DeiTForImageClassificationWithTeacher.from_pretrained(tmp_path)
    assert theirs.config.merge == 3
    x = images(ours.config)
    with torch.no_grad():
        found, plain = theirs(x).logits, type(ours).from_pretrained(tmp_path, merge=0)(x).logits
        assert (ours(x).logits - plain).abs().max() > 1e-3
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-5)
    theirs.save_pretrained(tmp_path / "again")
    assert type(ours).from_pretrained(tmp_path / "again").config.merge == 3
