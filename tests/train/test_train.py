"""The loop: each step is the formula, it repeats itself to the bit, and what goes wrong is said and survived."""

import json
import math
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from support.checks import raises_saying
from support.models import small
from support.runs import assert_same_end, photos, small_recipe, stopped_at
from torch._dynamo.utils import counters

from deit import machine
from deit.config import ConvNetConfig
from deit.data import batches as batching
from deit.data.ahead import Ahead
from deit.data.batches import BadImages, EvaluationBatches, TrainingBatches, processor_for
from deit.data.draws import draws
from deit.data.folders import Split, read_data
from deit.data.loading import LoaderDied
from deit.evaluate.models import evaluate
from deit.image.processor import DeiTImageProcessor
from deit.model.load import load_model
from deit.recipe import (
    SGD,
    AdamW,
    Augment,
    Cosine,
    Data,
    Distilled,
    Erase,
    MaskedImage,
    Mix,
    Recipe,
    ResizedCrop,
    Supervised,
    epochs,
    steps,
)
from deit.train import budget, checkpoint, compiling, loop, objectives, optim, progress, records, runs, stepping
from deit.train.budget import TooShort
from deit.train.build import build_model
from deit.train.loop import Diverged, train
from deit.train.progress import Reporter

QUIET = Console(quiet=True)
CONVNET = small_recipe(
    Supervised(smoothing=0.1),
    name="convnet",
    model=ConvNetConfig(widths=(8, 16), depth=1, image_size=16),
    augment=Augment(crop=ResizedCrop(), flip=0.5),
    optim=AdamW(lr=4e-3, per_images=16),
    schedule=Cosine(total=epochs(4), warmup=epochs(1)),
)
PLAIN = replace(CONVNET, name="plain", model=small(distillation_token=False, num_labels=None, drop_path_rate=0.3))


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    return read_data(photos(photos(root), split="val", count=3), holdout=0.1, seed=0)


def run(recipe, splits, out, **options):
    return train(recipe, *splits, out, device="cpu", console=QUIET, **options)


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def end(out):
    return load_file(checkpoint.saved(out / "checkpoints")[-1])


def model_end(out):
    return {name.removeprefix("model."): value for name, value in end(out).items() if name.startswith("model.")}


# ------------------------------------------------------------------------------------------------------------ the loop


def test_a_run_leaves_a_model_that_scores_as_recorded(splits, tmp_path):
    done = run(CONVNET, splits, tmp_path)
    model = load_model(done.model)
    assert list(model.config.id2label.values()) == ["a", "b", "c"]
    processor = DeiTImageProcessor.from_pretrained(done.model)
    assert processor == processor_for(CONVNET)
    found = evaluate(model, EvaluationBatches(splits[1], processor, 50))["fused"].value
    written = rows(tmp_path)
    assert found == done.score == max(row["val_accuracy"] for row in written)
    assert written[-1]["loss"] < written[0]["loss"]
    assert [math.floor(row["epoch"]) for row in written[:-1]] == [1, 2, 3]
    assert json.loads((tmp_path / "recipe.json").read_text()) == json.loads(json.dumps(CONVNET.to_dict()))


class Ordered(Ahead):
    """As on a GPU, with streams that do nothing, and a record of what the loop does when."""

    done: ClassVar[list[str]] = []

    def __init__(self, batches, device):
        super().__init__(batches, device, torch.cpu)

    def __next__(self):
        self.done.append("next")
        return super().__next__()

    def fetch(self):
        self.done.append("fetch")
        super().fetch()


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_that_are_fetched_ahead_change_nothing(splits, tmp_path, monkeypatch, workers):
    """The next batch is fetched when a step's gradients are queued, and before its numbers are read. The last step
    fetches none."""
    recipe = replace(
        PLAIN, augment=Augment(erase=Erase(), mix=Mix(mixup=0.8)), compute=replace(PLAIN.compute, workers=workers)
    )
    run(recipe, splits, tmp_path / "plain")
    monkeypatch.setattr(loop, "Ahead", Ordered)
    Ordered.done.clear()
    clip, tolist = optim.clip_gradients, torch.Tensor.tolist

    def clipped(*given):
        Ordered.done.append("gradients")
        return clip(*given)

    def read(tensor):
        if Ordered.done and Ordered.done[-1] in ("gradients", "fetch") and tensor.numel() > 3:
            Ordered.done.append("numbers")
        return tolist(tensor)

    monkeypatch.setattr(optim, "clip_gradients", clipped)
    monkeypatch.setattr(torch.Tensor, "tolist", read)
    run(recipe, splits, tmp_path / "ahead")
    monkeypatch.undo()
    # `next` calls `fetch` itself, which finds the batch that is there already
    step = ["next", "fetch", "gradients", "fetch", "numbers"]
    assert Ordered.done == 9 * step + ["next", "fetch", "gradients", "numbers"]
    assert_same_end(tmp_path / "plain", tmp_path / "ahead")


@pytest.mark.parametrize("kind", ["mixed", "masked"])
def test_no_copy_to_the_device_waits_for_it(splits, tmp_path, monkeypatch, kind):
    """PyTorch waits for all that a GPU has queued when it copies without `non_blocking`. That would keep the next batch
    from being fetched meanwhile."""
    recipe = (
        replace(PLAIN, augment=Augment(erase=Erase(), mix=Mix(mixup=0.8)))
        if kind == "mixed"
        else replace(PLAIN, objective=MaskedImage(unit=8), augment=Augment(crop=ResizedCrop()))
    )
    moved, inside = [], []
    to, step = torch.Tensor.to, stepping.take

    def noted(tensor, *given, **options):
        if inside and any(isinstance(one, torch.device) for one in (*given, options.get("device"))):
            moved.append(options.get("non_blocking", False))
        return to(tensor, *given, **options)

    def stepped(*given):
        inside.append(True)
        try:
            return step(*given)
        finally:
            inside.clear()

    monkeypatch.setattr(torch.Tensor, "to", noted)
    monkeypatch.setattr(stepping, "take", stepped)
    run(recipe, splits, tmp_path)
    assert len(moved) >= 40  # pixels, labels and wishes in each of 10 steps
    assert all(moved)


