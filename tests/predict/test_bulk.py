"""Many files, and going on after a stop."""

import csv
import io
import json
import os
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.checks import raises_saying
from support.models import trained_folder

from deit import locks
from deit.cli import main
from deit.predict import bulk
from deit.predict.bulk import Job, Results, csv_lines, find_images, identity, parse_shard, share
from deit.predict.predictor import Predictor


@pytest.fixture
def folder(tmp_path):
    trained_folder(tmp_path / "m")
    rng = np.random.default_rng(0)
    for i in range(10):
        place = tmp_path / "photos" / ("x" if i % 2 else "y/deep")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(place / f"{i}.png")
    (tmp_path / "photos/x/notes.txt").write_text("no image")
    (tmp_path / "photos/x/3.png").write_bytes(b"broken")
    return tmp_path


def expected_rows(folder, top_k=3):
    """One by one, by name, as the folder is walked."""
    predictor = Predictor(folder / "m")
    paths = sorted((folder / "photos/x").glob("*.png")) + sorted((folder / "photos/y/deep").glob("*.png"))
    for path in paths:
        if path.name == "3.png":
            yield {"image": str(path), "labels": [], "error": None}
        else:
            yield {"image": str(path), "labels": predictor([path], top_k=top_k)[0]}


def assert_rows(found, expected):
    assert [row["image"] for row in found] == [row["image"] for row in expected]
    for row, other in zip(found, expected, strict=True):
        assert ("error" in row) == ("error" in other)
        if "error" in row:
            assert "3.png is not an image" in row["error"]
        assert [each["label"] for each in row["labels"]] == [each["label"] for each in other["labels"]]
        assert [each["score"] for each in row["labels"]] == pytest.approx(
            [each["score"] for each in other["labels"]], abs=1e-6
        )


@pytest.mark.parametrize("batch", [1, 3, 32])
def test_a_folder_in_batches_gives_what_one_by_one_gives(folder, capsys, batch):
    assert main(["predict", str(folder / "m"), str(folder / "photos"), "--batch", str(batch), "--json"]) == 1
    shown = capsys.readouterr()
    assert_rows([json.loads(line) for line in shown.out.splitlines()], list(expected_rows(folder)))
    assert "10 images, 1 unreadable, " in shown.err
    assert "3.png is not an image" in shown.err


def test_patterns_lists_and_shards(folder, capsys, monkeypatch):
    whole = [row["image"] for row in expected_rows(folder)]
    assert list(find_images([str(folder / "photos")])) == whole
    assert list(find_images([str(folder / "photos/*/*/*.png")])) == whole[5:]
    assert list(find_images([str(folder / "photos/x")])) + list(find_images([str(folder / "photos/y")])) == whole
    assert list(find_images(["-", "gone.png"], io.StringIO("a.png\n\nb c.png\n"))) == ["a.png", "b c.png", "gone.png"]
    with raises_saying(FileNotFoundError, "*.jpg matches no file; check the pattern"):
        list(find_images([str(folder / "*.jpg")]))
    parts = [list(share(whole, parse_shard(f"{i}/3"))) for i in (1, 2, 3)]
    assert sorted(path for part in parts for path in part) == sorted(whole)
    assert [len(part) for part in parts] == [4, 3, 3]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(whole)))
    assert main(["predict", str(folder / "m"), "-", "--engine", "torch", "--shard", "3/5", "--json"]) == 0
    assert [json.loads(line)["image"] for line in capsys.readouterr().out.splitlines()] == [whole[2], whole[7]]
    for text in ("0/3", "4/3", "2", "a/b"):
        with raises_saying(ValueError, "expected a shard i/N with i from 1 to N, found"):
            parse_shard(text)


def test_csv(folder, capsys):
    assert main(["predict", str(folder / "m"), str(folder / "photos"), "--top-k", "2", "--csv"]) == 1
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    found = []
    for row in rows:
        labels = [{"label": row[f"label_{i}"], "score": float(row[f"score_{i}"])} for i in (1, 2) if row[f"label_{i}"]]
        found.append({"image": row["image"], "labels": labels} | ({"error": row["error"]} if row["error"] else {}))
    assert_rows(found, list(expected_rows(folder, 2)))
    hostile = {"image": 'a,"b"\nc.png', "labels": [{"label": "x,y", "score": 0.5}], "sure": False}
    [row] = csv.DictReader(io.StringIO("".join(csv_lines([hostile], 1)), newline=""))
    assert (row["image"], row["label_1"], row["sure"]) == ('a,"b"\nc.png', "x,y", "False")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet"])
