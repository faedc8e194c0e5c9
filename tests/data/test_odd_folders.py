"""`deit train` on folders as people have them: it trains, or says in one sentence what to do."""

import os
import re
from pathlib import Path

import pytest
from support.checks import raises_saying
from support.folders import CONVNET, found_in, names, save
from support.runs import photos

from deit.data.batches import EvaluationBatches, processor_for
from deit.evaluate.models import evaluate

# ------------------------------------------------------------------------------------------------- classes that are odd


def test_a_class_folder_without_images_is_refused(data, command):
    (data / "train" / "empty").mkdir()
    (data / "train" / "empty" / "notes.txt").write_text("later")
    command.assert_refused(
        data, saying=[data / "train" / "empty", "has no images", "expected files *{.bmp", "or remove the folder"]
    )


def test_a_train_folder_without_images_is_refused(data, command):
    for path in (data / "train").rglob("*.png"):
        path.rename(path.with_suffix(".heic"))
    command.assert_refused(data, saying=[data / "train" / "a", "has no images", "expected", ".png"])
    (data / "train").rename(data / "photos")
    (data / "train").mkdir()
    command.assert_refused(data, saying=[data / "train", "has no images", f"expected {data / 'train'}/CLASS/*", ".png"])


def test_a_class_that_validation_lacks(data, command):
    """The score is over the images that are there, and the model keeps all classes."""
    for path in (data / "val" / "b").iterdir():
        path.unlink()
    command.assert_refused(data, saying=[data / "val" / "b", "has no images", "or remove the folder"])
    (data / "val" / "b").rmdir()
    train, val = found_in(data)
    assert train.classes == val.classes == ("a", "b", "c")
    assert val.labels == (0, 0, 0, 2, 2, 2)
    model = command.trains(data)
    assert list(model.config.id2label.values()) == ["a", "b", "c"]
    accuracy = evaluate(model, EvaluationBatches(val, processor_for(CONVNET), 6))["fused"]
    assert accuracy.total == 6
    assert accuracy.value == max(row["val_accuracy"] for row in command.rows if "val_accuracy" in row)


def test_a_class_that_training_lacks_is_refused(data, command):
    save(data / "val" / "zebra" / "0.png")
    command.assert_refused(data, saying=[data / "val", "'zebra'", "it knows a, b, c", "rename or remove"])


def test_the_refusal_of_a_class_among_many_stays_short(data):
    for i in range(30):
        save(data / "train" / f"class {i:02}" / "0.png")
    save(data / "val" / "zebra" / "0.png")
    with raises_saying(ValueError, "'zebra'", "it knows a, b, c, class 00, ", "class 06 and others"):
        found_in(data)


def test_a_single_class_is_refused(tmp_path, command):
    root = photos(photos(tmp_path / "data", classes="a"), split="val", classes="a")
    command.assert_refused(root, saying=[root / "train", "one class, 'a'", "needs two", "add a folder"])
    command.assert_refused(root / "train", saying=[root / "train", "one class, 'a'", "needs two", "add a folder"])


def test_three_images_in_all(tmp_path, command):
    """With a validation folder all are trained on, in batches of eight; without, one of the two is held out."""
    root = tmp_path / "data"
    for name in ("a/0", "a/1", "b/0"):
        save(root / "train" / f"{name}.png")
    train, val = found_in(root)
    assert train.labels == (0, 1)
    assert val.labels == (0,)
    assert {*train.files, *val.files} == set((root / "train").glob("*/*"))
    command.trains(root)
    save(root / "val" / "a" / "0.png")
    train, val = found_in(root)
    assert (len(train), len(val)) == (3, 1)
    command.trains(root)
    assert command.rows[-1]["images"] == 8 * 20
    assert command.rows[-1]["epoch"] == pytest.approx(160 / 3)


def test_one_image_of_each_class_can_not_be_held_out(tmp_path, command):
    for name in "ab":
        save(tmp_path / "data" / "train" / name / "0.png")
    command.assert_refused(
        tmp_path / "data", saying=["nothing to validate on", tmp_path / "data" / "train", "add a folder val"]
    )


def test_images_beside_class_folders_are_refused(data, command):
    save(data / "train" / "stray.JPG")
    command.assert_refused(data, saying=[data / "train" / "stray.JPG", "is in no class folder", "move"])
    (data / "train" / "stray.JPG").rename(data / "val" / "stray.JPG")
    command.assert_refused(data, saying=[data / "val" / "stray.JPG", "is in no class folder", "move"])


