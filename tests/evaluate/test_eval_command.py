"""`deit eval` as a person types it, and the formats that it and a run write."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, log_loss, top_k_accuracy_score
from support.checks import raises_saying
from support.models import build, saved, small, trained_folder
from support.runs import photos, small_recipe

from deit.cli import main
from deit.data import batches
from deit.data.folders import fingerprint, read_data, read_split
from deit.evaluate.models import examine_files
from deit.image.processor import DeiTImageProcessor
from deit.model.heads import fuse_heads
from deit.model.load import load_model
from deit.recipe import Cosine, Data, Distilled, MaskedImage, steps
from deit.train.loop import train

PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"
NAMES = ("g", "c", "f", "a", "e", "b", "d")
"""Of the models' classes: more than the data's a, b, c, and in another order."""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("eval")
    photos(photos(photos(root / "data", count=2), split="val", count=2), split="test", count=20)
    trained_folder(root / "m", labels=NAMES)
    trained_folder(root / "other", labels=NAMES[::-1], seed=1)
    trained_folder(root / "single", "plain", NAMES, seed=2, image_size=24)
    return root


class Shown:
    def __init__(self, root, capsys):
        self.root, self.capsys = root, capsys

    def __call__(self, model, *options, data="data", status=0):
        """The object on standard output, with --json; else the text there."""
        assert (
            main(
                ["eval", str(self.root / model), "--data", str(self.root / data), "--device", "cpu", *map(str, options)]
            )
            == status
        )
        shown = self.capsys.readouterr()
        self.said = shown.err
        if "--json" not in options or status:
            return shown.out
        [line] = shown.out.splitlines()
        return json.loads(line)


@pytest.fixture
def evaluate(root, capsys):
    return Shown(root, capsys)


def by_hand(folder, split, head, processor=None):
    """Probabilities of the model's classes and true labels, image by image."""
    model = load_model(folder)
    processor = processor or DeiTImageProcessor.from_pretrained(folder)
    rows = []
    for file in split.files:
        out = model(processor([file], return_tensors="pt").pixel_values)
        rows.append(fuse_heads(out.cls_logits, out.distillation_logits, head)[0].detach().double().numpy())
    names = list(model.config.id2label.values())
    scores = np.stack(rows)
    return scores / scores.sum(1, keepdims=True), np.array([names.index(split.classes[i]) for i in split.labels])


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")  # classes without images
@pytest.mark.parametrize("head", ["fused", "class", "distillation", "softmax"])
def test_values_are_those_of_model_processor_and_scikit_learn(evaluate, root, head):
    found = evaluate("m", "--json", "--head", head)
    split = read_split(root / "data", "test")
    scores, labels = by_hand(root / "m", split, head)
    assert (found["head"], found["images"], list(found["heads"])) == (
        head,
        60,
        ["fused", "class", "distillation", "softmax"],
    )
    for top in (1, 5):
        assert found["heads"][head][f"top{top}"]["value"] == pytest.approx(
            top_k_accuracy_score(labels, scores, k=top, labels=range(7))
        )
    assert found["heads"][head]["balanced"]["value"] == pytest.approx(balanced_accuracy_score(labels, scores.argmax(1)))
    assert found["heads"][head]["balanced"]["classes"] == 3
    assert found["nll"] == pytest.approx(log_loss(labels, scores, labels=range(7)), rel=1e-5)
    assert found["brier"] == pytest.approx(((scores - np.eye(7)[labels]) ** 2).sum(1).mean(), rel=1e-5)
    matrix = confusion_matrix(labels, scores.argmax(1), labels=range(7))
    assert found["confusion"] == [[i, j, matrix[i, j]] for i in range(7) for j in range(7) if matrix[i, j]]
    assert [each["name"] for each in found["classes"]] == list(NAMES)
    assert sum(each["count"] for each in found["calibration"]["bins"]) == 60
    assert found["data"] == {"path": str(root / "data"), "split": "test", "fingerprint": fingerprint(split)}
    assert (found["model"], found["image_size"], found["crop_ratio"]) == (str(root / "m"), [16, 16], 16 / 18)
    assert "comparison" not in found


def test_the_order_of_the_models_classes_does_not_matter(evaluate, root):
    """The same weights, their outputs and names permuted alike."""
    model = load_model(root / "m")
    order = [3, 0, 6, 2, 5, 1, 4]
    permuted = build("with_teacher", model.config.replace(id2label={i: NAMES[j] for i, j in enumerate(order)}))
    state = model.state_dict()
    for name in state:
        if "classifier" in name:
            state[name] = state[name][order]
    permuted.load_state_dict(state)
    saved(permuted, root / "permuted")
    found, other = evaluate("m", "--json"), evaluate("permuted", "--json")
    assert found["heads"] == other["heads"]
    assert found["nll"] == pytest.approx(other["nll"])
    assert found["data"] == other["data"]
    key = lambda each: each["name"]  # noqa: E731
    assert sorted(found["classes"], key=key) == sorted(other["classes"], key=key)


