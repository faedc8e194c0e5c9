"""The page of a run while it trains: what it says, what it costs, and that it can stop nothing."""

import json
import time
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from support.models import small, trained_folder
from support.reports import ABOUT, QUIET, checked, record
from support.runs import assert_same_end, photos, small_recipe

from deit import files, locks
from deit.cli import main
from deit.data.folders import read_data
from deit.machine import Processes
from deit.recipe import Cosine, LinearProbe, MaskedImage, steps
from deit.report import LivePage, document, live
from deit.train import Stopped, train
from deit.train.progress import Reporter
from deit.train.records import Record

RECIPE = small_recipe(schedule=Cosine(total=steps(6)), evaluate=steps(2))


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return read_data(photos(photos(tmp_path_factory.mktemp("d")), split="val", count=3), holdout=0.1, seed=0)


class Collected(LivePage):
    """Keeps each page that was written."""

    def __init__(self, **options):
        super().__init__(**options)
        self.pages = []

    def _put(self, out, *rest):
        super()._put(out, *rest)
        self.pages.append((self.file or out / document.FILE).read_text())


def reloads(page):
    return [entry[1]["content"] for entry in page.all("meta", **{"http-equiv": "refresh"})]


def trained(out, splits, receiver, recipe=RECIPE, **options):
    return train(recipe, *splits, out, device="cpu", console=QUIET, receivers=[receiver], **options)


def test_each_evaluation_is_on_the_page_and_the_report_replaces_it(splits, tmp_path):
    collected = Collected()
    trained(tmp_path, splits, collected)
    assert len(collected.pages) == 5  # before the first step, three evaluations, the end
    *during, after = collected.pages
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for number, text in enumerate(during):
        page = checked(text, unfinished=True)
        assert reloads(page) == ["30"]
        assert page.all("title")[0][2].startswith("Unfinished run: ")
        page.sees("This run is not finished", f"{2 * number} of 6", "Recipe", "fingerprint of the training images")
        assert ("Learning rate over steps" in text) == (number > 0)
        assert ("time left" in text) == (number > 0)
        if number:
            best = max(rows[:number], key=lambda row: (row["val_accuracy"], row["step"]))
            page.sees(f"{best['val_accuracy']:.4g}, after step {best['step']}", "follow when the run is finished")
    page = checked(after)
    assert not reloads(page)
    assert "not finished" not in after
    page.sees("6 steps", "Calibration, confusions, classes and single images appear here after")


def test_the_command_shows_a_page_and_ends_with_the_report(tmp_path, monkeypatch, capsys):
    data = photos(photos(tmp_path / "data"), split="val", count=3)
    recipe = replace(RECIPE, schedule=Cosine(total=steps(12)), evaluate=steps(4))
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.to_dict()))
    seen, write = [], document.write

    def noted(file, record, evaluation, **options):
        seen.append((options.get("unfinished", False), evaluation is not None))
        return write(file, record, evaluation, **options)

    monkeypatch.setattr(document, "write", noted)
    command = ["train", tmp_path / "recipe.json", "--data", data, "--device", "cpu", "--out", tmp_path / "run"]
    assert main([*map(str, command)]) == 0
    assert seen == [*[(True, False)] * 4, (False, False), (False, True)]
    checked((tmp_path / "run" / "report.html").read_text()).sees("Judged by 9 validation images")
    assert not list((tmp_path / "run").rglob(".*"))
    capsys.readouterr()


def test_a_stopped_run_says_so_and_how_to_go_on(splits, tmp_path):
    collected = Collected()

    class Stops:
        def begin(self, *_):
            pass

        def row(self, numbers):
            raise Stopped(143)

        close = begin

    with pytest.raises(Stopped):
        train(RECIPE, *splits, tmp_path, device="cpu", console=QUIET, receivers=[collected, Stops()])
    page = checked(collected.pages[-1], unfinished=True)
    page.sees("A signal or an error has ended the run early", "The same command goes on with --resume.", "2 of 6")
    assert "time left" not in collected.pages[-1]


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (small_recipe(MaskedImage(unit=8), schedule=Cosine(total=steps(2))), "lowest loss on validation images so far"),
        (
            small_recipe(LinearProbe(strengths=(0.1,), folds=2), optim=None, schedule=None, start="start"),
            "best accuracy so far",
        ),
    ],
    ids=["masked", "probe"],
)
def test_other_kinds_of_runs(splits, tmp_path, monkeypatch, recipe, words):
    if isinstance(recipe.objective, LinearProbe):
        pytest.importorskip("sklearn")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        start = trained_folder(tmp_path / "start", labels="uvwx", distilled=False)
        recipe = replace(recipe, start=str(start), model=small(distillation_token=False, num_labels=None))
    collected = Collected()
    trained(tmp_path / "run", splits, collected, recipe)
    assert words in collected.pages[-2]
    checked(collected.pages[-2], unfinished=True)
    checked(collected.pages[-1])


