"""Whoever receives the metrics gets every row, and never stops a run. Stand-ins record the calls of each package."""

import json
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console
from support.runs import photos, small_recipe

from deit.cli import main
from deit.data.folders import read_data
from deit.recipe import Compute, Cosine, steps
from deit.train import MLflow, WandB, progress, stepping, train
from deit.train.loop import Stopped

RECIPE = small_recipe(
    schedule=Cosine(total=steps(6)), evaluate=steps(2), compute=Compute(precision="float32", workers=0)
)


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    return read_data(photos(photos(tmp_path_factory.mktemp("d")), split="val", count=3), holdout=0.1, seed=0)


@pytest.fixture(autouse=True)
def no_tensorboard(monkeypatch):
    monkeypatch.setattr(progress, "find_spec", lambda _: None)


def run(splits, out, receivers, console=None, **options):
    return train(
        RECIPE, *splits, out, device="cpu", console=console or Console(quiet=True), receivers=receivers, **options
    )


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def stopped_after(monkeypatch, splits, out, receivers, step):
    """Runs until SIGTERM comes in that step."""
    taken, real = [], stepping.take

    def watched(work, state, *rest):
        taken.append(state.step)
        numbers, (_, save, late) = real(work, state, *rest)
        return numbers, [len(taken) == step, save, late]

    with monkeypatch.context() as patched:
        patched.setattr(stepping, "take", watched)
        with pytest.raises(Stopped):
            run(splits, out, receivers)


class Note:
    """Notes its calls. Fails in the method of that name."""

    def __init__(self, fails=""):
        self.calls, self.fails = [], fails

    def _noted(self, name, *given):
        self.calls.append((name, *given))
        if name == self.fails:
            raise ConnectionError("the network\nis down")

    def begin(self, out, recipe, step):
        self._noted("begin", out, recipe, step)

    def row(self, numbers):
        self._noted("row", numbers)

    def close(self, finished):
        self._noted("close", finished)


class Spans:
    """Runs of the stand-ins, one for each session."""

    def __init__(self):
        self.begun, self.logged, self.ended = [], [], []


def fake_wandb(monkeypatch):
    """`wandb` as version 0.31 is called."""
    seen = Spans()

    class Run:
        def __init__(self, id):
            self.id = id

        def log(self, data, step=None, commit=None):
            seen.logged.append((self.id, data, step))

        def finish(self, exit_code=None):
            seen.ended.append((self.id, exit_code))

    known = {"entity", "project", "dir", "name", "config", "allow_val_change", "reinit", "resume"}

    def init(id=None, **given):
        assert given.keys() <= known
        seen.begun.append(given if id is None else {**given, "id": id})
        return Run(id or f"id{len(seen.begun)}")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    return seen


def fake_mlflow(monkeypatch):
    """`mlflow` as version 3.17 is called."""
    seen = Spans()
    seen.params, active = [], []

    def start_run(run_id=None, experiment_id=None, run_name=None, nested=False, parent_run_id=None, tags=None):
        seen.begun.append({"run_id": run_id, "run_name": run_name, "nested": nested, "tags": tags})
        active.append(run_id or f"id{len(seen.begun)}")
        return SimpleNamespace(info=SimpleNamespace(run_id=active[-1]))

    def log_params(params, synchronous=None, run_id=None):
        seen.params.append((run_id or active[-1], params))

    def log_metrics(metrics, step=None, synchronous=None, run_id=None):
        assert run_id is None  # otherwise each call asks the server once more
        seen.logged.append((active[-1], metrics, step))

    def end_run(status="FINISHED"):
        seen.ended.append(status)
        active.pop()

    offered = (start_run, log_params, log_metrics, end_run)
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(**{each.__name__: each for each in offered}))
    return seen


def test_any_object_receives_the_rows(splits, tmp_path):
    note = Note()
    run(splits, tmp_path, [note])
    begun, *middle, closed = note.calls
    assert begun == ("begin", tmp_path, RECIPE, 0)
    assert middle == [("row", row) for row in rows(tmp_path)]
    assert [row["step"] for _, row in middle] == [2, 4, 6]
    assert closed == ("close", True)


