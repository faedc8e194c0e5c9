"""Images to judge a model by: splits, lists of files, and classes found by name."""

import json
import os
import unicodedata
from pathlib import Path

import pytest
from support.checks import raises_saying
from support.runs import photos

from deit.data.folders import Split, fingerprint, has_split, matched, read_data, read_examples, read_split
from deit.image.decode import ImageError, load_image


def write(path, *lines, encoding="utf-8"):
    path.write_text("\n".join(lines) + "\n", encoding=encoding)
    return path


def shown(split, root):
    return [
        (file.relative_to(root).as_posix(), split.classes[label])
        for file, label in zip(split.files, split.labels, strict=True)
    ]


# ------------------------------------------------------------------------------------------------------------- folders


def test_test_comes_before_val_and_train_is_asked_for(tmp_path):
    photos(photos(tmp_path, count=3), split="val", count=2)
    assert read_examples(tmp_path) == (read_split(tmp_path, "val"), "val")
    photos(tmp_path, split="test", count=1)
    assert read_examples(tmp_path) == (read_split(tmp_path, "test"), "test")
    for split in ("train", "val", "test"):
        assert read_examples(tmp_path, split) == (read_split(tmp_path, split), split)


def test_a_folder_without_splits(tmp_path):
    photos(tmp_path, split="birds", classes="ab")
    found, split = read_examples(tmp_path / "birds")
    assert split is None
    assert found.classes == ("a", "b")
    assert len(found) == 14


def test_training_images_are_no_default(tmp_path):
    with raises_saying(ValueError, "neither test nor val", "--split train"):
        read_examples(photos(tmp_path))


def test_folders_that_are_something_else(tmp_path):
    photos(tmp_path / "one", split="Test")
    with raises_saying(ValueError, "rename it to test"):
        read_examples(tmp_path / "one")
    with raises_saying(FileNotFoundError, "no folder test", "expected"):
        read_examples(photos(tmp_path / "two"), "test")
    with raises_saying(FileNotFoundError, "does not exist", ".csv or .jsonl"):
        read_examples(tmp_path / "three.csv")
    with raises_saying(ValueError, "three.txt is neither", ".csv or .jsonl"):
        read_examples(write(tmp_path / "three.txt", "path,label"))


# --------------------------------------------------------------------------------------------------------------- lists


def test_a_csv_list(tmp_path):
    list_ = write(
        tmp_path / "list.CSV",
        "path,weight, label",
        'a.png,2,"tench, Tinca tinca"',
        "",
        f"{tmp_path}/b/c.png,3,dog",
        "b/../d é.png,4,dog",
        encoding="utf-8-sig",
    )  # as spreadsheets write it
    found, split = read_examples(list_)
    assert split is None
    assert shown(found, tmp_path) == [("a.png", "tench, Tinca tinca"), ("b/c.png", "dog"), ("d é.png", "dog")]
    assert found.classes == ("dog", "tench, Tinca tinca")


def test_a_jsonl_list(tmp_path, monkeypatch):
    rows = [{"path": "a.png", "label": "7", "width": 3}, {"label": "cat", "path": str(tmp_path / "b.png")}]
    write(tmp_path / "list.jsonl", json.dumps(rows[0]), "  ", json.dumps(rows[1]))
    monkeypatch.chdir(tmp_path)  # relative to the list, whose own name is relative
    for name in ("list.jsonl", tmp_path / "list.jsonl"):
        assert shown(read_examples(name)[0], tmp_path) == [("a.png", "7"), ("b.png", "cat")]


def test_spaces_around_a_label_make_no_other_class(tmp_path):
    """A class of its own would be learnt without a word."""
    lines = ["path, label, split", "a.png,cat,train", "b.png, cat, train", "c.png,cat ,val", "d.png,big cat,train"]
    train, val = read_data(write(tmp_path / "list.csv", *lines), holdout=0.1, seed=0)
    assert train.classes == val.classes == ("big cat", "cat")
    assert (train.labels, val.labels) == ((1, 1, 0), (1,))
    rows = [json.dumps({"path": f"{i}.png", "label": label}) for i, label in enumerate(["cat", "\tcat", "dog\u00a0"])]
    assert read_examples(write(tmp_path / "list.jsonl", *rows))[0].classes == ("cat", "dog")


def test_the_same_images_by_folder_and_by_list(tmp_path):
    folder, _ = read_examples(photos(tmp_path), "train")
    lines = [
        f"{file.relative_to(tmp_path)},{folder.classes[label]}"
        for file, label in zip(folder.files, folder.labels, strict=True)
    ]
    listed, _ = read_examples(write(tmp_path / "list.csv", "path,label", *lines))
    assert listed == folder
    assert fingerprint(listed) == fingerprint(folder)