def test_a_loader_that_dies_while_a_step_is_computed_spoils_no_step(splits, tmp_path, monkeypatch):
    """Its error is raised in place of the next batch, so the state is complete then."""
    steps = []

    class Dying(Ordered):
        def __init__(self, batches, device):
            def until_it_dies():
                yield from islice(batches, 3)
                raise LoaderDied("a loader process died")

            super().__init__(until_it_dies(), device)

        def __next__(self):
            try:
                return super().__next__()
            except LoaderDied:
                steps.append("died")
                raise

    advance = Reporter.advance
    monkeypatch.setattr(Reporter, "advance", lambda self, step, *rest: (steps.append(step), advance(self, step, *rest)))
    monkeypatch.setattr(loop, "Ahead", Dying)
    with pytest.raises(LoaderDied):
        run(PLAIN, splits, tmp_path)
    assert steps == [1, 2, 3, "died"]


def test_the_record_and_the_schedule(splits, tmp_path):
    """21 images in batches of 8: an epoch is 2.625 steps, and none of its views is dropped."""
    run(CONVNET, splits, tmp_path)
    total, warmup = round(4 * 21 / 8), round(21 / 8)
    written = rows(tmp_path)
    assert [row["step"] for row in written] == [3, 6, 8, 10]
    for row in written:
        assert row["images"] == 8 * row["step"]
        assert row["epoch"] == row["images"] / 21
        peak = 4e-3 * 8 / 16
        assert row["lr"] == optim.learning_rate(CONVNET.schedule, peak, row["step"] - 1, total, warmup)
        assert row["skipped"] == row["bad_images"] == 0
    assert written[-1]["step"] == total


def by_hand(recipe, splits):
    """The run again without the loop: objective, backward, AdamW at the scheduled rate, nothing else."""
    model = build_model(recipe, splits[0].classes).train()
    batches = TrainingBatches(splits[0], recipe)
    total = recipe.schedule.total.in_steps(batches.steps_per_epoch)
    warmup = recipe.schedule.warmup.in_steps(batches.steps_per_epoch)
    decayed = [p for name, p in model.named_parameters() if p.ndim > 1 and not name.endswith(("token", "position"))]
    free = [p for name, p in model.named_parameters() if p.ndim <= 1 or name.endswith(("token", "position"))]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": free, "weight_decay": 0.0}],
        betas=recipe.optim.betas,
        fused=True,
    )
    stream = batches.from_step(0)
    for step in range(total):
        for group in optimizer.param_groups:
            group["lr"] = optim.learning_rate(recipe.schedule, 2e-3, step, total, warmup)
        batch = batches.mix(next(stream))
        options = {}
        if not isinstance(recipe.model, ConvNetConfig):
            numbers = draws(recipe.seed, step, 0, 0, 4).random((8, 3, 2), dtype="float32")
            options["depth_draws"] = torch.from_numpy(numbers)[batch.positions]
        F.cross_entropy(model(batch.pixels, **options).logits, batch.labels, label_smoothing=0.1).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


@pytest.mark.parametrize(
    "recipe",
    [CONVNET, PLAIN, replace(PLAIN, augment=Augment(erase=Erase(), mix=Mix(mixup=0.8)))],
    ids=["convnet", "stochastic_depth", "mixed"],
)
def test_every_update_follows_the_formula(recipe, splits, tmp_path):
    run(recipe, splits, tmp_path)
    found = model_end(tmp_path)
    for name, expected in by_hand(recipe, splits).items():
        assert torch.equal(found[name], expected), name


def test_workers_change_nothing(splits, tmp_path):
    for workers in (0, 2):
        run(replace(PLAIN, compute=replace(PLAIN.compute, workers=workers)), splits, tmp_path / str(workers))
    first, second = model_end(tmp_path / "0"), model_end(tmp_path / "2")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("options", [{"accumulate": 3}, {"checkpoint_blocks": True}])
def test_how_the_work_is_divided_changes_nothing_but_rounding(options, splits, tmp_path):
    recipe = replace(
        PLAIN,
        augment=Augment(mix=Mix(mixup=0.8, cutmix=1.0)),
        optim=SGD(lr=0.1, per_images=16),
        model=PLAIN.model.replace(drop_path_rate=0.5),
    )
    run(recipe, splits, tmp_path / "one")
    run(replace(recipe, compute=replace(recipe.compute, **options)), splits, tmp_path / "other")
    one, other = model_end(tmp_path / "one"), model_end(tmp_path / "other")
    for name in one:
        torch.testing.assert_close(other[name], one[name], atol=1e-6, rtol=0, msg=name)
    assert rows(tmp_path / "one")[-1]["loss"] == pytest.approx(rows(tmp_path / "other")[-1]["loss"], abs=1e-6)


def test_the_average_is_evaluated_and_saved(splits, tmp_path):
    """`model/` holds the average at the best evaluation: here the last one, as the score never falls."""
    recipe = replace(CONVNET, ema=0.9, evaluate=steps(10))
    run(recipe, splits, tmp_path)
    state = end(tmp_path)
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert torch.equal(saved["classifier.weight"], state["ema.classifier.weight"])
    assert not torch.equal(saved["classifier.weight"], state["model.classifier.weight"])
    average = build_model(recipe, splits[0].classes)
    own = average.state_dict()
    assert state["ema.updates"] == 10
    assert (saved["classifier.weight"] - own["classifier.weight"]).norm() > 0


def test_the_best_is_kept_and_a_tie_goes_to_the_later(splits, tmp_path, monkeypatch):
    """Scores 1, 3, 2, 3: saved at the start, and after the first, second and fourth evaluation."""
    scores, saved = iter([1.0, 3.0, 2.0, 3.0]), []
    monkeypatch.setattr(
        objectives.SupervisedObjective,
        "judge",
        lambda *_: objectives.Verdict((score := next(scores)), {"val_accuracy": score}),
    )
    save = runs.save_model
    monkeypatch.setattr(runs, "save_model", lambda work, folder: saved.append(1) or save(work, folder))
    done = run(replace(CONVNET, evaluate=steps(1), schedule=Cosine(total=steps(4))), splits, tmp_path)
    assert done.score == 3.0
    assert len(saved) == 4


@pytest.mark.parametrize(("scores", "stays"), [([1.0, 2.0], False), ([2.0, 1.0], True)])
def test_a_calibration_goes_with_the_model_that_it_was_made_of(splits, tmp_path, monkeypatch, scores, stays):
    left = iter(scores)

    def judge(*_):
        (tmp_path / "model/calibration.json").write_text("{}")
        return objectives.Verdict((score := next(left)), {"val_accuracy": score})

    monkeypatch.setattr(objectives.SupervisedObjective, "judge", judge)
    run(replace(CONVNET, evaluate=steps(1), schedule=Cosine(total=steps(2))), splits, tmp_path)
    assert (tmp_path / "model/calibration.json").exists() == stays


