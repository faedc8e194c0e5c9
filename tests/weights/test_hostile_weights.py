"""Weight files of a stranger run no code, read no other file and unpack to no more than they hold."""

import io
import json
import os
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import hostile
from support.checks import raises_saying
from support.models import trained_folder
from support.runs import small_recipe

from deit.files import CheckpointError
from deit.image.processor import DeiTImageProcessor
from deit.predict.predictor import Predictor
from deit.recipe import Distilled
from deit.train.teacher import Teacher
from deit.weights import hub


def keras_with_lambda(trace):
    """What Keras refuses unless safe_mode=False: a layer that is marshalled Python."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        layer = {"class_name": "Lambda", "config": {"function": {"class_name": "__lambda__", "config": {"code": "4w"}}}}
        archive.writestr("config.json", json.dumps({"class_name": "Sequential", "config": {"layers": [layer]}}))
        archive.writestr("metadata.json", "{}")
        archive.writestr("model.weights.h5", b"")
    return buffer.getvalue()


def numpy_of_objects(trace):
    buffer = io.BytesIO()
    np.save(buffer, np.array([hostile.Runs(trace)], dtype=object), allow_pickle=True)
    return buffer.getvalue()


CONTENTS = {
    "pytorch_model.bin": hostile.pickled,
    "best.pth": hostile.plainly_pickled,
    "model.pt": hostile.pickled,
    "tf_model.h5": hostile.plainly_pickled,
    "model.safetensors": hostile.pickled,
    "model.keras": keras_with_lambda,
    "model.npy": numpy_of_objects,
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", CONTENTS)
def test_no_command_runs_what_a_weight_file_holds(name, tmp_path, capsys):
    """Whether the folder is named, or the file in it."""
    folder, trace, data = trained_folder(tmp_path / "model"), tmp_path / "ran", hostile.images(tmp_path / "data")
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(CONTENTS[name](trace))
    for place in (folder, folder / name):
        for verb, command in hostile.commands(place, data, tmp_path).items():
            hostile.refused(command, capsys)
            assert not trace.exists(), verb


def test_the_attack_would_work_on_python_itself(tmp_path):
    torch.load(io.BytesIO(hostile.pickled(tmp_path / "ran")), weights_only=False)
    assert (tmp_path / "ran").exists()


def compressed(tensors, path):
    """Zeros that take a thousandth of their size."""
    buffer = io.BytesIO()
    torch.save({**tensors, "more": torch.zeros(10**7)}, buffer)
    with zipfile.ZipFile(buffer) as whole, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for part in whole.namelist():
            archive.writestr(part, whole.read(part))


def expanded(tensors, path):
    """A single number that calls itself a terabyte."""
    torch.save({**tensors, "more": torch.zeros(1).expand(2**38)}, path)


@pytest.mark.parametrize(
    ("write", "why"), [(compressed, "unpacks to more than it holds"), (expanded, "names more numbers than it holds")]
)
def test_pickles_that_are_larger_than_their_file(write, why, tmp_path):
    folder = trained_folder(tmp_path / "model")
    write(load_file(folder / "model.safetensors"), tmp_path / "x.pth")
    with raises_saying(CheckpointError, tmp_path / "x.pth", why, "ask for a safetensors file"):
        hub.read_tensors(tmp_path / "x.pth")


def external(file, path):
    (path.parent / "secret").write_bytes(bytes(range(64)))
    file.create_dataset("a", (8,), "f4", external=[(str(path.parent / "secret"), 0, 32)])


def virtual(file, path):
    import h5py

    with h5py.File(path.parent / "other.h5", "w") as other:
        other["a"] = np.ones(8, np.float32)
    layout = h5py.VirtualLayout((8,), "f4")
    layout[:] = h5py.VirtualSource(str(path.parent / "other.h5"), "a", (8,))
    file.create_virtual_dataset("a", layout)


def unfilled(file, path):
    file.create_dataset("a", (2**40,), "f4", chunks=(2**20,))


def textual(file, path):
    file["a"] = ["x" * 9]


def elsewhere(file, path):
    import h5py

    with h5py.File(path.parent / "other.h5", "w") as other:
        other["a"] = np.ones(8, np.float32)
    file["a"] = h5py.ExternalLink(str(path.parent / "other.h5"), "a")


@pytest.mark.parametrize(
    ("write", "why"),
    [
        (external, "a lies in another file"),
        (virtual, "a lies in another file"),
        (unfilled, "expected as many numbers as the file holds"),
        (textual, "expected as many numbers as the file holds"),
        (elsewhere, None),
    ],
)
def test_hdf5_holds_its_own_numbers(write, why, tmp_path):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "tf_model.h5"
    with h5py.File(path, "w") as file:
        write(file, path)
    if why is None:  # a link to another file is not followed
        assert hub._read_h5(path) == {}
    else:
        with raises_saying(CheckpointError, path, why):
            hub._read_h5(path)


@pytest.mark.parametrize(
    "change",
    [
        {"num_classes": 10**9},
        {"num_classes": "5"},
        {"model_args": {"depth": 10**9}},
        {"model_args": {"embed_dim": 10**9}},
        {"model_args": {"stem_width": 10**5}},
        {"model_args": {"img_size": 10**6}},
        {"model_args": []},
        {"model_args": [1]},
        {"architecture": "os.system"},
        {"pretrained_cfg": {"input_size": [3, 10**6, 10**6]}},
    ],
)
def test_timm_folders_ask_for_no_more_than_they_hold(change, tmp_path):
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet10t", num_classes=5)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    config = {"architecture": "resnet10t", "num_classes": 5, "pretrained_cfg": {"input_size": [3, 32, 32]}}
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    recipe = small_recipe(Distilled(teacher=f"timm:{tmp_path}"))
    with raises_saying(CheckpointError):
        Teacher.load(f"timm:{tmp_path}", list("abcde"), recipe)
    DeiTImageProcessor.paper(32).save_pretrained(tmp_path)
    with raises_saying(ValueError):
        Predictor(tmp_path)


@pytest.mark.parametrize("name", ["checkpoint_path", "pretrained_cfg_overlay", "pretrained"])
def test_a_timm_folder_names_no_file(name, tmp_path):
    """timm unpickles the file that `checkpoint_path` names."""
    timm = pytest.importorskip("timm")
    torch.save(timm.create_model("resnet10t", num_classes=5).state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "evil.pth").write_bytes(hostile.pickled(tmp_path / "ran"))
    config = {"architecture": "resnet10t", "num_classes": 5, "model_args": {name: str(tmp_path / "evil.pth")}}
    (tmp_path / "config.json").write_text(json.dumps({**config, "pretrained_cfg": {"input_size": [3, 32, 32]}}))
    DeiTImageProcessor.paper(32).save_pretrained(tmp_path)
    with raises_saying(ValueError, f"model_args hold '{name}', which is no argument of a model"):
        Predictor(tmp_path)
    with raises_saying(ValueError):
        Teacher.load(f"timm:{tmp_path}", list("abcde"), small_recipe(Distilled(teacher=f"timm:{tmp_path}")))
    assert not (tmp_path / "ran").exists()


def test_a_pickled_timm_folder_runs_nothing(tmp_path):
    pytest.importorskip("timm")
    (tmp_path / "pytorch_model.bin").write_bytes(hostile.pickled(tmp_path / "ran"))
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet10t", "num_classes": 5}))
    with raises_saying(CheckpointError, "Nothing was executed or loaded"):
        Teacher.load(f"timm:{tmp_path}", list("abcde"), small_recipe(Distilled(teacher=f"timm:{tmp_path}")))
    assert not os.path.exists(tmp_path / "ran")


def test_a_damaged_directory_of_an_archive_is_a_sentence(tmp_path):
    """Python's own reader of archives has an error of its own for it."""
    torch.save({"weight": torch.ones(3)}, tmp_path / "weights.pth")
    content = bytearray((tmp_path / "weights.pth").read_bytes())
    content[content.index(b"PK\x01\x02")] ^= 0xFF
    (tmp_path / "weights.pth").write_bytes(content)
    with raises_saying(CheckpointError, "weights.pth is truncated, corrupt or no PyTorch file", "fetch it again"):
        hub.read_tensors(tmp_path / "weights.pth")
