"""`deit pack`: a pack is read as the folder that it was made of, other tools read its shards, no bad index is taken."""

import csv
import hashlib
import io
import json
import os
import shutil
import tarfile
import threading
import zlib
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save
from support.checks import raises_saying
from support.folders import found_in
from support.folders import save as save_image
from support.models import trained_folder
from support.runs import RECIPES, assert_same_end, photos, small_recipe

from deit.cli import main
from deit.data import BadImages, TrainingBatches, fingerprint, packing, read_data, read_examples, read_split
from deit.data.folders import has_split, read_parts
from deit.data.packing import pack
from deit.image import packs
from deit.image.decode import ImageError, load_image
from deit.predict.bulk import find_images, stamp
from deit.recipe import Augment, Data, ResizedCrop


def jpegs(root, split="train", count=4, size=(90, 60), classes="ab"):
    """JPEG files of noise, one of them with an orientation."""
    generator = np.random.default_rng(len(split))
    for name in classes:
        for i in range(count):
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(generator.integers(0, 255, (size[1], size[0], 3), np.uint8))
            exif = Image.Exif()
            exif[0x0112] = 6 if i == 1 else 1
            picture.save(folder / f"{i}.jpg", quality=80, exif=exif)
    return root


@pytest.fixture
def data(tmp_path):
    """Photos of all parts, PNG and JPEG, with a name that is not text."""
    root = tmp_path / "photos"
    for split, count in (("train", 6), ("val", 2), ("test", 3)):
        photos(jpegs(root, split, count, classes="cab"), split=split, count=count)
    shutil.copy(root / "train/a/0.png", os.fsencode(root / "train/a") + b"/\xff 1.2.png")
    return root


def relative(split, root):
    return [os.path.relpath(file, root) for file in split.files], split.labels, split.classes


def content(split):
    return [packs.find(file).read() if packs.find(file) else file.read_bytes() for file in split.files]


def same(one, root, other, elsewhere):
    assert relative(one, root) == relative(other, elsewhere)
    assert content(one) == content(other)
    assert fingerprint(one) == fingerprint(other)


def test_a_pack_gives_the_images_of_its_folder(data, tmp_path):
    counts = []
    [said] = pack(data, tmp_path / "pack", progress=lambda *numbers: counts.append(numbers))
    assert counts == [(number, 67) for number in range(1, 68)]
    assert said == f"{tmp_path / 'pack'}: 37 train, 12 val, 18 test images in 3 shards"
    for labelled in (True, False):
        theirs = read_data(tmp_path / "pack", holdout=0.5, seed=3, labelled=labelled)
        for one, other in zip(read_data(data, holdout=0.5, seed=3, labelled=labelled), theirs, strict=True):
            same(one, data, other, tmp_path / "pack")
    for name in ("train", "val", "test"):
        assert has_split(tmp_path / "pack", name)
        same(read_examples(data, name)[0], data, read_examples(tmp_path / "pack", name)[0], tmp_path / "pack")
        same(read_split(data, name, "cba"), data, read_split(tmp_path / "pack", name, "cba"), tmp_path / "pack")
    assert read_examples(data)[1] == read_examples(tmp_path / "pack")[1] == "test"


