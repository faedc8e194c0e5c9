"""A linear probe, against scikit-learn on features that timm and transformers give."""

import errno
import json
import os
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console
from support.checks import raises_saying
from support.models import trained_folder
from support.runs import photos

from deit import Predictor, files, load_model
from deit.config import ConvNetConfig, TimmConfig
from deit.data.folders import read_data
from deit.evaluate.calibration import Calibration
from deit.files import cache_folder
from deit.image.processor import DeiTImageProcessor
from deit.machine import Processes
from deit.model.timm_classifier import TimmClassifier
from deit.predict.calibrate import calibrate_split
from deit.recipe import AdamW, Augment, Compute, Cosine, Data, LinearProbe, Recipe, Supervised, epochs
from deit.train import loop, probe
from deit.train.loop import train

pytest.importorskip("sklearn")
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler


class Scaler(StandardScaler):
    """Divides no feature by less than a tenth of the median deviation of those that vary."""

    def fit(self, features, labels=None):
        super().fit(features)
        deviations = np.sqrt(self.var_)
        self.scale_ = np.maximum(deviations, 0.1 * np.median(deviations[deviations > 1e-12]))
        return self


def clusters(classes, count=40, size=12):
    rng = np.random.default_rng(classes)
    labels = np.repeat(np.arange(classes), count)
    centres = rng.normal(size=(classes, size))
    features = 5 + 3 * (centres[labels] + rng.normal(size=(len(labels), size)))
    features[:, 0] = 7  # a feature that never changes
    return features.astype(np.float32), labels


@pytest.mark.parametrize("weights", ["equal", "balanced"])
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_the_head_is_scikit_learns(classes, weights):
    features, labels = (values[25:] for values in clusters(classes))  # the first class has 15 images, the others 40
    weight, bias = probe.fit(features, labels, classes, 0.1, weights)
    weighing = None if weights == "equal" else weights
    solver = LogisticRegression(C=0.1, max_iter=1000, tol=1e-8, class_weight=weighing)
    theirs = make_pipeline(StandardScaler(), solver).fit(features, labels)
    ours = torch.softmax(torch.from_numpy(features @ weight.T + bias), 1).numpy()
    np.testing.assert_allclose(ours, theirs.predict_proba(features), atol=2e-3)
    assert not weight[:, 0].any()


def test_the_strength_is_that_of_a_grid_search():
    features, labels = clusters(4)
    settings = LinearProbe(strengths=(0.0001, 0.01, 1.0, 100.0))
    strength, accuracy = probe.choose(features, labels, settings, seed=3)
    parts = StratifiedKFold(5, shuffle=True, random_state=3)
    theirs = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
        {"logisticregression__C": settings.strengths},
        cv=parts,
        scoring={"loss": "neg_log_loss", "accuracy": "accuracy"},
        refit="loss",
    ).fit(features, labels)
    assert strength == theirs.best_params_["logisticregression__C"]
    assert accuracy == pytest.approx(theirs.cv_results_["mean_test_accuracy"][theirs.best_index_], abs=0.007)


def test_a_class_without_an_image_is_never_the_answer():
    features, labels = clusters(3)
    weight, bias = probe.fit(features, np.where(labels == 2, 3, labels), 4, 0.1)
    assert set((features @ weight.T + bias).argmax(1)) == {0, 1, 3}


def test_a_feature_that_hardly_varies_does_not_decide():
    features, labels = clusters(3, count=4)
    features[:, 1] = 0.0
    features[labels == 2, 1] = 1e-4
    weight, bias = probe.fit(features, labels, 3, 0.1)
    theirs = make_pipeline(Scaler(), LogisticRegression(C=0.1, max_iter=1000, tol=1e-8)).fit(features, labels)
    ours = torch.softmax(torch.from_numpy(features @ weight.T + bias), 1).numpy()
    np.testing.assert_allclose(ours, theirs.predict_proba(features), atol=2e-3)
    other = features[labels == 0]
    other[:, 1] = 0.5  # 5,000 times as much as in any image of the class 2
    assert set((other @ weight.T + bias).argmax(1)) == {0}
    plain = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)).fit(features, labels)
    assert set(plain.predict(other)) == {2}


