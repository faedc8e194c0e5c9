"""`compile`, `fit`, `evaluate` and `export` of the Keras models."""

import numpy as np
import pytest
import torch
from support.checks import raises_saying
from support.models import small
from twins import (
    BACKEND,
    SLOW_ON_JAX,
    TWIN_OF,
    arrays,
    as_arrays,
    distance,
    given_for,
    keras,
    needs_tensorflow,
    slow_on_jax,
    twins,
)

from deit.data.folders import write_digits
from deit.model import losses
from deit.model_keras import losses as losses_keras

UNCOMPILED = {"run_eagerly": True}
"""Where what is asked does not depend on it, and compiling takes longer than the test."""
X = given_for(small(), 6)["pixel_values"].numpy()
Y = np.array([0, 1, 2, 3, 4, 0])
TEACHER = np.random.default_rng(1).standard_normal((6, 5)).astype("float32")


# ------------------------------------------------------------------------------------------------------------- losses


LABELS = {"whole": torch.tensor([1, 0, 4]), "shares": torch.randn(3, 5).softmax(-1)}


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight": 0.3, "smoothing": 0.1},
        {"kind": "soft"},
        {"kind": "soft", "temperature": 1.5, "weight": 0.7},
        {"kind": "soft", "normalisation": "elements"},
    ],
)
def test_distillation_loss(labels, options):
    cls, distillation, teacher = 3 * torch.randn(3, 3, 5)
    expected = losses.distillation_loss(cls, distillation, LABELS[labels], teacher, **options)
    found = losses_keras.distillation_loss(
        *(keras.ops.convert_to_tensor(t.numpy()) for t in (cls, distillation, LABELS[labels], teacher)), **options
    )
    assert float(found) == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize(
    ("labels", "changes"),
    [
        (torch.tensor([1, 0, 4]), {}),
        (torch.tensor([[1], [0], [4]]), {}),
        (torch.rand(3, 5).round(), {}),
        (torch.rand(3, 5) > 0.5, {}),
        (torch.randn(3, 5), {"problem_type": "regression"}),
        (torch.randn(3), {"num_labels": 1}),
        (torch.tensor([1, 0, 2]), {"num_labels": 1}),
    ],
)
def test_classification_loss(labels, changes):
    config = small(**changes)
    logits = 3 * torch.randn(3, config.num_labels)
    found = losses_keras.classification_loss(
        keras.ops.convert_to_tensor(logits.numpy()), keras.ops.convert_to_tensor(labels.numpy()), config
    )
    assert float(found) == pytest.approx(losses.classification_loss(logits, labels, config).item(), abs=1e-5)


def test_an_unknown_class_is_no_loss_of_zero():
    for labels in ([5, 0], [-1, 0]):
        assert np.isnan(float(losses_keras.cross_entropy(keras.ops.zeros((2, 5)), keras.ops.array(labels))))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"distillation": "medium"}, "distillation kind 'medium' is not known; choose hard or soft"),
        ({"temperature": 2.0}, "hard distillation has no temperature"),
        ({"distillation_weight": 2.0}, "distillation weight must be from 0 to 1, found 2.0"),
    ],
)
def test_refused_distillation(options, sentence):
    with raises_saying(ValueError, sentence):
        TWIN_OF["with_teacher"](small()).compile("adamw", **options)


# ---------------------------------------------------------------------------------------------------------------- fit


@pytest.mark.parametrize("place", ["inputs", "targets", "both"])
def test_distilled_fit_wherever_the_data_hold_the_teacher(place):
    """The loss that Keras reports is the paper's, of the weights before the step."""
    ours, twin = twins("with_teacher", small())
    with torch.no_grad():
        expected = ours(
            torch.from_numpy(X),
            labels=torch.from_numpy(Y),
            teacher_logits=torch.from_numpy(TEACHER),
            distillation="soft",
            distillation_weight=0.4,
        ).loss.item()
    data = {
        "inputs": ({"pixel_values": X, "labels": Y, "teacher_logits": TEACHER},),
        "targets": (X, {"labels": Y, "teacher_logits": TEACHER}),
        "both": ({"pixel_values": X, "teacher_logits": TEACHER}, Y),
    }[place]
    twin.compile(
        keras.optimizers.AdamW(1e-3), distillation="soft", distillation_weight=0.4, metrics=["accuracy"], **UNCOMPILED
    )
    history = twin.fit(*data, batch_size=6, verbose=0).history
    assert history["loss"] == [pytest.approx(expected, abs=1e-5)]
    with torch.no_grad():
        accuracy = (ours(torch.from_numpy(X)).logits.argmax(-1).numpy() == Y).mean()
    assert history["accuracy"] == [pytest.approx(accuracy)]
    for name, value in arrays(ours).items():
        assert distance(twin.tensors()[name], value) > 0 or "attention.qkv" in name, name


