"""Folders as people have them: what is wrong is refused by name, what is only odd is read."""

import os
import shutil
import unicodedata
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from support.checks import assert_close, raises_saying
from support.runs import small_recipe

from deit.data import folders
from deit.data.batches import EvaluationBatches, TrainingBatches, processor_for
from deit.data.folders import fingerprint, read_data, read_split
from deit.recipe import Augment, Data, ResizedCrop


def recipe(**parts):
    return small_recipe(**{"data": Data(batch=4, crop_ratio=1.0), **parts})


def photo(size=(20, 24), seed=0):
    """Smooth colours, (height, width, 3), alike in no two places."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize(size[::-1], Image.Resampling.BICUBIC))


def write(path, pixels=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(photo() if pixels is None else pixels).save(path, **options)
    return path


def folder(root, counts=(("cat", 4), ("dog", 3)), split="train"):
    for name, count in counts:
        for i in range(count):
            write(root / split / name / f"{i}.png", photo(seed=i))
    return root


def names(split):
    return ["/".join(file.parts[-2:]) for file in split.files]


# ------------------------------------------------------------------------------------------------------- whole folders


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_training_and_validation_folders(tmp_path, name):
    folder(folder(tmp_path), (("cat", 1), ("dog", 2)), name)
    folder(tmp_path, (("bird", 2),), "test")
    train, val = read_data(tmp_path, holdout=0.5, seed=0)
    assert train.classes == val.classes == ("cat", "dog")
    assert names(train) == [f"cat/{i}.png" for i in range(4)] + [f"dog/{i}.png" for i in range(3)]
    assert (train.labels, val.labels) == ((0,) * 4 + (1,) * 3, (0, 1, 1))
    assert {file.parts[-3] for file in val.files} == {name}


def test_a_class_may_be_missing_from_val(tmp_path):
    folder(folder(tmp_path), (("dog", 2),), "val")
    _, val = read_data(tmp_path, holdout=0.1, seed=0)
    assert (val.classes, val.labels) == (("cat", "dog"), (1, 1))


def test_val_has_a_class_that_train_lacks(tmp_path):
    folder(folder(tmp_path), (("dog", 2), ("eel", 1)), "val")
    with raises_saying(ValueError, tmp_path / "val", "'eel'", "cat, dog"):
        read_data(tmp_path, holdout=0.1, seed=0)


@pytest.mark.parametrize("layout", ["train", "."])
def test_a_share_of_every_class_is_held_out(tmp_path, layout):
    folder(tmp_path, (("cat", 40), ("dog", 10), ("eel", 2), ("fly", 1)), layout)
    folder(tmp_path, (("cat", 2),), "test")
    train, val = read_data(tmp_path, holdout=0.2, seed=3)
    assert train.classes == val.classes == ("cat", "dog", "eel", "fly")
    assert np.bincount(val.labels, minlength=4).tolist() == [8, 2, 1, 0]
    assert np.bincount(train.labels, minlength=4).tolist() == [32, 8, 1, 1]
    assert len(set(train.files) | set(val.files)) == 53
    assert not [file for file in train.files + val.files if "test" in file.relative_to(tmp_path).parts]
    for split in (train, val):
        assert [file.parent.name for file in split.files] == [split.classes[label] for label in split.labels]
    again = read_data(tmp_path, holdout=0.2, seed=3)
    assert again == (train, val)
    assert read_data(tmp_path, holdout=0.2, seed=4)[1].files != val.files


def test_nothing_can_be_held_out(tmp_path):
    folder(tmp_path, (("cat", 1), ("dog", 1)))
    with raises_saying(ValueError, tmp_path / "train", "val"):
        read_data(tmp_path, holdout=0.3, seed=0)
    folder(tmp_path, (("cat", 9),))
    with raises_saying(ValueError, "holdout", "val"):
        read_data(tmp_path, holdout=0.0, seed=0)


def test_three_images_in_all(tmp_path):
    """One is held out, and a batch of any size comes of the two others."""
    folder(tmp_path, (("cat", 2), ("dog", 1)))
    train, val = read_data(tmp_path, holdout=0.1, seed=0)
    assert (train.labels, val.labels) == ((0, 1), (0,))
    [batch] = islice(TrainingBatches(train, recipe(data=Data(batch=64, repeats=3))).from_step(0), 1)
    assert np.bincount(batch.labels).tolist() in ([33, 31], [31, 33], [32, 32], [30, 34], [34, 30])
    [batch] = EvaluationBatches(val, processor_for(recipe()), 8)
    assert batch.labels.tolist() == [0]


def test_refused_folders(tmp_path):
    with raises_saying(FileNotFoundError, tmp_path / "nowhere", "train/CLASS"):
        read_data(tmp_path / "nowhere", holdout=0.1, seed=0)
    write(tmp_path / "file.png")
    with raises_saying(FileNotFoundError, "file.png"):
        read_data(tmp_path / "file.png", holdout=0.1, seed=0)
    for name in ("test", "val"):
        for labelled in (True, False):
            with raises_saying(FileNotFoundError, tmp_path / name, "train"):
                read_data(folder(tmp_path / name, split=name), holdout=0.1, seed=0, labelled=labelled)
    folder(tmp_path / "empty", (("cat", 2),))
    (tmp_path / "empty" / "train" / "dog").mkdir()
    (tmp_path / "empty" / "train" / "dog" / "notes.txt").write_text("no image")
    with raises_saying(ValueError, tmp_path / "empty" / "train" / "dog", "no images"):
        read_data(tmp_path / "empty", holdout=0.1, seed=0)
    folder(tmp_path / "one", (("cat", 5),))
    with raises_saying(ValueError, tmp_path / "one" / "train", "'cat'", "a classifier needs two"):
        read_data(tmp_path / "one", holdout=0.1, seed=0)
    above = folder(tmp_path / "above" / "photos").parent
    with raises_saying(ValueError, "'photos'", f"If the classes are the folders in {above / 'photos'}, give that"):
        read_data(above, holdout=0.1, seed=0)
    write(folder(tmp_path / "loose") / "train" / "lost.png")
    with raises_saying(ValueError, "lost.png", tmp_path / "loose" / "train"):
        read_data(tmp_path / "loose", holdout=0.1, seed=0)
    with raises_saying(ValueError, "lost.png"):
        read_split(tmp_path / "loose", "train")
    (tmp_path / "bare" / "train").mkdir(parents=True)
    for labelled in (True, False):
        with raises_saying(ValueError, tmp_path / "bare" / "train", "has no images"):
            read_data(tmp_path / "bare", holdout=0.1, seed=0, labelled=labelled)


def test_a_misnamed_split_is_no_class(tmp_path):
    """Train and Test would else be told apart, as two classes."""
    for split in ("Train", "Test"):
        folder(tmp_path, split=split)
    with raises_saying(ValueError, tmp_path / "Test", "rename"):
        read_data(tmp_path, holdout=0.1, seed=0)


def denying(real):
    def listing(path):
        if os.fspath(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return real(path)

    return listing


def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch):
    folder(tmp_path)
    for name in ("scandir", "listdir"):
        monkeypatch.setattr(os, name, denying(getattr(os, name)))
    with raises_saying((OSError, ValueError), tmp_path / "train" / "dog", "Permission denied", "check its permissions"):
        read_data(tmp_path, holdout=0.1, seed=0)


@pytest.mark.parametrize("layout", ["train", "."])
def test_images_without_labels(tmp_path, layout):
    """All at any depth; but for the test images, which are nobody's."""
    folder(tmp_path, (("cat", 4), ("dog", 5)), layout)
    write(tmp_path / layout / "loose.JPG")
    write(tmp_path / layout / "a" / "b" / "deep.png")
    folder(tmp_path, (("cat", 3),), "test")
    train, val = read_data(tmp_path, holdout=0.2, seed=0, labelled=False)
    assert train.classes == val.classes == ("image",)
    assert (train.labels, val.labels) == ((0,) * 9, (0,) * 2)
    found = sorted(names(train) + names(val))
    assert [name.split("/")[-1] for name in found if "cat" not in name and "dog" not in name] == [
        "deep.png",
        "loose.JPG",
    ]
    assert len(set(found)) == 11