@pytest.mark.parametrize("apart", [(), ("test",), ("val", "test")])
def test_folders_without_parts(data, tmp_path, apart):
    """The held-out images are the same, and so is what is refused."""
    plain = tmp_path / "plain"
    (data / "train").rename(plain)
    for name in apart[-1:] if apart == ("test",) else ():
        (data / name).rename(plain / name)
    if apart == ("val", "test"):
        plain.rename(tmp_path / "train")
        plain.mkdir()
        (tmp_path / "train").rename(plain / "train")
    pack(plain, tmp_path / "pack")
    for labelled in (True, False):
        theirs = found_in(tmp_path / "pack", holdout=0.3, seed=5, labelled=labelled)
        for one, other in zip(found_in(plain, holdout=0.3, seed=5, labelled=labelled), theirs, strict=True):
            same(one, plain, other, tmp_path / "pack")
    for name in ("val", "test"):
        assert has_split(plain, name) == has_split(tmp_path / "pack", name)
    parts, packed = read_parts(plain), read_parts(tmp_path / "pack")
    assert list(parts) == list(packed)
    if not apart:
        same(read_examples(plain)[0], plain, read_examples(tmp_path / "pack")[0], tmp_path / "pack")
        with raises_saying(ValueError, "without parts", "--split val"):
            read_examples(tmp_path / "pack", "val")
    if apart == ("val", "test"):
        for place in (plain, tmp_path / "pack"):
            with raises_saying(ValueError, "neither test nor val"):
                read_examples(place)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_lists_keep_their_order_and_their_classes(data, tmp_path, suffix):
    rows = [
        (data / "train/a/1.jpg", "Zebra", "train"),
        (data / "test/c/0.png", "apple, red", "train"),
        (data / "train/a/0.png", "apple, red", "train"),
        (data / "val/b/1.png", "Zebra", "val"),
    ]
    place = tmp_path / f"list{suffix}"
    if suffix == ".csv":
        with place.open("w", newline="") as file:
            csv.writer(file).writerows([("path", "label", "split"), *rows])
    else:
        lines = (json.dumps(dict(zip(("path", "label", "split"), map(str, row), strict=True))) for row in rows)
        place.write_text("\n".join(lines))
    pack(place, tmp_path / "pack")
    for labelled in (True, False):
        for one, other in zip(
            found_in(place, labelled=labelled), found_in(tmp_path / "pack", labelled=labelled), strict=True
        ):
            same(one, data, other, tmp_path / "pack")
    assert found_in(tmp_path / "pack")[0].classes == ("Zebra", "apple, red")


def test_shards_are_plain_tar_files(data, tmp_path, monkeypatch):
    """As any program reads them: NUMBER.SUFFIX, then NUMBER.cls, each shard up to its size."""
    monkeypatch.setattr(packing, "SHARD_BYTES", 30_000)
    pack(data, tmp_path / "pack")
    about = json.loads((tmp_path / "pack" / packs.ABOUT).read_text())
    assert about["classes"] == ["a", "b", "c"]
    for split in ("train", "val", "test"):
        found = []
        shards = sorted((tmp_path / "pack").glob(f"{split}-*.tar"))
        assert [path.name for path in shards] == [f"{split}-{i:06}.tar" for i in range(len(shards))]
        for path in shards:
            with tarfile.open(path) as tar:
                members = [(member, tar.extractfile(member).read()) for member in tar.getmembers()]
            assert sum(member.size for member, _ in members[:-2]) < 30_000
            for (image, data_), (label, number) in zip(members[::2], members[1::2], strict=True):
                assert image.name.split(".")[0] + ".cls" == label.name
                assert image.name.split(".")[1] in ("jpg", "png")
                found.append((data_, about["classes"][int(number)]))
        images = read_examples(data, split)[0]
        expected = zip(images.files, images.labels, strict=True)
        assert found == [(file.read_bytes(), images.classes[label]) for file, label in expected]
    assert len(about["shards"]) > 5
    same(found_in(data)[0], data, found_in(tmp_path / "pack")[0], tmp_path / "pack")