@pytest.mark.parametrize(
    ("scores", "patience", "last"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 0.3, 10),
        ([1, 3, 2, 2, 2, 9, 9, 9, 9, 9], 0.3, 5),  # the steps 3 to 5 are three tenths of the ten
        ([1, 3, 3, 3, 3, 9, 9, 9, 9, 9], 0.3, 5),  # a tie is no improvement
        ([1, 3, 2, 2, 2, 9, 9, 9, 9, 9], 0.5, 10),
        ([9, 3, 2, 2, 2, 2, 2, 2, 2, 2], 0.0, 10),
    ],
)
def test_training_ends_when_nothing_improves(scores, patience, last, splits, tmp_path, monkeypatch):
    given = iter(scores)
    monkeypatch.setattr(
        objectives.SupervisedObjective,
        "judge",
        lambda *_: objectives.Verdict((score := float(next(given))), {"val_accuracy": score}),
    )
    recipe = replace(CONVNET, evaluate=steps(1), schedule=Cosine(total=steps(10)), patience=patience)
    done = run(recipe, splits, tmp_path)
    assert done.score == max(scores[:last])
    assert rows(tmp_path)[-1]["step"] == last
    assert run(recipe, splits, tmp_path, resume=True).score == done.score  # which has nothing to do
    assert rows(tmp_path)[-1]["step"] == last


