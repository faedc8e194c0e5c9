"""The part of a model that a run trains: all of it, the head, the last blocks, or adapters beside its layers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from deit import files, host
from deit.model.network import PreTrained
from deit.model.timm_classifier import TimmClassifier
from deit.recipe import LastBlocks, LoRA, Tuning
from deit.train import optim

_HEADS = ("classifier.", "cls_classifier.", "distillation_classifier.")


@dataclass(frozen=True)
class Tuned:
    """A model of which the trained part is chosen."""

    frozen: tuple[nn.Module, ...] = ()
    """The modules that compute as in evaluation: those of which nothing is trained, and batch normalisation that keeps
    its statistics."""
    adapters: Any = None
    """The `peft.PeftModel` around the model, if it has adapters."""


def tune(model: nn.Module, tuning: Tuning | None, statistics: Literal["batch", "start"] = "batch") -> Tuned:
    """Chooses the parameters that are trained, by `requires_grad`. Adapters are put into the model itself. `statistics`
    is the recipe's.

    Raises `ValueError` if the model has no such part.
    """
    kept = () if statistics == "batch" else tuple(part for part in model.modules() if isinstance(part, _BatchNorm))
    if tuning is None:
        return Tuned(kept)
    heads = _heads(model)
    adapters = None
    if isinstance(tuning, LoRA):
        adapters = _adapted(model, tuning, heads)
    else:
        trained = _after(model, tuning.count) if isinstance(tuning, LastBlocks) else set()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained or name.startswith(heads))
    frozen = _frozen(model)
    if isinstance(model, PreTrained):
        frozen.append(model.backbone.dropout)  # of the tokens, which no tuning trains
    return Tuned((*frozen, *kept), adapters)


def normalises_batches(model: nn.Module, tuned: Tuned) -> bool:
    """Whether batch normalisation takes its statistics from the images of a step. Where it is frozen, it doesn't."""
    frozen = {part for whole in tuned.frozen for part in whole.modules()}
    return any(isinstance(part, _BatchNorm) for part in model.modules() if part not in frozen)


def _heads(model: nn.Module) -> tuple[str, ...]:
    """What the names of the parameters of all heads begin with."""
    if not isinstance(model, TimmClassifier):
        return _HEADS
    found = tuple(f"model.{name}" for name in model.heads)
    if not any(name.startswith(found) for name, _ in model.named_parameters()):
        raise ValueError(
            f"timm doesn't say which part of {model.config.architecture} is its head; set tuning=None to train the "
            "whole model"
        )
    return found


def _after(model: nn.Module, count: int) -> set[str]:
    """The names of the parameters of the last `count` blocks and of what comes after them."""
    depth = optim.depths(model, coarse=True)
    last = max(depth.values())
    if count > last - 1:
        raise ValueError(
            f"tuning.count={count}, and the model has {max(0, last - 1)} groups of layers between its stem and its "
            "head; set it to at most that, or set tuning=None to train the whole model"
        )
    return {name for name, each in depth.items() if each >= last - count}


def _frozen(module: nn.Module) -> list[nn.Module]:
    """The largest modules that have parameters of which none is trained."""
    own = list(module.parameters())
    if own and not any(parameter.requires_grad for parameter in own):
        return [module]
    return [part for child in module.children() for part in _frozen(child)]


# ----------------------------------------------------------------------------------------------------------- adapters


def find_peft() -> Any:
    """The package that makes adapters. Raises `ImportError` if it is missing."""
    try:
        import peft
    except ImportError:
        raise host.missing("tuning=LoRA needs peft", "lora") from None
    return peft


def _adapted(model: nn.Module, settings: LoRA, heads: tuple[str, ...]) -> Any:
    peft = find_peft()
    parts = dict(model.named_modules())
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=_targets(model, settings, heads),
        modules_to_save=[name for head in heads if (name := head.removesuffix(".")) in parts],
    )
    return peft.get_peft_model(model, config)


def _targets(model: nn.Module, settings: LoRA, heads: tuple[str, ...]) -> list[str]:
    """The names of the layers that get an adapter."""
    if not isinstance(model, TimmClassifier):
        return ["qkv", "out"] if settings.targets == "attention" else ["qkv", "out", "fc1", "fc2"]
    found = {
        name: part
        for name, part in model.named_modules()
        if (isinstance(part, nn.Linear) or (type(part) is nn.Conv2d and part.groups == 1))
        and not f"{name}.".startswith(heads)
    }
    linear = [name for name, part in found.items() if isinstance(part, nn.Linear)]
    attention = [name for name in linear if any(part.startswith("attn") for part in name.split("."))]
    chosen = attention if settings.targets == "attention" else linear or list(found)
    if not chosen:
        more = "tuning.targets=all, or tuning=LastBlocks(count=2)" if found else "tuning=LastBlocks(count=2)"
        kind = "of attention " if settings.targets == "attention" else ""
        raise ValueError(f"timm's {model.config.architecture} has no linear layers {kind}for adapters; set {more}")
    if silent := _never_called(model, {name: found[name] for name in chosen}):
        raise ValueError(
            f"timm's {model.config.architecture} computes with the weights of {silent[0]} and doesn't call it, so an "
            "adapter there would do nothing; set tuning=LastBlocks(count=2)"
        )
    return chosen


@torch.no_grad()
def _never_called(model: TimmClassifier, layers: dict[str, nn.Module]) -> list[str]:
    """The layers that a pass over a black image doesn't call."""
    if next(model.parameters()).is_meta:  # a model to be saved, which was looked at when it was built
        return []
    called: set[str] = set()
    hooks = [layer.register_forward_hook(lambda *_, name=name: called.add(name)) for name, layer in layers.items()]
    training = model.training
    model.eval()(torch.zeros(1, model.config.num_channels, *model.config.image_hw))
    model.train(training)
    for hook in hooks:
        hook.remove()
    return [name for name in layers if name not in called]


def merged(tuned: Tuned) -> nn.Module:
    """The model with its adapters merged into its layers, in place."""
    found: nn.Module = tuned.adapters.merge_and_unload()
    return found


def save_adapters(tuned: Tuned, folder: Path, base: str) -> None:
    """Writes adapters and head as `peft.PeftModel.from_pretrained` reads them. `base` names the weights under them."""
    adapters = tuned.adapters
    config = adapters.peft_config[adapters.active_adapter]
    config.base_model_name_or_path = base
    config.inference_mode = True
    tensors = find_peft().get_peft_model_state_dict(adapters, save_embedding_layers=False)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with files.replacing(folder / "adapter_model.safetensors") as temporary:
        save_file(tensors, temporary, {"format": "pt"})
    with TemporaryDirectory() as place:
        config.save_pretrained(place)
        files.write_json(folder / "adapter_config.json", files.read_json(Path(place) / "adapter_config.json"))