def test_large_images_are_resized_once(tmp_path):
    root = jpegs(tmp_path / "photos", size=(120, 80))
    jpegs(tmp_path / "photos", "val", size=(50, 40))
    generator = np.random.default_rng(0)
    Image.fromarray(generator.integers(0, 255, (64, 100), np.uint8)).save(root / "train/a/grey.png")
    save_image(root / "train/a/grey.png.jpg", size=(20, 20))
    said = pack(root, tmp_path / "pack", short_side=40, quality=95)
    assert said[1] == "9 images were resized to a short side of 40 pixels"
    train, val = found_in(root), found_in(tmp_path / "pack")
    assert content(train[1]) == content(val[1])
    for file in train[0].files:
        if file.name == "grey.png.jpg":
            continue
        packed = tmp_path / "pack/train" / file.parent.name / file.name.replace(".png", ".png.jpg.jpg")
        with Image.open(io.BytesIO(packs.find(packed).read())) as stored:
            assert stored.format == "JPEG"
            assert stored.getexif().get(0x0112, 1) == 1
            assert min(stored.size) == 40
            sides = load_image(file).size
            short = min(sides)
            assert stored.size == tuple(40 if side == short else int(40 * side / short) for side in sides)
            mode = "L" if file.name == "grey.png" else "RGB"
            assert stored.mode == mode
            expected = load_image(file, min_side=40, mode=mode)
            buffer = io.BytesIO()
            expected.resize(stored.size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
            assert np.array_equal(np.asarray(stored), np.asarray(Image.open(buffer)))
    assert {file.name for file in val[0].files} == {*(f"{i}.jpg" for i in range(4)), "grey.png.jpg", "grey.png.jpg.jpg"}
    assert load_image(tmp_path / "pack/train/a/grey.png.jpg").size == (20, 20)
    again = pack(tmp_path / "pack", tmp_path / "again")
    assert len(again) == 1
    same(val[0], tmp_path / "pack", found_in(tmp_path / "again")[0], tmp_path / "again")


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_views(data, tmp_path, workers):
    """Bit by bit, in this process and in loader processes, from any step on."""
    pack(data, tmp_path / "pack")
    recipe = small_recipe(data=Data(batch=8, repeats=2), augment=Augment(crop=ResizedCrop(), flip=0.5))
    recipe = replace(recipe, compute=replace(recipe.compute, workers=workers))
    ours, theirs = (TrainingBatches(found_in(place)[0], recipe) for place in (data, tmp_path / "pack"))
    ones, others = ours.from_step(0), theirs.from_step(0)
    for _ in range(6):
        one, other = next(ones), next(others)
        assert torch.equal(one.pixels, other.pixels)
        assert torch.equal(one.labels, other.labels)
    again = theirs.from_step(5)
    assert torch.equal(next(again).pixels, other.pixels)
    for stream in (ones, others, again):
        stream.close()


def test_small_images_need_no_loaders(data, tmp_path):
    """The headers of a pack's images decide as those of files do."""
    pack(data, tmp_path / "pack")
    jpegs(tmp_path / "large", size=(900, 700), count=2)
    pack(tmp_path / "large", tmp_path / "large-pack")
    recipe = small_recipe(augment=Augment(crop=ResizedCrop()))
    recipe = replace(recipe, compute=replace(recipe.compute, workers=None))
    for place, few in ((data, True), (tmp_path / "large", False)):
        pack_of = tmp_path / ("pack" if few else "large-pack")
        counts = [TrainingBatches(found_in(each)[0], recipe).workers for each in (place, pack_of)]
        assert counts[0] == counts[1]
        assert (counts[1] == 0) == few


def test_the_commands_take_a_pack(data, tmp_path, capsys):
    """Training, labels of a teacher, evaluation and prediction give what they give on the folder."""
    (tmp_path / "recipes.py").write_text(RECIPES)
    model = trained_folder(tmp_path / "model", labels="abc")
    assert main(["pack", str(data), "--out", str(tmp_path / "pack")]) == 0
    shared = ["--set", "schedule.total=steps(6)", "--set", "schedule.warmup=steps(1)", "--set", "evaluate=steps(3)"]
    for name in ("photos", "pack"):
        place, out = str(tmp_path / name), str(tmp_path / f"run-{name}")
        train = ["train", f"{tmp_path / 'recipes.py'}:student", "--data", place, "--out", out, *shared]
        assert main(train) == 0
        assert main(["calibrate", str(model), "--data", place, "--split", "test", "--error-rate", "0.1"]) == 0
        assert main(["report", out, "--data", place]) == 0
    assert_same_end(tmp_path / "run-pack", tmp_path / "run-photos")
    about = [json.loads((tmp_path / f"run-{name}/about.json").read_text()) for name in ("photos", "pack")]
    assert about[0]["fingerprint"] == about[1]["fingerprint"]
    assert about[1]["data"] == str(tmp_path / "pack")
    assert main(["report", str(tmp_path / "run-pack")]) == 0  # finds the images again by about.json
    capsys.readouterr()
    found = []
    for name in ("photos", "pack"):
        assert main(["eval", str(model), "--data", str(tmp_path / name), "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
        assert found[-1]["data"].pop("path") == str(tmp_path / name)
    assert found[0] == found[1]
    rows = []
    for name in ("photos", "pack"):
        assert main(["predict", str(model), str(tmp_path / name), "--json"]) == 0
        lines = map(json.loads, capsys.readouterr().out.splitlines())
        rows.append([(os.path.relpath(row.pop("image"), tmp_path / name), row) for row in lines])
    assert rows[0] == rows[1]
    assert len(rows[1]) == 67
    assert main(["explain", str(model), str(tmp_path / "pack/train/b/0.png"), "--out", str(tmp_path / "a.png")]) == 0


def test_labels_of_a_teacher_fit_both(data, tmp_path):
    """A pack of unchanged bytes has the views of the folder, so labels for one serve the other."""
    (tmp_path / "recipes.py").write_text(RECIPES)
    model = trained_folder(tmp_path / "model", "plain", labels="abc")
    pack(data, tmp_path / "pack")
    teach = ["--teacher", str(model), "--recipe", f"{tmp_path / 'recipes.py'}:taught", "--epochs", "1"]
    for name in ("photos", "pack"):
        assert main(["teach", str(tmp_path / name), *teach, "--out", str(tmp_path / f"labels-{name}")]) == 0
    ones, others = (sorted((tmp_path / f"labels-{name}").iterdir()) for name in ("photos", "pack"))
    assert [file.name for file in ones] == [file.name for file in others]
    for one, other in zip(ones, others, strict=True):
        if one.suffix == ".safetensors":
            assert one.read_bytes() == other.read_bytes()
        elif one.suffix == ".json":
            assert json.loads(one.read_text()) == json.loads(other.read_text())


def test_split_lists_the_images_of_a_pack(tmp_path):
    jpegs(tmp_path / "photos", count=10)
    plain = tmp_path / "photos/train"
    pack(plain, tmp_path / "pack")
    for place, name in ((plain, "photos.csv"), (tmp_path / "pack", "pack.csv")):
        assert main(["split", str(place), "--out", str(tmp_path / name)]) == 0
    for part in ("train", "val", "test"):
        one, other = (read_examples(tmp_path / name, part)[0] for name in ("photos.csv", "pack.csv"))
        same(one, plain, other, tmp_path / "pack")


def test_broken_images_are_told_and_left_out(tmp_path, monkeypatch, capsys):
    root = jpegs(tmp_path / "photos", count=100, size=(12, 10))
    broken = root / "train/b/7.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    assert main(["pack", str(root), "--out", str(tmp_path / "pack")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{tmp_path / 'pack'}: 199 train images in 1 shard"
    assert said[1].startswith(f"left out: {broken} is damaged or cut short")
    left = read_examples(tmp_path / "pack", "train")[0]
    assert relative(left, tmp_path / "pack")[0] == [
        os.path.relpath(file, root) for file in read_examples(root, "train")[0].files if file != broken
    ]
    for number in (3, 4):
        (root / f"train/a/{number}.jpg").write_bytes(b"no image")
    with raises_saying(BadImages, "3 of 200 images can't be read, more than 1 %", "not an image that Pillow can read"):
        pack(root, tmp_path / "more")
    assert not (tmp_path / "more").exists()
    save_image(root / "train/c/0.jpg").write_bytes(b"no image")
    for number in (3, 4):
        shutil.copy(root / "train/a/5.jpg", root / f"train/a/{number}.jpg")
    with raises_saying(ValueError, "none of the train images of 'c' can be read", "leave the class out"):
        pack(root, tmp_path / "more")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pack", "photos"]


def test_settings_and_places_that_are_refused(data, tmp_path):
    with raises_saying(ValueError, "--quality", "--short-side"):
        pack(data, tmp_path / "pack", quality=80)
    with raises_saying(ValueError, "--quality goes from 1 to 100, found 101"):
        pack(data, tmp_path / "pack", short_side=40, quality=101)
    with raises_saying(ValueError, "--short-side", "found 0"):
        pack(data, tmp_path / "pack", short_side=0)
    with raises_saying(ValueError, "lies in", "choose another --out"):
        pack(data, data / "pack")
    (tmp_path / "pack").mkdir()
    with raises_saying(FileExistsError, "exists already"):
        pack(data, tmp_path / "pack")
    with raises_saying(FileNotFoundError, "does not exist"):
        pack(tmp_path / "nothing", tmp_path / "other")


def test_a_pack_appears_whole_and_one_process_writes_it(data, tmp_path, monkeypatch):
    """What is half written has a hidden name and is removed, and a second process is refused meanwhile."""
    original, seen = packing._packed, []

    def watching(*arguments):
        if not seen:
            seen.append(sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".")))
            with raises_saying(OSError, "is being written by another process"):
                pack(data, tmp_path / "pack")
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(packing.host, "cores", lambda: 1)
    monkeypatch.setattr(packing, "_packed", watching)
    with pytest.raises(KeyboardInterrupt):
        pack(data, tmp_path / "pack")
    assert seen == [["photos"]]
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]
    left = tmp_path / ".pack.0123abcd"  # of a process that was killed
    left.mkdir()
    pack(data, tmp_path / "pack")
    assert not left.exists()


