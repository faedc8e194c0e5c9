"""Teachers: any trained classifier, adapted to the student's images and classes. B images, C classes."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deit import files, host
from deit.config import DeiTConfig, TimmConfig, read_config
from deit.data.batches import EvaluationBatches, processor_for
from deit.data.folders import Split, nfc
from deit.evaluate.models import evaluate
from deit.evaluate.scores import Accuracy
from deit.machine import Processes, Rows
from deit.model.load import load_classifier
from deit.model.network import PreTrained
from deit.model.timm_classifier import refuse_larger
from deit.recipe import Distilled, Recipe, is_code
from deit.train.guidance import MapReader
from deit.weights import hub

_JUDGED = 512
"""Largest number of validation images that a teacher is tried on before a run."""
_MEASURED = 64
"""Number of training images on which its feature maps are measured."""
TINY = 2.0**-24
"""Smallest probability of a kept class, or of all other classes together: float16's smallest number."""


class Teacher:
    """A frozen classifier that sees the student's batch with its own normalisation, channels and resolution.

    The teacher answers to the student's augmented and mixed batch (Touvron et al. 2020, section 4). The student's
    normalisation is replaced by the teacher's. A grey image is repeated if the teacher has three channels. The image is
    resized (bicubic, antialiased) if `objective.resolution` is "teacher" and the sizes differ. The teacher is always in
    evaluation mode, is not a submodule of anything, and needs no gradient.

    Its answers are in the order of `classes`, the names of the data's classes.
    """

    def __init__(
        self,
        model: nn.Module,
        classes: Sequence[str],
        recipe: Recipe,
        *,
        name: str,
        vocabularies: Sequence[Sequence[str]],
        mean: Sequence[float],
        std: Sequence[float],
        size: tuple[int, int],
        assumed: Sequence[str] = (),
    ):
        """`Teacher.load` and `Teacher.of` find these arguments out.

        `vocabularies` are lists of names of the model's outputs. The data may use any of them. Empty if the names are
        not known. `assumed` names what nobody stated, so that it is the student's.
        """
        self.name, self.classes, self.size, self.assumed = name, tuple(classes), size, tuple(assumed)
        self.student = _student(recipe)
        self.model = model.eval().requires_grad_(False)
        self.maps: MapReader | None = None
        """Reads its feature maps, once `read_maps` has prepared it."""
        self.judged: Accuracy | None = None
        """Its accuracy on the images that it was introduced with; None before that."""
        self.resizes = self.student["resolution"] == "teacher"
        # our own transformers accept other image sizes only with this option
        self.options = {} if self.resizes or not isinstance(model, PreTrained) else {"interpolate_pos_encoding": True}
        self.mean, self.std = list(map(float, mean)), list(map(float, std))
        if len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise ValueError(
                f"teacher {name} states mean={self.mean} and std={self.std}; expected one entry for each "
                "of its channels in both, and a positive std"
            )
        channels = len(self.student["mean"])
        if len(self.mean) != channels and channels != 1:
            raise ValueError(
                f"teacher {name} takes {len(self.mean)} channels, but the student's images have {channels}; "
                "choose a teacher for such images"
            )
        place = next((tensor.device for tensor in model.state_dict().values()), torch.device("cpu"))
        ours, theirs = (
            torch.tensor([stats["mean"], stats["std"]], dtype=torch.float64)
            for stats in (self.student, {"mean": self.mean, "std": self.std})
        )
        self.gain = (ours[1] / theirs[1]).float().view(-1, 1, 1).to(place)
        self.shift = ((ours[0] - theirs[0]) / theirs[1]).float().view(-1, 1, 1).to(place)
        self.order: Tensor | None = None
        self.outputs = self._count_outputs(place)
        order = _order(name, vocabularies, self.classes, self.outputs)
        self.order = None if order is None else torch.tensor(order, device=place)

    @classmethod
    def load(cls, name: str, classes: Sequence[str], recipe: Recipe) -> Teacher:
        """Loads the teacher that `objective.teacher` names, for data of these `classes`, in this order.

        - `timm:NAME` is a published model, which is downloaded. `timm:NAME:WEIGHT_FILE` is that architecture with the
          `state_dict` of a safetensors file or of a `.pth` file of tensors. `timm:FOLDER` is a folder that timm saved.
          Image size and normalisation come from the model's `pretrained_cfg`. Class names are those that it states, or
          ImageNet's if it has as many outputs: "n01440764", or "tench, Tinca tinca".
        - A folder or hub name is a model of this package, or DeiT or ViT as transformers or timm saved it.
        - `FILE.py:FUNCTION` is the result of a function without arguments: a `Teacher` or any module (`Teacher.of`).

        A teacher may know more classes than the data, in any order, because classes are matched by name.

        Raises `ValueError` if the teacher does not fit the data or its images, `FileNotFoundError` if it is not found,
        and `ImportError` if it needs timm, which is not installed.
        """
        if name.startswith("timm:"):
            return _from_timm(name, classes, recipe)
        if not is_code(name):
            if name.endswith(".py"):
                raise ValueError(f"teacher {name} names a file but no function; give {name}:FUNCTION")
            return _from_folder(name, classes, recipe)
        made = _call(name)
        if isinstance(made, Teacher):
            if (made.classes, made.student) != (tuple(classes), _student(recipe)):
                raise ValueError(
                    f"{name} returned a Teacher for other classes, or for a student of another image size, mean, std "
                    "or resolution; return the module instead, which is then adapted"
                )
            return made
        if not isinstance(made, nn.Module):
            raise ValueError(f"{name} returned {type(made).__name__}, expected a torch.nn.Module or a Teacher")
        return cls.of(made, classes, recipe, name=name)

    @classmethod
    def of(
        cls,
        module: nn.Module,
        classes: Sequence[str],
        recipe: Recipe,
        *,
        labels: Sequence[str] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        image_size: int | tuple[int, int] | None = None,
        name: str = "",
    ) -> Teacher:
        """Makes a teacher of any module that maps images (B, channels, height, width) to logits (B, outputs).

        The module is frozen. It may also return a tuple that starts with the logits, or an object or mapping with
        `logits`.

        `labels` names its outputs. An argument that is None is read from the module's attribute of the same name
        (`classes` for the labels). If the module lacks that too, the student's value is used. Labels can't come from
        the student: without them there must be as many outputs as `classes`, and a warning says that their order is
        not checked.
        """
        stated = {"classes": labels, "mean": mean, "std": std, "image_size": image_size}
        stated = {key: getattr(module, key, None) if value is None else value for key, value in stated.items()}
        names, size, student = stated["classes"], stated["image_size"], _student(recipe)
        name = name or type(module).__name__
        if names is not None and (isinstance(names, str) or not isinstance(names, Sequence)):
            raise ValueError(f"teacher {name} has classes={names!r}; expected a list of names, one for each output")
        mean_std = [
            torch.as_tensor(student[key] if stated[key] is None else stated[key], dtype=torch.float64)
            .flatten()
            .tolist()
            for key in ("mean", "std")
        ]
        return cls(
            module,
            classes,
            recipe,
            name=name,
            vocabularies=[] if names is None else [list(map(str, names))],
            mean=mean_std[0],
            std=mean_std[1],
            size=_pair(size or student["size"]),
            assumed=[key for key, value in stated.items() if value is None],
        )

    def to(self, device: torch.device | str) -> Self:
        self.model.to(device)
        self.gain, self.shift = self.gain.to(device), self.shift.to(device)
        self.order = None if self.order is None else self.order.to(device)
        return self

    def __call__(self, pixels: Tensor) -> Tensor:
        """Logits (B, C) in the student's class order, for the student's batch (B, channels, height, width)."""
        return self._ordered(self._logits(pixels))

    def kept(self, pixels: Tensor, settings: Distilled) -> dict[str, Tensor]:
        """What is kept of its answers to the student's batch: those of `condense` and, with guidance, its maps."""
        if self.maps is None:
            return condense(self(pixels), settings)
        with torch.no_grad():
            logits, maps = self.maps(self._adapted(pixels))
        return condense(self._ordered(logits), settings) | maps

    def read_maps(self, recipe: Recipe, split: Split, device: torch.device) -> None:
        """Prepares it for guidance. `split` has the training images, of which some are looked at.

        Raises `ValueError` if it gives no maps, or other logits with them.
        """
        assert isinstance(recipe.model, DeiTConfig)
        [batch] = EvaluationBatches(_some(split, _MEASURED), processor_for(recipe), _MEASURED, keep=False)
        pixels = batch.pixels[batch.labels >= 0].to(device)
        if not len(pixels):
            raise ValueError(f"none of the images that teacher {self.name} is tried on can be read; check them")
        with torch.no_grad():
            self.maps = MapReader(self.model, self.name, recipe.model, self._adapted(pixels), self._logits(pixels))

    def _ordered(self, logits: Tensor) -> Tensor:
        return logits if self.order is None else logits[:, self.order]

    def _adapted(self, pixels: Tensor) -> Tensor:
        """The student's batch as the teacher takes it."""
        if self.model.training:  # because train() of a parent module also changes this one
            self.model.eval()
        pixels = pixels * self.gain + self.shift  # one channel becomes the teacher's three by broadcasting
        if self.resizes and tuple(pixels.shape[2:]) != self.size:
            pixels = F.interpolate(pixels, self.size, mode="bicubic", antialias=True)
        return pixels

    @torch.no_grad()
    def _logits(self, pixels: Tensor) -> Any:
        out = self.model(self._adapted(pixels), **self.options)
        if isinstance(out, Tensor):
            return out
        if isinstance(out, Mapping):
            return out["logits"]
        return out[0] if isinstance(out, tuple | list) else out.logits

    def __str__(self) -> str:
        """What it is and how it is given the images, with what is assumed."""
        height, width = self.size if self.resizes else self.student["size"]
        mean, std = (", ".join(f"{value:.3g}" for value in values) for values in (self.mean, self.std))
        known = f"{self.outputs} classes" + (
            "" if self.outputs == len(self.classes) else f", of which {len(self.classes)} are the data's"
        )
        assumed = f"; assumed from the student, because nobody states them: {', '.join(self.assumed)}"
        return (
            f"teacher {self.name}: {known}; images of {height} x {width} pixels, mean {mean}, std {std}"
            f"{assumed if self.assumed else ''}"
        )

    @torch.inference_mode()
    def introduction(
        self, recipe: Recipe, split: Split, kind: str, device: torch.device, student: nn.Module | None = None
    ) -> Iterator[str]:
        """What people should know before they trust it: `str`, its accuracy on at most `_JUDGED` images of `split`,
        which are `kind` images, and a warning if it is no better than the answer that never looks, or than a student
        that has learned before."""
        yield str(self)
        some = _some(split, _JUDGED)
        batches = EvaluationBatches(some, processor_for(recipe), min(recipe.data.batch, _JUDGED), keep=False)
        correct = total = 0
        told: list[str] = []
        rows = Rows(told.append)
        for batch in batches:
            read = batch.labels >= 0
            if read.any():
                logits = rows(lambda pixels: {"logits": self(pixels)}, batch.pixels[read].to(device))["logits"]
                correct += int((logits.argmax(-1).cpu() == batch.labels[read]).sum())
                total += int(read.sum())
        yield from told
        if not total:
            return
        self.judged, often = Accuracy(correct, total), max(Counter(some.labels).values()) / len(some)
        value, interval = self.judged.cells()
        yield (
            f"teacher {self.name}: {value:.3f} of {total} {kind} images right ({interval} at 95 %), prepared as the "
            "student sees them"
        )
        if value <= (blind := max(often, 1 / len(self.classes))):
            yield (
                f"warning: the teacher is no better than the answer that never looks ({blind:.3f}); the student will "
                "learn its mistakes. Check its classes, mean, std and image_size, or choose another teacher"
            )
        if student is not None and (before := evaluate(student, batches, Processes(device))["fused"]).value > value:
            yield (
                f"warning: the student is right on {before.value:.3f} of these images before it begins, more than its "
                "teacher, and may become worse. Choose another teacher, or train without one"
            )

    def _count_outputs(self, place: torch.device) -> int:
        """Number of the model's outputs, counted in its answer to a blank image of the student's size."""
        shape = (1, len(self.student["mean"]), *self.student["size"])
        try:
            logits = self._logits(torch.zeros(shape, device=place))
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            move = (
                "state its mean, std and image_size"
                if self.resizes
                else "set objective.resolution=teacher if it only takes images of its own size"
            )
            raise ValueError(
                f"teacher {self.name} can't process the student's images of {shape[1:]} as "
                f"{len(self.mean)} channels of {self.size if self.resizes else shape[2:]} "
                f"({reason}); {move}"
            ) from error
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != 1 or not logits.shape[1]:
            found = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"teacher {self.name} answers one image with {found}, expected logits (1, classes); choose a classifier"
            )
        return logits.shape[1]

    def fingerprint(self) -> str:
        """SHA-256 of everything that determines the teacher's answers, but not of its name.

        It covers all tensors with their names, the normalisation, the image size, the order of the classes and
        `objective.resolution`.
        """
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            if isinstance(tensor, Tensor):
                digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        order = None if self.order is None else self.order.tolist()
        digest.update(json.dumps([self.mean, self.std, self.size, self.classes, order, self.student]).encode())
        return digest.hexdigest()