def test_hidden_nested_and_linked(tmp_path):
    root = folder(tmp_path / "data")
    cats = root / "train" / "cat"
    write(cats / "indoors" / "old" / "9.JPEG")
    write(cats / ".trash" / "gone.png")
    write(root / "train" / ".cache" / "x.png")
    (cats / ".DS_Store").write_bytes(b"\0")
    (cats / "._0.png").write_bytes(b"\0")
    (cats / "Thumbs.db").write_bytes(b"\0")
    for i in (1, 0):
        write(tmp_path / "elsewhere" / f"{i}.png")
    (root / "train" / "eel").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    with pytest.warns(UserWarning, match=r"train: 1 file was passed over, .*: 1 \.db$"):
        train = read_split(root, "train")
    assert names(train) == [
        "cat/0.png",
        "cat/1.png",
        "cat/2.png",
        "cat/3.png",
        "old/9.JPEG",
        "dog/0.png",
        "dog/1.png",
        "dog/2.png",
        "eel/0.png",
        "eel/1.png",
    ]
    assert train.labels == (0,) * 5 + (1,) * 3 + (2,) * 2


def test_a_link_to_a_folder_above_is_followed_once(tmp_path):
    folder(tmp_path)
    (tmp_path / "train" / "cat" / "again").symlink_to(tmp_path / "train" / "cat", target_is_directory=True)
    assert len(read_split(tmp_path, "train")) == 7


