"""A linear probe: a linear head on the features of a frozen model. N images, D features, C classes.

The features are what goes into the model's own head. They are computed once, without augmentation, and kept in this
user's cache. Logistic regression on them takes seconds. The fitted head becomes the model's own, so the result is an
ordinary model.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from deit import files, host
from deit.data.batches import EvaluationBatches, Faults, processor_for
from deit.data.folders import Split, fingerprint
from deit.machine import Processes, resolve_precision
from deit.model.timm_classifier import TimmClassifier
from deit.recipe import LinearProbe, Recipe
from deit.train.build import build_model
from deit.train.labels import VIEWS_VERSION
from deit.train.objectives import ClassificationObjective
from deit.train.progress import Reporter
from deit.train.records import amount, span

_COUNTED = 5000
"""Largest number of images that cross-validation uses, drawn at random. The choice is as sure with so many."""
_ITERATIONS = 300
"""Largest number of iterations of a fit."""
_LEAST = 0.1
"""Least standard deviation that a feature is divided by, as a part of the median one."""
_SOON = 3.0
"""Seconds after which it is said how long the images will take."""


def learn(
    recipe: Recipe, splits: tuple[Split, Split], us: Processes, reporter: Reporter
) -> tuple[nn.Module, dict[str, float]]:
    """Fits the head of the model that `recipe` starts from. Returns the model, and the numbers of the only row of
    metrics.

    Raises `ValueError` if the model's head is not a linear layer, or if too many images can't be read, and
    `ImportError` without scikit-learn.
    """
    assert isinstance(recipe.objective, LinearProbe)
    _solver()
    train, validation = splits
    most = recipe.objective.images
    if most is not None and most < len(train):
        train = train.take(drawn(train.labels, most, recipe.seed).tolist())
    settings = recipe.objective
    objective = ClassificationObjective(recipe, settings.class_weights, splits[0], us.device)
    for sentence in objective.introduction(nn.Identity(), validation, us):
        reporter.say(sentence)
    model = build_model(recipe, train.classes).to(us.device).eval()
    heads = linear_heads(model)
    features, labels = _cached(recipe, train, model, us, reporter)
    strength, accuracy = choose(features[0], labels, settings, recipe.seed)
    crossed = {"cross_validation": accuracy} if (folds := _folds(labels, settings)) else {}
    reporter.say(
        f"C={strength:g} is right on {accuracy:.3f} of the training images in {folds}-fold cross-validation"
        if folds
        else f"C={strength:g}, the least, because cross-validation needs a class with two training images"
    )
    for head, values in zip(heads, features, strict=True):
        weight, bias = fit(values, labels, len(train.classes), strength, settings.class_weights)
        with torch.no_grad():
            head.weight.copy_(torch.from_numpy(weight))
            head.bias.copy_(torch.from_numpy(bias))
    verdict = objective.judge(
        model, objective.validation(validation, us), us, resolve_precision(recipe.compute.precision, us.device)
    )
    return model, {"strength": strength, **crossed, **verdict.numbers}


def drawn(labels: Sequence[int], most: int, seed: int) -> np.ndarray:
    """The numbers of `most` images, drawn at random, in rising order. An image of each class is among them, as long as
    there are enough."""
    order = np.random.default_rng(seed).permutation(len(labels))
    first = np.sort(np.unique(np.asarray(labels)[order], return_index=True)[1])  # the places of each class's first
    return np.sort(np.concatenate([order[first], np.delete(order, first)])[:most])


def linear_heads(model: nn.Module) -> list[nn.Linear]:
    """The layers that turn features into logits: one, or two for a distilled DeiT."""
    if isinstance(model, TimmClassifier):
        found = [model.model.get_classifier()]
    else:
        names = ("classifier", "cls_classifier", "distillation_classifier")
        found = [getattr(model, name) for name in names if hasattr(model, name)]
    for head in found:
        if not isinstance(head, nn.Linear):
            raise ValueError(
                f"a linear probe needs a model whose head is a linear layer with a bias, found {type(head).__name__}; "
                "choose another architecture, or train it with objective=Supervised()"
            )
    return found


def choose(features: np.ndarray, labels: np.ndarray, probe: LinearProbe, seed: int) -> tuple[float, float]:
    """The strength with the smallest log loss in stratified cross-validation, and the accuracy there. The accuracy
    itself would choose among near ties by chance. `features` (N, D), `labels` (N,).

    If no class has two images, it is the least strength, and the accuracy is NaN.
    """
    from sklearn.model_selection import StratifiedKFold

    if len(labels) > _COUNTED:
        kept = np.sort(np.random.default_rng(seed).permutation(len(labels))[:_COUNTED])
        features, labels = features[kept], labels[kept]
    strengths, classes = sorted(probe.strengths), int(labels.max()) + 1
    folds = _folds(labels, probe)
    if not folds:
        return strengths[0], float("nan")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)  # it is told before training
        parts = list(StratifiedKFold(folds, shuffle=True, random_state=seed).split(features, labels))
    right, losses = np.zeros((2, len(strengths)))
    for learnt, judged in parts:
        found = _fits(features[learnt], labels[learnt], classes, strengths, probe.class_weights)
        for number, (weight, bias) in enumerate(found):
            logits = torch.from_numpy(features[judged] @ weight.T + bias)
            truth = torch.from_numpy(labels[judged])
            right[number] += int((logits.argmax(1) == truth).sum())
            losses[number] += float(nn.functional.cross_entropy(logits, truth, reduction="sum"))
    best = int(losses.argmin())
    return strengths[best], float(right[best]) / len(labels)


def _folds(labels: np.ndarray, probe: LinearProbe) -> int:
    """Number of parts in cross-validation: no more than the largest class has images. 0 if that is one image."""
    most = int(np.bincount(labels).max())
    return min(probe.folds, most) if most > 1 else 0


def fit(
    features: np.ndarray, labels: np.ndarray, classes: int, strength: float, class_weights: str = "equal"
) -> tuple[np.ndarray, np.ndarray]:
    """Weights (C, D) and biases (C,) of logistic regression on `features` (N, D) with `labels` (N,).

    The features are standardised for the fit, and the result is for the features as they are. A class without an image
    gets no weights and the bias of the least likely class, less 10, so that it is never the answer.

    A feature whose standard deviation is below a tenth of the median one is divided by that tenth. With few images,
    some features hardly vary by chance, and would otherwise decide about other images.
    """
    [found] = _fits(features, labels, classes, [strength], class_weights)
    return found


def _fits(
    features: np.ndarray, labels: np.ndarray, classes: int, strengths: Sequence[float], class_weights: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields `fit` for each of the rising strengths. Each fit begins where the one before ended."""
    from threadpoolctl import threadpool_limits  # which scikit-learn needs too

    # Threads win little on small matrices. On cores that others use too, waiting for each other costs up to fifty times
    # as much as it gains.
    threads = 1 if len(features) <= _COUNTED else None
    mean, deviation = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64)
    varying = deviation[deviation > 1e-12]
    deviation = np.maximum(deviation, _LEAST * np.median(varying) if len(varying) else 1.0)
    standardised = ((features - mean) / deviation).astype(np.float32)
    weighing = "balanced" if class_weights == "balanced" else None
    if len(seen := np.unique(labels)) == 1:  # without another class, there is nothing to fit
        bias = np.where(np.arange(classes) == seen, 0.0, -10.0)
        yield from [(np.zeros((classes, features.shape[1])), bias)] * len(strengths)
        return
    solver = _solver()(max_iter=_ITERATIONS, warm_start=True, class_weight=weighing)
    for strength in strengths:
        solver.set_params(C=strength)
        with warnings.catch_warnings(), threadpool_limits(threads):
            warnings.filterwarnings("ignore", category=_not_converged())  # then it is close enough for a decision
            solver.fit(standardised, labels)
        scaled, offsets = (values.astype(np.float64) for values in (solver.coef_, solver.intercept_))
        if len(solver.classes_) == 2:  # scikit-learn gives the difference of the two logits
            scaled, offsets = np.concatenate([-scaled, scaled]) / 2, np.concatenate([-offsets, offsets]) / 2
        weight, bias = np.zeros((classes, features.shape[1])), np.full(classes, offsets.min() - 10)
        weight[solver.classes_] = scaled / deviation
        bias[solver.classes_] = offsets - weight[solver.classes_] @ mean
        yield weight, bias