def test_warnings_are_on_the_page(tmp_path):
    rows = [{"step": 50, "epoch": 0.5, "seconds": 10.0, "val_accuracy": 0.5, "loss": 1.0, "waiting": 0.62}]
    page = shown(record(tmp_path / "run", replace(ABOUT, teacher=(45, 50)), rows), 200)
    page.sees(
        "Warning: the accuracy 0.500 is not above 0.600",
        "Warning: the student is right on 0.500 of the validation images, its teacher on 0.900 of 50 of them",
        "62% of the recent time went by waiting for images.",
    )


def shown(folder, total):
    page = LivePage()
    page.begin(folder, small_recipe(schedule=Cosine(total=steps(total))), 0)
    return checked((folder / document.FILE).read_text(), unfinished=True)


@pytest.mark.parametrize(
    ("rows", "seconds"),
    [
        ([(10, 5.0)], 45.0),
        ([(10, 5.0), (20, 25.0)], 160.0),
        ([(10 * i, 10.0 * i if i < 50 else 500 + 100.0 * (i - 50)) for i in range(1, 81)], 2000.0),
        ([(10, 5.0), (10, 6.0)], None),
        ([], None),
        ([(100, 50.0)], 0.0),
    ],
)
def test_the_time_left_is_that_of_recent_steps(tmp_path, rows, seconds):
    """The third run became ten times slower."""
    written = [{"step": step, "epoch": 1.0, "seconds": taken} for step, taken in rows]
    found = live.remaining(Record.read(record(tmp_path, ABOUT, written)), 1000 if len(rows) > 2 else 100)
    assert found == (seconds if seconds is None else pytest.approx(seconds))


def test_it_costs_next_to_nothing(tmp_path):
    """Less than a tenth of a second of a run with 300 rows; it may be once because of other work on the machine."""
    rows = [
        {"step": i, "epoch": i / 10, "images": 8 * i, "lr": 1e-3 / i, "loss": 2 / i, "accuracy": 0.5,
         "seconds": 1.0 * i, "val_accuracy": 0.4, "gradient_norm": 1.0, "images_per_second": 100.0,
         "waiting": 0.1, "memory": 2**30, "skipped": 0, "bad_images": 0}
        for i in range(1, 301)
    ]  # fmt: skip
    record(tmp_path, ABOUT, rows)
    page, times = LivePage(), []
    page.begin(tmp_path, RECIPE, 0)
    for _ in range(5):
        began = time.perf_counter()
        page.row(rows[-1])
        times.append(time.perf_counter() - began)
    assert min(times) < 0.1
    checked((tmp_path / document.FILE).read_text(), unfinished=True).sees("300 of 6")


def test_a_full_disk_is_one_warning(splits, tmp_path, monkeypatch):
    write = files.write_text

    def full(path, text):
        if path.name == document.FILE:
            raise files.DiskFull(path, "No space left on device")
        write(path, text)

    monkeypatch.setattr(files, "write_text", full)
    with open(tmp_path / "said", "w") as said:
        console = Console(file=said, width=1000)
        train(RECIPE, *splits, tmp_path / "run", device="cpu", console=console, receivers=[LivePage()])
    text = (tmp_path / "said").read_text()
    assert text.count("report.html") == 1
    assert "LivePage failed (DiskFull: " in text
    assert "the run goes on without it" in text
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3


def test_whoever_writes_the_report_now_is_not_disturbed(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "_DYING", 0.0)
    file = record(tmp_path / "run") / document.FILE
    file.write_text("theirs")
    with locks.held(file, lock=locks.beside(file)):
        page = LivePage()
        page.begin(tmp_path / "run", RECIPE, 0)
        assert file.read_text() == "theirs"
    page.row({"step": 1, "val_accuracy": 0.5})
    assert "This run is not finished" in file.read_text()


def test_only_the_main_process_writes(tmp_path):
    other = Processes(torch.device("cpu"), rank=1, world=2)
    with Reporter(tmp_path, RECIPE, other, QUIET, done=0, total=6, written=0, receivers=[LivePage()]) as reporter:
        reporter.row({"step": 2, "val_accuracy": 0.5})
    assert not list(tmp_path.iterdir())


def test_pages_do_not_change_a_run(splits, tmp_path):
    trained(tmp_path / "one", splits, LivePage())
    train(RECIPE, *splits, tmp_path / "other", device="cpu", console=QUIET)
    assert_same_end(tmp_path / "one", tmp_path / "other")