@pytest.mark.parametrize(
    ("fails", "calls"),
    [
        ("begin", ["begin"]),
        ("row", ["begin", "row"]),
        ("close", ["begin", "row", "row", "row", "close"]),
    ],
)
def test_a_receiver_that_fails_stops_nothing(splits, tmp_path, fails, calls):
    broken, note = Note(fails), Note()
    with open(tmp_path / "shown", "w") as shown:
        run(splits, tmp_path / "out", [broken, note], Console(file=shown, width=1000))
    assert [call[0] for call in broken.calls] == calls
    assert [call[0] for call in note.calls] == ["begin", *["row"] * 3, "close"]
    text = (tmp_path / "shown").read_text()
    assert text.count("Note failed (ConnectionError: the network is down); the run goes on without it") == 1
    assert [row["step"] for row in rows(tmp_path / "out")] == [2, 4, 6]


def test_wandb(splits, tmp_path, monkeypatch):
    seen, out = fake_wandb(monkeypatch), tmp_path / "photos"
    stopped_after(monkeypatch, splits, out, [WandB(project="p")], 3)
    run(splits, out, [WandB(project="p")], resume=True)
    own = {"dir": str(out), "name": "photos", "config": RECIPE.to_dict(), "reinit": "create_new", "project": "p"}
    assert seen.begun == [own, {**own, "id": "id1", "resume": "allow", "allow_val_change": True}]
    assert seen.logged == [("id1", row, row["step"]) for row in rows(out)]
    assert [row["step"] for row in rows(out)] == [2, 4, 6]
    assert seen.ended == [("id1", 1), ("id1", 0)]


def test_mlflow(splits, tmp_path, monkeypatch):
    seen, out = fake_mlflow(monkeypatch), tmp_path / "photos"
    stopped_after(monkeypatch, splits, out, [MLflow(tags={"by": "me"})], 3)
    run(splits, out, [MLflow(tags={"by": "me"})], resume=True)
    assert seen.begun == [
        {"run_id": None, "run_name": "photos", "nested": True, "tags": {"by": "me"}},
        {"run_id": "id1", "run_name": None, "nested": True, "tags": {"by": "me"}},
    ]
    assert seen.logged == [("id1", row, row["step"]) for row in rows(out)]
    assert seen.ended == ["KILLED", "FINISHED"]
    [(owner, params)] = seen.params
    assert owner == "id1"
    assert params["name"] == "small"
    assert params["schedule.total"] == "6 steps"
    assert params["optim.lr"] == RECIPE.optim.lr
    assert params["model.hidden_size"] == 24


def test_tensorboard(splits, tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, *scalar):
            written.append(scalar)

        def flush(self):
            pass

        close = flush

    monkeypatch.setattr(progress, "find_spec", lambda name: name == "tensorboard")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    run(splits, tmp_path, [])
    assert written[0] == (str(tmp_path / "tensorboard"), 1)
    assert written[1:] == [(name, value, row["step"]) for row in rows(tmp_path) for name, value in row.items()]


@pytest.mark.parametrize(
    ("name", "fake", "package"),
    [("wandb", fake_wandb, "Weights & Biases needs wandb"), ("mlflow", fake_mlflow, "MLflow needs mlflow")],
)
def test_the_recipe_sends_the_metrics(tmp_path, monkeypatch, capsys, name, fake, package):
    data = photos(photos(tmp_path / "data"), split="val", count=3)
    (tmp_path / "recipe.json").write_text(json.dumps(RECIPE.to_dict()))
    command = ["train", tmp_path / "recipe.json", "--data", data, "--device", "cpu", "--out", tmp_path / "out"]
    command = [*map(str, command), "--set", f"compute.log={name}"]
    monkeypatch.setitem(sys.modules, name, None)
    assert main(command) == 1
    assert f'{package}: pip install "deit[{name}]"' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    seen = fake(monkeypatch)
    assert main(command) == 0
    assert [(data, step) for _, data, step in seen.logged] == [(row, row["step"]) for row in rows(tmp_path / "out")]
    assert seen.begun[0].get("name", seen.begun[0].get("run_name")) == "out"
