"""A stranger's folder gives answers or one sentence, soon and in little memory, in each command that reads it."""

import json
import random
import resource
import shutil
import time
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import hostile
from support.checks import raises_saying
from support.models import trained_folder

from deit.evaluate.calibration import Calibration, HeadCalibration
from deit.export.write import export
from deit.files import CheckpointError
from deit.model.load import load_model
from deit.predict.predictor import Predictor

SECONDS = 1.0
"""Of the processor, for a command that refuses a folder. What it imports was imported before."""
MEMORY = 300 * 2**20
"""Largest growth of this process, in bytes, while it refuses a folder."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model of each family and an export, all calibrated, and labelled images."""
    root = tmp_path_factory.mktemp("folders")
    found = {"distilled": trained_folder(root / "distilled"), "convnet": trained_folder(root / "convnet", "convnet")}
    head = HeadCalibration(temperature=1.0, threshold=0.5, nll=(1.0, 1.0), answered=0.5)
    for folder in found.values():
        Calibration(error_rate=0.05, images=9, data="", heads={"fused": head}).save(folder)
    found["exported"] = export(found["distilled"], "torch", root / "exported").folder
    return found | {"data": hostile.images(root / "data")}


@pytest.fixture
def copied(folders, tmp_path):
    return lambda kind: shutil.copytree(folders[kind], tmp_path / kind)


def edit(name, **changes):
    def change(folder):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **changes}))

    return change


def without_labels(**changes):
    def change(folder):
        edit("config.json", **changes)(folder)
        content = json.loads((folder / "config.json").read_text())
        del content["id2label"], content["label2id"]
        (folder / "config.json").write_text(json.dumps(content))

    return change


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def repeated_key(folder):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.rstrip().rstrip("}") + ', "hidden_size": 24}')


def sharded(*names):
    def change(folder):
        (folder / "model.safetensors").rename(folder / "other.safetensors")
        shards = {f"t{i}": name for i, name in enumerate(names)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))

    return change


def header(length, text=b"{}"):
    def change(folder):
        (folder / "model.safetensors").write_bytes(length.to_bytes(8, "little") + text)

    return change


def overlapping(folder):
    """Two tensors in the same bytes."""
    named = {name: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for name in ("a", "b")}
    text = json.dumps(named).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))


def promising(folder):
    """A tensor of a terabyte in sixteen bytes."""
    text = json.dumps({"a": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}}).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))


REFUSED = {
    "a billion layers": (edit("config.json", num_hidden_layers=10**9), "asks for 1000000000; the file is incomplete"),
    "a hundred million labels": (without_labels(num_labels=10**8), "num_labels must be at most 1000000"),
    "huge hidden sizes": (edit("config.json", hidden_size=3 * 2**29, intermediate_size=2**30), "this model expects"),
    "a huge image": (edit("config.json", image_size=2**40), "this model expects"),
    "NaN": (edit("config.json", layer_norm_eps=float("nan")), "NaN is not a number"),
    "infinity": (edit("config.json", initializer_range=float("inf")), "Infinity is not a number"),
    "a number too large": (write("config.json", '{"layer_norm_eps": 1e999}'), "1e999 is too large for a number"),
    "a number too long": (write("config.json", f'{{"hidden_size": {"9" * 10_000}}}'), "is not valid JSON"),
    "a number as text": (edit("config.json", hidden_size="24"), "hidden_size must be a whole number"),
    "a label that is no text": (
        edit("config.json", id2label={"0": ["a"], "1": {}}, label2id=None),
        "id2label names class 0 ['a'], expected text",
    ),
    "deep nesting": (write("config.json", "[" * 100_000), "is not valid JSON (brackets in too many brackets)"),
    "deeper objects": (write("config.json", '{"a":' * 100_000), "is not valid JSON (brackets in too many brackets)"),
    "100 MB of JSON": (write("config.json", '{"a": "' + "x" * 10**8 + '"}'), "takes 95 MiB, expected at most 8 MiB"),
    "a key that is there twice": (repeated_key, "the key 'hidden_size' is there twice"),
    "no object": (write("config.json", "[]"), "should hold a JSON object, found list"),
    "a class that is no text": (edit("config.json", architectures=[{}]), "has architectures=[{}]"),
    "a weight_map that is a list": (
        lambda folder: (sharded()(folder), write("model.safetensors.index.json", '{"weight_map": ["a"]}')(folder)),
        "has no weight_map",
    ),
    "a weight_map of numbers": (
        lambda folder: (sharded()(folder), write("model.safetensors.index.json", '{"weight_map": {"a": 1}}')(folder)),
        "lists the shard 1, expected the name of a file beside it",
    ),
    "a shard above the folder": (sharded("../other/model.safetensors"), "lists the shard '../other/model.safetensors'"),
    "a shard at the root": (sharded("/etc/passwd"), "lists the shard '/etc/passwd', expected the name of a file"),
    "a shard of another system": (sharded("..\\x.safetensors"), "expected the name of a file beside it"),
    "the folder itself": (sharded(".."), "lists the shard '..'"),
    "a header of an exabyte": (header(2**60), "is truncated or corrupt"),
    "a header that ends early": (header(1000), "is truncated or corrupt"),
    "a header that is no JSON": (header(2, b"[["), "is truncated or corrupt"),
    "tensors in the same bytes": (overlapping, "is truncated or corrupt"),
    "a tensor of a terabyte": (promising, "is truncated or corrupt"),
}


