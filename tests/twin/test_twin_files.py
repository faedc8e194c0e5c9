"""The Keras classes' files: the PyTorch classes' own, transformers', TensorFlow's of old, and Keras'."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from support.checks import raises_saying, run_python
from support.models import CLASS_OF, build, saved, small
from twins import BACKEND, TWIN_OF, arrays, as_arrays, assert_alike, distance, given_for, keras, slow_on_jax, twins

import deit
from deit import weights
from deit.config import VARIANTS
from deit.export.convert import convert
from deit.files import CheckpointError

KINDS = pytest.mark.parametrize("kind", TWIN_OF)
OF_TENSORFLOW = Path(__file__).parents[1] / "golden" / "tensorflow"


def mask_of(kind):
    return kind == "masked_image"


# ------------------------------------------------------------------------------------------- between the frameworks


@KINDS
@pytest.mark.parametrize(
    "changes",
    [{}, {"layer_scale_init_value": 0.1, "position_on_class_token": False}, {"image_size": (8, 20), "qkv_bias": False}],
)
def test_saved_in_one_loaded_in_the_other(kind, changes, tmp_path):
    ours, twin = twins(kind, small(**changes))
    ours.save_pretrained(tmp_path / "ours")
    twin.save_pretrained(tmp_path / "twins")
    assert (tmp_path / "ours/config.json").read_text() == (tmp_path / "twins/config.json").read_text()
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "twins"))
    assert list(first) == list(second)
    assert all(np.array_equal(first[name], second[name]) for name in first)
    given = given_for(ours.config, mask=mask_of(kind))
    assert_alike(ours, TWIN_OF[kind].from_pretrained(tmp_path / "ours"), given)
    assert_alike(CLASS_OF[kind].from_pretrained(tmp_path / "twins"), twin, given)


@slow_on_jax
@pytest.mark.parametrize(
    "name",
    [
        "DeiTModel",
        "DeiTForMaskedImageModeling",
        "DeiTForImageClassification",
        "DeiTForImageClassificationWithTeacher",
        "ViTModel",
        "ViTForImageClassification",
    ],
)
def test_transformers_loads_what_keras_saves(name, quiet_transformers, tmp_path):
    config = small(distillation_token=name.startswith("DeiT"))
    twin = getattr(deit, f"TF{name}")(config)
    rng = np.random.default_rng(0)
    twin.set_tensors({n: value + 0.2 * rng.standard_normal(value.shape) for n, value in twin.tensors().items()})
    twin.save_pretrained(tmp_path)
    theirs, info = getattr(quiet_transformers, name).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    given = given_for(config, mask="Masked" in name)
    with torch.no_grad():
        expected = theirs.eval()(**given)
    found = twin(**as_arrays(given))
    for field in found:
        assert distance(found[field], expected[field]) < 1e-5, field


@pytest.mark.parametrize("dialect", ["timm", "original"])
def test_other_dialects(dialect, tmp_path):
    ours = build("with_teacher", small())
    ours.save_pretrained(tmp_path / "hf")
    written = convert(tmp_path / "hf", dialect, tmp_path / "theirs")
    options = {"config": ours.config} if dialect == "original" else {}
    twin = TWIN_OF["with_teacher"].from_pretrained(written, **options)
    assert twin.deit.position.shape == (1, 18, 24)
    assert all(np.array_equal(twin.tensors()[name], value) for name, value in arrays(ours).items())


@slow_on_jax
def test_shards_and_half_precision(tmp_path):
    ours, twin = twins("classification", small())
    twin.save_pretrained(tmp_path / "shards", max_shard_size=8000)
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    assert_alike(CLASS_OF["classification"].from_pretrained(tmp_path / "shards"), twin, given_for(ours.config))
    ours.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    torch.save(ours.state_dict() and weights.from_ours(ours._tensors(), "hf"), tmp_path / "half.bin")
    for source, options in (("half", {}), ("half.bin", {"config": ours.config})):
        twin = TWIN_OF["classification"].from_pretrained(tmp_path / source, **options)
        assert all(
            value.dtype == np.float32 and np.array_equal(value, ours._tensors()[name].float().numpy())
            for name, value in twin.tensors().items()
        )
    half = TWIN_OF["classification"].from_pretrained(tmp_path / "half", dtype="bfloat16")
    half.save_pretrained(tmp_path / "again")
    again = CLASS_OF["classification"].from_pretrained(tmp_path / "again", dtype="auto")
    assert again.dtype == torch.bfloat16
    assert all(torch.equal(value, ours._tensors()[name]) for name, value in again._tensors().items())


def test_at_another_resolution(tmp_path):
    ours, twin = twins("classification", small())
    twin.save_pretrained(tmp_path)
    resized = TWIN_OF["classification"].from_pretrained(tmp_path, image_size=(24, 8))
    assert resized.config.image_size == (24, 8)
    assert_alike(ours.resize_to((24, 8)), resized, given_for(ours.config))


def test_what_a_file_lacks_starts_anew(tmp_path):
    build("backbone", small(), add_pooling_layer=False).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"does not give classifier.weight, classifier.bias: initialised anew"):
        twin, info = TWIN_OF["classification"].from_pretrained(tmp_path, output_loading_info=True, num_labels=3)
    assert info["missing_keys"] == ["classifier.weight", "classifier.bias"]
    assert twin.classifier.kernel.shape == (24, 3)
    twin.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="initialised anew"):
        again = TWIN_OF["classification"].from_pretrained(tmp_path, num_labels=2, ignore_mismatched_sizes=True)
    assert again.classifier.kernel.shape == (24, 2)
    with raises_saying(CheckpointError, "classifier.weight has shape (3, 24), this model expects (2, 24) (and 1 more)"):
        TWIN_OF["classification"].from_pretrained(tmp_path, num_labels=2)


@pytest.mark.parametrize(
    ("source", "options"),
    [("backbone", {"use_mask_token": True}), ("masked_image", {}), ("with_teacher", {}), ("classification", {})],
)
@KINDS
def test_every_class_from_every_file(source, options, kind, tmp_path):
    """Pooler, mask token and heads that a class has no place for are left aside, as the PyTorch classes do: a model is
    fine-tuned after masked pre-training so."""
    build(source, small(), **options).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what starts anew
        ours, expected = CLASS_OF[kind].from_pretrained(tmp_path, output_loading_info=True)
        twin, info = TWIN_OF[kind].from_pretrained(tmp_path, output_loading_info=True)
    assert info == expected
    shared = [name for name in arrays(ours) if name not in info["missing_keys"]]
    assert all(np.array_equal(twin.tensors()[name], arrays(ours)[name]) for name in shared)
    assert twin.tensors().keys() == arrays(ours).keys()


def test_a_vit_is_a_vit(tmp_path):
    build("classification", small(distillation_token=False)).save_pretrained(tmp_path)
    twin = deit.TFViTForImageClassification.from_pretrained(tmp_path)
    assert twin.vit is twin.deit
    assert twin.config.model_type == "vit"


# ------------------------------------------------------------------------------------- TensorFlow's files of old


@slow_on_jax
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("backbone", "backbone"),
        ("masked_image", "masked_image"),
        ("classification", "classification"),
        ("with_teacher", "with_teacher"),
        ("with_teacher_safetensors", "with_teacher"),
        ("vit", "classification"),
    ],
)
def test_files_of_transformers_tensorflow_classes(name, kind):
    """Written by transformers 4.57 with its answers (`golden/tensorflow/make.py`); read in both frameworks.

    Its masked image class decodes one token too early and so paints other patches: there hidden states are compared.
    """
    golden = np.load(OF_TENSORFLOW / name.removesuffix("_safetensors") / "golden.npz")
    given = {key: golden[key] for key in ("pixel_values", "bool_masked_pos") if key in golden}
    options = {"output_hidden_states": True, "output_attentions": True}
    found = TWIN_OF[kind].from_pretrained(OF_TENSORFLOW / name)(**given, **options)
    with torch.no_grad():
        other = CLASS_OF[kind].from_pretrained(OF_TENSORFLOW / name)(
            **{key: torch.from_numpy(value) for key, value in given.items()}, **options
        )
    for out in (found, other):
        fields = {"hidden_states": out.hidden_states, "attentions": out.attentions}
        fields = {f"{key}_{i}": value for key, values in fields.items() for i, value in enumerate(values)}
        fields |= {
            key: out[key]
            for key in out
            if key not in ("loss", "reconstruction", *options) and key not in ("hidden_states", "attentions")
        }
        assert fields.keys() <= set(golden.files)
        for key, value in fields.items():
            assert distance(value, torch.from_numpy(golden[key])) < 1e-5, key


def test_a_damaged_or_foreign_h5_is_refused(tmp_path):
    import h5py

    whole = (OF_TENSORFLOW / "vit" / "tf_model.h5").read_bytes()
    (tmp_path / "tf_model.h5").write_bytes(whole[:5000])
    with raises_saying(CheckpointError, "tf_model.h5 is truncated, corrupt or no HDF5 file"):
        TWIN_OF["classification"].from_pretrained(tmp_path)
    with h5py.File(tmp_path / "tf_model.h5", "w") as file:
        file["resnet/conv/kernel:0"] = np.zeros((3, 3))
    with raises_saying(ValueError, "'resnet/conv/kernel:0' is no tensor of the TensorFlow classes of transformers"):
        TWIN_OF["classification"].from_pretrained(tmp_path)
    with h5py.File(tmp_path / "tf_model.h5", "w") as file:
        file["classifier/kernel:0"] = np.zeros((3, 3, 3))
    with raises_saying(ValueError, "'classifier/kernel:0' is no tensor of the TensorFlow classes of transformers"):
        TWIN_OF["classification"].from_pretrained(tmp_path)


# --------------------------------------------------------------------------------------------------------- Keras' own


@pytest.mark.parametrize(
    "name",
    [
        "TFDeiTModel",
        "TFDeiTForMaskedImageModeling",
        "TFDeiTForImageClassification",
        "TFDeiTForImageClassificationWithTeacher",
        "TFViTModel",
        "TFViTForImageClassification",
    ],
)
def test_keras_file(name, tmp_path):
    config = small(distillation_token="DeiT" in name, image_size=(8, 20), id2label=dict(enumerate("abcde")))
    options = {"add_pooling_layer": False, "use_mask_token": True} if name.endswith("Model") else {}
    twin = getattr(deit, name)(config, **options)
    twin.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert type(again) is type(twin)
    assert again.config.to_dict() == twin.config.to_dict()
    assert again.tensors().keys() == twin.tensors().keys()
    assert all(np.array_equal(again.tensors()[key], value) for key, value in twin.tensors().items())


@slow_on_jax
def test_keras_file_goes_on_training(tmp_path):
    twin = TWIN_OF["with_teacher"](small(), dtype="mixed_bfloat16")
    twin.compile(keras.optimizers.AdamW(1e-3), distillation="soft", temperature=2.0)
    data = {
        "pixel_values": given_for(small(), 4)["pixel_values"].numpy(),
        "labels": np.arange(4),
        "teacher_logits": np.eye(4, 5, dtype="float32"),
    }
    twin.train_on_batch(data)
    twin.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.dtype_policy.name == "mixed_bfloat16"
    assert again._distillation == {"kind": "soft", "weight": None, "temperature": 2.0}
    assert int(again.optimizer.iterations) == 1
    assert float(twin.train_on_batch(data)) == pytest.approx(float(again.train_on_batch(data)), abs=1e-6)
    for key, value in twin.tensors().items():
        assert distance(again.tensors()[key], value) < 1e-6, key


@pytest.mark.parametrize("kind", TWIN_OF)
def test_convert_to_keras(kind, tmp_path):
    """In a process of its own, as a person would open it."""
    from deit.cli import main

    ours = build(kind, small())
    saved(ours, tmp_path / "hf")
    assert main(["convert", str(tmp_path / "hf"), "--to", "keras", "--out", str(tmp_path / "keras")]) == 0
    assert sorted(path.name for path in (tmp_path / "keras").iterdir()) == ["model.keras", "preprocessor_config.json"]
    assert json.loads((tmp_path / "keras/preprocessor_config.json").read_text())["crop_size"] == {
        "height": 16,
        "width": 16,
    }
    again = keras.saving.load_model(tmp_path / "keras" / "model.keras")
    assert_alike(ours, again, given_for(ours.config, mask=mask_of(kind)))


def test_a_stopped_conversion_to_keras_leaves_nothing(tmp_path, monkeypatch):
    """Keras writes under a name of its own, also if another process was killed there."""
    saved(build("classification", small(distillation_token=False)), tmp_path / "hf")
    (tmp_path / "keras").mkdir()
    (tmp_path / "keras" / ".model.keras.0123abcd.keras").write_text("half")

    def stopped(_, file):
        Path(file).write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(TWIN_OF["classification"], "save", stopped)
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "hf", "keras", tmp_path / "keras")
    assert list((tmp_path / "keras").iterdir()) == []


# ----------------------------------------------------------------------------------------------- one framework alone


def test_processor_returns_tensorflow_tensors():
    tensorflow = pytest.importorskip("tensorflow")
    processor = deit.DeiTImageProcessor.paper(32)
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    found = processor(image, return_tensors="tf").pixel_values
    assert isinstance(found, tensorflow.Tensor)
    assert np.array_equal(found.numpy(), processor(image, return_tensors="np").pixel_values)
    if BACKEND == "tensorflow":
        model = TWIN_OF["classification"](
            VARIANTS["deit-tiny-patch16-224"].replace(image_size=32, num_hidden_layers=1, distillation_token=True)
        )
        assert model(processor(image, return_tensors="tf")).logits.shape == (1, 1000)


@slow_on_jax
@pytest.mark.parametrize(("framework", "absent"), [("keras", ("torch",)), ("torch", ("keras", "tensorflow", "jax"))])
def test_golden_without_the_other_framework(framework, absent):
    """`golden/twins.py` holds stored weights and answers to one twin where the other's framework can't be imported."""
    script = Path(__file__).parents[1] / "golden" / "twins.py"
    shown = run_python(f"""
