"""`deit train` on files that are broken, named oddly or no images: it trains, or says in one sentence what to do."""

import os
import re

import pytest
import torch
from support.folders import CONVNET, found_in, names, save
from support.runs import photos

from deit.data.batches import EvaluationBatches, TrainingBatches, processor_for
from deit.evaluate.models import evaluate

# ---------------------------------------------------------------------------------------------------------- in training


def many(root, suffix=".jpg"):
    """120 training images, red for class a and blue for b, and four to validate."""
    for split, count in (("train", 60), ("val", 2)):
        for name, colour in (("a", (220, 30, 30)), ("b", (30, 30, 220))):
            for i in range(count):
                save(root / split / name / f"{i:02}{suffix}", colour)
    return root


def cut(path):
    path.write_bytes(path.read_bytes()[:-200])


def write_text(path):
    path.write_text("404: not found")


def write_nothing(path):
    path.write_bytes(b"")


def dead_link(path):
    path.unlink()
    path.symlink_to(path.parent / "moved")


BROKEN = [
    ("[red]holi day[0].jpg", cut, "damaged or cut short"),
    ("page.jpg", write_text, "not an image"),
    ("empty.png", write_nothing, "is empty"),
    ("link.png", dead_link, "does not exist"),
]


@pytest.mark.parametrize(("name", "breaks", "reason"), BROKEN, ids=["cut", "text", "empty", "link"])
def test_one_bad_image_of_many_is_told_counted_and_replaced(name, breaks, reason, tmp_path, command):
    root = many(tmp_path / "data")
    bad = save(root / "train" / "a" / name, (220, 30, 30), (64, 64))
    breaks(bad)
    command.trains(root, "convnet", "schedule.total=epochs(2)", "evaluate=epochs(1)")
    assert [row["bad_images"] for row in command.rows][-1] == 1
    [told] = [line for line in command.shown.err.splitlines() if str(bad) in line]
    assert reason in told
    assert "nother image stands in" in told
    assert "Traceback" not in command.shown.err


def test_what_stands_in_is_another_image_with_its_own_label(tmp_path):
    root = many(tmp_path / "data")
    bad = save(root / "train" / "a" / "bad.jpg", (0, 255, 0), (64, 64))
    cut(bad)
    split, _ = found_in(root)
    batches = TrainingBatches(split, CONVNET)
    index, seen, stream = split.files.index(bad), [], batches.from_step(0)
    for step in range(121):  # eight epochs of 121 views
        batch = next(stream)
        std, mean = (torch.tensor(values).view(3, 1, 1) for values in (CONVNET.data.std, CONVNET.data.mean))
        colours = (batch.pixels * std + mean).mean((2, 3))
        assert torch.equal(batch.labels, (colours[:, 2] > colours[:, 0]).long())
        assert (colours[:, 1] < 0.2).all()
        wanted = batches.keys(step)[:, 1].tolist()
        assert {file for file, _ in batch.faults} == ({str(bad)} if index in wanted else set())
        seen += [int(batch.labels[wanted.index(index)])] if index in wanted else []
    assert len(seen) == 8
    assert set(seen) == {0, 1}  # drawn from all classes


@pytest.mark.parametrize(("name", "breaks", "reason"), BROKEN, ids=["cut", "text", "empty", "link"])
def test_one_bad_image_of_ten_is_refused(name, breaks, reason, tmp_path, command):
    root = photos(photos(tmp_path / "data", count=5, classes="ab"), split="val", count=1, classes="ab")
    (root / "train" / "a" / "0.png").unlink()
    bad = save(root / "train" / "a" / name, (200, 0, 0), (64, 64))
    breaks(bad)
    command.assert_refused(root, saying=["1 of 10 images can't be read", bad, reason, "Replace or remove"])


def test_a_bad_image_whose_name_is_no_utf8(tmp_path, command):
    """Latin-1 names come out of old archives."""
    root = many(tmp_path / "data")
    bad = save(root / "train" / "a" / os.fsdecode(b"caf\xe9.jpg"), (220, 30, 30), (64, 64))
    cut(bad)
    command.trains(root, "convnet", "schedule.total=epochs(1)")
    assert command.rows[-1]["bad_images"] == 1


def test_other_files_are_passed_over(data, command):
    for name in (
        ".DS_Store",
        "Thumbs.db",
        "desktop.ini",
        "notes.txt",
        "labels.csv",
        "clip.mp4",
        "scan.pdf",
        "README",
        "photo.jpg.part",
        ".hidden.png",
        "._0.png",
    ):
        for folder in (data, data / "train", data / "train" / "a", data / "val" / "b"):
            (folder / name).write_bytes(b"no image")
    counted = (
        "24 files were passed over, because they are no images that Pillow reads: 3 without a suffix, 3 .csv, 3 .db, "
        "3 .ini, 3 .mp4, 3 .part, 3 .pdf, 3 .txt"
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(f'{data}: {counted}')}$"):
        train, val = found_in(data)
    assert len(train) == 21
    assert len(val) == 9
    assert set(names(train)) == {f"{i}.png" for i in range(7)}
    with pytest.warns(UserWarning, match=re.escape(counted)):
        command.trains(data)
    assert command.rows[-1]["bad_images"] == 0


def test_upper_case_suffixes(tmp_path, command):
    suffixes = (".JPG", ".Jpeg", ".PNG", ".BMP", ".WEBP", ".TIFF", ".TIF", ".GIF")
    for name in "ab":
        for i, suffix in enumerate(suffixes):
            save(tmp_path / "data" / "train" / name / f"{i}{suffix}")
    save(tmp_path / "data" / "val" / "a" / "0.JPG")
    train, val = found_in(tmp_path / "data")
    assert [path.suffix for path in train.files] == 2 * list(suffixes)
    assert names(val) == ["0.JPG"]
    command.trains(tmp_path / "data")


def test_two_identical_images(tmp_path, command):
    for name in "ab":
        save(tmp_path / "data" / name / "0.png")
        save(tmp_path / "data" / name / "copy of 0.png")
    train, val = found_in(tmp_path / "data")
    assert len(train) == len(val) == 2
    command.trains(tmp_path / "data")


# -------------------------------------------------------------------------------------------------------- in validation


def test_a_bad_validation_image_is_told_once_and_not_counted(tmp_path, command):
    root = photos(photos(tmp_path / "data", classes="ab"), split="val", count=60, classes="ab")
    bad = root / "val" / "b" / "17.png"
    cut(bad)
    model = command.trains(root)
    assert len([row for row in command.rows if "val_accuracy" in row]) == 2
    [told] = [line for line in command.shown.err.splitlines() if str(bad) in line]
    assert "damaged or cut short" in told
    assert "evaluation leaves it out" in told
    bad.unlink()
    accuracy = evaluate(model, EvaluationBatches(found_in(root)[1], processor_for(CONVNET), 50))["fused"]
    assert accuracy.total == 119
    assert accuracy.value == max(row["val_accuracy"] for row in command.rows if "val_accuracy" in row)


def test_too_many_bad_validation_images_are_refused(data, command):
    bad = data / "val" / "b" / "0.png"
    write_nothing(bad)
    assert command(data) == 1
    last = command.shown.err.splitlines()[-1]
    assert last.startswith("deit train: 1 of 9 images can't be read")
    assert str(bad) in last
    assert "Replace or remove" in last
    assert "Traceback" not in command.shown.err