def test_stopped_work_goes_on(folder, name, capsys, monkeypatch):
    """Killed in the middle of any part: the file at the end is that of work never stopped, and no image is read twice
    but those of the part that was lost."""
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    monkeypatch.setattr(bulk, "PART", 3)
    option = {"jsonl": "--json", "csv": "--csv", "parquet": "--parquet"}[name.rpartition(".")[2]]

    def command(out):
        return ["predict", str(folder / "m"), str(folder / "photos"), "--batch", "2", option, str(folder / out / name)]

    assert main(command("whole")) == 1
    read = []
    prepared = Predictor.prepared

    class Killed(BaseException):
        pass

    order = list(find_images([str(folder / "photos")], sys.stdin, Counter()))

    def until(limit, parts):
        def reading(self, source):
            read.append(source)
            if order.index(str(source)) >= limit:  # by its place, because threads read in an order of their own
                written = folder / "stopped" / f"{name}.parts"
                waited = time.monotonic() + 10  # images are read ahead of the rows that are written
                while len(list(written.glob("*[0-9].jsonl"))) < parts and time.monotonic() < waited:
                    time.sleep(0.01)
                raise Killed
            return prepared(self, source)

        return reading

    for parts, limit in enumerate((5, 7, 99), 1):
        read.clear()
        monkeypatch.setattr(Predictor, "prepared", until(limit, parts))
        if limit < 99:
            with pytest.raises(Killed):
                assert main(command("stopped")) == 1
            assert not (folder / "stopped" / name).exists()
        else:
            assert main(command("stopped")) == 1
    assert len(read) < 10
    assert "continuing after 6 images" in capsys.readouterr().err
    assert (folder / "stopped" / name).read_bytes() == (folder / "whole" / name).read_bytes()
    assert [path.name for path in (folder / "stopped").iterdir()] == [name]
    if name.endswith("parquet"):
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(folder / "whole" / name).to_pylist()
        assert_rows(
            [
                {
                    "image": row["image"],
                    "labels": [
                        {"label": label, "score": score}
                        for label, score in zip(row["labels"], row["scores"], strict=True)
                    ],
                }
                | ({"error": row["error"]} if row["error"] else {})
                for row in rows
            ],
            list(expected_rows(folder)),
        )


def test_other_work_is_not_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setattr(bulk, "PART", 2)
    job = Job(model="m", files="0", head="fused", engine="torch", top_k=1, inputs=("photos",))
    rows = [{"image": f"{i}.png", "labels": []} for i in range(5)]
    with Results(tmp_path / "rows.jsonl", job) as begun:
        writing = begun.write(iter(rows))
        for _ in range(3):
            next(writing)
        writing.close()
    with Results(tmp_path / "rows.jsonl", job) as again:
        assert list(again.remaining([row["image"] for row in rows])) == ["2.png", "3.png", "4.png"]
        assert again.done == 2
    said = "the images have changed since", "remove", "rows.jsonl.parts to start over"
    with Results(tmp_path / "rows.jsonl", job) as again, raises_saying(ValueError, *said):
        again.remaining(["1.png", "0.png"])
    for changes, named in (
        ({"head": "class"}, "head"),
        ({"files": "1"}, "files"),
        ({"engine": "openvino, bf16"}, "engine"),
    ):
        with raises_saying(ValueError, f"holds parts of other work ({named} differ)"):
            Results(tmp_path / "rows.jsonl", replace(job, **changes)).__enter__()
    with Results(tmp_path / "rows.jsonl", job) as again:
        left = list(again.remaining([row["image"] for row in rows]))
        list(again.write(row for row in rows if row["image"] in left))
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == rows
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    with raises_saying(FileExistsError, "rows.jsonl exists already; remove it to predict again"):
        Results(tmp_path / "rows.jsonl", job)
    with raises_saying(FileExistsError, "remove it to predict again, or give each shard a file of its own"):
        Results(tmp_path / "rows.jsonl", replace(job, shard=(2, 4)))
    with raises_saying(ValueError, "expected a .jsonl, .csv, .parquet file for the results, found"):
        Results(tmp_path / "rows.txt", job)