def test_evaluation_needs_no_teacher():
    ours, twin = twins("with_teacher", small())
    twin.compile("adamw", **UNCOMPILED)
    with torch.no_grad():
        expected = ours(torch.from_numpy(X), labels=torch.from_numpy(Y)).loss.item()
    assert float(twin.evaluate(X, Y, verbose=0)) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="trains on labels and teacher_logits together, found only labels"):
        twin.fit(X, Y, verbose=0)


@slow_on_jax
def test_classification_with_its_own_loss_and_with_keras():
    ours, twin = twins("classification", small())
    with torch.no_grad():
        expected = ours(torch.from_numpy(X), labels=torch.from_numpy(Y)).loss.item()
    for loss in (None, keras.losses.SparseCategoricalCrossentropy(from_logits=True)):
        twin.set_tensors(arrays(ours))
        twin.compile("adamw", loss=loss, metrics=["accuracy"], **UNCOMPILED)
        history = twin.fit(X, Y, batch_size=6, verbose=0).history
        assert history["loss"] == [pytest.approx(expected, abs=1e-5)]


WEIGHTS = np.array([1.0, 0, 3.0, 0.5, 0, 2.0], "float32")


@pytest.mark.parametrize("loss", ["own", "Keras'"])
@pytest.mark.parametrize("place", ["targets", "inputs"])
@pytest.mark.parametrize("given", ["sample_weight", "class_weight"])
def test_weights_of_images_and_classes(loss, place, given):
    """Keras' rule: the mean over the batch of each image's loss times its weight, wherever the labels are."""
    ours, twin = twins("classification", small())
    own = {} if loss == "own" else {"loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True)}
    twin.compile("adamw", **own, **UNCOMPILED)
    by_class = {i: 0.5 * (i + 1) for i in range(5)}
    weights = WEIGHTS if given == "sample_weight" else np.array([by_class[i] for i in Y])
    with torch.no_grad():
        each = torch.nn.functional.cross_entropy(
            ours(torch.from_numpy(X)).logits, torch.from_numpy(Y), reduction="none"
        )
    data = (X, Y) if place == "targets" else ({"pixel_values": X, "labels": Y},)
    options = {given: WEIGHTS if given == "sample_weight" else by_class}
    if given == "sample_weight":
        found = twin.evaluate(*data, batch_size=6, verbose=0, **options)
        assert float(found) == pytest.approx(float((each.numpy() * weights).mean()), abs=1e-5)
    history = twin.fit(*data, batch_size=6, verbose=0, **options).history
    assert history["loss"] == [pytest.approx(float((each.numpy() * weights).mean()), abs=1e-5)]


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_weights_of_images_for_a_student(kind):
    ours, twin = twins("with_teacher", small())
    twin.compile("adamw", distillation=kind, **UNCOMPILED)
    with torch.no_grad():
        out = ours(torch.from_numpy(X))
    each = [
        float(
            losses.distillation_loss(
                out.cls_logits[i : i + 1],
                out.distillation_logits[i : i + 1],
                torch.from_numpy(Y[i : i + 1]),
                torch.from_numpy(TEACHER[i : i + 1]),
                kind=kind,
            )
        )
        for i in range(6)
    ]
    given = {"pixel_values": X, "labels": Y, "teacher_logits": TEACHER}
    history = twin.fit(given, batch_size=6, sample_weight=WEIGHTS, verbose=0).history
    assert history["loss"] == [pytest.approx(float((np.array(each) * WEIGHTS).mean()), abs=1e-5)]


def test_masked_images_have_no_weights():
    _, twin = twins("masked_image", small())
    twin.compile("adamw", **UNCOMPILED)
    with pytest.raises(ValueError, match="weighs all images alike"):
        twin.evaluate(as_arrays(given_for(small(), 6, mask=True)), np.zeros(6), sample_weight=WEIGHTS, verbose=0)


def test_masked_images_fit():
    ours, twin = twins("masked_image", small())
    given = given_for(small(), 6, mask=True)
    with torch.no_grad():
        expected = ours(**given).loss.item()
    twin.compile(keras.optimizers.AdamW(1e-3), **UNCOMPILED)
    assert twin.fit(as_arrays(given), batch_size=6, verbose=0).history["loss"] == [pytest.approx(expected, abs=1e-5)]
    with pytest.raises(ValueError, match="trains on pixel_values and bool_masked_pos, found no mask"):
        twin.fit(given["pixel_values"].numpy(), verbose=0)


@slow_on_jax
def test_it_learns_real_digits_with_a_teacher(tmp_path):
    """8x8 scans of handwriting; the teacher knows the labels. Mixed precision, stochastic depth and dropout on."""
    pytest.importorskip("sklearn")
    write_digits(tmp_path, side=8)
    from PIL import Image

    from deit.data.folders import read_split

    split = read_split(tmp_path, "train")
    pixels = np.stack([np.asarray(Image.open(path).convert("L"), "float32")[None] / 128 - 1 for path in split.files])
    labels = np.array(split.labels)
    keras.utils.set_random_seed(0)
    config = small(
        image_size=8,
        patch_size=2,
        encoder_stride=2,
        num_channels=1,
        num_labels=10,
        initializer_range=0.06,
        drop_path_rate=0.05,
        hidden_dropout_prob=0.01,
    )
    twin = TWIN_OF["with_teacher"](config, dtype="mixed_bfloat16")
    twin.compile(keras.optimizers.AdamW(3e-3), metrics=["accuracy"])
    history = twin.fit(
        {"pixel_values": pixels, "teacher_logits": 8 * np.eye(10, dtype="float32")[labels]},
        labels,
        batch_size=64,
        epochs=12,
        verbose=0,
    ).history
    assert history["loss"][-1] < history["loss"][0] / 2
    assert history["accuracy"][-1] > 0.85


# ------------------------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind == "with_teacher" else SLOW_ON_JAX) for kind in TWIN_OF]
)
def test_saved_model(kind, tmp_path):
    tensorflow = pytest.importorskip("tensorflow")
    ours, twin = twins(kind, small(drop_path_rate=0.1, hidden_dropout_prob=0.1))
    path = twin.export(tmp_path / "saved")
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]
    loaded = tensorflow.saved_model.load(str(path))
    found = loaded.serve(X)
    with torch.no_grad():
        expected = ours(torch.from_numpy(X))
    assert sorted(found) == sorted(expected.keys())
    for name in expected:
        assert distance(found[name].numpy(), expected[name]) < 1e-4, name
    with raises_saying(FileExistsError, f"{path} is there already"):
        twin.export(path)