@pytest.mark.parametrize("attack", REFUSED)
def test_a_hostile_folder_is_refused_soon_and_in_little_memory(attack, copied, folders, tmp_path, capsys):
    change, why = REFUSED[attack]
    change(folder := copied("distilled"))
    (tmp_path / "out").mkdir()
    for verb, command in hostile.commands(folder, folders["data"], tmp_path / "out").items():
        if verb == "convert" and "architectures" in why:  # which reads the kind of model off the tensors
            continue
        began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        said = hostile.refused(command, capsys)
        assert time.process_time() - began < SECONDS + (verb in WARMING)
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY
        assert len(said) < 1000
        if verb not in ("train", "teach"):  # which may miss something else before
            assert why in said, verb
    WARMING.clear()


WARMING = {"predict", "serve", "eval", "explain", "export", "train", "teach", "convert", "calibrate"}
"""Commands that have not imported their modules yet."""


OTHERS = {
    "preprocessing for a huge image": (
        "distilled",
        edit("preprocessor_config.json", crop_size={"height": 10**6, "width": 10**6}),
        "from 1 to 16384",
    ),
    "preprocessing of a list": ("distilled", write("preprocessor_config.json", "[]"), "should hold a JSON object"),
    "another processor": (
        "distilled",
        edit("preprocessor_config.json", image_processor_type="\x1b[31m"),
        "the file is for '\\x1b[31m'",
    ),
    "a calibration of lists": ("distilled", edit("calibration.json", heads=[]), "is not a calibration"),
    "a calibration to infinity": (
        "distilled",
        edit("calibration.json", heads={"fused": {"temperature": 10**30, "threshold": 0, "nll": [], "answered": 0}}),
        "is not a calibration",
    ),
    "a network of a billion layers": ("convnet", edit("config.json", depth=10**9), "does not fit the config.json"),
    "a network as wide": ("convnet", edit("config.json", widths=[10**6, 10**6]), "does not fit the config.json"),
    "a network of text": ("convnet", edit("config.json", widths="xyz"), "widths must be a list of channels"),
    "an export of a list": ("exported", edit("export.json", format=[]), "is of format []"),
    "an export of other outputs": ("exported", edit("export.json", outputs=["logits"] * 9), "lacks the files"),
    "an export without its output": (
        "exported",
        edit("export.json", input={"name": "x", "shape": [None, 3, 16, 16]}),
        "names 'x' and logits",
    ),
    "an export of files elsewhere": ("exported", edit("export.json", files={"../m": ""}), "lacks the files"),
    "an export with other labels": (
        "exported",
        edit("config.json", id2label={"0": "a", "1": "b"}, label2id=None),
        "gives 5 numbers for an image, and its config.json names 2 labels",
    ),
}


@pytest.mark.parametrize("attack", OTHERS)
def test_other_hostile_files_are_refused(attack, copied, folders, tmp_path, capsys):
    kind, change, why = OTHERS[attack]
    change(folder := copied(kind))
    began = time.process_time()
    said = hostile.refused(hostile.commands(folder, folders["data"], tmp_path)["predict"], capsys)
    assert time.process_time() - began < SECONDS
    assert why in said