# -------------------------------------------------------------------------------------------------------- single images


def batch_of(root, **parts):
    """All images of the training folder, by file name, as the evaluation of training: no augmentation."""
    split = read_split(root, "train")
    [batch] = islice(
        TrainingBatches(split, recipe(data=Data(batch=len(split), crop_ratio=1.0), **parts)).from_step(0), 1
    )
    order = TrainingBatches(split, recipe(data=Data(batch=len(split)))).keys(0)[:, 1]
    return {split.files[index].name: batch.pixels[row] for row, index in enumerate(order)}, batch


def pixels_of(array, **parts):
    """What an upright 8-bit RGB image of these pixels gives."""
    return processor_for(recipe(**parts))(
        [Image.fromarray(array)], data_format="channels_first", return_tensors="pt"
    ).pixel_values[0]


BROKEN = {
    "torn.jpg": "damaged or cut short",
    "text.jpg": "not an image",
    "empty.png": "empty",
    "link.png": "does not exist",
}


def broken(root):
    """A folder with an image of each kind that can't be read, beside seven good ones."""
    cats = folder(root) / "train" / "cat"
    whole = write(cats / "torn.jpg", photo((200, 200))).read_bytes()
    (cats / "torn.jpg").write_bytes(whole[: len(whole) // 2])
    (cats / "text.jpg").write_text("These are words, and no picture.")
    (cats / "empty.png").write_bytes(b"")
    (cats / "link.png").symlink_to(root / "nothing.png")
    return root


@pytest.mark.parametrize("augment", [Augment(), Augment(crop=ResizedCrop())], ids=["evaluation", "crop"])
def test_unreadable_files_are_told_by_name_and_reason(tmp_path, augment):
    """In training another image stands in, in evaluation the row does not count."""
    split = read_split(broken(tmp_path), "train")
    assert len(split) == 11
    assert len(fingerprint(split)) == 64
    given = recipe(data=Data(batch=11, crop_ratio=1.0), augment=augment)
    [batch] = islice(TrainingBatches(split, given).from_step(0), 1)
    [judged] = EvaluationBatches(split, processor_for(given), 11)
    for found in (batch, judged):
        reasons = dict(found.faults)
        assert {os.path.basename(file) for file in reasons} == set(BROKEN)
        for file, reason in reasons.items():
            assert file == str(tmp_path / "train" / "cat" / os.path.basename(file))
            assert BROKEN[os.path.basename(file)] in reason
            assert "\n" not in reason
    assert (batch.labels >= 0).all()
    assert [file.name for file, label in zip(split.files, judged.labels, strict=True) if label < 0] == sorted(BROKEN)


def test_alpha_is_dropped(tmp_path):
    folder(tmp_path)
    alpha = np.dstack([photo(), np.random.default_rng(0).integers(0, 256, (20, 24), dtype=np.uint8)])
    write(tmp_path / "train" / "cat" / "alpha.png", alpha)
    found, _ = batch_of(tmp_path)
    assert_close(found["alpha.png"], pixels_of(photo()), 1e-6)


def test_cmyk(tmp_path):
    folder(tmp_path)
    image = Image.fromarray(photo((40, 40))).convert("CMYK")
    image.save(tmp_path / "train" / "cat" / "print.jpg", quality=98)
    found, _ = batch_of(tmp_path)
    with Image.open(tmp_path / "train" / "cat" / "print.jpg") as stored:
        assert stored.mode == "CMYK"
        assert_close(found["print.jpg"], pixels_of(np.asarray(stored.convert("RGB"))), 1e-6)
    assert (found["print.jpg"] - pixels_of(photo((40, 40)))).abs().mean() < 0.1


def test_sixteen_bits_are_scaled(tmp_path):
    folder(tmp_path)
    deep = photo()[..., 0].astype(np.uint16) * 257
    write(tmp_path / "train" / "cat" / "deep.png", deep)
    with Image.open(tmp_path / "train" / "cat" / "deep.png") as stored:
        assert stored.mode.startswith("I")
    found, _ = batch_of(tmp_path)
    assert_close(found["deep.png"], pixels_of(np.repeat(photo()[..., :1], 3, axis=2)), 1e-6)


@pytest.mark.parametrize(
    "augment", [Augment(), Augment(crop=ResizedCrop(scale=(1.0, 1.0), ratio=(1.0, 1.0)))], ids=["evaluation", "crop"]
)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_upright(tmp_path, orientation, augment):
    """By their EXIF orientation: stored turned, each is the upright photo, pixel for pixel."""
    flips = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }
    folder(tmp_path)
    upright = photo((24, 24))
    exif = Image.Exif()
    exif[0x0112] = orientation
    write(tmp_path / "train" / "cat" / "turned.png", np.ascontiguousarray(flips[orientation](upright)), exif=exif)
    found, _ = batch_of(tmp_path, augment=augment)
    assert_close(found["turned.png"], pixels_of(upright), 1e-6)


# -------------------------------------------------------------------------------------------------------- fingerprints


def test_a_fingerprint_is_of_the_content_and_not_of_the_place(tmp_path):
    first = folder(tmp_path / "one")
    print_of = fingerprint(read_split(first, "train"))
    shutil.copytree(first, tmp_path / "deeper" / "two")
    assert fingerprint(read_split(tmp_path / "deeper" / "two", "train")) == print_of

    def changed(name, change):
        shutil.copytree(first, tmp_path / name)
        change(tmp_path / name / "train")
        return fingerprint(read_split(tmp_path / name, "train"))

    def other_byte(train):
        content = bytearray((train / "dog" / "2.png").read_bytes())
        content[-20] ^= 1
        (train / "dog" / "2.png").write_bytes(bytes(content))

    found = {
        changed("renamed", lambda train: (train / "cat" / "3.png").rename(train / "cat" / "4.png")),
        changed("other_class", lambda train: (train / "cat").rename(train / "cow")),
        changed("moved", lambda train: (train / "cat" / "3.png").rename(train / "dog" / "3.png")),
        changed("fewer", lambda train: (train / "cat" / "3.png").unlink()),
        changed("other_size", lambda train: write(train / "cat" / "3.png", photo((9, 9)))),
        changed("other_byte", other_byte),
        print_of,
    }
    assert len(found) == 7


def test_a_fingerprint_of_many_files_reads_a_few(tmp_path, monkeypatch):
    """Sizes of all, the content of 256, the first and the last among them. It reads all if they are small together."""
    for i in range(600):
        path = tmp_path / "train" / "ab"[i % 2] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"content")
    split = read_split(tmp_path, "train")
    read = []
    plain = type(tmp_path).read_bytes
    monkeypatch.setattr(type(tmp_path), "read_bytes", lambda path: read.append(path) or plain(path))
    whole = fingerprint(split)
    assert read == list(split.files)
    split.files[1].write_bytes(b"changed")
    assert fingerprint(split) != whole
    read.clear()
    monkeypatch.setattr(folders, "_READ_WHOLE", 600 * 7 - 1)
    before = fingerprint(split)
    assert len(read) == 256
    assert {split.files[0], split.files[-1]} <= set(read)
    spread = np.diff([split.files.index(path) for path in read])
    assert spread.min() >= 2
    assert spread.max() <= 3
    unread = next(file for file in split.files if file not in read)
    unread.write_bytes(b"content!")
    assert fingerprint(split) != before