@pytest.mark.parametrize(
    ("lines", "saying"),
    [
        (["a.png,cat"], ["line 1", "one column 'path'", "'a.png', 'cat'"]),
        (["path;label", "a.png;cat"], ["line 1", "'path;label'"]),
        (["path,label,label", "a.png,cat,cat"], ["line 1", "one column 'label'"]),
        (["path,label", "a.png,cat", "b.png,tench, Tinca tinca"], ["line 3", "expected 2 fields", "found 3", "quotes"]),
        (["path,label", "a.png"], ["line 2", "found 1"]),
        (["path,label", "a.png,"], ["line 2", 'label is ""', "name of a class"]),
        (["path,label", ",cat"], ["line 2", 'path is ""']),
        (["path,label", "a.png,cat", "b.png,cat", "./a.png,dog"], ["line 4", "a.png is already listed in line 2"]),
        (["path,label"], ["lists no images"]),
        ([""], ["line 1", "found nothing"]),
        (["path,label", '"a.png,cat'], ["can't be read as CSV"]),
    ],
)
def test_csv_lists_that_are_refused(lines, saying, tmp_path):
    with raises_saying(ValueError, tmp_path / "list.csv", *saying):
        read_examples(write(tmp_path / "list.csv", *lines))


@pytest.mark.parametrize(
    ("line", "saying"),
    [
        ('{"path": "b.png", "label": 7}', ["line 2", "label is 7", "name of a class"]),
        ('{"path": null, "label": "cat"}', ["line 2", "path is null"]),
        ('{"path": "b.png", "class": "cat"}', ["line 2", '"path" and "label"', "'path', 'class'"]),
        ('["b.png", "cat"]', ["line 2", "found list"]),
        ('{"path": "b.png", "label": "cat"', ["line 2", "not valid JSON"]),
        ('{"path": "a.png", "label": "cat"}', ["line 2", "already listed in line 1"]),
    ],
)
def test_jsonl_lists_that_are_refused(line, saying, tmp_path):
    with raises_saying(ValueError, tmp_path / "list.jsonl", *saying):
        read_examples(write(tmp_path / "list.jsonl", '{"path": "a.png", "label": "cat"}', line))


def test_other_lists_that_are_refused(tmp_path):
    with raises_saying(ValueError, "UTF-8"):
        read_examples(write(tmp_path / "list.csv", "path,label", "a.png,café", encoding="latin-1"))
    with raises_saying(ValueError, "is a list without a column split", "--split val"):
        read_examples(write(tmp_path / "list.csv", "path,label", "a.png,cat"), "val")


def listing(root, *splits, suffix=".csv", split=True):
    """A list of what lies in these folders of `root`."""
    rows = [
        {"path": str(file.relative_to(root)), "label": file.parent.name} | ({"split": name} if split else {})
        for name in splits
        for file in sorted((root / name).rglob("*.png"))
    ]
    if suffix == ".jsonl":
        return write(root / "all.jsonl", *map(json.dumps, rows))
    return write(root / "all.csv", ",".join(rows[0]), *(",".join(row.values()) for row in rows))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_the_same_training_by_folder_and_by_list(tmp_path, suffix):
    for name, count in (("train", 7), ("val", 3), ("test", 2)):
        photos(tmp_path, split=name, count=count)
    list_ = listing(tmp_path, "train", "val", "test", suffix=suffix)
    assert read_data(list_, holdout=0.1, seed=0) == read_data(tmp_path, holdout=0.1, seed=0)
    for split in (None, "train", "val", "test"):
        assert read_examples(list_, split) == read_examples(tmp_path, split)
        assert has_split(list_, split or "test") is has_split(tmp_path, split or "test") is True
    unlabelled = read_data(list_, holdout=0.1, seed=0, labelled=False)
    assert [split.files for split in unlabelled] == [split.files for split in read_data(list_, holdout=0.1, seed=0)]
    assert {split.classes for split in unlabelled} == {("image",)}


@pytest.mark.parametrize("split", [True, False])
def test_images_are_held_out_of_a_list_as_of_a_folder(tmp_path, split):
    photos(tmp_path)
    list_ = listing(tmp_path, "train", split=split)
    for seed in (0, 1):
        assert read_data(list_, holdout=0.3, seed=seed) == read_data(tmp_path, holdout=0.3, seed=seed)
    assert not has_split(list_, "val")


def test_other_names_of_splits_and_lists_without_labels(tmp_path):
    photos(tmp_path)
    names = sorted(str(file.relative_to(tmp_path)) for file in (tmp_path / "train").rglob("*.png"))
    bare = write(tmp_path / "bare.csv", "path", *names)
    whole, held = read_data(bare, holdout=0.2, seed=0, labelled=False)
    assert len(whole) + len(held) == len(names)
    parts = [
        f"{name},{'validation' if i % 3 == 0 else 'train'},{Path(name).parent.name}" for i, name in enumerate(names)
    ]
    train, val = read_data(write(tmp_path / "parts.csv", "path,split,label", *parts), holdout=0.2, seed=0)
    assert (len(train), len(val)) == (14, 7)