def _some(split: Split, count: int) -> Split:
    """At most `count` images, evenly spread."""
    return split.take(np.unique(np.linspace(0, len(split) - 1, count).round().astype(int)).tolist())


# -------------------------------------------------------------------------------------------------------------- answers


def condense(logits: Tensor, settings: Distilled) -> dict[str, Tensor]:
    """The part of a teacher's logits (B, C) that is kept, by name. `expand` turns it into answers.

    Hard: `hard` (B,) int64. Soft: `log_probability` (B, C) float32; if `settings.top_k` is below C, instead `index`
    (B, top_k) int64, the most likely classes, and their `probability` (B, top_k) float16.
    """
    logits = logits.float()
    if settings.kind == "hard":
        return {"hard": logits.argmax(-1)}
    if settings.top_k is None or settings.top_k >= logits.shape[1]:
        return {"log_probability": logits.log_softmax(-1)}
    kept, index = logits.softmax(-1).topk(settings.top_k)
    return {"index": index, "probability": kept.clamp(min=TINY).half()}


def expand(kept: Mapping[str, Tensor], classes: int) -> Tensor:
    """The answers that the student learns from, made of what `condense` kept.

    Hard: the decisions (B,) int64 (Touvron et al. 2020, equation 3). Soft: log-probabilities (B, classes) float32 at
    temperature 1. Any temperature can be applied to them as to logits, because they differ from logits by a constant
    for each image. The probability that the kept classes leave is spread evenly over the others.
    """
    if "hard" in kept:
        return kept["hard"]
    if "log_probability" in kept:
        return kept["log_probability"]
    index, probability = kept["index"], kept["probability"].double()  # all devices round float64 to the same float32
    rest = (1 - probability.sum(-1, keepdim=True)).clamp(min=TINY) / (classes - index.shape[1])
    return rest.log().float().repeat(1, classes).scatter(1, index, probability.log().float())