def test_the_folder_of_a_class_is_refused_with_the_folder_above(data, command):
    cats = next(place for place in sorted((data / "train").iterdir()) if place.is_dir())
    command.assert_refused(
        cats, saying=["in no class folder", f"If {cats} is the folder of a class, give the one above"]
    )


def test_images_without_classes_are_refused(tmp_path, command):
    for i in range(3):
        save(tmp_path / "data" / f"{i}.png")
    command.assert_refused(
        tmp_path / "data",
        saying=[tmp_path / "data" / "0.png", "and 2 more images", "move", tmp_path / "data" / "CLASS"],
    )


# ------------------------------------------------------------------------------------------------ folders that are odd


@pytest.mark.parametrize("train", ["train", "."])
def test_without_val_a_share_of_every_class_is_held_out(train, tmp_path, monkeypatch):
    counts = {"a": 40, "b": 6, "c": 2, "d": 1}
    for name, count in counts.items():
        for i in range(count):
            save(tmp_path / train / name / f"{name}{i}.png", size=(2, 2))
    save(tmp_path / "test" / "a" / "t.png")
    save(tmp_path / "test" / "unheard" / "t.png")
    listed, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda place: listed.append(Path(place)) or scandir(place))
    kept, held = found_in(tmp_path, seed=3)
    assert tmp_path / train / "a" in listed
    assert not [path for path in listed if "test" in path.relative_to(tmp_path).parts]
    assert kept.classes == held.classes == tuple("abcd")
    assert [held.labels.count(i) for i in range(4)] == [4, 1, 1, 0]  # a tenth, one at least, never the last
    assert [kept.labels.count(i) for i in range(4)] == [36, 5, 1, 1]
    assert not set(kept.files) & set(held.files)
    assert {*kept.files, *held.files} == {path for path in tmp_path.rglob("*.png") if path.name != "t.png"}
    for split in (kept, held):
        assert all(path.name[0] == split.classes[label] for path, label in zip(split.files, split.labels, strict=True))
    assert found_in(tmp_path, seed=3) == (kept, held)
    assert set(found_in(tmp_path, seed=4)[1].files) != set(held.files)
    assert len(found_in(tmp_path, holdout=0.5)[1]) == 20 + 3 + 1
    with raises_saying(ValueError, "nothing to validate on", "data.holdout is 0", "set data.holdout"):
        found_in(tmp_path, holdout=0.0)


def test_classes_directly_in_the_root(data, command):
    (data / "train").rename(data.parent / "flat")
    (data / "val").rename(data.parent / "flat" / "test")
    train, val = found_in(data.parent / "flat")
    assert train.classes == ("a", "b", "c")
    assert (len(train), len(val)) == (18, 3)
    model = command.trains(data.parent / "flat")
    assert list(model.config.id2label.values()) == ["a", "b", "c"]


@pytest.mark.parametrize("recipe", ["convnet", "masked"])
@pytest.mark.parametrize("spelt", [("Train", "val"), ("TRAIN", "VAL"), ("train", "Validation"), (".", "Val")])
def test_split_folders_in_upper_case_are_refused(spelt, recipe, data, command):
    """They would be two classes, or not be looked at."""
    for name, other in zip(("train", "val"), spelt, strict=True):
        if other == ".":
            for path in (data / name).iterdir():
                path.rename(data / path.name)
            (data / name).rmdir()
        elif name != other:
            (data / name).rename(data / "aside")
            (data / "aside").rename(data / other)
    if spelt == ("Train", "val"):
        command.assert_refused(data, recipe, saying=[data, "no folder train", f"expected {data}/train/CLASS/IMAGE"])
    else:
        first = min(name for name in spelt if name.lower() != name)
        command.assert_refused(data, recipe, saying=[data / first, f"rename it to {first.lower()}"])


def test_a_test_folder_in_upper_case_beside_train_is_left_alone(data, command):
    photos(data, split="Test", classes="xyz", count=1)
    assert [len(split) for split in found_in(data)] == [21, 9]


@pytest.mark.parametrize("split", ["test", "val"])
def test_without_training_images_it_is_refused(split, tmp_path, command):
    root = photos(tmp_path / "data", split=split)
    command.assert_refused(root, saying=[root, "no folder train", f"expected {root}/train/CLASS/IMAGE files"])


def test_a_root_that_is_empty_missing_or_a_file(tmp_path, command):
    (tmp_path / "empty").mkdir()
    command.assert_refused(tmp_path / "empty", saying=[tmp_path / "empty", "no folder train", "CLASS/IMAGE"])
    for place in (tmp_path / "nowhere", save(tmp_path / "photo.jpg")):
        command.assert_refused(place, saying=[f"{place} is not a folder", "expected one with"])


