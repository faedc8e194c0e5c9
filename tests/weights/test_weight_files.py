"""Weight files: what is written, and what is read from them."""

import argparse
import datetime
import json
import os
import re
import stat
import warnings
from pathlib import Path, PureWindowsPath

import numpy as np
import pytest
import safetensors.torch
import torch
from support.checks import assert_close, raises_saying, run_python
from support.models import CLASS_OF, LABELS, build, images, small

from deit import files, weights
from deit.config import DeiTConfig
from deit.model.load import load_model
from deit.model.network import DeiTForImageClassification, DeiTModel
from deit.weights import hub

load = DeiTForImageClassification.from_pretrained


# ---------------------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("size", ["5GB", "3KB", 2000, "1 KiB"])
@pytest.mark.parametrize("kind", CLASS_OF)
def test_round_trip(kind, size, tmp_path):
    model = build(kind, small())
    model.save_pretrained(tmp_path, max_shard_size=size)
    limit = {"5GB": 5 * 10**9, "3KB": 3000, 2000: 2000, "1 KiB": 1024}[size]
    largest = max(tensor.numel() * 4 for tensor in model.state_dict().values())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) == 1) == (size == "5GB")
    for file in files:
        tensors = safetensors.torch.load_file(file)
        assert sum(t.numel() * 4 for t in tensors.values()) <= max(limit, largest)
    again, info = CLASS_OF[kind].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_close(again.state_dict(), model.state_dict(), 0)


def test_stale_shards_are_removed(saved):
    model, folder = saved
    model.save_pretrained(folder, max_shard_size="2KB")
    assert not (folder / "model.safetensors").exists()
    many = len(list(folder.glob("model-*")))
    model.save_pretrained(folder, max_shard_size="10KB")
    fewer = len(list(folder.glob("model-*")))
    assert many > fewer > 1
    (folder / "model_of_mine.safetensors").write_bytes(b"another's file")
    model.save_pretrained(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors", "model_of_mine.safetensors"]


@pytest.mark.parametrize("size", ["lots", "5 parsecs", "MB"])
def test_refused_shard_size(size, saved):
    with raises_saying(ValueError, f"max_shard_size='{size}' is not understood; give bytes, or a size like 500MB"):
        saved[0].save_pretrained(saved[1], max_shard_size=size)


def test_config_of_a_saved_model(saved):
    content = json.loads((saved[1] / "config.json").read_text())
    assert content["architectures"] == ["DeiTForImageClassification"]
    assert (content["dtype"], content["model_type"]) == ("float32", "deit")
    assert content["id2label"]["3"] == "dog"
    metadata = safetensors.safe_open(saved[1] / "model.safetensors", "pt").metadata()
    assert metadata == {"format": "pt"}  # transformers raises_saying a file without it


def test_failing_write_leaves_the_old_files(saved, monkeypatch):
    _, folder = saved
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full_disk(tensors, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    with raises_saying(OSError, "No space left"):
        build("classification", small(), seed=9).save_pretrained(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    monkeypatch.undo()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("I/O error")))
    with raises_saying(OSError, "I/O error"):
        files.write_text(folder / "config.json", "{}")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_written_files_are_readable_by_others(tmp_path):
    """The temporary file's private mode would otherwise stay."""
    before = os.umask(0o022)
    try:
        files.write_text(tmp_path / "new" / "a.txt", "é")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new" / "a.txt").stat().st_mode) == 0o644
    assert (tmp_path / "new" / "a.txt").read_bytes() == "é".encode()


def test_views_and_shared_storage_are_saved_whole(tmp_path):
    model = build("classification", small())
    model.classifier.weight.data = torch.randn(24, 5).T
    model.save_pretrained(tmp_path)
    assert_close(DeiTForImageClassification.from_pretrained(tmp_path).state_dict(), model.state_dict(), 0)


def test_tied_heads_are_saved_each_for_itself(tmp_path):
    model = build("with_teacher", small())
    model.distillation_classifier = model.cls_classifier
    model.save_pretrained(tmp_path)
    again = CLASS_OF["with_teacher"].from_pretrained(tmp_path)
    assert_close(again.state_dict(), model.state_dict(), 0)


# ------------------------------------------------------------------------------------------------------- what is read


def test_missing_head(tmp_path):
    backbone = build("backbone", small(hidden_size=96))
    backbone.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="initialised anew") as caught:
        model, info = CLASS_OF["with_teacher"].from_pretrained(tmp_path, num_labels=100, output_loading_info=True)
    heads = [f"{name}.{leaf}" for name in ("cls_classifier", "distillation_classifier") for leaf in ("weight", "bias")]
    assert info == {
        "missing_keys": heads,
        "mismatched_keys": [],
        "error_msgs": [],
        "unexpected_keys": ["deit.pooler.bias", "deit.pooler.weight"],
    }
    assert str(tmp_path / "model.safetensors") in str(caught[0].message)
    assert f"does not give {', '.join(heads)}: initialised anew, train before use" in str(caught[0].message)
    assert caught[0].filename == __file__
    for head in (model.cls_classifier, model.distillation_classifier):
        assert head.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert not head.bias.any()
    assert not torch.equal(model.cls_classifier.weight, model.distillation_classifier.weight)
    assert all(p.requires_grad and not p.is_meta for p in model.parameters())
    with torch.no_grad():
        x = images(model.config)
        assert_close(model.deit(x).last_hidden_state, backbone(x).last_hidden_state, 0)