VALUES = (
    *(None, True, -1, 0, 10**8, 10**30, 1e308, 1.5, "x", "", [], {}, [[]], [10**9] * 2, {"a": 1}, {"0": []}),
    *({"height": 10**6, "width": 10**6}, {"shortest_edge": 10**7}, "\n\x1b[31m"),
)


def places(value, path=()):
    """Each place in JSON that holds a value."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


@pytest.mark.parametrize("kind", ["distilled", "convnet", "exported"])
@pytest.mark.parametrize("seed", range(3))
def test_any_wrong_value_gives_an_answer_or_one_sentence(kind, seed, copied, folders):
    """Each place in each file in turn, with values of all types."""
    folder, draw = copied(kind), random.Random(seed)
    image = next(folders["data"].rglob("*.png"))
    answered, refused = 0, []
    for file in sorted(folder.glob("*.json")):
        text = file.read_text()
        for *owners, last in places(json.loads(text)):
            content = place = json.loads(text)
            for key in owners:
                place = place[key]
            place[last] = draw.choice(VALUES)
            file.write_text(json.dumps(content))
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    Predictor(folder)([image])
                answered += 1
            except (ValueError, OSError) as error:
                refused.append(str(error))
        file.write_text(text)
    assert answered
    assert len(refused) > 10
    assert [message for message in refused if set(message) & {"\n", "\x1b"}] == []


def test_a_config_that_asks_for_attention_changes_no_answer(copied, folders):
    folder, image = copied("distilled"), next(folders["data"].rglob("*.png"))
    expected = Predictor(folder)([image])
    edit("config.json", output_attentions=True, output_hidden_states=True, return_dict=False)(folder)
    assert Predictor(folder)([image]) == expected


def test_code_that_a_config_names_is_not_imported(copied, tmp_path, monkeypatch):
    """What `transformers` runs with trust_remote_code=True is kept as text."""
    folder = copied("distilled")
    (folder / "stranger.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})")
    monkeypatch.syspath_prepend(folder)
    auto = {"AutoConfig": "stranger.Config", "AutoModel": "stranger.Model"}
    edit("config.json", auto_map=auto, trust_remote_code=True)(folder)
    edit("preprocessor_config.json", auto_map={"AutoImageProcessor": "stranger.Processor"})(folder)
    assert load_model(folder, trust_remote_code=True).config.auto_map == auto
    Predictor(folder)
    assert not (tmp_path / "ran").exists()


def test_a_head_that_no_file_holds_is_not_made_of_nothing(copied):
    """A file may lack its heads, but not ask for gigabytes of them."""
    folder = copied("distilled")
    tensors = {
        name: value for name, value in load_file(folder / "model.safetensors").items() if "classifier" not in name
    }
    save_file(tensors, folder / "model.safetensors")
    edit("config.json", pooler_output_size=2**30, architectures=["DeiTModel"])(folder)
    pooler = {"deit.pooler.dense.bias": torch.zeros(1)}
    save_file({**tensors, **pooler}, folder / "model.safetensors")
    with raises_saying(CheckpointError, "model.safetensors", "pooler"):
        load_model(folder)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "calibration.json", "model.safetensors"])
def test_a_link_out_of_the_folder_shows_nothing(name, copied, folders, tmp_path, capsys):
    """The cache of the hub consists of links, so they are followed. No message quotes what they lead to."""
    folder = copied("distilled")
    (tmp_path / "secret").write_text("root:the-secret:0:0")
    (folder / name).unlink()
    (folder / name).symlink_to(tmp_path / "secret")
    commands = hostile.commands(folder, folders["data"], tmp_path)
    assert "the-secret" not in hostile.refused(commands["predict"], capsys)
    assert (tmp_path / "secret").read_text() == "root:the-secret:0:0"


def test_a_link_is_replaced_and_not_written_through(copied, folders, tmp_path):
    """`calibrate` writes into the folder."""
    folder = copied("distilled")
    (tmp_path / "victim").write_text((folder / "calibration.json").read_text())
    (folder / "calibration.json").unlink()
    (folder / "calibration.json").symlink_to(tmp_path / "victim")
    before = (tmp_path / "victim").read_text()
    calibration = Calibration.of_model(folder)
    calibration.save(folder)
    assert (tmp_path / "victim").read_text() == before
    assert not (folder / "calibration.json").is_symlink()