# -------------------------------------------------------------------------------------------------------------- finding


def _student(recipe: Recipe) -> dict[str, Any]:
    """The properties of the student that determine how a teacher is adapted."""
    if not isinstance(recipe.objective, Distilled):
        raise ValueError(
            f"recipe {recipe.name} can't use a teacher, because its objective is "
            f"{type(recipe.objective).__name__}; set objective=Distilled()"
        )
    return {
        "mean": list(recipe.data.mean),
        "std": list(recipe.data.std),
        "size": list(recipe.model.image_hw),
        "resolution": recipe.objective.resolution,
    }


def _pair(size: Any) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def _order(name: str, vocabularies: Sequence[Sequence[str]], classes: Sequence[str], outputs: int) -> list[int] | None:
    """Number of the teacher's output for each of the data's classes; None if the order is already the same."""
    for names in vocabularies:
        if len(names) != outputs:
            raise ValueError(f"teacher {name} has {outputs} outputs and {len(names)} class names; name each output")
    if not vocabularies:
        if outputs != len(classes):
            raise ValueError(
                f"teacher {name} has {outputs} outputs without names, but the data has {len(classes)} classes;"
                " choose a teacher that names its classes (a module may have an attribute `classes`)"
            )
        warnings.warn(
            f"teacher {name} does not name its {outputs} outputs, so they are taken to be the data's classes in "
            "the order of their names; this can't be checked",
            stacklevel=2,
        )
        return None
    classes = [nfc(one) for one in classes]
    vocabularies = [[nfc(one) for one in names] for names in vocabularies]
    names = min(vocabularies, key=lambda names: len(set(classes).difference(names)))
    place = {one: i for i, one in enumerate(names)}
    if missing := [one for one in classes if one not in place]:
        raise ValueError(
            f"teacher {name} does not know the data's class {missing[0]!r} ({len(missing)} of "
            f"{len(classes)} are missing); it knows {', '.join(map(repr, names[:5]))}"
            f"{f' and {len(names) - 5} more' if len(names) > 5 else ''}; choose a teacher of these "
            "classes"
        )
    counts = Counter(names)
    if repeated := [one for one in classes if counts[one] > 1]:
        raise ValueError(
            f"teacher {name} gives the name {repeated[0]!r} to {counts[repeated[0]]} of its classes, so it "
            "is not clear which one is meant; choose a teacher whose names differ"
        )
    return None if list(names) == list(classes) else [place[one] for one in classes]


