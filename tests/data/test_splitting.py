"""`deit split`: the shares of each class, copies that stay together, and lists that the other commands read."""

import shutil
from collections import Counter

import pytest
from support.checks import raises_saying
from support.folders import save
from support.runs import photos

from deit.cli import main
from deit.data.folders import has_split, read_data, read_examples, read_parts
from deit.data.splitting import split


def pictures(folder, counts, first=0):
    """Pictures that all differ, in a folder for each class."""
    number = first
    for label, count in counts.items():
        for i in range(count):
            save(folder / label / f"{i:03}.png", (number % 256, number // 256, 7))
            number += 1
    return folder


def parts_of(place):
    return {name: read_examples(place, name)[0] for name in ("train", "val", "test") if has_split(place, name)}


def counted(split):
    return dict(Counter(split.classes[label] for label in split.labels))


@pytest.mark.parametrize("name", ["list.csv", "list.jsonl"])
def test_every_part_has_the_share_of_every_class(tmp_path, name):
    pictures(tmp_path / "photos", {"a": 40, "b, c": 20, "d": 3})
    [said] = split(tmp_path / "photos", tmp_path / name, val=0.2, test=0.1, seed=3)
    assert said == f"{tmp_path / name}: 43 train, 13 val, 7 test images"
    found = parts_of(tmp_path / name)
    assert counted(found["test"]) == {"a": 4, "b, c": 2, "d": 1}
    assert counted(found["val"]) == {"a": 8, "b, c": 4, "d": 1}
    assert counted(found["train"]) == {"a": 28, "b, c": 14, "d": 1}
    every = [file for part in found.values() for file in part.files]
    assert sorted(every) == sorted((tmp_path / "photos").rglob("*.png"))
    assert len(set(every)) == len(every)


def test_the_seed_decides_and_the_draw_is_that_of_training(tmp_path):
    data = pictures(tmp_path / "photos", {"a": 30, "b": 12})
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        split(data, tmp_path / f"{name}.csv", seed=seed)
    one, two, three = (parts_of(tmp_path / f"{name}.csv") for name in ("one", "two", "three"))
    assert one == two
    assert one["test"] != three["test"]
    split(data, tmp_path / "held.csv", test=0, val=0.25, seed=5)
    train, val = read_data(data, holdout=0.25, seed=5)
    found = parts_of(tmp_path / "held.csv")
    assert "test" not in found
    assert (set(found["train"].files), set(found["val"].files)) == (set(train.files), set(val.files))


@pytest.mark.parametrize("layout", ["folders", "test beside classes", "list"])
def test_parts_that_are_there_stay(tmp_path, layout):
    """The other part is drawn from the training images alone."""
    data = tmp_path / "photos"
    if layout == "test beside classes":
        pictures(data, {"a": 20, "b": 10})
        pictures(data / "test", {"a": 2, "b": 2}, 100)
        kept, drawn_part, expected = "test", "val", {"a": 2, "b": 1}
    else:
        pictures(data / "train", {"a": 20, "b": 10})
        pictures(data / "val", {"a": 2, "b": 2}, 100)
        kept, drawn_part, expected = "val", "test", {"a": 2, "b": 1}
    if layout == "list":
        rows = [f"{file.relative_to(tmp_path)},{file.parts[-2]},{file.parts[-3]}" for file in data.rglob("*.png")]
        (tmp_path / "all.csv").write_text("\n".join(["path,label,split", *rows]))
    given = tmp_path / "all.csv" if layout == "list" else data
    before = read_parts(given)
    split(given, tmp_path / "list.csv")
    found = parts_of(tmp_path / "list.csv")
    assert set(found[kept].files) == set(before[kept].files)
    assert counted(found[drawn_part]) == expected
    assert set(found["train"].files) | set(found[drawn_part].files) == set(before["train"].files)
    with raises_saying(ValueError, f"has {kept} images already, and they stay as they are; leave --{kept} out"):
        split(given, tmp_path / "other.csv", **{kept: 0.2})
    with raises_saying(ValueError, "there is nothing to draw", "train, val, test", "list.csv itself to the commands"):
        split(tmp_path / "list.csv", tmp_path / "other.csv")


def test_files_with_the_same_content_stay_together(tmp_path):
    data = pictures(tmp_path / "photos", {"a": 30, "b": 30})
    for i in range(30):  # each image of `a` twice, and one of `b` thirteen times
        shutil.copy(data / "a" / f"{i:03}.png", data / "a" / f"copy{i:03}.png")
    for i in range(12):
        shutil.copy(data / "b" / "000.png", data / "b" / f"copy{i:03}.png")
    for seed in range(5):
        said = split(data, tmp_path / f"{seed}.csv", val=0.2, test=0.2, seed=seed)
        assert len(said) == 1
        found = parts_of(tmp_path / f"{seed}.csv")
        contents = {name: {file.read_bytes() for file in part.files} for name, part in found.items()}
        assert not contents["train"] & contents["val"]
        assert not contents["train"] & contents["test"]
        assert not contents["val"] & contents["test"]
        assert counted(found["test"]) == counted(found["val"]) == {"a": 12, "b": 8}
        assert sum(file.name.startswith("copy") for file in found["train"].files if file.parts[-2] == "b") == 12


def test_copies_that_can_not_be_kept_apart_are_named(tmp_path):
    data = pictures(tmp_path / "photos" / "train", {"a": 12, "b": 12}).parent
    pictures(data / "val", {"a": 1, "b": 1}, 500)
    shutil.copy(data / "train" / "a" / "003.png", data / "train" / "b" / "same.png")
    shutil.copy(data / "train" / "b" / "005.png", data / "val" / "b" / "000.png")
    _, labels, parts = split(data, tmp_path / "list.csv")
    assert "2 files with the same content as another have different labels" in labels
    assert f"{data / 'train' / 'b' / 'same.png'} (b)" in labels
    assert "2 files with the same content as another are in different parts" in parts
    assert f"{data / 'val' / 'b' / '000.png'} (val)" in parts
    [rows] = [part for name, part in parts_of(tmp_path / "list.csv").items() if name == "train"]
    assert data / "train" / "b" / "same.png" in rows.files  # which class it is of is not known


def test_a_class_too_small_for_a_part_is_named(tmp_path):
    data = pictures(tmp_path / "photos", {"a": 9, "b": 1, "c": 2})
    _, test, val = split(data, tmp_path / "list.csv")
    assert test.startswith('no test image of "b": too few images')
    assert val.startswith('no val image of "b", "c": too few images')


def test_paths_follow_the_list(tmp_path):
    """Relative ones below its folder, so that both can move together, and whole ones elsewhere."""
    data = pictures(tmp_path / "one" / "photos", {"a": 5, "b": 5})
    split(data, tmp_path / "one" / "list.csv")
    (tmp_path / "two").mkdir()
    split(data, tmp_path / "two" / "list.csv")
    (tmp_path / "one").rename(tmp_path / "moved")
    assert all(file.is_file() for part in parts_of(tmp_path / "moved" / "list.csv").values() for file in part.files)
    assert str(data / "a" / "000.png") in (tmp_path / "two" / "list.csv").read_text()


def test_what_is_refused(tmp_path):
    data = pictures(tmp_path / "photos", {"a": 5, "b": 5})
    out = tmp_path / "list.csv"
    with raises_saying(ValueError, "expected a .csv or .jsonl file after --out", "list.txt"):
        split(data, tmp_path / "list.txt")
    for share in (-0.1, 1.0, float("nan")):
        with raises_saying(ValueError, "--test is a share of the training images, from 0 to below 1"):
            split(data, out, test=share)
    with raises_saying(ValueError, "leave nothing to train on, found 1.1 together"):
        split(data, out, val=0.6, test=0.5)
    with raises_saying(ValueError, "there is nothing to draw", "give --test or --val above 0"):
        split(data, out, val=0, test=0)
    with raises_saying(ValueError, "--seed can't be negative, found -1"):
        split(data, out, seed=-1)
    with raises_saying(FileNotFoundError, "does not exist"):
        split(tmp_path / "none", out)
    with raises_saying(ValueError, "has test images but no training images", "train/CLASS"):
        split(pictures(tmp_path / "only" / "test", {"a": 2}).parent, out)
    assert not out.exists()
    out.write_text("mine")
    with raises_saying(FileExistsError, "exists already", "choose another --out"):
        split(data, out)
    assert out.read_text() == "mine"
    save(data / "a" / "\udcff.png")
    with raises_saying(ValueError, "a list is text in UTF-8", "rename"):
        split(data, tmp_path / "new.csv")


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "photos", count=10)
    assert main(["split", "photos", "--out", "list.csv", "--val", "0.2", "--seed", "1"]) == 0
    assert capsys.readouterr().out == "list.csv: 21 train, 6 val, 3 test images\n"
    assert main(["split", "photos", "--out", "list.csv"]) == 1
    assert capsys.readouterr().err.startswith("deit split: list.csv exists already")