def test_nested_hidden_and_linked_folders(data, command, tmp_path):
    """A class is all that lies below its folder; a link that leads back up is not gone round in."""
    for place in ("2021/spring/deep.png", ".thumbnails/hidden.png", "2021/.cache/hidden.png", "folder.jpg/inside.png"):
        save(data / "train" / "a" / place)
    save(data / "train" / ".ipynb_checkpoints" / "hidden.png")
    (data / "train" / "a" / "2021" / "back").symlink_to(data / "train" / "a", target_is_directory=True)
    save(tmp_path / "more" / "linked.png")
    (data / "train" / "a" / "more").symlink_to(tmp_path / "more", target_is_directory=True)
    (data / "train" / "b" / "itself").symlink_to(".", target_is_directory=True)
    (data / "train" / "c").rename(tmp_path / "elsewhere")
    (data / "train" / "c").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    train, _ = found_in(data)
    assert train.classes == ("a", "b", "c")
    numbered = [f"{i}.png" for i in range(7)]
    assert sorted(names(train)) == sorted([*numbered * 3, "deep.png", "inside.png", "linked.png"])
    assert train.labels == (0,) * 10 + (1,) * 7 + (2,) * 7
    command.trains(data)


def test_a_class_folder_without_permission_is_refused(data, command, monkeypatch):
    closed = data / "train" / "b"
    closed.chmod(0)
    if os.access(closed, os.R_OK):  # to root every folder is open
        scandir = os.scandir

        def refused(place):
            if Path(place) == closed:
                raise PermissionError(13, "Permission denied", str(place))
            return scandir(place)

        monkeypatch.setattr(os, "scandir", refused)
    try:
        command.assert_refused(data, saying=[f"{closed} can't be read", "Permission denied", "check its permissions"])
    finally:
        closed.chmod(0o755)


ODD_NAMES = [
    " leading",
    "Großes Café",
    "[red]x[bold]",
    "a;b&'c\"$(d)",
    "dog (1) [2021] 50% #3 {x}",
    "x" * 200,
    "~",
    "猫 🐈",
    os.fsdecode(b"latin-1 caf\xe9"),
]


def test_odd_names(tmp_path, command):
    root = tmp_path / "my photos [2021] é"
    for name in ODD_NAMES:
        for i, stem in enumerate((name, "0")):
            save(root / "train" / name / f"{stem}.png", (25 * ODD_NAMES.index(name), 100 * i, 0))
        save(root / "val" / name / "0.png")
    train, val = found_in(root)
    assert set(train.classes) == set(ODD_NAMES)
    assert [path.parent.name for path in train.files] == [train.classes[label] for label in train.labels]
    assert (len(train), len(val)) == (18, 9)
    model = command.trains(root)
    assert list(model.config.id2label.values()) == sorted(ODD_NAMES)


# -------------------------------------------------------------------------------------------------------- masked images


@pytest.mark.parametrize("train", ["train", "."])
def test_masked_images_from_folders_of_any_depth(train, tmp_path, command):
    root, images = tmp_path / "data", 0
    for place in (".", "2020", "2021/05", "2021/06/raw", "test prints"):
        for i in range(4):
            save(root / train / place / f"{i}.png", (60 * i, 100, 50))
            images += 1
    for place in ("test", "test/deep", ".thumbnails"):
        save(root / place / "unseen.png")
    kept, held = found_in(root, labelled=False)
    assert (len(kept), len(held)) == (images - 2, 2)
    assert kept.classes == ("image",)
    assert not {"unseen.png"} & {*names(kept), *names(held)}
    assert not set(kept.files) & set(held.files)
    command.trains(root, "masked")
    assert re.search(r": loss \d+\.\d+ on 2 validation images", command.shown.out)
    if train == "train":
        photos(root, split="val", count=1)
        kept, held = found_in(root, labelled=False)
        assert (len(kept), len(held)) == (images, 3)


def test_masked_images_without_images_are_refused(tmp_path, command):
    save(tmp_path / "data" / "test" / "0.png")
    (tmp_path / "data" / "notes").mkdir()
    command.assert_refused(tmp_path / "data", "masked", saying=[tmp_path / "data", "has no images", ".png"])
    save(tmp_path / "data" / "only.png")
    command.assert_refused(
        tmp_path / "data", "masked", saying=["nothing to validate on", tmp_path / "data", "add a folder val"]
    )
