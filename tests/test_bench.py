"""bench/: turns and what becomes of them, records of one form, and that what the docs name is there."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import time

import pytest
from support.pages import PAGES, ROOT
from support.runs import photos

from bench import fortress, growth, harness
from bench import photos as photos_bench
from bench.speed import __main__ as speed
from bench.speed import keras, memory, merge, predict, reading, train
from deit.data.folders import read_parts

TOY = """
import time
from pathlib import Path
from bench import fortress, harness

harness.SECONDS = 0.1

def work(name, pause, batch):
    assert name != "broken"
    if name.endswith("held"):
        import torch
        assert torch.backends.cpu.get_cpu_capability() == "AVX2", torch.backends.cpu.get_cpu_capability()
    harness.answer(lambda: time.sleep(pause * (1 if name.startswith("deit") else 10)))

COMPARISON = harness.Comparison(
    module="toy",
    description=None,
    records=Path(__file__).with_suffix(".jsonl"),
    cases={"short": {"pause": 0.01, "batch": 4}, "broken": {"pause": 0.0, "batch": 4}},
    contenders=lambda case: ["deit", "peer slow"] if case["pause"] else ["broken"],
    held=lambda case: ["deit held", "peer held"],
    work=work,
    step="nap",
    images="batch",
    packages=("torch",),
    circumstances={"dark": True},
)

if __name__ == "__main__":
    COMPARISON.main()