def _from_folder(name: str, classes: Sequence[str], recipe: Recipe) -> Teacher:
    file = Path(name).expanduser() / "config.json"
    if file.is_file() and "architecture" in files.read_json(file) and isinstance(read_config(file), TimmConfig):
        return _from_timm(f"timm:{name}", classes, recipe)
    classifier = load_classifier(name)
    normalisation, config = classifier.processor.normalisation, classifier.model.config
    # a teacher's mean and std are for levels from 0 to 1
    mean, std = (
        np.broadcast_to(stated / (255 * normalisation.factor), config.num_channels).tolist()
        for stated in (normalisation.mean, normalisation.std)
    )
    return Teacher(
        classifier.model,
        classes,
        recipe,
        name=name,
        vocabularies=[classifier.labels],
        mean=mean,
        std=std,
        size=config.image_hw,
    )


def _call(name: str) -> Any:
    """The result of the function that `FILE.py:FUNCTION` names."""
    file, function = _source_file(name), name.rpartition(":")[2]
    spec = importlib.util.spec_from_file_location(f"deit_teacher_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = getattr(module, function, None)
    if not callable(made):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(f"teacher {name}: {file} has no function {function!r}; it has {', '.join(known) or 'none'}")
    return made()


def find_teacher(recipe: Recipe) -> None:
    """Raises `FileNotFoundError`, `ValueError` or `ImportError` if the teacher that a recipe asks is not there.

    Long work begins with it. What `Teacher.load` reads from the hub is fetched; what timm downloads is only known by
    its name.
    """
    if not isinstance(recipe.objective, Distilled) or recipe.objective.cache or not recipe.objective.teacher:
        return
    name = recipe.objective.teacher
    if name.startswith("timm:"):
        _timm_source(name)
    elif is_code(name):
        _source_file(name)
    elif not name.endswith(".py") and not Path(name).expanduser().exists():
        try:
            try:
                files.find_file(name, "config.json")
            except FileNotFoundError as error:
                hub.find_weights(name, local_files_only=isinstance(error, files.NotFetched))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"teacher {name}: {error}") from None