def stop_before_the_end(monkeypatch, command):
    """Runs a command that dies when its parts are whole and its file is not."""
    with monkeypatch.context() as patched:
        patched.setitem(bulk._WRITERS, ".jsonl", lambda *_: {}["killed"])
        with pytest.raises(KeyError):
            main(command)


def touched(path):
    os.utime(path, (path.stat().st_mtime + 1,) * 2)


def enlarged(path):
    """Another size, and the time of before."""
    status = path.stat()
    path.write_bytes(path.read_bytes() + b"-")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", [touched, enlarged, os.remove])
def test_changed_images_are_not_gone_on_with(folder, monkeypatch, capsys, change):
    """The names are those of before, and only one file among those that are done has changed."""
    monkeypatch.setattr(bulk, "PART", 3)
    command = ["predict", str(folder / "m"), *sorted(map(str, folder.glob("photos/**/*.png")))]
    command += ["--json", str(folder / "rows.jsonl")]
    stop_before_the_end(monkeypatch, command)
    changed = Path(command[2])
    change(changed)
    assert main(command) == 1
    assert f"000000.jsonl was written; {changed} has another size or time; remove" in capsys.readouterr().err


def test_damaged_rows_are_answered_again(folder, monkeypatch, capsys):
    """A part whose bytes are not those that were written, and all after it."""
    monkeypatch.setattr(bulk, "PART", 3)
    command = ["predict", str(folder / "m"), str(folder / "photos"), "--json"]
    assert main([*command, str(folder / "whole.jsonl")]) == 1
    stop_before_the_end(monkeypatch, [*command, str(folder / "rows.jsonl")])
    part = folder / "rows.jsonl.parts/000001.jsonl"
    part.write_bytes(part.read_bytes().replace(b"0.", b"1.", 1))
    assert main([*command, str(folder / "rows.jsonl")]) == 1
    assert "continuing after 3 images" in capsys.readouterr().err
    assert (folder / "rows.jsonl").read_bytes() == (folder / "whole.jsonl").read_bytes()


def test_rows_without_their_job_are_no_ones(folder, capsys):
    """Or the rows of another model would be taken for this one's."""
    (folder / "rows.jsonl.parts").mkdir()
    (folder / "rows.jsonl.parts/000000.jsonl").write_text("{}\n")
    assert main(["predict", str(folder / "m"), str(folder / "photos"), "--json", str(folder / "rows.jsonl")]) == 1
    assert "holds 000000.jsonl but no job.json" in capsys.readouterr().err


def test_one_process_writes_a_file(folder, capsys):
    out = folder / "rows.jsonl"
    with locks.held(out, lock=locks.beside(out)):
        assert main(["predict", str(folder / "m"), str(folder / "photos"), "--json", str(out)]) == 1
    assert f"{out} is being written by another process (process {os.getpid()} on" in capsys.readouterr().err
    assert not out.exists()