"""


@pytest.fixture
def toy(tmp_path):
    """Runs a comparison of naps from a folder of its own, where only PYTHONPATH leads to `bench`."""
    (tmp_path / "toy.py").write_text(TOY)

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "toy", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_a_comparison_takes_turns_and_appends_a_record(toy, tmp_path):
    for count in (1, 2):
        done = toy("--case", "short", "--rounds", "2")
        assert done.returncode == 0, done.stderr
        assert "peer slow" in done.stdout
        lines = (tmp_path / "toy.jsonl").read_text().splitlines()
        assert len(lines) == count
    record = json.loads(lines[-1])
    assert list(record) == [
        *("case", "pause", "batch", "rounds", "dark", "images_per_second", "first_nap_seconds", "ratio_to_best"),
        *("machine", "bfloat16", "torch", "commit", "date"),
    ]
    assert (record["case"], record["pause"], record["batch"], record["rounds"]) == ("short", 0.01, 4, 2)
    assert list(record["images_per_second"]) == list(record["first_nap_seconds"]) == ["deit", "peer slow"]
    # A nap is no shorter than asked for: 4 images in 0.01 s, or in 0.1 s.
    assert record["images_per_second"]["deit"] <= 400
    assert record["images_per_second"]["peer slow"] <= 40
    middle, low, high = record["ratio_to_best"]["peer slow"]
    assert 1 < low <= middle <= high


def test_contenders_can_be_held_to_avx2(toy, tmp_path):
    done = toy("--case", "short", "--rounds", "1", "--avx2")
    assert done.returncode == 0, done.stderr  # the contenders look
    record = json.loads((tmp_path / "toy.jsonl").read_text())
    assert (record["bfloat16"], list(record["images_per_second"])) == ("held", ["deit held", "peer held"])


def test_a_contender_that_ends_is_named(toy, tmp_path):
    done = toy("--case", "broken", "--rounds", "1", "--records", "other.jsonl")
    assert "AssertionError" in done.stderr  # its own
    assert "RuntimeError: broken ended with status 1" in done.stderr
    assert not list(tmp_path.glob("*.jsonl"))


def test_rounds_are_counted_from_one(toy):
    done = toy("--rounds", "0")
    assert done.returncode == 2
    assert "expected 1 or more, found 0" in done.stderr


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({"deit": [4.0, 6.0, 6.0], "timm": [2.0, 2.0, 4.0]}, {"timm": [2.0, 1.5, 3.0]}),
        (  # the best variant of each by its median; peers in the order of their names
            {
                "b slow": [1.0, 9.0, 1.0],
                "b quick": [2.0, 2.0, 2.0],
                "a": [8.0, 8.0, 8.0],
                "deit slow": [3.0, 3.0, 3.0],
                "deit quick": [4.0, 4.0, 4.0],
            },
            {"a": [0.5, 0.5, 0.5], "b quick": [2.0, 2.0, 2.0]},
        ),
    ],
)
def test_ratios_are_of_the_same_round(rates, expected):
    found = harness.ratios(rates)
    assert found == expected
    assert list(found) == list(expected)


@pytest.mark.parametrize("script", [train, keras, predict, reading, merge], ids=lambda script: script.__name__)
def test_stored_records_have_the_fields_of_new_ones(script):
    comparison = script.COMPARISON
    assert comparison.module == script.__name__
    records = [json.loads(line) for line in comparison.records.read_text().splitlines()]
    assert {record["case"] for record in records} == set(comparison.cases)
    for record in records:
        settings = comparison.cases[record["case"]]
        assert {name: record[name] for name in settings} == settings
        named = comparison.held if comparison.held and record["bfloat16"] == "held" else comparison.contenders
        assert list(record["images_per_second"]) == list(named(settings))
        assert list(record) == [
            *("case", *settings, "rounds", *comparison.circumstances, "images_per_second"),
            *(f"first_{comparison.step}_seconds", "ratio_to_best", "machine", "bfloat16"),
            *(*comparison.packages, "commit", "date"),
        ]


@pytest.mark.parametrize("page", ["bench/README.md", "Makefile", *PAGES])
def test_what_the_pages_name_of_bench_is_there(page):
    text = (ROOT / page).read_text()
    for name in re.findall(r"python -m (bench[\w.]*\w)", text):
        found = importlib.util.find_spec(name)
        assert found, name
        assert found.submodule_search_locations is None or importlib.util.find_spec(f"{name}.__main__"), name
    for path in re.findall(r"\bbench/[\w./*]*\w", text):
        assert list(ROOT.glob(path)), path


def gpu_stages(tmp_path, *options):
    """The lines of `python -m bench.gpu` on the CPU."""
    run = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--records", tmp_path / "records.jsonl", *options],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert [{key: record[key] for key in line} for record, line in zip(records, lines, strict=True)] == lines
    assert all({"gpu", "torch", "commit", "date"} <= record.keys() for record in records)
    return run.returncode, lines


def test_the_stages_of_a_gpu_run_and_end_in_time(tmp_path):
    status, lines = gpu_stages(tmp_path, "--only", "machine")
    assert status == 0
    assert any(line.get("product_tflops", 0) > 0 for line in lines)
    assert lines[-1] == {"stage": "all", "failed": []}
    (tmp_path / "records.jsonl").unlink()
    status, lines = gpu_stages(tmp_path, "--only", "machine", "parity", "--seconds", "1")
    assert [line.get("left out") for line in lines[:-1]] == ["the time is up"] * 2
    assert status == 0


@pytest.mark.slow
@pytest.mark.timeout(1900)
def test_every_stage_of_a_gpu_finds_equal_values_on_a_cpu(tmp_path):
    """Device and reference are the same here, so each difference is rounding."""
    status, lines = gpu_stages(tmp_path, "--skip", "quickstart", "--seconds", "1800")
    assert status == 0, [line for line in lines if line.get("ok") is False]
    assert {line["stage"] for line in lines if line.get("ok")} >= {
        "parity", "objectives", "resuming", "memory", "planning", "two_processes", "answers", "serving",
    }  # fmt: skip


def test_damaged_files_give_an_answer_or_a_sentence(capsys):
    """A short form of `make fortress`."""
    for kind in fortress.KINDS:
        row = fortress.run(kind, 0, 60)
        assert row["faults"] == {}
        assert 0 < row["refused"] <= 60
    assert "| 60 |" in fortress.line(row)


def test_attacks_are_counted_by_the_tests_that_make_them(tmp_path, monkeypatch):
    (tmp_path / "test_toy.py").write_text(
        """
import os
import pytest

def test_many(record_property):
    record_property("attacks", 7)
    record_property("said", f"{os.environ['FORTRESS_MINUTES']} minutes")

def test_one():
    pass

def test_broken():
    assert 1 == 2

def test_impossible():
    pytest.skip("not here")