def _solver() -> Any:
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise host.missing("a linear probe needs scikit-learn", "fit") from None
    return LogisticRegression


def _not_converged() -> type[Warning]:
    from sklearn.exceptions import ConvergenceWarning

    return ConvergenceWarning


def _cached(
    recipe: Recipe, split: Split, model: Any, us: Processes, reporter: Reporter
) -> tuple[list[np.ndarray], np.ndarray]:
    """The features (N, D) in front of each head and the labels (N,) of a split, from the cache if they are there."""
    try:
        cache = files.cache_folder("features")
    except OSError as error:
        reporter.say(f"the features are not kept for other runs: {error}")
        return _computed(recipe, split, model, us, reporter)
    file = cache / f"{_digest(recipe, split, model)}.safetensors"
    if file.is_file() and files.only_mine(file):
        with suppress(Exception):  # a damaged file is written anew
            kept = load_file(file)
            os.utime(file)
            reporter.say(f"the features of {len(split)} images come from {file}")
            return [kept[f"features.{number}"] for number in range(len(kept) - 1)], kept["labels"]
    features, labels = _computed(recipe, split, model, us, reporter)
    try:
        with files.replacing(file) as temporary:
            kept = {f"features.{number}": each for number, each in enumerate(features)} | {"labels": labels}
            save_file(kept, temporary)
        files.forget_unused(cache)
    except OSError as error:  # they are here, and only another run would gain by the file
        reporter.say(f"the features are not kept for other runs: {file}: {getattr(error, 'reason', error)}")
    return features, labels