def test_missing_mask_token_and_decoder(saved):
    model, folder = saved
    with pytest.warns(UserWarning, match=r"does not give deit.mask_token, decoder.weight, decoder.bias: initialised"):
        masked = CLASS_OF["masked_image"].from_pretrained(folder)
    assert masked.deit.mask_token.std().item() == pytest.approx(0.02, rel=0.5)
    assert masked.decoder.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert_close(masked.deit.position, model.deit.position, 0)


def test_backbone_of_a_classifier(saved):
    model, folder = saved
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbone, info = DeiTModel.from_pretrained(folder, output_loading_info=True)
    assert backbone.pooler is None
    assert info["unexpected_keys"] == ["classifier.bias", "classifier.weight"]
    assert_close(backbone.state_dict(), model.deit.state_dict(), 0)


@pytest.mark.parametrize(
    ("changes", "left"),
    [
        ({"qkv_bias": False}, "deit.blocks.0.attention.qkv.bias (and 2 more)"),
        ({"layer_scale_init_value": None}, "deit.blocks.0.scale1 (and 5 more)"),
        ({"num_hidden_layers": 2}, "deit.blocks.2.attention.out.bias (and 13 more)"),
    ],
    ids=str,
)
def test_tensors_that_the_config_has_no_place_for(changes, left, tmp_path):
    """The model would answer as no model that was trained."""
    build("classification", small(layer_scale_init_value=0.1)).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="does not ask for") as caught:
        load(tmp_path, **changes)
    assert [str(warning.message) for warning in caught] == [
        f"{tmp_path / 'model.safetensors'} holds {left}, which this model's config does not ask for: left out, so the "
        "model is not the one that was trained; check the config"
    ]
    assert caught[0].filename == __file__


def test_other_number_of_labels(saved):
    model, folder = saved
    with raises_saying(
        files.CheckpointError,
        folder / "model.safetensors",
        "classifier.weight has shape (5, 24), this model expects (9, 24) (and 1 more)",
        "ignore_mismatched_sizes=True",
    ):
        load(folder, num_labels=9)
    with pytest.warns(UserWarning, match="does not give classifier.weight, classifier.bias: initialised anew"):
        other, info = DeiTForImageClassification.from_pretrained(
            folder, num_labels=9, ignore_mismatched_sizes=True, output_loading_info=True
        )
    assert info["mismatched_keys"] == ["classifier.weight", "classifier.bias"]
    assert other.classifier.weight.shape == (9, 24)
    assert 0 < other.classifier.weight.std() < 0.03
    assert other.config.id2label[8] == "LABEL_8"
    assert_close(other.deit.state_dict(), model.deit.state_dict(), 0)


def test_overrides_and_names(saved):
    model = DeiTForImageClassification.from_pretrained(saved[1], drop_path_rate=0.2, attn_implementation="sdpa")
    assert model.config.id2label[3] == "dog"
    assert model.config.drop_path_rates == pytest.approx([0, 0.1, 0.2])
    assert {block.attention.implementation for block in model.deit.blocks} == {"sdpa"}
    with raises_saying(ValueError, "DeiTConfig has no field 'numlabels'"):
        DeiTForImageClassification.from_pretrained(saved[1], numlabels=3)