"""
    )
    monkeypatch.setitem(fortress.ATTACKS, "toy", ("A toy", (str(tmp_path / "test_toy.py"),)))
    row = fortress.run_tests("toy", 0.5)
    assert [*row["faults"]] == ["test_broken"]
    assert (row["times"], row["left out"], row["said"]) == (9, 1, "0.5 minutes")
    row["seconds"] = 3.2
    assert fortress.line(row) == "| A toy | 9 | 1 | 1 | 3 | 0.5 minutes |"
    page = fortress.PAGE.read_text(encoding="utf-8")
    assert fortress.merged(page, [row]).replace(fortress.line(row) + "\n", "") == page
    assert fortress.merged(page, []) == page
    page = fortress.merged(page, [row])
    assert fortress.merged(page, [{**row, "times": 12}]) == page.replace("| A toy | 9 |", "| A toy | 12 |")


def test_every_attack_names_tests_that_are_there():
    for _, places in fortress.ATTACKS.values():
        for place in places[: places.index("-k") if "-k" in places else None]:
            file, _, name = place.partition("::")
            assert (ROOT / file).exists(), place
            assert f"def {name}(" in (ROOT / file).read_text() if name else True, place


def test_a_fault_is_found_and_does_not_end_the_search(monkeypatch, capsys):
    """Errors of another kind, files that take long, and the end of the process."""

    def broken():
        def read(content, folder):
            number = int(content)
            if number == 1:
                raise KeyError("x")
            if number == 2:
                time.sleep(9)
            if number == 3:
                raise ValueError("refused")

        return [str(number).encode() for number in range(5)], read, lambda content, draw: content

    monkeypatch.setitem(fortress.KINDS, "broken", broken)
    monkeypatch.setattr(fortress, "PATIENCE", 0.2)
    fortress.attempt("broken", 0, 5)
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert [(number, refused) for number, refused, *_ in answers] == [(0, 0), (1, 0), (2, 0), (3, 1), (4, 0)]
    assert [fault for _, _, fault, _ in answers if fault] == ["KeyError: 'x'", "took longer than 0 s"]


def test_few_photos_of_each_class_are_drawn_again(tmp_path):
    """From the training photos alone, and the same ones for the same seed."""
    data = photos(photos(photos(tmp_path / "data"), split="validation", count=3), split="test", count=2)
    drawn = [photos_bench.chosen(data, tmp_path / f"{seed}.csv", 4, seed).read_text() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    parts = read_parts(tmp_path / "1.csv")
    assert {name: sorted(split.labels) for name, split in parts.items()} == {
        "train": 4 * [0] + 4 * [1] + 4 * [2],
        "val": 3 * [0] + 3 * [1] + 3 * [2],
        "test": 2 * [0] + 2 * [1] + 2 * [2],
    }
    assert len(read_parts(photos_bench.chosen(data, tmp_path / "all.csv", 0, 0))["train"]) == 21


def test_fits_in_a_table(tmp_path, monkeypatch):
    def record(count, seed, baseline, student, minutes=30.0):
        parts = {
            "frozen": {"accuracy": {"class": baseline}, "seconds": 30.0},
            "student": {"accuracy": {"fused": student, "class": 0.1}, "seconds": 60.0},
        }
        about = {"recommended": "frozen" if seed else "student", "machine": "2 cores of X"}
        about |= {"per_class": count, "seed": seed, "minutes": minutes}
        return {"images": {"train": 3068}, "parts": parts, **about}

    monkeypatch.setattr(photos_bench, "RECORDS", tmp_path / "photos.jsonl")
    made = [record(0, 0, 0.875, 0.5), record(0, 1, 0.885, 0.52), record(10, 0, 0.7, 0.4, 10.0)]
    (tmp_path / "photos.jsonl").write_text("".join(json.dumps(each) + "\n" for each in made))
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- photos: begin -->\nold\n<!-- photos: end -->\nafter\n")
    harness.write_between(page, "photos", photos_bench.table())
    rows = [line for line in page.read_text().splitlines() if line.startswith("| ")]
    assert rows[1:] == [
        "| 10 a class, 3,068 | 10 | frozen baseline | 70.0 | 0.5 | 0 of 1 |",
        "| 10 a class, 3,068 | 10 | student | 40.0 | 1.0 | 1 of 1 |",
        "| all, 3,068 | 30 | frozen baseline | 88.0 (87.5 to 88.5) | 0.5 | 1 of 2 |",
        "| all, 3,068 | 30 | student | 51.0 (50.0 to 52.0) | 1.0 | 1 of 2 |",
    ]
    text = page.read_text()
    assert text.startswith("before\n<!-- photos: begin -->\n")
    assert text.endswith("<!-- photos: end -->\nafter\n")
    assert "old" not in text
    assert "Seeds 0, 1; 2 cores of X." in text
    with pytest.raises(ValueError, match="lacks the lines <!-- claims: begin -->"):
        harness.write_between(page, "claims", "")


def test_the_tables_of_speed_are_those_of_the_records(tmp_path):
    for page in speed.PAGES:
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).write_bytes((ROOT / page).read_bytes())
    speed.write(tmp_path)
    for page in speed.PAGES:
        assert (tmp_path / page).read_text() == (ROOT / page).read_text(), f"{page}: run python -m bench.speed"


def test_the_latest_record_of_each_kind_of_processor_is_shown(tmp_path):
    def record(case, kind, ours, rate, ratio, date):
        about = {"case": case, "bfloat16": kind, "machine": "2 cores of X", "date": date}
        rates = {"deit": ours, "deit Pillow": 1.0, "timm float32": 3.0, "timm bfloat16": rate}
        return {**about, "images_per_second": rates, "ratio_to_best": {"timm bfloat16": [ratio, 1.0, 9.0]}}

    made = [
        record("b", "AMX", 100.0, 50.0, 2.0, "2026-01-01"),
        record("a", "none", 9.94, 5.0, 2.0, "2026-01-01"),
        record("b", "none", 30.0, 10.0, 3.0, "2026-01-02"),
        record("b", "AMX", 120.0, 48.0, 2.5, "2026-01-03"),
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(each) + "\n" for each in made))
    records = speed.latest(tmp_path / "x.jsonl")
    assert records == [made[2], made[3], made[1]]
    assert speed.table(records, speed.ENGLISH, True).splitlines() == [
        "| | machine | deit | timm (ours over it) |",
        "|---|---|---|---|",
        "| b | 2 cores of X, AVX2 | 30 | 10 (3.00 x, 1.00 to 9.00) |",
        "| b | 2 cores of X, AMX | 120 | 48 (2.50 x, 1.00 to 9.00) |",
        "| a | 2 cores of X, AVX2 | 9.9 | 5.0 (2.00 x, 1.00 to 9.00) |",
    ]
    assert speed.table(records[1:2], speed.CHINESE, False).splitlines()[2] == "| b | AMX | 120 | 48 (2.50 x) |"


def test_the_curves_of_growth(tmp_path):
    """A point in a process of its own, and a table whose powers are those of the numbers."""
    found = growth.measured({"batch": 2, "image": 32, "width": 96, "classes": 5})
    assert found["seconds"] > 0
    assert 0 <= found["memory"] < 2000
    listed = growth.measured({"images": 20})
    assert 0 < listed["seconds"] < 60
    points = growth.lowest(
        [
            [{"batch": n, "seconds": 0.5 * n + a, "memory": 3.0 * n**2 + b} for n in (4, 8, 16)]
            for a, b in ((0, 1), (1, 0))
        ]
    )
    about = {"machine": "2 cores of X", "bfloat16": "AMX"}
    record = {"curve": "batch", "points": points, **about}
    (tmp_path / "growth.jsonl").write_text(json.dumps({**record, "points": []}) + "\n" + json.dumps(record) + "\n")
    text = growth.table(growth.records(tmp_path / "growth.jsonl"))
    assert "| images in a batch | 4, 8, 16 | 2, 4, 8 | 1.0 | 48, 192, 768 | 2.0 |" in text
    assert text.endswith("2 cores of X (AMX).\n")


def test_the_table_of_memory():
    mib = {"deit": 1000, "timm": 1250, "transformers": 2000}
    record = {
        "mib": {f"{name} float32": value for name, value in mib.items()}
        | {f"{name} bfloat16": 2 * value for name, value in mib.items()},
        "machine": "2 cores of X",
    }
    assert memory.table(record).splitlines()[2:4] == [
        "| float32 | 1,000 | 1,250 (0.80 x) | 2,000 (0.50 x) |",
        "| bfloat16 | 2,000 | 2,500 (0.80 x) | 4,000 (0.50 x) |",
    ]
    assert json.loads(memory.RECORDS.read_text().splitlines()[-1])["mib"].keys() == record["mib"].keys()


def test_the_packages_of_a_record_exist():
    names = re.search(r"machine\((.*)\)", (ROOT / "bench" / "photos.py").read_text())[1]
    found = harness.machine(*json.loads(f"[{names}]"))
    assert {"machine", "torch", "timm", "sklearn", "commit"} <= found.keys()
