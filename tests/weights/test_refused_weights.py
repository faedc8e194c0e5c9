"""Weight files that are damaged, hostile or don't fit are refused in one sentence."""

import os
import random

import numpy as np
import pytest
import safetensors.torch
import torch
from support.checks import raises_saying
from support.models import CLASS_OF, build, small

from deit import files, weights
from deit.config import DeiTConfig
from deit.model.network import DeiTForImageClassification

load = DeiTForImageClassification.from_pretrained


def test_missing_places(tmp_path):
    (tmp_path / "empty").mkdir()
    with raises_saying(
        FileNotFoundError, tmp_path / "no" / "such", "does not exist; give an existing folder, or a hub name like"
    ):
        load(tmp_path / "no" / "such")
    with raises_saying(FileNotFoundError, "best.pth does not exist"):
        load("best.pth")
    with raises_saying(FileNotFoundError, tmp_path / "empty", "holds no weights; expected one of model.safetensors, "):
        load(tmp_path / "empty")
    (tmp_path / "run" / "model").mkdir(parents=True)
    with raises_saying(FileNotFoundError, f"the model of a run is in {tmp_path / 'run' / 'model'}"):
        load(tmp_path / "run")
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "export.json").write_text("{}")
    with raises_saying(FileNotFoundError, tmp_path / "exported", "holds an exported model", "that was exported"):
        load(tmp_path / "exported")
    (tmp_path / "photo.JPG").write_bytes(b"photo")
    with raises_saying(files.CheckpointError, "photo.JPG is an image, expected a model"):
        load(tmp_path / "photo.JPG")
    with raises_saying(FileNotFoundError, "'a b/c' is neither a folder nor a possible hub name"):
        load("a b/c")
    with raises_saying(
        FileNotFoundError, "model.safetensors of org/none is not in the local cache", "no local folder org/none"
    ):
        load("org/none", cache_dir=tmp_path, local_files_only=True)


@pytest.mark.parametrize("damage", ["empty", "half", "ones", "header"])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "checkpoint.pth"])
def test_damaged_file(name, damage, saved):
    model, folder = saved
    path = folder / name
    if path.suffix != ".safetensors":
        (folder / "model.safetensors").unlink()
        torch.save(weights.from_ours(model._tensors(), "hf"), path)
    whole = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "half": whole[: len(whole) // 2], "ones": b"\xff" * 999, "header": whole[:5]}[damage]
    )
    with raises_saying(files.CheckpointError, path, "truncated", "corrupt", "fetch it again"):
        load(folder)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("legacy", [False, True])
def test_mutated_pickles_load_or_are_refused(legacy, tmp_path):
    """Random bytes in the part that is unpickled: a model or one sentence, never another error."""
    model = build("with_teacher", small(hidden_size=64, num_attention_heads=1))
    path, draw = tmp_path / "m.pth", random.Random(0)
    torch.save(
        {"model": weights.from_ours(model._tensors(), "original")}, path, _use_new_zipfile_serialization=not legacy
    )
    whole, sentences = path.read_bytes(), []
    for _ in range(120):
        mutated = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            mutated[draw.randrange(6000)] = draw.randrange(256)
        path.write_bytes(mutated)
        try:
            CLASS_OF["with_teacher"].from_pretrained(path)
        except ValueError as error:
            sentences.append(str(error))
    assert len(sentences) > 30
    assert all(str(path) in sentence and "\n" not in sentence for sentence in sentences)