def test_what_a_killed_process_left_is_removed(folder):
    for name in (".rows.jsonl.0123abcd", "rows.jsonl.parts/.000000.jsonl.0123abcd", ".rows.jsonl.parts.0123abcd/x"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("half")
    before = sorted(folder.iterdir())
    main(["predict", str(folder / "m"), str(folder / "photos"), "--json", str(folder / "rows.jsonl")])
    assert sorted(folder.iterdir()) == sorted(
        [path for path in before if not path.name.startswith((".rows", "rows"))] + [folder / "rows.jsonl"]
    )


def test_a_model_trained_again_is_another(folder):
    before = identity(str(folder / "m"))
    assert identity(str(folder / "m")) == before
    trained_folder(folder / "m", seed=1)
    assert identity(str(folder / "m")) != before
    assert identity("facebook/deit-tiny-patch16-224") == ""


def test_a_link_to_a_folder_above_ends(folder):
    whole = list(find_images([str(folder / "photos")]))
    (folder / "photos/x/above").symlink_to(folder / "photos")
    assert list(find_images([str(folder / "photos")])) == whole


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet"])
def test_names_that_are_no_text(folder, name):
    """Bytes that are not UTF-8 end no work; CSV gives them back as they are."""
    odd = os.path.join(os.fsencode(folder / "photos"), b"\xff.png")
    os.rename(os.fsencode(folder / "photos/x/1.png"), odd)
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    option = {"jsonl": "--json", "csv": "--csv", "parquet": "--parquet"}[name.rpartition(".")[2]]
    assert main(["predict", str(folder / "m"), str(folder / "photos"), option, str(folder / name)]) == 1
    assert (folder / name).stat().st_size > 0
    if name.endswith("csv"):
        assert odd in (folder / name).read_bytes()
    if name.endswith("jsonl"):
        rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        assert odd in [os.fsencode(row["image"]) for row in rows]


def test_options_that_swallow_an_image_are_refused(folder, capsys):
    image = str(folder / "photos/x/1.png")
    before = (folder / "photos/x/1.png").read_bytes()
    assert main(["predict", str(folder / "m"), image, "--json", image]) == 1
    assert "expected a .jsonl file after --json, found" in capsys.readouterr().err
    assert main(["predict", str(folder / "m"), image, "--json", "--csv"]) == 1
    assert "--json and --csv exclude each other; choose one" in capsys.readouterr().err
    for given in (image, "-"):  # no rows of Parquet go to standard output
        assert main(["predict", str(folder / "m"), image, "--parquet", given]) == 1
        assert f"expected a .parquet file after --parquet, found {given}; give such a name\n" in capsys.readouterr().err
    assert (folder / "photos/x/1.png").read_bytes() == before


def test_memory_does_not_grow_with_the_number_of_images(folder, monkeypatch):
    """The stream asks for images only as it gives answers."""
    predictor = Predictor(folder / "m")
    asked = []

    def endless():
        picture = Image.new("RGB", (20, 20))
        while True:
            asked.append(1)
            yield picture

    stream = predictor.stream(endless(), batch=4)
    for count in range(1, 41):
        next(stream)
        assert len(asked) <= count + 4 * 4


def test_lists_of_any_system(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for name in ("photos/a.png", "b.png\r", "c\\d.png"):
        (tmp_path / name).touch()
    for text in (
        "\ufeffphotos/a.png\r\nb.png\r\n\r\nc\\d.png",
        "ï»¿photos\\a.png\nb.png\r\nc\\d.png\r\n",
    ):
        assert list(find_images(["-"], io.StringIO(text, newline=""))) == ["photos/a.png", "b.png\r", "c\\d.png"]
    assert list(find_images(["-"], io.StringIO("x\\y.png\r\n", newline=""))) == ["x\\y.png"]
    for encoding in ("utf-16-le", "utf-16-be"):
        listed = "\ufeffa.png\n".encode(encoding).decode("utf-8", "surrogateescape")
        with raises_saying(ValueError, "is in UTF-16, expected UTF-8"):
            list(find_images(["-"], io.StringIO(listed)))


def test_what_is_passed_over_is_said_once(folder, capsys):
    for name in ("x/1.heic", "x/2.heic", "y/clip.mp4"):
        (folder / "photos" / name).write_bytes(b"-")
    (folder / "photos/x/3.png").unlink()
    given = [str(folder / "photos/x"), str(folder / "photos/y*")]
    assert main(["predict", str(folder / "m"), *given, "--json"]) == 0
    shown = capsys.readouterr()
    images = [json.loads(line)["image"] for line in shown.out.splitlines()]
    assert len(images) == 9
    assert all(image.endswith(".png") for image in images)
    assert [line for line in shown.err.splitlines() if "passed over" in line] == [
        "deit predict: 4 files were passed over, because they are no images that Pillow reads: 2 .heic, 1 .mp4, 1 .txt"
    ]


def test_a_folder_without_images_is_told(folder, capsys):
    (folder / "none").mkdir()
    assert main(["predict", str(folder / "m"), str(folder / "none")]) == 0
    assert "found no image; give image files, or a folder that holds some" in capsys.readouterr().err
    assert main(["predict", str(folder / "m"), str(folder / "none"), "--shard", "1/2"]) == 0
    assert "found no image" not in capsys.readouterr().err