# ------------------------------------------------------------------------------------------------------------ changes


@pytest.fixture
def packed(tmp_path):
    pack(jpegs(tmp_path / "photos"), tmp_path / "pack")
    return tmp_path / "pack"


def test_other_bytes_in_a_shard_are_noticed(packed):
    train = read_examples(packed, "train")[0]
    shard = packed / "train-000000.tar"
    whole = bytearray(shard.read_bytes())
    entry = packs.find(train.files[2])
    whole[entry.offset + 40] ^= 1
    shard.write_bytes(whole)
    with raises_saying(ImageError, train.files[2], "train-000000.tar has changed", "write the pack again"):
        load_image(train.files[2])
    load_image(train.files[3])
    shard.write_bytes(whole[:-512])
    with raises_saying(ImageError, f"expected {len(whole)} bytes, found {len(whole) - 512}"):
        load_image(train.files[3])
    shard.unlink()
    with raises_saying(ImageError, "train-000000.tar"):
        load_image(train.files[3])


def test_a_pack_that_was_written_again_is_read_again(packed, tmp_path):
    before = content(read_examples(packed, "train")[0])
    shutil.rmtree(packed)
    jpegs(tmp_path / "photos", size=(70, 60))
    pack(tmp_path / "photos", packed)
    after = content(read_examples(packed, "train")[0])
    assert after == [file.read_bytes() for file in read_examples(tmp_path / "photos", "train")[0].files] != before