@needs_tensorflow
@pytest.mark.parametrize("kind", TWIN_OF)
@pytest.mark.parametrize("batch", [None, 6])
def test_litert(kind, batch, tmp_path):
    from deit.model_keras.saved_model import _litert

    ours, twin = twins(kind, small())
    found = _litert(twin.export(tmp_path / "model.tflite", "litert", batch=batch))(X)
    with torch.no_grad():
        expected = ours(torch.from_numpy(X))
    for name in expected:
        assert distance(found[name], expected[name]) < 1e-4, name


@slow_on_jax
def test_a_file_that_answers_otherwise_is_not_kept(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow")
    from deit.model_keras import saved_model as export_keras

    honest = export_keras._saved_model
    monkeypatch.setattr(
        export_keras,
        "_saved_model",
        lambda path: lambda pixels: {name: value + 1e-3 for name, value in honest(path)(pixels).items()},
    )
    with raises_saying(ValueError, "was not kept: on random images its outputs differ from the model's by 0.001"):
        TWIN_OF["classification"](small()).export(tmp_path / "saved")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("path", "format", "sentence"),
    [
        ("x", "onnx", "format='onnx' is not written from Keras; choose tf_saved_model or litert"),
        pytest.param("x.bin", "litert", "a LiteRT model is a .tflite file", marks=needs_tensorflow),
    ],
)
def test_refused_exports(path, format, sentence, tmp_path):
    with raises_saying(ValueError, sentence):
        TWIN_OF["classification"](small()).export(tmp_path / path, format)


@pytest.mark.skipif(BACKEND == "tensorflow", reason="TensorFlow can")
def test_litert_on_another_back_end(tmp_path):
    with raises_saying(ValueError, "litert can't be written with Keras on jax; start Python with KERAS_BACKEND=tensor"):
        TWIN_OF["classification"](small()).export(tmp_path / "x.tflite", "litert")