def _digest(recipe: Recipe, split: Split, model: Any) -> str:
    """A hash of everything that decides the features."""
    parts = [
        VIEWS_VERSION,
        fingerprint(split),
        processor_for(recipe).to_dict(),
        recipe.compute.precision,
        model.config.to_dict(),
    ]
    found = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
    heads = {id(parameter) for head in linear_heads(model) for parameter in head.parameters()}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in heads:
            found.update(name.encode())
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()[:32]


@torch.inference_mode()
def _computed(
    recipe: Recipe, split: Split, model: Any, us: Processes, reporter: Reporter
) -> tuple[list[np.ndarray], np.ndarray]:
    """One pass over the images. Those that can't be read are told and left out."""
    batches = EvaluationBatches(
        split, processor_for(recipe), recipe.data.batch, keep=False, workers=recipe.compute.workers, device=us.device
    )
    precision = resolve_precision(recipe.compute.precision, us.device)
    heads = linear_heads(model)
    seen: list[list[np.ndarray]] = [[] for _ in heads]
    labels: list[np.ndarray] = []
    faults = Faults(len(split))
    hooks = [head.register_forward_pre_hook(_keeping(seen[number])) for number, head in enumerate(heads)]
    dimensions = sum(head.in_features for head in heads)
    reporter.say(
        f"{len(split):,} images go once through the frozen model; their features take "
        f"{amount(4 * dimensions * len(split))} of memory, and as much in the cache"
    )
    began, done, told = time.perf_counter(), 0, False
    try:
        for batch in batches:
            for file, reason in faults.add(batch.faults):
                reporter.say(f"{file} {reason}. It is left out")
            with torch.autocast(us.device.type, precision, enabled=precision != torch.float32):
                model(batch.to(us.device).pixels)
            labels.append(batch.labels.numpy())
            done, seconds = done + len(batch.labels), time.perf_counter() - began
            reporter.looked(done, len(split), done / seconds)
            if not told and seconds > _SOON and done < len(split):
                told = True
                reporter.say(
                    f"{len(split) - done:,} images to go: about {span(seconds * (len(split) - done) / done)} at "
                    f"{done / seconds:.0f} images/s, then seconds for the head; the evaluation is not counted"
                )
    finally:
        for hook in hooks:
            hook.remove()
    readable = np.concatenate(labels) >= 0
    seconds = time.perf_counter() - began
    reporter.say(f"{len(split)} images went through the frozen model: {len(split) / seconds:.0f} images/s")
    return [np.concatenate(each)[readable] for each in seen], np.concatenate(labels)[readable]


def _keeping(place: list[np.ndarray]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        place.append(inputs[0].float().cpu().numpy())

    return keep