def test_threads_read_the_same_shard(packed):
    train = read_examples(packed, "train")[0]
    expected, found = content(train), {}

    def read(number):
        order = np.random.default_rng(number).permutation(len(train)).tolist()
        found[number] = all(packs.find(train.files[i]).read() == expected[i] for _ in range(50) for i in order)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(4), True)


def test_paths_and_stamps(packed, monkeypatch):
    paths = list(find_images([str(packed)]))
    assert paths == [str(packed / f"train/{name}/{i}.jpg") for name in "ab" for i in range(4)]
    data = packs.find(paths[0]).read()
    assert stamp(paths[0]) == [len(data), zlib.crc32(data)]
    assert stamp(str(packed / "train/a/9.jpg")) is None
    assert packs.find(packed / "train/a/9.jpg") is None
    with raises_saying(ImageError, "does not exist"):
        load_image(packed / "train/a/9.jpg")
    monkeypatch.chdir(packed.parent)
    relative_ = read_examples("pack", "train")[0]
    assert str(relative_.files[0]) == "pack/train/a/0.jpg"
    assert load_image(relative_.files[0]).size == load_image(paths[0]).size


# ------------------------------------------------------------------------------------------------------- bad indexes


def rewrite(folder, change=lambda arrays: None, about=lambda content: None):
    """The pack with a changed index, and its checksum made right."""
    arrays = {name: values.copy() for name, values in load_file(folder / packs.INDEX).items()}
    arrays = change(arrays) or arrays
    data = save({name: np.ascontiguousarray(values) for name, values in arrays.items()})
    (folder / packs.INDEX).write_bytes(data)
    content = json.loads((folder / packs.ABOUT).read_text())
    content["index_sha256"] = hashlib.sha256(data).hexdigest()
    about(content)
    (folder / packs.ABOUT).write_text(json.dumps(content))