@pytest.mark.parametrize(
    ("stored", "asked", "found"),
    [
        (torch.float32, None, torch.float32),
        (torch.bfloat16, None, torch.float32),
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float16, "auto", torch.float16),
        (torch.float32, "bfloat16", torch.bfloat16),
        (torch.float32, "torch.float16", torch.float16),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_dtype(stored, asked, found, saved):
    model, folder = saved
    model.to(stored).save_pretrained(folder)
    assert DeiTConfig.from_pretrained(folder).dtype == str(stored).removeprefix("torch.")
    loaded = DeiTForImageClassification.from_pretrained(folder, dtype=asked)
    assert {p.dtype for p in loaded.parameters()} == {found}
    assert_close(loaded.state_dict(), {k: v.to(found) for k, v in model.state_dict().items()}, 0)


@pytest.mark.parametrize("dtype", ["int8", "half precision"])
def test_refused_dtype(dtype, saved):
    with raises_saying(ValueError, "dtype must be a floating torch dtype, its name"):
        load(saved[1], dtype=dtype)


@pytest.mark.parametrize("place", ["folder", "file", "subfolder", "pth in a folder", "pth in a subfolder"])
def test_places(place, saved):
    model, folder = saved
    source, options = {
        "folder": (folder, {}),
        "file": (folder / "model.safetensors", {}),
        "subfolder": (folder.parent, {"subfolder": "m"}),
        "pth in a folder": (folder, {}),
        "pth in a subfolder": (folder.parent, {"subfolder": "m"}),
    }[place]
    if "pth" in place:
        (folder / "model.safetensors").unlink()
        torch.save({"model": weights.from_ours(model._tensors(), "hf")}, folder / "best.pth")
    assert_close(DeiTForImageClassification.from_pretrained(str(source), **options).state_dict(), model.state_dict(), 0)


def test_config_given(saved):
    """A file alone, and shapes that don't tell the number of heads."""
    model, folder = saved
    (folder / "config.json").unlink()
    with raises_saying(ValueError, folder / "model.safetensors", "shapes don't tell the number of attention heads"):
        load(folder)
    loaded = DeiTForImageClassification.from_pretrained(folder, config=model.config)
    assert loaded.config == model.config
    with torch.no_grad():
        assert_close(loaded(images(model.config)).logits, model(images(model.config)).logits, 1e-6)


@pytest.mark.parametrize("reading", [load, load_model], ids=["from_pretrained", "load_model"])
@pytest.mark.parametrize("form", [str, Path])
def test_config_of_another_place(reading, form, saved, tmp_path):
    """A name or a folder stands for the config that is there, whatever reads the weights."""
    model, folder = saved
    torch.save(model.state_dict(), tmp_path / "m.pth")
    loaded = reading(tmp_path / "m.pth", config=form(folder))
    assert loaded.config.id2label == LABELS
    assert_close(loaded.state_dict(), model.state_dict(), 0)


@pytest.mark.parametrize("average", ["state_dict_ema", "model_ema"])
@pytest.mark.parametrize("raw", ["model", "state_dict"])
def test_averaged_weights_come_before_raw_ones(tmp_path, average, raw):
    config = small(distillation_token=False)
    models = {key: build("classification", config, seed) for seed, key in enumerate((raw, average))}
    content = {key: weights.from_ours(model.state_dict(), "timm") for key, model in models.items()}
    torch.save({**content, "epoch": 3}, tmp_path / "checkpoint.pth")
    with pytest.warns(UserWarning, match=f"holds {average} and {raw}; the weights are taken from {average}"):
        found = hub.read_checkpoint(tmp_path / "checkpoint.pth", config=config)
    expected = models[average].state_dict()
    assert found.tensors.keys() == expected.keys()
    assert all(torch.equal(found.tensors[name], expected[name]) for name in expected)


@pytest.mark.parametrize("zipped", [True, False])
def test_scores_paths_and_times_beside_the_weights_are_left_unread(tmp_path, zipped):
    tensors = {"weight": torch.randn(2, 3)}
    beside = {
        "accuracy": np.float64(0.5),
        "best": {"epoch": 3, "scores": [np.float32(0.25), np.int64(3), np.bool_(True)]},
        "path": Path("runs") / "a",
        "there": PureWindowsPath("c:/runs"),
        "curve": np.ones((2, 3)),
        "type": np.dtype("float32"),
        "when": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
        "args": argparse.Namespace(lr=1e-3),
    }
    path = tmp_path / "best.pth"
    torch.save({"model": tensors, "epoch": 3, **beside}, path, _use_new_zipfile_serialization=zipped)
    sentence = f"{path}: {', '.join(beside)} are pickled objects and were not read; the weights are"
    with pytest.warns(UserWarning, match=f"^{re.escape(sentence)}$"):
        found = hub.read_tensors(path)
    assert_close(found, tensors, 0)


@pytest.mark.parametrize("arrays", ["torch", "numpy"])
def test_parameters_in_a_pickle(arrays, tmp_path):
    """Code that saves `named_parameters()` stores parameters, and tied ones share their memory."""
    weight = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    torch.save({"a": weight, "b": weight}, tmp_path / "m.pth")
    found = hub.read_tensors(tmp_path / "m.pth", arrays)
    found["a"][:] = 0.0
    assert_close(found["b"], weight.detach(), 0)
    assert isinstance(found["a"], np.ndarray) == (arrays == "numpy")


def test_weights_that_are_no_tensors_are_refused(tmp_path):
    torch.save({"weight": np.ones(3)}, tmp_path / "arrays.pth")
    with raises_saying(ValueError, tmp_path / "arrays.pth", "'weight' is a pickled object, expected tensors only"):
        hub.read_tensors(tmp_path / "arrays.pth")


@pytest.mark.parametrize("arrays", ["torch", "numpy"])
def test_a_file_that_changes_changes_no_tensor_that_was_read(tmp_path, arrays):
    """A mapped file would: written over, it changes the model, and cut short, it ends the process (SIGBUS)."""
    read = """
import os
from pathlib import Path
from safetensors.numpy import save_file
import numpy as np
from deit.weights import hub
path = Path(os.environ["FILE"])
save_file({"a": np.arange(1_000_000, dtype=np.float32)}, path)
found = hub.read_tensors(path, os.environ["ARRAYS"])["a"]
size = path.stat().st_size
for content in (b"x" * size, b""):
    with open(path, "r+b") as file:
        file.truncate()
        file.write(content)
    assert found.shape == (1_000_000,) and (np.asarray(found) == np.arange(1_000_000)).all()
print("the same")
"""
    assert run_python(read, FILE=str(tmp_path / "model.safetensors"), ARRAYS=arrays) == "the same"