def test_the_crop_ratio_changes_the_pixels(evaluate, root):
    plain, whole = (evaluate("m", "--json", *options) for options in ((), ("--crop-ratio", "0.5")))
    assert (plain["crop_ratio"], whole["crop_ratio"], whole["image_size"]) == (16 / 18, 0.5, [16, 16])
    scores, labels = by_hand(root / "m", read_split(root / "data", "test"), "fused", DeiTImageProcessor.paper(16, 0.5))
    assert whole["nll"] == pytest.approx(log_loss(labels, scores, labels=range(7)), rel=1e-5)
    assert abs(whole["nll"] - plain["nll"]) > 1e-4


def test_a_comparison_on_the_same_images(evaluate, root):
    found = evaluate("m", "--json", "--compare", root / "other", "--head", "class", "--crop-ratio", 0.5)
    split = read_split(root / "data", "test")
    right = []
    for name, processor in (("m", DeiTImageProcessor.paper(16, 0.5)), ("other", None)):
        scores, labels = by_hand(root / name, split, "class", processor)
        right.append(scores.argmax(1) == labels)
    one, other = right
    compared = found["comparison"]
    assert [compared[key] for key in ("images", "both", "only_model", "only_other", "neither")] == [
        60,
        (one & other).sum(),
        (one & ~other).sum(),
        (~one & other).sum(),
        (~one & ~other).sum(),
    ]
    assert (compared["accuracy"]["value"], compared["other_accuracy"]["value"]) == (one.mean(), other.mean())
    assert compared["difference"] == pytest.approx(one.mean() - other.mean())
    assert compared["low"] < compared["difference"] < compared["high"]
    assert (compared["model"], compared["crop_ratio"]) == (str(root / "other"), 16 / 18)  # its own preprocessing
    assert found["heads"]["class"]["top1"] == compared["accuracy"]


def test_models_of_one_head_and_other_sizes(evaluate, root):
    found = evaluate("single", "--json", "--compare", root / "m")
    assert list(found["heads"]) == ["fused", "class"]
    assert found["heads"]["fused"] == found["heads"]["class"]
    assert (found["image_size"], found["comparison"]["image_size"]) == ([24, 24], [16, 16])
    evaluate("single", "--head", "distillation", status=1)
    assert "no head 'distillation'; it has fused, class" in evaluate.said
    evaluate("m", "--head", "distillation", "--compare", root / "single", status=1)
    assert "no head 'distillation'" in evaluate.said


def test_the_built_in_convnet(evaluate, root):
    trained_folder(root / "convnet", "convnet", "abc")
    assert list(evaluate("convnet", "--json")["heads"]) == ["fused", "class"]


def test_lists_and_splits(evaluate, root):
    by_folder = evaluate("m", "--json", "--split", "val")
    split = read_split(root / "data", "val")
    rows = [
        {"path": str(file.relative_to(root)), "label": split.classes[label]}
        for file, label in zip(split.files, split.labels, strict=True)
    ]
    (root / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "list.csv").write_text("path,label\n" + "".join(f"{row['path']},{row['label']}\n" for row in rows))
    assert (by_folder["images"], by_folder["data"]["split"]) == (6, "val")
    for name in ("list.jsonl", "list.csv"):
        by_list = evaluate("m", "--json", data=name)
        assert by_list.pop("data") == {
            "path": str(root / name),
            "split": None,
            "fingerprint": by_folder["data"]["fingerprint"],
        }
        assert by_list == {key: value for key, value in by_folder.items() if key != "data"}


def test_unreadable_images_are_named_and_left_out(evaluate, root, tmp_path):
    photos(tmp_path / "data", split="test")
    before = evaluate("m", "--json", data=tmp_path / "data")
    bad = tmp_path / "data" / "test" / "b" / "bad.png"
    bad.write_bytes(b"no image")
    found = evaluate("m", "--json", "--compare", root / "other", data=tmp_path / "data")
    assert found["unreadable"] == [
        {"file": str(bad), "reason": "is not an image that Pillow can read; convert it to JPEG or PNG"}
    ]
    assert evaluate.said.count(f"{bad} is not an image") == 1
    assert (found["images"], found["comparison"]["images"], found["nll"]) == (21, 21, before["nll"])
    assert "1 more can't be read and are left out" in evaluate("m", data=tmp_path / "data")
    (tmp_path / "gone.csv").write_text("path,label\ngone.png,a\n")
    evaluate("m", data=tmp_path / "gone.csv", status=1)
    assert "1 found, none can be read" in evaluate.said
    assert "gone.png does not exist" in evaluate.said