@pytest.mark.parametrize("counts", [(2, 1), (1, 3), (1, 4, 1)])
def test_a_fold_that_leaves_one_class_to_learn(counts):
    """A part that has all images of the other classes is judged by a head that knows one class, and never others."""
    labels = np.repeat(np.arange(len(counts)), counts)
    features = np.random.default_rng(0).normal(size=(len(labels), 12)).astype(np.float32)
    for weights in ("equal", "balanced"):
        strength, accuracy = probe.choose(features, labels, LinearProbe(class_weights=weights), seed=0)
        assert strength in LinearProbe().strengths
        assert 0 <= accuracy <= max(counts) / len(labels)
    weight, bias = probe.fit(features[labels == 1], labels[labels == 1], 3, 0.1)
    assert not weight.any()
    assert bias.tolist() == [-10, 0, -10]


def test_too_few_images_for_folds():
    features, labels = clusters(3, count=1)
    strength, accuracy = probe.choose(features, labels, LinearProbe(), seed=0)
    assert strength == 0.001
    assert np.isnan(accuracy)
    features, labels = clusters(3, count=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        probe.choose(features, labels, LinearProbe(), seed=0)


def test_a_rare_class_is_drawn():
    """The draw is that of all images alike, unless it would miss a class that has an image."""
    labels = [0] * 500 + [1] * 480 + [2] * 19 + [3]
    plain = [np.sort(np.random.default_rng(seed).permutation(1000)[:40]) for seed in range(200)]
    found = [probe.drawn(labels, 40, seed) for seed in range(200)]
    whole = [len({labels[row] for row in rows}) == 4 for rows in plain]
    assert 0 < sum(whole) < 200
    for one, other, complete in zip(found, plain, whole, strict=True):
        assert len(set(one.tolist())) == 40
        assert (np.diff(one) > 0).all()
        assert 999 in one
        assert len({labels[row] for row in one}) == 4
        assert len(set(one) & set(other)) >= 38
        assert not complete or one.tolist() == other.tolist()
    assert len({labels[row] for row in probe.drawn(labels, 3, 0)}) == 3


# ------------------------------------------------------------------------------------------------------------- whole


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return photos(photos(tmp_path_factory.mktemp("data")), split="val", count=3)


def started(kind, folder):
    """A recipe that starts from a trained model of other classes, by timm or ours."""
    if kind == "timm":
        timm = pytest.importorskip("timm")
        torch.manual_seed(1)
        folder.mkdir()
        torch.save(timm.create_model("test_resnet", num_classes=7).state_dict(), folder / "weights.pth")
        model, start = TimmConfig(architecture="test_resnet", image_size=32), folder / "weights.pth"
    else:
        start = trained_folder(folder, labels="uvwx")
        model = load_model(start).config
        model = model.replace(id2label={})
    return Recipe(
        name="probe",
        model=model,
        data=Data(batch=8),
        objective=LinearProbe(strengths=(0.01, 0.1), folds=3),
        compute=Compute(precision="float32", workers=0),
        start=str(start),
    )


def features_by_hand(folder, files):
    """What goes into the head, without the code that is tested."""
    model, processor = load_model(folder), DeiTImageProcessor.from_pretrained(folder)
    pixels = processor([str(file) for file in files], return_tensors="pt").pixel_values
    with torch.inference_mode():
        if isinstance(model, TimmClassifier):
            inner = model.model
            return [inner.forward_head(inner.forward_features(pixels), pre_logits=True).numpy()]
        hidden = model.deit(pixels).last_hidden_state
        return [hidden[:, 0].numpy(), hidden[:, 1].numpy()][: 2 if hasattr(model, "distillation_classifier") else 1]


@pytest.mark.parametrize("kind", ["timm", "distilled"])
def test_from_the_command_to_an_answer(kind, data, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    recipe = started(kind, tmp_path / "start")
    splits = read_data(data, holdout=0.1, seed=0)
    run = train(recipe, *splits, tmp_path / "run", console=Console(quiet=True))
    [row] = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert run.score == row["val_accuracy"]
    expected = []
    val = features_by_hand(run.model, splits[1].files)
    for number, features in enumerate(features_by_hand(run.model, splits[0].files)):
        theirs = make_pipeline(Scaler(), LogisticRegression(C=row["strength"], max_iter=1000))
        theirs.fit(features, splits[0].labels)
        expected.append(theirs.predict_proba(val[number]))
    found = Predictor(run.model, head="class")(splits[1].files, top_k=3)
    answers = np.array([[next(x["score"] for x in one if x["label"] == name) for name in "abc"] for one in found])
    np.testing.assert_allclose(answers, expected[0], atol=5e-3)
    assert (Predictor(run.model).labels) == ["a", "b", "c"]


def test_a_run_with_one_image_of_each_class(tmp_path, monkeypatch, capsys):
    """There is nothing to cross-validate, so the record has no such number, and each image is answered right."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = photos(photos(tmp_path / "data", count=1), split="val", count=3)
    splits = read_data(root, holdout=0.1, seed=0)
    run = train(
        started("distilled", tmp_path / "start"), *splits, tmp_path / "run", console=Console(stderr=True, width=999)
    )
    assert (
        "C=0.01, the least, because cross-validation needs a class with two training images" in capsys.readouterr().err
    )
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "cross_validation" not in json.loads(text)
    assert [one[0]["label"] for one in Predictor(run.model)(splits[0].files)] == ["a", "b", "c"]


def test_a_rare_class_with_balanced_weights(tmp_path, monkeypatch, capsys):
    """One of 41 images is of the class c, and four images are drawn. What is said of the classes is of all images."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = photos(photos(photos(tmp_path / "data", count=20, classes="ab"), count=3, split="val"), count=1)
    splits = read_data(root, holdout=0.1, seed=0)
    assert splits[0].labels.count(2) == 1
    recipe = replace(
        started("distilled", tmp_path / "start"), objective=LinearProbe(images=4, class_weights="balanced")
    )
    run = train(recipe, *splits, tmp_path / "run", console=Console(stderr=True, width=999))
    assert '1 class has fewer than 5 training images, too few to learn from: "c" (1).' in capsys.readouterr().err
    found = Predictor(run.model)([splits[0].files[splits[0].labels.index(2)]])
    assert found[0][0]["label"] == "c"


def test_features_are_kept_by_content(data, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    recipe, splits = started("distilled", tmp_path / "start"), read_data(data, holdout=0.1, seed=0)
    passes = []
    computed = probe._computed
    monkeypatch.setattr(probe, "_computed", lambda *given: passes.append(1) or computed(*given))

    def score(name, **changes):
        return train(replace(recipe, **changes), *splits, tmp_path / name, console=Console(quiet=True)).score

    first = score("one")
    assert score("two") == first
    assert len(passes) == 1
    score("three", objective=LinearProbe(strengths=(1.0,), folds=2))  # other settings, the same features
    assert len(passes) == 1
    score("four", data=replace(recipe.data, crop_ratio=1.0))
    score("five", objective=LinearProbe(images=12))
    assert len(passes) == 3
    for file in cache_folder("features").iterdir():
        file.write_bytes(b"damaged")
    assert score("six") == first
    assert len(passes) == 4


def _full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _read_only(*_):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), "/home/me/.cache")


@pytest.mark.parametrize(
    ("owner", "name", "fails", "words"),
    [(probe, "save_file", _full, "No space left on device"), (files, "cache_folder", _read_only, "Read-only file")],
)
def test_a_cache_that_takes_nothing_costs_nothing(owner, name, fails, words, data, tmp_path, monkeypatch, capsys):
    """A full disk, or a home that is read-only: the features are computed, and the run has the same end."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    recipe, splits = started("distilled", tmp_path / "start"), read_data(data, holdout=0.1, seed=0)
    monkeypatch.setattr(owner, name, fails)
    run = train(recipe, *splits, tmp_path / "run", console=Console(stderr=True, width=999))
    assert re.search(f"the features are not kept for other runs: .*{words}", capsys.readouterr().err)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    again = train(recipe, *splits, tmp_path / "again", console=Console(quiet=True))
    assert (run.model / "model.safetensors").read_bytes() == (again.model / "model.safetensors").read_bytes()
    assert len(list(cache_folder("features").iterdir())) == 1


def test_a_run_that_is_replaced_leaves_no_calibration(data, tmp_path, monkeypatch):
    """It was of another head."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    recipe, splits = started("distilled", tmp_path / "start"), read_data(data, holdout=0.1, seed=0)
    run = train(recipe, *splits, tmp_path / "run", console=Console(quiet=True))
    calibrate_split(run.model, splits[1], str(data), error_rate=0.5, device="cpu", console=Console(quiet=True))
    assert Calibration.of_model(run.model).images == 9
    other = replace(recipe, objective=LinearProbe(strengths=(1.0,), folds=2))
    train(other, *splits, tmp_path / "run", console=Console(quiet=True), resume=True)
    assert Calibration.of_model(run.model) is None


def test_an_image_that_cannot_be_read_is_left_out(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    damaged = photos(photos(tmp_path / "data", count=120), split="val", count=3)
    (damaged / "train" / "a" / "3.png").write_bytes(b"damaged")
    train(started("distilled", tmp_path / "start"), *read_data(damaged, holdout=0.1, seed=0), tmp_path / "run")
    assert "It is left out" in capsys.readouterr().err


def test_what_is_refused(data, tmp_path, monkeypatch):
    recipe, splits = started("distilled", tmp_path / "start"), read_data(data, holdout=0.1, seed=0)
    for changes, words in (
        ({"start": ""}, "needs the weights of a trained"),
        ({"model": ConvNetConfig(widths=(8,), depth=1, image_size=16)}, "needs the weights of a trained"),
        ({"ema": 0.9}, "it has no ema"),
        ({"augment": Augment(flip=0.5)}, "it has no augment"),
        ({"optim": AdamW(lr=1e-3, per_images=8)}, "it has no optim"),
        ({"schedule": Cosine(total=epochs(1))}, "it has no schedule"),
        ({"evaluate": epochs(1)}, "it has no evaluate"),
        ({"data": Data(batch=8, repeats=2)}, "sees each image once, found data.repeats=2"),
    ):
        with raises_saying(ValueError, "recipe probe", words):
            replace(recipe, **changes)
    with raises_saying(ValueError, "training takes steps"):
        replace(started("distilled", tmp_path / "other"), objective=Supervised())
    with raises_saying(ValueError, "found --time (in Python minutes=5); leave it out", "objective.images"):
        train(recipe, *splits, tmp_path / "run", console=Console(quiet=True), minutes=5)
    assert not (tmp_path / "run").exists()
    train(recipe, *splits, tmp_path / "run", console=Console(quiet=True))
    with raises_saying(FileExistsError, "already holds a run", "--resume"):
        train(recipe, *splits, tmp_path / "run", console=Console(quiet=True))
    monkeypatch.setattr(loop, "resolve_precision", lambda *_: torch.float32)
    with raises_saying(ValueError, "fitted by one process", "without torchrun"):
        loop._probe(recipe, splits, tmp_path / "two", Processes(torch.device("cpu"), 0, 2), None, False)