class Attack:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize(
    "wrap",
    [lambda a: a, lambda a: {"model": {"x": torch.zeros(1)}, "args": a}, lambda a: {"x": torch.zeros(1), "y": a}],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_code_is_not_run(wrap, legacy, tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "m.pth"
    torch.save(wrap(Attack(marker)), path, _use_new_zipfile_serialization=not legacy)
    with raises_saying(
        files.CheckpointError,
        path,
        "would run code when loaded. Nothing was executed or loaded",
        f"asks for {os.system.__module__}.system",
        "Ask for a safetensors file",
    ):
        load(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([torch.zeros(1)], "should hold a dictionary of tensors, found list"),
        ({"a": torch.zeros(1), "b": 3}, "'b' is int, expected tensors only, or a dictionary with them under \"model\""),
        ({"model": {"a": "text"}}, "'a' is str, expected tensors only"),
        ({"fc.weight": torch.zeros(1)}, "names its tensors like ['fc.weight']; expected Hugging Face's, timm's"),
    ],
)
def test_other_pickles(content, sentence, tmp_path):
    torch.save(content, tmp_path / "m.pth")
    with raises_saying(ValueError, tmp_path / "m.pth", sentence):
        load(tmp_path / "m.pth")


def altered(saved, change):
    model, folder = saved
    named = dict(weights.from_ours(model._tensors(), "hf"))
    change(named)
    safetensors.torch.save_file({k: v.contiguous() for k, v in named.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("flax_model.msgpack", "is a file of Flax, expected safetensors, .bin, .pth or .h5; load its folder with"),
        ("ViT-B_16.npz", "is a file of NumPy, as Google's ViTs have, expected safetensors, .bin, .pth or .h5; load it"),
        ("model.keras", "is a whole model of Keras, expected safetensors, .bin, .pth or .h5; import deit.model_keras"),
    ],
)
def test_formats_that_are_not_read(name, said, tmp_path):
    """They are not called damaged."""
    np.savez(tmp_path / "a.npz", a=np.ones(3))
    (tmp_path / "a.npz").rename(tmp_path / name)
    with raises_saying(files.CheckpointError, f"{tmp_path / name} {said}"):
        load(tmp_path / name)


@pytest.mark.parametrize("dtype", ["int8", "int64", "bool", "complex64"])
def test_numbers_that_are_no_floats(dtype, saved):
    def change(named):
        for leaf in ("weight", "bias"):
            named[f"classifier.{leaf}"] = named[f"classifier.{leaf}"].to(getattr(torch, dtype))

    with raises_saying(
        files.CheckpointError,
        f"model.safetensors: classifier.bias holds torch.{dtype} (and 1 more), expected floating-point numbers; ask",
    ):
        load(altered(saved, change))


@pytest.mark.parametrize("change", [torch.Tensor.to_sparse, lambda tensor: tensor.to("meta")], ids=["sparse", "meta"])
@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_tensors_without_all_of_their_numbers(change, tmp_path):
    torch.save({"a": torch.ones(2), "b": change(torch.eye(3))}, tmp_path / "m.pth")
    with raises_saying(files.CheckpointError, tmp_path / "m.pth", "names more numbers than it holds, expected whole"):
        load(tmp_path / "m.pth")


def test_key_without_a_rule(saved):
    folder = altered(saved, lambda named: named.update({"deit.extra.weight": torch.zeros(1)}))
    with raises_saying(
        ValueError,
        folder / "model.safetensors",
        "no rule for tensor 'deit.extra.weight' (read as hf names)",
        "save the file without it",
    ):
        load(folder)


def test_missing_part_of_qkv(saved):
    folder = altered(saved, lambda named: named.pop("deit.encoder.layer.2.attention.attention.value.weight"))
    with raises_saying(
        ValueError,
        folder / "model.safetensors",
        "deit.blocks.2.attention.qkv.weight is made of query, key and value, and the file has only 2 of the three",
        "fetch it again",
    ):
        load(folder)


def test_missing_tensor(saved):
    folder = altered(saved, lambda named: [named.pop(key) for key in list(named) if "layernorm_after" in key])
    with raises_saying(
        files.CheckpointError,
        folder / "model.safetensors",
        "lacks deit.blocks.0.norm2.weight (and 5 more)",
        "the file is incomplete, or the config is another model's",
    ):
        load(folder)


def test_tensor_of_another_shape(saved):
    folder = altered(saved, lambda named: named.update({"deit.embeddings.cls_token": torch.zeros(1, 1, 7)}))
    with raises_saying(
        files.CheckpointError,
        folder / "model.safetensors",
        "deit.cls_token has shape (1, 1, 7), this model expects (1, 1, 24);",
    ):
        load(folder)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("{", ("is not valid JSON (", "fetch or write it again")),
        ("", ("is not valid JSON",)),
        ("\ud800", ("is not valid JSON",)),
        ("[1]", ("should hold a JSON object, found list",)),
        ('{"model_type": "bert"}', ("model_type is 'bert'; this package reads deit, vit, deit3 and dinov2",)),
        ('{"model_type": "deit", "hidden_size": "wide"}', ("hidden_size must be a whole number", "'wide'")),
    ],
)
def test_bad_config(text, parts, saved):
    path = saved[1] / "config.json"
    path.write_bytes(text.encode(errors="surrogatepass"))
    with raises_saying(ValueError, path, *parts):
        load(saved[1])
    with raises_saying(ValueError, path, *parts):
        DeiTConfig.from_pretrained(saved[1])


def test_missing_shard(saved):
    model, folder = saved
    model.save_pretrained(folder, max_shard_size="3KB")
    gone = sorted(folder.glob("model-*"))[1]
    gone.unlink()
    with raises_saying(
        files.CheckpointError,
        folder / "model.safetensors.index.json",
        f"lists a shard that is missing ({folder} holds no {gone.name})",
        "fetch the checkpoint again",
    ):
        load(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with raises_saying(files.CheckpointError, folder / "model.safetensors.index.json", "has no weight_map"):
        load(folder)