import runpy, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent}: raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
sys.argv = ["twins.py", {framework!r}]
runpy.run_path({str(script)!r}, run_name="__main__")""")
    assert "4 models as stored" in shown


def test_without_keras_the_import_says_what_to_install():
    shown = run_python(
        "import sys; sys.modules['keras'] = None\nimport deit\ntry: deit.TFDeiTModel\n"
        "except ImportError as error: print(error)"
    )
    assert 'pip install "deit[keras]"' in shown
    assert run_python("import sys; sys.modules['keras'] = None\nfrom deit import *\nprint(DeiTModel)")


@pytest.mark.skipif(BACKEND != "tensorflow", reason="the clash is between TensorFlow and Triton")
@pytest.mark.parametrize("first", ["keras", "deit.model_keras"])
def test_pytorch_trains_beside_tensorflow_whichever_comes_first(first):
    shown = run_python(
        f"import {first}, keras, deit.model_keras, torch\n"
        "weight = torch.ones(1, requires_grad=True)\nweight.sum().backward()\n"
        "torch.optim.SGD([weight], lr=0.25).step()\nprint(weight.item())"
    )
    assert shown.endswith("0.75")


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"max_shard_sise": "1GB"}, TypeError, "max_shard_sise"),
        ({"signatures": None}, TypeError, "signatures"),
        ({"token": "x"}, ValueError, "token is for the hub, and nothing is pushed; pass push_to_hub=True"),
    ],
)
def test_options_of_saving_that_are_not_known(tmp_path, options, error, said):
    model = TWIN_OF["classification"](small())
    with raises_saying(error, said):
        model.save_pretrained(tmp_path / "m", **options)
    with raises_saying(ValueError, "safe_serialization=False", "leave it out"):
        model.save_pretrained(tmp_path / "m", safe_serialization=False)
    assert not (tmp_path / "m").exists()


@slow_on_jax
def test_saved_model_beside_the_weights(tmp_path):
    model = TWIN_OF["classification"](small())
    model.save_pretrained(tmp_path, saved_model=True, version=3)
    assert (tmp_path / "model.safetensors").is_file()
    assert (tmp_path / "saved_model" / "3" / "saved_model.pb").is_file()


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
def test_quantised_weights_are_not_saved(tmp_path):
    model = TWIN_OF["classification"](small())
    model(np.zeros((1, 3, 16, 16), np.float32))
    model.quantize("int8")
    for save in (
        lambda: model.save_pretrained(tmp_path / "m"),
        lambda: model.save(tmp_path / "m.keras"),
        lambda: keras.saving.save_model(model, tmp_path / "m.keras"),
    ):
        assert not list(tmp_path.iterdir())
        with raises_saying(ValueError, "quantised to int8", "save the model before quantize()"):
            save()


@pytest.mark.parametrize("kind", TWIN_OF)
def test_from_a_config_of_either_kind(kind):
    model = TWIN_OF[kind](small())
    for config in (model.get_config(), small()):
        again = TWIN_OF[kind].from_config(config)
        assert again.config == model.config
        assert again.tensors().keys() == model.tensors().keys()