def _source_file(name: str) -> Path:
    """The file of `FILE.py:FUNCTION`."""
    file = Path(name.rpartition(":")[0]).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"teacher {name}: there is no file {file}; give FILE.py:FUNCTION")
    return file


def _timm_source(name: str) -> tuple[str, Path | None]:
    """What stands after `timm:`: an architecture, empty for a folder, and the weight file or folder if one is named."""
    try:
        import timm
    except ImportError:
        raise host.missing(f"teacher {name} needs timm", "teachers") from None
    given = name.removeprefix("timm:")
    if (folder := Path(given).expanduser()).is_dir():
        return "", folder
    elsewhere = re.match("hf[-_]hub:", given)  # hf-hub:USER/MODEL is one name to timm
    architecture, _, file = (given, "", "") if elsewhere else given.partition(":")
    if not elsewhere and not timm.is_model(architecture):
        raise ValueError(
            f"teacher {name}: {architecture!r} is neither a timm model nor a folder; "
            f"timm.list_models('*{architecture[:4]}*') lists names"
        )
    path = Path(file).expanduser() if file else None
    if path is not None and not path.is_file():
        raise FileNotFoundError(f"teacher {name}: there is no file {path}; give timm:NAME:WEIGHT_FILE")
    return architecture, path


def _from_timm(name: str, classes: Sequence[str], recipe: Recipe) -> Teacher:
    architecture, path = _timm_source(name)
    import timm

    if path is not None and not architecture:
        folder = path
        config = files.read_json(files.find_file(folder, "config.json"))
        path = next((folder / file for file in hub.WEIGHT_FILES if (folder / file).is_file()), None)
        if path is None:
            raise FileNotFoundError(
                f"teacher {name}: {folder} holds no weights; expected one of {', '.join(hub.WEIGHT_FILES)}"
            )
        tensors = hub.read_tensors(path)
        count = config.get("num_classes")
        local = f"local-dir:{folder}"
        refuse_larger(folder, config, tensors, lambda: timm.create_model(local, pretrained=False, num_classes=count))
        model = _timm_model(local, path, tensors, count)
        return _of_timm(name, model, classes, recipe, own=True)
    if path is None:
        try:
            model = timm.create_model(architecture, pretrained=True)
        except Exception as error:  # from the network, the hub, the cache or the file
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise OSError(
                f"teacher {name} could not be fetched ({reason}); connect to the network, or give its "
                f"weights as timm:{architecture}:WEIGHT_FILE"
            ) from error
        return _of_timm(name, model, classes, recipe, own=True)
    tensors = {
        key.removeprefix("_orig_mod.").removeprefix("module."): tensor for key, tensor in hub.read_tensors(path).items()
    }
    head = getattr(timm.get_pretrained_cfg(architecture), "classifier", None)
    head = head if isinstance(head, str) else next(iter(head or ()), None)
    if f"{head}.weight" not in tensors:
        raise files.CheckpointError(
            f"{path} has no {head}.weight, which is the classifier of timm's {architecture}; give a "
            "file of that architecture's weights"
        )
    model = _timm_model(architecture, path, tensors, len(tensors[f"{head}.weight"]))
    return _of_timm(name, model, classes, recipe, own=False)