def test_a_model_is_there_before_the_first_evaluation(splits, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(stepping, "take", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(PLAIN, splits, tmp_path)
    model = load_model(tmp_path / "model")
    assert torch.equal(model.deit.position, build_model(PLAIN, splits[0].classes).deit.position)


def test_masked_images_are_judged_by_their_loss_and_painted(splits, tmp_path):
    recipe = replace(
        PLAIN,
        objective=MaskedImage(unit=8),
        augment=Augment(crop=ResizedCrop()),
        evaluate=steps(5),
        schedule=Cosine(total=steps(10)),
    )
    done = run(recipe, splits, tmp_path)
    written = rows(tmp_path)
    assert done.score == -min(row["val_loss"] for row in written)
    model = load_model(done.model)
    objective = objectives.MaskedImageObjective(recipe)
    us = machine.Processes(torch.device("cpu"))
    [batch] = list(objective.validation(replace_split(splits[1]), us))[:1]
    batches = EvaluationBatches(splits[1], processor_for(recipe), 9)
    [whole] = list(batches)
    masks = torch.stack([torch.from_numpy(objective._mask(i)) for i in range(9)])
    with torch.no_grad():
        loss = model(whole.pixels, masks).loss.item()
    assert written[-1]["val_loss"] == pytest.approx(loss, abs=1e-6)
    assert torch.equal(batch.mask, masks[:8])
    pictures = sorted((tmp_path / "reconstructions").iterdir())
    assert [path.name for path in pictures] == ["update-000000005.png", "update-000000010.png"]
    shown = np.asarray(Image.open(pictures[-1]), int)
    assert shown.shape == (8 * 16, 3 * 16, 3)
    expected = (whole.pixels[0].permute(1, 2, 0).numpy() * recipe.data.std + recipe.data.mean) * 255
    np.testing.assert_allclose(shown[:16, :16], expected, atol=1)
    hidden = masks[0].reshape(4, 4).repeat_interleave(4, 0).repeat_interleave(4, 1).numpy()
    np.testing.assert_allclose(shown[:16, 32:][~hidden], expected[~hidden], atol=1)
    assert np.abs(shown[:16, 32:][hidden] - expected[hidden]).max() > 1


def replace_split(split):
    return Split(split.files, (0,) * len(split), ("image",))


# --------------------------------------------------------------------------------------------------- when it goes wrong


@pytest.mark.parametrize("when", ["evaluation", "step"])
def test_a_signal_saves_the_weights_and_not_their_average(when, splits, tmp_path):
    """SIGTERM within an evaluation, when the model has the average for its weights, or within a step."""
    recipe = replace(PLAIN, ema=0.9, augment=Augment(erase=Erase(), mix=Mix(mixup=0.8)))
    run(recipe, splits, tmp_path / "whole")
    owner, name = (
        (EvaluationBatches, "__iter__") if when == "evaluation" else (objectives.SupervisedObjective, "__call__")
    )
    with stopped_at(2, owner, name):
        run(recipe, splits, tmp_path / "broken")
    assert len(rows(tmp_path / "broken")) == (1 if when == "evaluation" else 0)
    run(recipe, splits, tmp_path / "broken", resume=True)
    one, other = end(tmp_path / "broken"), end(tmp_path / "whole")
    assert all(torch.equal(one[name], other[name]) for name in other)
    for row, expected in zip(rows(tmp_path / "broken"), rows(tmp_path / "whole"), strict=True):
        assert {key: row[key] for key in ("step", "loss", "val_accuracy")} == {
            key: expected[key] for key in ("step", "loss", "val_accuracy")
        }


def poisoned(monkeypatch, bad):
    """Makes the loss of some steps infinite."""
    honest = objectives.SupervisedObjective.__call__

    def call(self, model, batch, rows):
        found = honest(self, model, batch, rows)
        return {**found, "loss": found["loss"] * (math.inf if batch.step in bad else 1.0)}

    monkeypatch.setattr(objectives.SupervisedObjective, "__call__", call)


def test_a_loss_that_is_not_finite_skips_its_update(splits, tmp_path, monkeypatch):
    """The weights, running statistics and average are as if the step had not been."""
    recipe = replace(CONVNET, schedule=Cosine(total=steps(5)), ema=0.9)
    states = []
    update = stepping.take

    def watched(work, *rest):
        found = update(work, *rest)
        states.append(
            {name: value.clone() for name, value in work.model.state_dict().items()}
            | {f"ema.{name}": value.clone() for name, value in work.average.state().items()}
        )
        return found

    monkeypatch.setattr(stepping, "take", watched)
    poisoned(monkeypatch, {2, 3})
    run(recipe, splits, tmp_path)
    for name, before in states[1].items():
        assert torch.equal(states[2][name], before), name
        assert torch.equal(states[3][name], before), name
    assert not torch.equal(states[4]["classifier.weight"], states[1]["classifier.weight"])
    assert rows(tmp_path)[-1]["skipped"] == 2
    assert all(math.isfinite(row["loss"]) for row in rows(tmp_path) if "loss" in row)


def deciding(monkeypatch):
    """The CPU decides by itself whether to skip a step, and the loop reads its numbers one step late, as on a GPU."""
    honest = runs.prepare

    def prepare(*given):
        work, state = honest(*given)
        assert work.optimizers.can_skip
        work.decides = True
        return work, state

    monkeypatch.setattr(runs, "prepare", prepare)


LATE = replace(PLAIN, optim=AdamW(lr=1e-3, per_images=8), schedule=Cosine(total=steps(7)), ema=0.9)


def test_numbers_that_are_read_late_give_the_same_run(splits, tmp_path, monkeypatch):
    run(LATE, splits, tmp_path / "a")
    deciding(monkeypatch)
    run(LATE, splits, tmp_path / "b")
    for name, value in model_end(tmp_path / "a").items():
        torch.testing.assert_close(model_end(tmp_path / "b")[name], value, atol=1e-6, rtol=0, msg=name)
    one, other = rows(tmp_path / "a"), rows(tmp_path / "b")
    assert [row["step"] for row in one] == [row["step"] for row in other]
    for name in ("loss", "gradient_norm", "val_accuracy"):
        assert [row[name] for row in one if name in row] == pytest.approx([row[name] for row in other if name in row])


@pytest.mark.parametrize("recipe", [LATE, replace(CONVNET, optim=LATE.optim, schedule=LATE.schedule, ema=0.9)])
def test_a_device_that_decides_skips_what_is_not_finite(recipe, splits, tmp_path, monkeypatch):
    states, update = [], stepping.take

    def watched(work, *rest):
        found = update(work, *rest)
        states.append({name: value.clone() for name, value in work.model.state_dict().items()})
        states[-1] |= {f"ema.{name}": value.clone() for name, value in work.average.state().items()}
        states[-1] |= {f"optim.{name}": value.clone() for name, value in work.optimizers.state().items()}
        return found

    deciding(monkeypatch)
    monkeypatch.setattr(stepping, "take", watched)
    poisoned(monkeypatch, {2, 3})
    run(recipe, splits, tmp_path)
    for name, before in states[1].items():
        if name != "ema.updates":  # is right once the numbers are read
            assert torch.equal(states[2][name], before), name
            assert torch.equal(states[3][name], before), name
    assert any(not torch.equal(states[4][name], before) for name, before in states[1].items())
    assert states[-1]["ema.updates"] == 7 - 2
    assert rows(tmp_path)[-1]["skipped"] == 2


def test_a_device_that_decides_gives_up_too(splits, tmp_path, monkeypatch):
    deciding(monkeypatch)
    poisoned(monkeypatch, range(1, 7))
    with pytest.raises(Diverged, match="in 5 steps in a row, up to 6"):
        run(LATE, splits, tmp_path)


def test_a_run_that_only_skips_stops(splits, tmp_path, monkeypatch):
    poisoned(monkeypatch, set(range(6, 99)))
    recipe = replace(CONVNET, compute=replace(CONVNET.compute, save_minutes=0))
    with raises_saying(Diverged, "convnet", "5 steps in a row, up to 11", "Lower optim.lr (now 0.004)", "optim.clip"):
        run(replace(recipe, schedule=Cosine(total=steps(40))), splits, tmp_path)
    _, state, _ = checkpoint.restore(tmp_path / "checkpoints")
    assert state["step"] == 6
    assert all(value.isfinite().all() for value in end(tmp_path).values())
    assert load_model(tmp_path / "model").classifier.weight.isfinite().all()


def test_a_real_divergence_is_caught(splits, tmp_path):
    with raises_saying(Diverged, "was not finite"):
        run(replace(PLAIN, optim=SGD(lr=1e38, per_images=8), schedule=Cosine(total=steps(40))), splits, tmp_path)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_out_of_memory_halves_the_parts_and_changes_nothing_else(error, splits, tmp_path, monkeypatch):
    """Of batches of 8, more than two images at once fail: from the third step on, four parts."""
    recipe = replace(PLAIN, optim=SGD(lr=0.1, per_images=16), augment=Augment(mix=Mix(cutmix=1.0)))
    run(recipe, splits, tmp_path / "whole")
    honest, seen = objectives.SupervisedObjective.__call__, []

    def limited(self, model, batch, rows):
        if batch.step >= 2 and len(batch) > 2:
            raise error
        seen.append((batch.step, len(batch)))
        return honest(self, model, batch, rows)

    monkeypatch.setattr(objectives.SupervisedObjective, "__call__", limited)
    run(recipe, splits, tmp_path / "parts")
    assert seen[:6] == [(0, 8), (1, 8), (2, 2), (2, 2), (2, 2), (2, 2)]
    one, other = model_end(tmp_path / "whole"), model_end(tmp_path / "parts")
    for name in one:
        torch.testing.assert_close(other[name], one[name], atol=1e-6, rtol=0, msg=name)


def test_out_of_memory_with_single_pairs_is_said(splits, tmp_path, monkeypatch):
    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(objectives.SupervisedObjective, "__call__", fails)
    with raises_saying(RuntimeError, "out of memory with micro-batches of 2 images", "compute.checkpoint_blocks=True"):
        run(PLAIN, splits, tmp_path)


def test_batch_normalisation_is_never_divided_in_silence(splits, tmp_path, monkeypatch):
    """Its micro-batches would have other statistics, and so other gradients."""

    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(objectives.SupervisedObjective, "__call__", fails)
    with raises_saying(
        RuntimeError,
        "out of memory with 8 images at once",
        "batch normalisation",
        "would train another model",
        "set data.batch below 8",
    ):
        run(CONVNET, splits, tmp_path)
    with raises_saying(ValueError, "compute.accumulate is 2", "batch normalisation", "compute.accumulate=1"):
        replace(CONVNET, compute=replace(CONVNET.compute, accumulate=2))


@pytest.mark.parametrize("objective", [Supervised(smoothing=0.1), MaskedImage(unit=8)], ids=["accuracy", "masked"])
def test_an_evaluation_survives_lack_of_memory_with_the_same_score(objective, splits, tmp_path, monkeypatch):
    """Of the 9 validation images, 3 at once fit; this is said once in the run and remembered."""
    recipe = replace(PLAIN, objective=objective, evaluate=steps(5))
    run(recipe, splits, tmp_path / "whole")
    kind = type(build_model(recipe, splits[0].classes))
    honest, seen, said = kind.forward, [], []

    def limited(self, pixels, *rest, **options):
        if not self.training:
            seen.append(len(pixels))
            if len(pixels) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return honest(self, pixels, *rest, **options)

    monkeypatch.setattr(kind, "forward", limited)
    monkeypatch.setattr(progress.Reporter, "say", lambda self, sentence: said.append(sentence))
    run(recipe, splits, tmp_path / "parts")
    assert [sentence for sentence in said if "memory" in sentence] == [
        f"out of memory: {now} images are now computed at once instead of {before}; the answers stay the same"
        for now, before in ((4, 8), (2, 4))
    ]
    assert seen == [8, 4, 2, 2, 2, 2, 1] + [2, 2, 2, 2, 1] * (len(seen) // 5 - 1)
    one, other = rows(tmp_path / "whole"), rows(tmp_path / "parts")
    for name in ("val_accuracy", "val_loss"):
        assert [row.get(name) for row in one] == pytest.approx([row.get(name) for row in other], abs=1e-6)
    assert all(
        torch.equal(value, model_end(tmp_path / "parts")[name]) for name, value in model_end(tmp_path / "whole").items()
    )


def test_other_errors_are_not_taken_for_lack_of_memory(splits, tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(objectives.SupervisedObjective, "__call__", fails)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run(PLAIN, splits, tmp_path)


def many(tmp_path, count, bad):
    """`count` photos of two classes, of which `bad` can't be read."""
    folder = photos(
        photos(tmp_path / "many", count=count // 2, classes="ab", size=8), split="val", count=2, classes="ab", size=8
    )
    for path in sorted((folder / "train" / "a").iterdir())[:bad]:
        path.write_bytes(path.read_bytes()[:20])
    return read_data(folder, holdout=0.1, seed=0)


def test_an_unreadable_image_is_named_counted_and_replaced(tmp_path):
    shown = Console(file=open(tmp_path / "shown.txt", "w"), width=1000)  # noqa: SIM115
    recipe = replace(CONVNET, data=Data(batch=40), schedule=Cosine(total=epochs(3)))
    train(recipe, *many(tmp_path, 200, 2), tmp_path / "run", device="cpu", console=shown)
    shown.file.close()
    text = Path(tmp_path / "shown.txt").read_text()
    assert text.count("Another image stands in for it") == 2
    assert str(tmp_path / "many" / "train" / "a" / "0.png") in text
    assert [row["bad_images"] for row in rows(tmp_path / "run")] == [2, 2, 2]


def test_too_many_unreadable_images_stop_the_run(tmp_path):
    recipe = replace(CONVNET, data=Data(batch=40), schedule=Cosine(total=epochs(3)))
    with raises_saying(BadImages, "3 of 200 images can't be read, more than 1 %", "train/a/", "Replace or remove"):
        run(recipe, many(tmp_path, 200, 3), tmp_path / "run")


def test_a_full_disk_stops_the_run_and_keeps_what_was_saved(splits, tmp_path, monkeypatch):
    save, calls = checkpoint.save_file, []

    def full(*given):
        calls.append(1)
        if len(calls) > 3:
            raise OSError(28, "No space left on device")
        save(*given)

    monkeypatch.setattr(checkpoint, "save_file", full)
    recipe = replace(CONVNET, compute=replace(CONVNET.compute, save_minutes=0))
    with raises_saying(OSError, "No space left on device", "step-000000003.safetensors is untouched", "--resume"):
        run(recipe, splits, tmp_path)
    monkeypatch.setattr(checkpoint, "save_file", save)
    run(recipe, splits, tmp_path, resume=True)
    run(recipe, splits, tmp_path / "whole")
    one, other = end(tmp_path), end(tmp_path / "whole")
    assert all(torch.equal(one[name], other[name]) for name in other)


# ----------------------------------------------------------------------------------------------------------------- time


def test_the_schedule_is_planned_to_fit_the_time(splits, tmp_path, monkeypatch):
    """A step that takes 20 ms: of 10,000, about a hundred fit into three seconds, with as much of them warm-up as
    before, and the record repeats the run without the clock."""
    honest = objectives.SupervisedObjective.__call__

    def slow(self, *given):
        loop.time.sleep(0.02)
        return honest(self, *given)

    monkeypatch.setattr(objectives.SupervisedObjective, "__call__", slow)
    recipe = replace(CONVNET, schedule=Cosine(total=steps(10_000), warmup=steps(1_000)), evaluate=steps(50))
    began = loop.time.perf_counter()
    run(recipe, splits, tmp_path / "planned", minutes=3 / 60)
    assert loop.time.perf_counter() - began < 4
    planned = Recipe.from_dict(json.loads((tmp_path / "planned" / "recipe.json").read_text()))
    total = planned.schedule.total.in_steps(1)
    assert 20 < total < 150
    assert planned.schedule.warmup.in_steps(1) == round(total / 10)
    assert planned == replace(recipe, schedule=planned.schedule)
    assert rows(tmp_path / "planned")[-1]["step"] <= total
    if rows(tmp_path / "planned")[-1]["step"] == total:
        monkeypatch.setattr(objectives.SupervisedObjective, "__call__", honest)
        run(planned, splits, tmp_path / "again")
        one, other = end(tmp_path / "planned"), end(tmp_path / "again")
        assert all(torch.equal(one[name], other[name]) for name in other)


class Bursts:
    """A stream of batches as loader processes give them: each loader makes one in `each` seconds of the fake clock, and
    holds at most two that are ready. So `workers` batches come at once, and then the loop waits for long."""

    def __init__(self, batches, clock, workers, each):
        self.batches, self.clock, self.workers, self.each = batches, clock, workers, each

    def __getattr__(self, name):
        return getattr(self.batches, name)

    def from_step(self, step, **options):
        ready = [0.0] * self.workers  # when each loader finishes its next batch
        taken = []
        for number, batch in enumerate(self.batches.from_step(step, **options)):
            loader = number % self.workers
            room = taken[number - 2 * self.workers] if number >= 2 * self.workers else 0.0
            ready[loader] = max(ready[loader], room) + self.each
            self.clock.now = max(self.clock.now, ready[loader])
            taken.append(self.clock.now)
            yield batch


@pytest.mark.parametrize(("workers", "each"), [(6, 0.6), (3, 1.5), (1, 0.1), (6, 0.05)])
def test_the_plan_counts_the_waits_between_bursts(workers, each, splits, tmp_path, monkeypatch):
    """Steps of 10 ms and loaders that need `each` for a batch: a step takes max(10 ms, each / workers)."""
    clock = SimpleNamespace(now=0.0)
    honest, prepare = stepping.take, runs.prepare

    def slow(*given):
        clock.now += 0.01
        return honest(*given)

    def prepared(*given):
        work, state = prepare(*given)
        return replace(work, batches=Bursts(work.batches, clock, workers, each)), state

    monkeypatch.setattr(budget, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(stepping, "take", slow)
    monkeypatch.setattr(runs, "prepare", prepared)
    recipe = replace(CONVNET, schedule=Cosine(total=steps(100_000)), evaluate=steps(100_000))
    us = machine.Processes(torch.device("cpu"))
    planned = budget.fitted(recipe, *splits, us, 100.0, QUIET).schedule.total.amount
    expected = 0.9 * (100 - clock.now) / max(0.01, each / workers)
    assert planned == pytest.approx(expected, rel=0.03)
    assert clock.now < 20 + 2 * each


class Costs:
    """A clock on which a step takes `step` seconds and an evaluation `judging`, and nothing else takes time."""

    def __init__(self, monkeypatch, step, judging):
        self.now, count = 0.0, math.ceil(9 / CONVNET.data.batch)
        honest_take, honest_judge = stepping.take, objectives.SupervisedObjective.judge

        def take(*given):
            self.now += step
            return honest_take(*given)

        def counted(batches):
            for batch in batches:
                self.now += judging / count
                yield batch

        def judge(self_, model, batches, *given):
            return honest_judge(self_, model, counted(batches), *given)

        monkeypatch.setattr(budget, "time", SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setattr(stepping, "take", take)
        monkeypatch.setattr(objectives.SupervisedObjective, "judge", judge)


def planned(recipe, splits, seconds, console=QUIET):
    return budget.fitted(recipe, *splits, machine.Processes(torch.device("cpu")), seconds, console)


@pytest.mark.parametrize(
    ("step", "judging", "total", "evaluate", "expected"),
    [
        # 21 images in batches of 8: an epoch is 2.625 steps. Planning takes 14 steps and 1.5 evaluations. A tenth of
        # what it leaves is kept in reserve.
        (0.1, 0.02, 10_000, None, None),  # an evaluation of 0.02 s for each 0.26 s of steps is below a tenth
        (0.1, 0.1, 10_000, None, 10),  # 8.86 s for evaluations are 88 of them, and 798 steps take the rest
        (0.1, 2.0, 10_000, None, 195),  # 8.6 s are 4 of them, and 780 steps take the rest
        (0.1, 2.0, 40, None, 10),  # all steps fit, and 4 evaluations are a tenth of the time that there is
        (0.1, 2.0, 9, None, None),  # the 4 evaluations of the recipe are as many
        (0.1, 30.0, 10_000, None, 182),  # one evaluation takes more than a tenth, so there is one alone, at the end
        (0.1, 2.0, 10_000, epochs(1), epochs(1)),  # what the recipe says counts
        (0.1, 2.0, 10_000, steps(20), steps(20)),
    ],
)
def test_evaluations_take_a_tenth_of_the_time(step, judging, total, evaluate, expected, splits, monkeypatch, capsys):
    seconds = 100.0
    recipe = replace(CONVNET, schedule=Cosine(total=steps(total)), evaluate=evaluate)
    costs = Costs(monkeypatch, step, judging)
    found = planned(recipe, splits, seconds, Console(stderr=True, width=40))
    said = capsys.readouterr().err
    assert found.evaluate == (steps(expected) if isinstance(expected, int) else expected)
    length = min(total, found.schedule.total.in_steps(1))
    every = 21 / 8 if found.evaluate in (None, epochs(1)) else found.evaluate.amount
    taken = sum(1 for n in range(1, length + 1) if n == length or n // every > (n - 1) // every)
    assert costs.now + length * step + taken * judging <= seconds
    chosen = isinstance(expected, int)
    if chosen and taken > 1:
        available = 0.9 * (seconds - costs.now)
        assert taken * judging <= 0.1 * available
        assert math.ceil(length / (expected - 1)) * judging > 0.1 * available  # one step less would be too often
    count = f"with {taken} evaluation{'s' * (taken != 1)}, because one after each epoch would take more than a tenth"
    assert (count in said) == chosen


@pytest.mark.parametrize(("step", "taken"), [(40.0, 1), (20.0, 2), (11.0, 3)])
def test_planning_ends_with_the_time(step, taken, splits, monkeypatch):
    costs = Costs(monkeypatch, step, 1.0)
    with raises_saying(budget.TooShort, f"a step takes about {step} s", "of 30 s after they were measured"):
        planned(CONVNET, splits, 30.0)
    assert costs.now == pytest.approx(taken * step + 1.5)


def test_a_run_with_rarer_evaluations_goes_on_as_it_began(splits, tmp_path, monkeypatch):
    """The interval that the time gave stands in the record. The same command goes on with it, with or without a time,
    and so does one that repeats the record."""
    recipe = replace(CONVNET, schedule=Cosine(total=steps(12)), compute=replace(CONVNET.compute, save_minutes=0))
    with monkeypatch.context() as costs:
        Costs(costs, 0.1, 3.0)
        whole = run(recipe, splits, tmp_path / "whole", minutes=100 / 60)
    written = json.loads((tmp_path / "whole" / "recipe.json").read_text())
    assert Recipe.from_dict(written) == replace(recipe, evaluate=steps(6))
    assert [row["step"] for row in rows(tmp_path / "whole")] == [6, 12]
    for name, again in {"timed": recipe, "untimed": recipe, "repeated": Recipe.from_dict(written)}.items():
        out = tmp_path / name
        shutil.copytree(tmp_path / "whole", out)
        for path in checkpoint.saved(out / "checkpoints")[1:]:  # as if it had stopped after an earlier step
            path.unlink()
        options = {"minutes": 10} if name == "timed" else {}
        assert run(again, splits, out, resume=True, **options).score == whole.score
        assert json.loads((out / "recipe.json").read_text()) == written
        assert [row["step"] for row in rows(out)] == [6, 12]
        assert all(torch.equal(end(out)[key], value) for key, value in end(tmp_path / "whole").items())
    with raises_saying(ValueError, "evaluate.amount is 6.0 there and 1.0 here", "continue with its own recipe"):
        run(replace(recipe, evaluate=epochs(1)), splits, tmp_path / "whole", resume=True, minutes=1)


def test_a_run_that_recorded_an_epoch_goes_on(splits, tmp_path):
    """Earlier records say `epochs(1)` where the recipe says nothing."""
    recipe = replace(CONVNET, schedule=Cosine(total=steps(12)))
    run(replace(recipe, evaluate=epochs(1)), splits, tmp_path)
    record = (tmp_path / "recipe.json").read_text()
    run(recipe, splits, tmp_path, resume=True)
    assert (tmp_path / "recipe.json").read_text() == record


def test_patience_with_rarer_evaluations(splits, tmp_path, monkeypatch):
    """Ten evaluations of 1,000 steps in a tenth of the time. The third is the best, so half of the schedule ends with
    the eighth."""
    recipe = replace(CONVNET, schedule=Cosine(total=steps(10_000)), patience=0.5)
    Costs(monkeypatch, 0.1, 1.0)
    recipe = planned(recipe, splits, 123.0)
    total, every = recipe.schedule.total.in_steps(1), recipe.evaluate.in_steps(1)
    assert math.ceil(total / every) == 10
    given = iter([1, 2, 9, 3, 4, 5, 6, 7, 8, 8])
    monkeypatch.setattr(
        objectives.SupervisedObjective,
        "judge",
        lambda *_: objectives.Verdict((score := float(next(given))), {"val_accuracy": score}),
    )
    assert run(recipe, splits, tmp_path).score == 9
    assert rows(tmp_path)[-1]["step"] == 8 * every


@pytest.mark.parametrize("seconds", [7.0, 30.0, 31.0, 33.0, 1000.0])
@pytest.mark.parametrize("evaluate", [steps(40), None])
def test_reading_counts_once(evaluate, seconds):
    """Against a clock that goes from step to step: images are read in the first 20 steps and in the first evaluation,
    and the run ends with one more evaluation."""
    costs = budget.Costs(step=0.25, reading=1.0, unread=20, judging=0.5, first=2.0)
    work = SimpleNamespace(recipe=SimpleNamespace(evaluate=evaluate), every=40.0 if evaluate else 1.0, total=100_000)
    found, interval = costs.choice(seconds, work)
    assert bool(interval) == (evaluate is None)
    evaluations = 1 + found / 40 if evaluate else math.ceil(found / interval)
    now, taken = 2.0 + 0.5 * evaluations, 0
    while now <= seconds:
        now += 0.25 + (taken < 20)
        taken += now <= seconds
    assert taken == pytest.approx(found, abs=1, rel=0.005)


def test_a_whole_run_takes_its_steps_its_evaluations_and_the_first_reading():
    costs = budget.Costs(step=0.25, reading=1.0, unread=20, judging=0.5, first=2.0)
    assert costs.whole(SimpleNamespace(every=40.0, total=100)) == pytest.approx(100 * 0.25 + 20 * 1.0 + 3 * 0.5 + 2.0)
    assert costs.whole(SimpleNamespace(every=40.0, total=10)) == pytest.approx(10 * 0.25 + 10 * 1.0 + 0.5 + 2.0)


def test_kept_images_are_read_once_and_timed_once(splits, tmp_path, monkeypatch):
    """On a clock on which to read an image takes a second, and nothing else takes time but a step."""
    now, honest, take = [0.0], batching.read, stepping.take

    def slow(file):
        now[0] += 1.0
        return honest(file)

    def stepped(*given):
        now[0] += 0.1
        return take(*given)

    monkeypatch.setattr(batching, "read", slow)
    monkeypatch.setattr(stepping, "take", stepped)
    for module in (budget, batching):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    batches = batching.TrainingBatches(splits[0], CONVNET)
    assert batches.keeps
    assert batches.reading_seconds() == pytest.approx(1.0)
    assert now[0] == len(splits[0])
    recipe = replace(CONVNET, schedule=Cosine(total=steps(100_000)), evaluate=steps(100_000))
    length = planned(recipe, splits, 1000.0).schedule.total.amount
    left = 0.9 * (1000 - (now[0] - len(splits[0])))
    assert length == pytest.approx((left - len(splits[0])) / 0.1, rel=0.01)


def test_a_recipe_that_fits_is_left_alone_and_one_that_cannot_is_refused(splits, tmp_path):
    run(CONVNET, splits, tmp_path / "fits", minutes=10)
    assert Recipe.from_dict(json.loads((tmp_path / "fits" / "recipe.json").read_text())) == CONVNET
    with raises_saying(TooShort, "fits into the 0 s that are left of 0 s after they were measured", "give more time"):
        run(CONVNET, splits, tmp_path / "never", minutes=1e-6)
    assert not (tmp_path / "never" / "metrics.jsonl").exists()


def test_time_that_runs_out_ends_with_an_evaluation(splits, tmp_path, monkeypatch):
    """The plan was too hopeful: steps became slower."""
    monkeypatch.setattr(budget, "fitted", lambda recipe, *_: recipe)
    recipe = replace(CONVNET, schedule=Cosine(total=steps(10_000)), evaluate=steps(5000))
    run(recipe, splits, tmp_path, minutes=0.3 / 60)
    written = rows(tmp_path)
    assert written[-1]["step"] < 10_000
    assert "val_accuracy" in written[-1]
    assert checkpoint.restore(tmp_path / "checkpoints")[1]["step"] == written[-1]["step"]


# ------------------------------------------------------------------------------------------------- what a person sees


def test_progress_and_estimate(splits, tmp_path):
    shown = Console(file=open(tmp_path / "shown.txt", "w"), width=200)  # noqa: SIM115
    recipe = replace(CONVNET, schedule=Cosine(total=steps(30)), evaluate=steps(15))
    train(recipe, *splits, tmp_path / "run", device="cpu", console=shown)
    shown.file.close()
    lines = (tmp_path / "shown.txt").read_text().splitlines()
    lines = [line for line in lines if "waiting for images" not in line]  # depends on the machine
    assert lines[0].startswith("convnet: 30 steps of 8 images, ")
    assert lines[1].startswith("a checkpoint takes ")
    assert lines[2].startswith("20 steps of 8 images to go: about ")
    assert "images/s" in lines[2]
    assert len(lines) == 5
    for line, step in zip(lines[3:], (15, 30), strict=True):
        assert f"step {step} of 30: loss " in line
        for part in ("accuracy", "val ", "images/s", "GiB"):
            assert part in line


def test_the_rate_counts_the_waits_between_bursts(tmp_path):
    """Six batches at once, then a wait: 60 steps in 60 seconds. The first two steps took a minute each."""
    us = machine.Processes(torch.device("cpu"))
    with progress.Reporter(tmp_path, CONVNET, us, QUIET, done=0, total=99, written=0) as reporter:
        for step in range(1, 63):
            seconds = 60.0 if step <= 2 else 5.5 if step % 6 == 2 else 0.1
            reporter.advance(step, {}, seconds, 0.0)
            if step > 20:
                assert reporter.rate == pytest.approx(8, rel=0.25)
    assert reporter.rate == pytest.approx(8, rel=0.1)


def test_waiting_is_a_share_of_the_steps_since_the_last_row(tmp_path):
    """Without the first two steps, which start things. A row after no step repeats the share."""
    us = machine.Processes(torch.device("cpu"))
    with progress.Reporter(tmp_path, CONVNET, us, QUIET, done=0, total=99, written=0) as reporter:
        for step in range(1, 11):
            reporter.advance(step, {}, *((50.0, 40.0) if step <= 2 else (2.0, 0.5)))
        reporter.row({"step": 10})
        reporter.row({"step": 10})
        for step in range(11, 15):
            reporter.advance(step, {}, 1.0, 0.9)
        reporter.row({"step": 14})
    assert [row["waiting"] for row in rows(tmp_path)] == [0.25, 0.25, 0.9]


@pytest.mark.parametrize(("waited", "said"), [(0.3, False), (0.6, True)])
def test_a_run_that_waits_for_images_says_so_once(splits, tmp_path, monkeypatch, waited, said):
    """After the first epoch, or ten steps if that is more."""
    told = []
    monkeypatch.setattr(Reporter, "say", lambda self, sentence: told.append(sentence))
    advance = Reporter.advance
    monkeypatch.setattr(Reporter, "advance", lambda self, step, numbers, *_: advance(self, step, numbers, 1.0, waited))
    recipe = replace(CONVNET, schedule=Cosine(total=steps(30)), evaluate=steps(30))
    train(replace(recipe, compute=replace(recipe.compute, workers=0)), *splits, tmp_path / "run", device="cpu")
    found = [sentence for sentence in told if "waiting for images" in sentence]
    assert len(found) == said
    if said:
        assert found[0].startswith("60% of the time went by waiting for images; set compute.workers above 0")


@pytest.mark.parametrize(("seconds", "text"), [(5, "5 s"), (89, "89 s"), (300, "5 min"), (2 * 3600, "2.0 h")])
def test_spans(seconds, text):
    assert records.span(seconds) == text


def test_precision(monkeypatch):
    cpu = torch.device("cpu")
    assert machine.resolve_precision("float32", cpu) == torch.float32
    assert machine.resolve_precision("bfloat16", cpu) == torch.bfloat16
    for native, expected in [(True, torch.bfloat16), (False, torch.float32)]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda native=native: {"avx512_bf16": native})
        assert machine.resolve_precision("auto", cpu) == expected


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.resolve_device("auto") == torch.device("cpu")
    with raises_saying(ValueError, "sees no GPU here", "--device cpu"):
        machine.resolve_device("cuda")


def test_distillation_needs_a_teacher(splits, tmp_path):
    recipe = replace(PLAIN, model=small(num_labels=None), objective=Distilled())
    with raises_saying(ValueError, "distils but names no teacher", "objective.teacher", "objective.cache"):
        run(recipe, splits, tmp_path)


GRAPHS = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
"""PyTorch's compiler looks at every tensor, and hides this warning in its own way."""


def quick(monkeypatch):
    """Compilation without a compiler: graphs are computed eagerly, and counted."""
    torch._dynamo.reset()
    counters.clear()
    honest = compiling.compile_parts
    monkeypatch.setattr(compiling, "compile_parts", lambda model: honest(model, backend="eager"))
    return replace(PLAIN, compute=replace(PLAIN.compute, compile=True))


@GRAPHS
def test_compiled_blocks_train(splits, tmp_path, monkeypatch):
    """The blocks give the run that they give without compilation, and the weights keep their names."""
    run(quick(monkeypatch), splits, tmp_path / "a")
    run(replace(PLAIN, compute=replace(PLAIN.compute, compile=False)), splits, tmp_path / "b")
    one, other = model_end(tmp_path / "a"), model_end(tmp_path / "b")
    assert one.keys() == other.keys()
    assert counters["stats"]["unique_graphs"] > 0
    for name, value in other.items():
        if not name.endswith("qkv.bias"):  # the keys' part has no gradient but rounding errors
            torch.testing.assert_close(one[name], value, atol=1e-4, rtol=0, msg=name)


@GRAPHS
def test_few_graphs_serve_all_sizes_of_micro_batches(splits, tmp_path, monkeypatch):
    """Three for micro-batches of 8, three for the smaller ones, and two for an evaluation of 8 images.

    The evaluation's last batch has one image. PyTorch compiles that number by itself, so there are two more.
    """
    honest, sizes, said = objectives.SupervisedObjective.__call__, set(), []

    def limited(self, model, batch, draws):
        if len(batch) > 8 >> batch.step // 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.add(len(batch))
        return honest(self, model, batch, draws)

    recipe = replace(quick(monkeypatch), schedule=Cosine(total=steps(6)), evaluate=steps(2))
    monkeypatch.setattr(objectives.SupervisedObjective, "__call__", limited)
    monkeypatch.setattr(progress.Reporter, "say", lambda self, sentence: said.append(sentence))
    run(recipe, splits, tmp_path)
    assert sizes == {8, 4, 2}
    assert counters["stats"]["unique_graphs"] == 3 + 3 + 2 + 2
    assert not [sentence for sentence in said if "torch.compile" in sentence]


@GRAPHS
def test_the_limit_of_graphs_is_said_once(splits, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(progress.Reporter, "say", lambda self, sentence: said.append(sentence))
    recipe = quick(monkeypatch)
    monkeypatch.setattr(compiling, "_GRAPHS", 2)
    run(recipe, splits, tmp_path)
    [sentence] = [sentence for sentence in said if "torch.compile" in sentence]
    assert "has met its limit of graphs" in sentence
    assert "compute.compile=False" in sentence


@pytest.mark.parametrize(
    ("setting", "device", "recipe", "expected"),
    [
        (None, "cuda", PLAIN, True),
        (None, "cpu", PLAIN, False),
        (None, "cuda", CONVNET, False),
        (False, "cuda", PLAIN, False),
        (True, "cpu", CONVNET, True),
    ],
)
def test_what_is_compiled_if_the_recipe_leaves_it_open(setting, device, recipe, expected, monkeypatch):
    model = build_model(recipe, "abc")
    monkeypatch.setattr(compiling, "find_spec", lambda name: name)
    monkeypatch.setattr(compiling.shutil, "which", lambda name: name if name == "gcc" else None)
    us = machine.Processes(torch.device(device))
    assert compiling.wanted(setting, model, us, 2000) is expected
    assert compiling.wanted(setting, model, us, 1999) is (setting is True)  # too short to pay
    monkeypatch.setattr(compiling.shutil, "which", lambda _: None)
    assert compiling.wanted(setting, model, us, 2000) is (setting is True)  # no C compiler