def named(names):
    def change(arrays):
        arrays["names"] = np.frombuffer(b"".join(names), np.uint8)
        arrays["ends"] = np.cumsum([len(name) for name in names])

    return change


GOOD = [b"train/%c/%d.jpg" % (letter, i) for letter in b"ab" for i in range(4)]


def put(name, row, value):
    def change(arrays):
        arrays[name][row] = value

    return change


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (put("offset", 3, 2**40), ("image 3", "expected bytes within")),
        (put("offset", 3, -512), ("image 3", "expected bytes within")),
        (put("offset", 3, 0), ("image 3", "after a header")),
        (put("offset", 3, 513), ("image 3", "expected bytes within")),
        (put("offset", 3, 2**63 - 512), ("image 3", "expected bytes within")),
        (put("length", 1, 2**62), ("image 1", "expected bytes within")),
        (put("length", 1, 2**63 - 1), ("image 1", "expected bytes within")),
        (put("length", 1, 0), ("image 1 has 0 bytes",)),
        (put("label", 2, 2), ("label of image 2 is 2, expected 0 to 1",)),
        (put("label", 2, -1), ("label of image 2 is -1",)),
        (put("shard", 0, 1), ("shard of image 0 is 1",)),
        (put("part", 0, 4), ("part of image 0 is 4",)),
        (put("part", 0, 0), ("some images belong to a part and others to none",)),
        (put("ends", 0, -1), ("do not fit together",)),
        (put("ends", -1, 2**63 - 1), ("do not fit together",)),
        (named([*GOOD[:7], GOOD[0]]), ("'train/a/0.jpg' twice",)),
        (named([*GOOD[:7], b"../secret.jpg"]), ("'../secret.jpg'", "expected a path below the pack")),
        (named([*GOOD[:7], b"train/../../secret.jpg"]), ("expected a path below the pack",)),
        (named([*GOOD[:7], b"/etc/passwd"]), ("expected a path below the pack",)),
        (named([*GOOD[:7], b"train//a.jpg"]), ("expected a path below the pack",)),
        (named([*GOOD[:7], b"train/\0.jpg"]), ("expected a path below the pack",)),
        (named([*GOOD[:7], b"train-000000.tar"]), ("a file or folder 'train-000000.tar'",)),
        (named([*GOOD[:7], b"a" * 5000]), ("do not fit together",)),
        (lambda arrays: {k: v for k, v in arrays.items() if k != "crc"}, ("crc is nothing", "uint32")),
        (lambda arrays: {**arrays, "label": arrays["label"].astype(np.float64)}, ("label is float64",)),
        (lambda arrays: {**arrays, "label": arrays["label"][:3]}, ("label is int64 of the shape (3,)",)),
        (lambda arrays: {name: values[:0] for name, values in arrays.items()}, ("lists no images",)),
    ],
)
def test_a_bad_index_is_refused(packed, change, parts):
    rewrite(packed, change)
    with raises_saying(packs.BadPack, packed, *parts):
        found_in(packed)