def test_what_does_not_fit_is_refused_before_any_image_is_evaluated(evaluate, root, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("an evaluation began")

    monkeypatch.setattr("deit.evaluate.models.examine", refuse)
    photos(tmp_path, split="test", classes="abx")
    evaluate("m", data=tmp_path, status=1)
    assert "deit eval: the model knows no class 'x', which " in evaluate.said
    trained_folder(root / "twice", labels=("a", "b", "b", "c", "c", "d", "e"))
    evaluate("m", "--compare", root / "twice", status=1)
    assert "the model calls 2 of its classes 'b'" in evaluate.said
    build("masked_image", small()).save_pretrained(root / "masked")
    evaluate("masked", status=1)
    assert (
        "DeiTForMaskedImageModeling without classes; expected a classifier. To make one of it, train" in evaluate.said
    )
    trained_folder(root / "wrong", processor=DeiTImageProcessor.paper(24))
    evaluate("wrong", status=1)
    assert "images are 24x24, this model takes 16x16" in evaluate.said
    evaluate("m", "--crop-ratio", "1.5", status=1)
    assert "above 0, at most 1" in evaluate.said


def test_with_json_only_the_object_is_on_standard_output(evaluate):
    tables = evaluate("m")
    evaluate("m", "--json")  # asserts that one line is there
    assert tables == evaluate.said


def test_the_tables(evaluate, root):
    text = " ".join(evaluate("m", "--compare", root / "other").split())
    found = evaluate("m", "--json", "--compare", root / "other")
    top, compared = found["heads"]["distillation"]["top1"], found["comparison"]
    balanced = found["heads"]["distillation"]["balanced"]
    for part in (
        f"distillation │ {top['value']:.3f} │ {top['low']:.3f} to {top['high']:.3f} │",
        "60 images, 3 of the model's 7 classes",
        'No image shows "g", "f", "e" and 1 more, so nothing here is about them',
        f"distillation │ {balanced['value']:.3f} │ {balanced['low']:.3f} to {balanced['high']:.3f} │ 3 │",
        "16x16 pixels, crop ratio 0.8889",
        f"calibration error {found['calibration']['error']:.4f}",
        f"p = {compared['p_value']:.3g}",
        f"Difference {compared['difference']:+.4f}, 95 % interval {compared['low']:+.4f} to {compared['high']:+.4f}",
    ):
        assert part in text, part
    assert "│ fused │" not in evaluate("single")  # one head is one row


def test_many_images_are_read_by_loaders_and_none_is_kept(root, monkeypatch):
    asked = []

    class Batches(batches.EvaluationBatches):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            asked.append((self.workers > 0, self.keeps))

    monkeypatch.setattr("deit.evaluate.models.EvaluationBatches", Batches)
    few = examine_files(root / "m", root / "data", device="cpu")
    monkeypatch.setattr("deit.evaluate.models._MANY", 60)
    many = examine_files(root / "m", root / "data", device="cpu", console=Console(quiet=True))
    assert asked == [(False, False), (True, False)]
    assert few.to_dict() == many.to_dict()


# ------------------------------------------------------------------------------------------------- what docs/ promises


def keys_of(value, name=""):
    """Names of all that a JSON value holds, as the document writes them."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from keys_of(entry, f"{name}.{'HEAD' if name == 'heads' else key}".lstrip("."))
    elif isinstance(value, list) and value and isinstance(value[0], dict | list):
        for entry in value:
            yield from keys_of(entry, f"{name}[]")
    else:
        yield name


def documented(title):
    """The keys of the tables below a title."""
    [section] = re.findall(rf"^## {re.escape(title)}$(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)


def test_every_key_of_the_object_is_documented(evaluate, root, tmp_path):
    photos(tmp_path, split="test")
    (tmp_path / "test" / "a" / "bad.png").write_bytes(b"no image")
    written = set(keys_of(evaluate("m", "--json", "--compare", root / "other", data=tmp_path)))
    listed = documented("The JSON of --json")
    assert len(set(listed)) == len(listed)
    assert written == set(listed)


def test_every_key_of_metrics_is_documented(root, tmp_path):
    parts = {"data": Data(batch=4), "schedule": Cosine(total=steps(2))}
    trained_folder(root / "teacher", labels="abc")
    recipes = [
        small_recipe(**parts),
        small_recipe(MaskedImage(unit=8), **parts),
        small_recipe(Distilled(teacher=str(root / "teacher")), **parts),
    ]
    written = set()
    for i, recipe in enumerate(recipes):
        splits = read_data(root / "data", holdout=0.1, seed=0, labelled=not isinstance(recipe.objective, MaskedImage))
        train(recipe, *splits, tmp_path / str(i), device="cpu", console=Console(quiet=True))
        for line in (tmp_path / str(i) / "metrics.jsonl").read_text().splitlines():
            written |= json.loads(line).keys()
    assert written == set(documented("metrics.jsonl"))


def test_the_names_of_imagenets_folders(tmp_path, monkeypatch):
    """The document's Python: two classes share a name, and the folders have others."""
    [block] = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    photos(Path("imagenet"), split="val")
    name = str(trained_folder("published", labels=("crane", "crane", "tench")))
    with raises_saying(ValueError, "no class 'a'"):
        examine_files(name, "imagenet", device="cpu")
    exec(block.replace("facebook/deit-tiny-patch16-224", name), {})
    found = examine_files("deit-tiny-wordnet", "imagenet", device="cpu")
    assert found.main.report.classes == ("a", "b", "c")
    pixels = torch.randn(2, 3, 16, 16)
    assert torch.equal(load_model("deit-tiny-wordnet")(pixels).logits, load_model(name)(pixels).logits)