def test_evaluation_is_of_the_same_pixels_as_training(tmp_path):
    """Odd images included."""
    folder(tmp_path)
    write(tmp_path / "train" / "cat" / "alpha.png", np.dstack([photo(), photo()[..., 0]]))
    split = read_split(tmp_path, "train")
    found, _ = batch_of(tmp_path)
    [judged] = EvaluationBatches(split, processor_for(recipe()), 8)
    assert len(judged) == 8
    assert torch.equal(judged.pixels[4], processor_for(recipe())(split.files[4], return_tensors="pt").pixel_values[0])
    assert_close(found["alpha.png"], judged.pixels[[file.name for file in split.files].index("alpha.png")], 1e-6)


# --------------------------------------------------------------------------------------------- files that are no images


@pytest.mark.parametrize("suffix", [".jfif", ".JPE", ".avif", ".jp2", ".mpo", ".ppm", ".tga", ".qoi", ".ico"])
def test_every_format_that_pillow_reads_is_taken(tmp_path, suffix):
    form = {".mpo": "MPO", ".JPE": "JPEG"}.get(suffix)
    for name in ("cat", "dog"):
        write(tmp_path / "train" / name / f"0{suffix}", np.full((24, 24, 3), 90, np.uint8), format=form)
    split = read_split(tmp_path, "train")
    assert names(split) == [f"cat/0{suffix}", f"dog/0{suffix}"]
    pixels = next(iter(EvaluationBatches(split, processor_for(recipe()), 2)))
    assert pixels.faults == ()
    flat = EvaluationBatches(
        replace(split, files=(write(tmp_path / "flat.png", np.full((24, 24, 3), 90, np.uint8)),) * 2),
        processor_for(recipe()),
        2,
    )
    assert_close(pixels.pixels, next(iter(flat)).pixels, 0.03)  # two grey levels of a lossy format