def renamed(name):
    return lambda content: content["shards"][0].update(name=name)


@pytest.mark.parametrize(
    ("about", "parts"),
    [
        (lambda content: content.update(format=2), ("format 2, expected 1",)),
        (lambda content: content.pop("classes"), ("does not describe a pack",)),
        (lambda content: content.update(classes=["a", "a"]), ("does not describe a pack",)),
        (lambda content: content.update(classes=["a", 1]), ("does not describe a pack",)),
        (lambda content: content.update(shards=[]), ("does not describe a pack",)),
        (lambda content: content.update(of=["folder"]), ("does not describe a pack",)),
        (lambda content: content.update(index_sha256="0"), ("is not the index that",)),
        (renamed("../train-000000.tar"), ("does not describe a pack",)),
        (renamed("/dev/zero"), ("does not describe a pack",)),
        (renamed("train-000009.tar"), ("train-000009.tar is missing or no file",)),
        (lambda content: content["shards"][0].update(bytes=2**80), ("does not describe a pack",)),
        (lambda content: content["shards"][0].update(bytes=10240 * 20), ("expected 204800",)),
        (lambda content: content.update(shards=content["shards"] * 2), ("does not describe a pack",)),
    ],
)
def test_a_bad_description_is_refused(packed, about, parts):
    rewrite(packed, about=about)
    with raises_saying(packs.BadPack, packed, *parts):
        found_in(packed)


def test_a_named_pipe_is_no_shard(packed):
    (packed / "train-000000.tar").unlink()
    os.mkfifo(packed / "train-000000.tar")
    with raises_saying(packs.BadPack, "is missing or no file"):
        found_in(packed)


@pytest.mark.parametrize("name", [packs.ABOUT, packs.INDEX])
def test_damaged_files_are_read_or_refused(packed, name):
    """A thousand damaged copies, with the checksum made right: each gives images or one sentence."""
    whole, draw, ends, lines = (packed / name).read_bytes(), np.random.default_rng(0), Counter(), set()
    for _ in range(1000):
        data = bytearray(whole)
        for place in draw.integers(0, len(data), draw.integers(1, 4)):
            data[place] = draw.integers(0, 256)
        (packed / name).write_bytes(data[: draw.integers(1, len(data) + 1)] if draw.random() < 0.3 else data)
        if name == packs.INDEX:
            rewrite_sum(packed)
        packs._opened.clear()
        try:
            train, _ = found_in(packed)
            for file in train.files[:2]:
                load_image(file)
            ends["read"] += 1
        except ValueError as error:
            said, kind = str(error), type(error).__name__
            ends[kind] += 1
            lines.update(said.splitlines()[1:])
    assert ends["BadPack"] > 300
    assert not lines


def rewrite_sum(folder):
    content = json.loads((folder / packs.ABOUT).read_text())
    content["index_sha256"] = hashlib.sha256((folder / packs.INDEX).read_bytes()).hexdigest()
    (folder / packs.ABOUT).write_text(json.dumps(content))


def test_a_fault_of_the_index_while_reading_ends_the_command(packed, capsys):
    rewrite(packed, put("offset", 3, 2**40))
    assert main(["split", str(packed), "--out", str(packed.parent / "list.csv")]) == 1
    assert "expected bytes within" in capsys.readouterr().err
