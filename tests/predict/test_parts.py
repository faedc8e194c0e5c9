"""Parts that many machines fill together."""

import json
import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from support.checks import raises_saying
from support.models import trained_folder

from deit.cli import main
from deit.predict import Predictor, find_images, missing_parts


@pytest.fixture
def folder(tmp_path):
    """A model, and seven images, one of which can't be read."""
    trained_folder(tmp_path / "m")
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(7):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(tmp_path / f"photos/{i}.png")
    (tmp_path / "photos/3.png").write_bytes(b"broken")
    return tmp_path


def missing(folder, photos=None, **options):
    images = find_images([str(photos or folder / "photos")])
    return missing_parts(images, folder / "out", **{"model": str(folder / "m"), "size": 3, **options})


def test_the_parts_together_are_what_the_command_writes(folder):
    assert main(["predict", str(folder / "m"), str(folder / "photos"), "--json", str(folder / "whole.jsonl")]) == 1
    parts = pickle.loads(pickle.dumps(list(missing(folder))))
    assert [len(part.images) for part in parts] == [3, 3, 1]
    predictor = Predictor(folder / "m")
    assert [part.answer(predictor, batch=3) for part in reversed(parts)] == [0, 1, 0]
    assert list(missing(folder)) == []
    found, expected = (
        [json.loads(line) for file in files for line in file.read_text().splitlines()]
        for files in (sorted((folder / "out").glob("*.jsonl")), [folder / "whole.jsonl"])
    )
    for row, other in zip(found, expected, strict=True):
        assert {**row, "labels": [each["label"] for each in row["labels"]]} == {
            **other,
            "labels": [each["label"] for each in other["labels"]],
        }
        assert [each["score"] for each in row["labels"]] == pytest.approx(
            [each["score"] for each in other["labels"]], abs=1e-6
        )
    assert "3.png is not an image" in found[3]["error"]


def test_only_missing_parts_are_answered(folder, monkeypatch):
    predictor = Predictor(folder / "m")
    parts = list(missing(folder))
    parts[1].answer(predictor)

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Predictor, "answers", killed)
    with pytest.raises(KeyboardInterrupt):
        parts[0].answer(predictor)
    assert sorted(path.name for path in (folder / "out").iterdir()) == [
        "000001.images.json",
        "000001.jsonl",
        "job.json",
    ]
    assert list(missing(folder)) == [parts[0], parts[2]]


def test_other_work_is_refused(folder, tmp_path_factory):
    predictor = Predictor(folder / "m", head="class")
    [first, *_] = missing(folder)
    with raises_saying(ValueError, "for the head fused, found a predictor with class"):
        first.answer(predictor)
    for part in missing(folder):
        part.answer(Predictor(folder / "m"))
    for changed in ({"top_k": 2}, {"size": 2}, {"head": "class"}):
        with raises_saying(ValueError, f"holds parts of other work ({next(iter(changed))} differ)"):
            missing(folder, **changed)
    with raises_saying(ValueError, "the images have changed since", "000002.jsonl", "to start over"):
        list(missing(folder, str(folder / "photos/[0-5].png")))
    (folder / "photos/0.png").unlink()
    with raises_saying(ValueError, "the images have changed since", "000000.jsonl", "to start over"):
        list(missing(folder))
    trained_folder(folder / "m", seed=1)
    with raises_saying(ValueError, "(files differ)"):
        missing(folder)
    with raises_saying(ValueError, "size must be at least 1, found 0"):
        missing(folder, size=0)


def test_changed_images_are_refused(folder):
    """Only their time differs."""
    predictor = Predictor(folder / "m")
    parts = list(missing(folder))
    for part in parts:
        part.answer(predictor)
    image = folder / "photos/4.png"
    os.utime(image, (image.stat().st_mtime + 1,) * 2)
    with raises_saying(ValueError, f"{image} has another size or time", "to start over"):
        list(missing(folder))
    with raises_saying(ValueError, f"{image} has another size or time"):
        parts[1].answer(predictor)


def test_the_same_part_twice(folder, monkeypatch):
    """The second process waits for the first, and does not answer what that one has."""
    predictor = Predictor(folder / "m")
    [_, second, _] = missing(folder)
    answered = []
    prepared = Predictor.prepared

    def slowly(self, source):
        answered.append(source)
        time.sleep(0.1)
        return prepared(self, source)

    monkeypatch.setattr(Predictor, "prepared", slowly)
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda _: second.answer(predictor), range(3))) == [1, 1, 1]
    assert sorted(answered) == sorted(second.images)
    assert [path.name for path in (folder / "out").glob(".*")] == []


def test_a_damaged_part_is_missing(folder):
    predictor = Predictor(folder / "m")
    parts = list(missing(folder))
    for part in parts:
        part.answer(predictor)
    parts[2].file.write_bytes(parts[2].file.read_bytes()[:-5])
    assert list(missing(folder)) == [parts[2]]