def _timm_model(architecture: str, path: Path, tensors: Mapping[str, Tensor], count: int | None) -> nn.Module:
    import timm

    try:
        model = timm.create_model(architecture, pretrained=False, num_classes=count)  # None: the architecture's own
    except Exception as error:  # its models take arguments of all kinds
        reason = " ".join(str(error).split())[:300]
        raise files.CheckpointError(f"timm can't make the model of {path} ({reason}); check its config.json") from None
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise files.CheckpointError(
            f"{path} does not fit timm's {architecture}: {' '.join(str(error).split())[:300]}; "
            "give a file of that architecture's weights"
        ) from None
    return model


def _of_timm(name: str, model: nn.Module, classes: Sequence[str], recipe: Recipe, *, own: bool) -> Teacher:
    """Makes a teacher of a timm model. `own` says that its `pretrained_cfg` describes these very weights."""
    stated: Mapping[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    channels, height, width = stated["input_size"]
    mean, std = (
        (list(stated[key]) * channels)[:channels] if len(stated[key]) == 1 else list(stated[key])
        for key in ("mean", "std")
    )
    return Teacher(
        model.to(memory_format=torch.channels_last),  # in which a CPU convolves up to three times as fast
        classes,
        recipe,
        name=name,
        vocabularies=_timm_names(model, stated, classes, own),
        mean=mean,
        std=std,
        size=(height, width),
    )


def _timm_names(model: Any, stated: Mapping[str, Any], classes: Sequence[str], own: bool) -> list[list[str]]:
    from timm.data import ImageNetInfo, infer_imagenet_subset

    if own and (names := stated.get("label_names")):
        if isinstance(names, Mapping):  # by number, which is text in JSON
            names = [names[key] for key in sorted(names, key=int)]
        descriptions = stated.get("label_descriptions") or {}
        if not isinstance(descriptions, Mapping):
            descriptions = dict(zip(names, descriptions, strict=False))
        return [list(names), [descriptions.get(one, one) for one in names]]
    if subset := infer_imagenet_subset(model):
        info = ImageNetInfo(subset)
        found = [list(info.label_names()), list(info.label_descriptions())]
        # A file with as many classes may come from other data, and then its names are not known.
        if own or any(set(classes) <= set(names) for names in found):
            return found
    return []