@pytest.mark.parametrize(
    ("lines", "saying"),
    [
        (["a.png,cat,train", "b.png,dog,holdout"], ["line 3", 'split is "holdout"', "train, val or test"]),
        (["a.png,cat,train", "b.png,dog,"], ["line 3", "the split is empty"]),
        (["a.png,cat,test", "b.png,dog,val"], ["no image of the split train"]),
        (["a.png,cat,train", "b.png,cat,train"], ["one class, 'cat'"]),
        (["a.png,cat,train", "b.png,dog,train", "c.png,dgo,val"], ["line 4", "class 'dgo'", "'dog'"]),
    ],
)
def test_training_lists_that_are_refused(lines, saying, tmp_path):
    with raises_saying(ValueError, tmp_path / "list.csv", *saying):
        read_data(write(tmp_path / "list.csv", "path,label,split", *lines), holdout=0.1, seed=0)


def test_splits_that_a_list_lacks(tmp_path):
    list_ = write(tmp_path / "list.csv", "path,label,split", "a.png,cat,train", "b.png,dog,val")
    with raises_saying(ValueError, "no image of the split test", "train, val"):
        read_examples(list_, "test")
    alone = write(tmp_path / "alone.csv", "path,label,split", "a.png,cat,train")
    with raises_saying(ValueError, "neither test nor val", "--split train"):
        read_examples(alone)


def test_a_listed_folder_counts_as_an_image_that_can_not_be_read(tmp_path):
    (tmp_path / "folder").mkdir()
    found, _ = read_examples(write(tmp_path / "list.csv", "path,label", "folder,cat", "gone.png,cat"))
    before = fingerprint(found)
    (tmp_path / "folder").rmdir()
    assert fingerprint(found) == before


# ------------------------------------------------------------------------------------------------------------- classes

SPLIT = Split(tuple(map(Path, ("1.png", "2.png", "3.png"))), (1, 0, 1), ("cat", "dog"))


def test_classes_are_found_by_name_in_any_order():
    found = matched(SPLIT, ["eel", "dog", "ant", "cat"])
    assert (found.labels, found.classes) == ((1, 3, 1), ("eel", "dog", "ant", "cat"))
    assert found.files == SPLIT.files


@pytest.mark.parametrize(
    ("classes", "saying"),
    [
        (["Dog", "cat"], ["no class 'dog', which is the class of 1.png", "knows 'Dog'"]),
        (["cat", "hot dog, red hot", "dogs"], ["no class 'dog'", "knows 'dogs' and 'hot dog, red hot'"]),
        (["x", "y"], ["no class 'cat', which is the class of 2.png", "1 more are unknown", "knows 'x', 'y'"]),
        ([f"LABEL_{i}" for i in range(9)], ["'LABEL_4' and others"]),
    ],
)
def test_classes_that_the_model_does_not_know(classes, saying):
    with raises_saying(ValueError, *saying):
        matched(SPLIT, classes)


def test_a_name_that_the_model_gives_twice_is_refused_where_it_is_used():
    with raises_saying(ValueError, "calls 2 of its classes 'dog'", "id2label"):
        matched(SPLIT, ["dog", "cat", "dog"])
    assert matched(SPLIT, ["crane", "cat", "dog", "crane"]).labels == (2, 1, 2)


@pytest.mark.skipif(os.sep != "/", reason="backslashes are separators here")
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_paths_of_windows(tmp_path, suffix):
    photos(tmp_path / "photos", split="birds", classes="ab", count=1)
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "back\\slash.png").write_bytes((tmp_path / "photos/birds/a/0.png").read_bytes())
    paths = ["..\\photos\\birds\\a\\0.png", "..\\photos\\birds/b/0.png", "back\\slash.png", "..\\photos\\gone.png"]
    rows = [json.dumps({"path": path, "label": "a"}) for path in paths]
    file = tmp_path / "lists" / f"all{suffix}"
    write(file, *(["path,label", *(f"{path},a" for path in paths)] if suffix == ".csv" else rows))
    split, _ = read_examples(file)
    assert [os.path.relpath(path, tmp_path) for path in split.files] == [
        "photos/birds/a/0.png",
        "photos/birds/b/0.png",
        "lists/back\\slash.png",
        "lists/..\\photos\\gone.png",
    ]
    with raises_saying(ImageError, "gone.png does not exist; write its path with / instead of \\"):
        load_image(split.files[3])


def test_labels_are_one_class_however_an_accent_is_written(tmp_path):
    cafe = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]
    file = write(tmp_path / "all.csv", "path,label", f"1.png,{cafe[0]}", f"2.png,{cafe[1]}", "3.png,dog")
    split, _ = read_examples(file)
    assert (split.classes, split.labels) == ((cafe[0], "dog"), (0, 0, 1))
    for name in cafe:
        found = matched(split, ["dog", name])
        assert (found.classes, found.labels) == (("dog", name), (1, 1, 0))
    with raises_saying(ValueError, "the model calls 2 of its classes 'café'"):
        matched(split, ["dog", *cafe])


def test_a_list_that_is_a_pipe(tmp_path):
    """It is not waited for."""
    os.mkfifo(tmp_path / "list.csv")
    with raises_saying(ValueError, "list.csv is neither a folder nor a regular file", "give that"):
        read_examples(tmp_path / "list.csv")