def test_what_is_passed_over_is_counted_in_one_line(tmp_path):
    root = folder(tmp_path / "data")
    for path in ("cat/a.heic", "cat/deep/b.HEIC", "dog/c.heic", "dog/clip.mp4", "notes", "list.csv", ".hidden.heic"):
        (root / "train" / path).parent.mkdir(exist_ok=True)
        (root / "train" / path).write_bytes(b"-")
    sentence = (
        f"{root}: 6 files were passed over, because they are no images that Pillow reads: "
        "3 .heic, 1 without a suffix, 1 .csv, 1 .mp4"
    )
    for labelled in (True, False):
        with pytest.warns(UserWarning, match="passed over") as caught:
            read_data(root, holdout=0.3, seed=0, labelled=labelled)
        [warning] = caught
        assert str(warning.message) == sentence


def test_a_folder_of_nothing_else_says_what_was_passed_over(tmp_path):
    root = folder(tmp_path / "data")
    (root / "train" / "eel").mkdir()
    (root / "train" / "eel" / "1.heic").write_bytes(b"-")
    with raises_saying(ValueError, root / "train" / "eel", "has no images (1 file was passed over", "1 .heic)"):
        read_split(root, "train")


# ------------------------------------------------------------------------------------------------------------ one class

CAFE = {form: unicodedata.normalize(form, "café") for form in ("NFC", "NFD")}


def test_spellings_of_an_accent_are_one_class(tmp_path):
    assert CAFE["NFC"] != CAFE["NFD"]
    folder(folder(tmp_path, ((CAFE["NFD"], 2), ("dog", 2))), ((CAFE["NFC"], 1), ("dog", 1)), "val")
    train, val = read_data(tmp_path, holdout=0, seed=0)
    assert train.classes == val.classes == (CAFE["NFC"], "dog")
    assert (train.labels, val.labels) == ((0, 0, 1, 1), (0, 1))
    for model in CAFE.values():
        split = read_split(tmp_path, "train", ["dog", model])
        assert (split.classes, split.labels) == (("dog", model), (1, 1, 0, 0))


def test_folders_of_both_spellings_are_merged_with_a_word(tmp_path):
    folder(tmp_path, ((CAFE["NFD"], 2), ("dog", 1), (CAFE["NFC"], 1)))
    if len(list((tmp_path / "train").iterdir())) < 3:
        pytest.skip("this file system has one spelling only")
    with pytest.warns(UserWarning, match="has 2 folders 'café', whose names differ only in how accents are written"):
        split = read_split(tmp_path, "train")
    assert split.classes == (CAFE["NFC"], "dog")
    assert split.labels == (0, 0, 0, 1)
    assert {file.parent.name for file in split.files[:3]} == set(CAFE.values())
