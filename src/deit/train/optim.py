"""Parameter groups, the optimizers, learning rate, gradient clipping, and the average of the weights.

The state of the optimizers and of the average is a flat dictionary by parameter name. It holds whole tensors even if
the parameters are sharded over processes (FSDP2), so it fits any number of processes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deit.machine import resolve_precision, whole
from deit.model.timm_classifier import TimmClassifier
from deit.recipe import LAMB, SGD, AdamW, Cosine, Muon, Optimizer

_NEVER_DECAYED = {"position", "cls_token", "mask_token"}
_BLOCK = re.compile(r"(?:^|\.)blocks\.(\d+)\.")
_INPUT = re.compile(r"(?:^|\.)(?:patch\.|(?:position|cls_token|distillation_token|mask_token)$)")
"""Names of the parameters before the first block."""
_FUSED_ON = ("cpu", "cuda")


# ------------------------------------------------------------------------------------------------------------- groups


def parameter_groups(model: nn.Module, settings: Optimizer) -> list[dict[str, Any]]:
    """The trainable parameters, in groups that share `weight_decay` and `lr_scale`.

    `lr_scale` is the group's learning rate divided by the main one.

    As in the original code, vectors (biases, norms, LayerScale), positions, class token and mask token have no weight
    decay. The settings decide on the distillation token. The scale is `layer_decay ** (last - depth)`. Depth is 0 for
    patches, tokens and positions, i + 1 for block i, and last = blocks + 1 for everything after the blocks (Clark et
    al. 2020; BEiT, Bao et al. 2021). timm counts the final norm as part of the last block, one power lower. For models
    of timm, depth is the number of the group that timm puts a parameter into, and what timm exempts from weight decay
    is exempt.

    Raises `ValueError` if `layer_decay` is below 1 and the model has no blocks.
    """
    return _groups(model, settings, _trained(model))


def depths(model: nn.Module, coarse: bool = False) -> dict[str, int]:
    """The depth of every parameter, as in `parameter_groups`. `coarse` is as in `TimmClassifier.groups`."""
    if isinstance(model, TimmClassifier):
        return model.groups(coarse)
    names = [name for name, _ in model.named_parameters()]
    last = 1 + len({found[1] for name in names if (found := _BLOCK.search(name))})
    return {
        name: int(block[1]) + 1 if (block := _BLOCK.search(name)) else 0 if _INPUT.search(name) else last
        for name in names
    }


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _groups(model: nn.Module, settings: Optimizer, chosen: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    depth = depths(model) if settings.layer_decay < 1 else dict.fromkeys(chosen, 1)
    last = max(depth.values(), default=1)
    if settings.layer_decay < 1 and last <= 1:
        raise ValueError(
            f"layer_decay={settings.layer_decay} needs a model with blocks, {type(model).__name__} has "
            "none; set optim.layer_decay=1"
        )
    free = _NEVER_DECAYED | (set() if settings.decay_distillation_token else {"distillation_token"})
    exempt = model.never_decayed if isinstance(model, TimmClassifier) else set()
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in chosen.items():
        scale = settings.layer_decay ** (last - depth[name])
        kept = parameter.ndim <= 1 or name in exempt or name.rpartition(".")[2] in free
        decay = 0.0 if kept else settings.weight_decay
        group = groups.setdefault((scale, decay), {"params": [], "weight_decay": decay, "lr_scale": scale})
        group["params"].append(parameter)
    return list(groups.values())


# --------------------------------------------------------------------------------------------------------- optimizers


class Optimizers:
    """The optimizers of one model, which step together. `build` makes them.

    Their state exists from the start, with the values that each optimizer would begin with. So a run's state has the
    same names before its first step as after it.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]):
        self.optimizers = tuple(optimizers)
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}

    @property
    def can_skip(self) -> bool:
        """Whether `step` takes `unless`."""
        return all(
            isinstance(optimizer, torch.optim.AdamW) and all(group["fused"] for group in optimizer.param_groups)
            for optimizer in self.optimizers
        )

    def step(self, unless: Tensor | None = None) -> None:
        """Takes a step. If `unless` is 1, a float32 number on the parameters' device, nothing changes."""
        for optimizer in self.optimizers:
            optimizer.found_inf = unless  # type: ignore[attr-defined]  # the name that PyTorch's fused optimizers read
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def set_lr(self, lr: float) -> None:
        """Sets the main learning rate to `lr`, and each group's rate in proportion."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]

    def state(self) -> dict[str, Tensor]:
        """The state of all optimizers, `"{parameter}.{what}"` -> whole tensor.

        Returns the tensors themselves, not copies. If they are sharded, all processes must call this, and each gets
        whole copies in main memory.
        """
        return _gathered(self._state())

    @property
    def size(self) -> int:
        """Number of bytes of `state`."""
        return _bytes(self._state())

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restores `state`, bit for bit. With sharded parameters, all processes must call this.

        Raises `ValueError` if a name is missing or unknown or a shape differs, and then changes nothing.
        """
        _fill(self._state(), state, "the optimizer's state")

    def _state(self) -> dict[str, Tensor]:
        return {
            f"{self._names[parameter]}.{what}": value
            for optimizer in self.optimizers
            for parameter, remembered in optimizer.state.items()
            for what, value in remembered.items()
        }


def build(model: nn.Module, settings: Optimizer) -> Optimizers:
    """Builds the optimizers of these settings for the model's trainable parameters, on its device.

    The learning rate is that of the settings, for a batch of `per_images`, until `Optimizers.set_lr`. Spread the model
    over processes first, because parameters that are sharded later are not followed.

    Raises `ValueError` if no parameter is trainable, or if `Muon` or `layer_decay` needs blocks that the model lacks.
    """
    trained = _trained(model)
    if not trained:
        raise ValueError(f"every parameter of {type(model).__name__} is frozen; set requires_grad on those to train")
    matrices = {
        name: p for name, p in trained.items() if isinstance(settings, Muon) and p.ndim == 2 and _BLOCK.search(name)
    }
    others = _groups(model, settings, {name: p for name, p in trained.items() if name not in matrices})
    fused = True if next(iter(trained.values())).device.type in _FUSED_ON else None
    made: list[torch.optim.Optimizer] = []
    match settings:
        case AdamW():
            made = [torch.optim.AdamW(others, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=fused)]
        case SGD():
            made = [torch.optim.SGD(others, lr=settings.lr, momentum=settings.momentum, nesterov=settings.momentum > 0)]
        case LAMB():
            made = [_Lamb(others, lr=settings.lr, betas=settings.betas, eps=settings.eps)]
        case Muon():
            made = [_muon(model, settings, matrices)]
            for group in others:
                group["lr_scale"] *= settings.others_lr / settings.lr
            if others:
                made.append(
                    torch.optim.AdamW(
                        others, lr=settings.others_lr, betas=settings.betas, eps=settings.eps, fused=fused
                    )
                )
    for optimizer in made:
        _begin(optimizer)
    optimizers = Optimizers(model, made)
    optimizers.set_lr(settings.lr)
    return optimizers


def _muon(model: nn.Module, settings: Muon, matrices: Mapping[str, Tensor]) -> torch.optim.Optimizer:
    if not matrices:
        raise ValueError(
            f"Muon trains the matrices of a transformer's blocks, {type(model).__name__} trains none; choose AdamW"
        )
    return _Muon(_groups(model, settings, matrices), lr=settings.lr, momentum=settings.momentum)


def _begin(optimizer: torch.optim.Optimizer) -> None:
    """Gives every parameter the zeros that the optimizer would give it in its first step."""
    adaptive = isinstance(optimizer, torch.optim.AdamW | _Lamb)
    for group in optimizer.param_groups:
        if isinstance(optimizer, torch.optim.SGD) and not group["momentum"]:
            continue
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if adaptive:  # a fused kernel counts steps on the parameter's device, everything else on the CPU
                state["step"] = torch.zeros((), device=parameter.device if group.get("fused") else "cpu")
            for what in ("exp_avg", "exp_avg_sq") if adaptive else ("momentum_buffer",):
                state[what] = torch.zeros_like(parameter, requires_grad=False)


class _Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) with Nesterov's momentum, scaled to the size of AdamW's steps (Liu et al. 2025).

    A step is 0.2 sqrt(max(rows, columns)) times the orthogonalised momentum. PyTorch's own Muon orthogonalises one
    matrix at a time, and always in bfloat16. A CPU that only imitates bfloat16 needs 3.0 s for the 24 matrices of six
    blocks of width 192; it takes a tenth of a second in float32. Here matrices of the same shape go together, in the
    precision that the device is quick in.
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, momentum: float):
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[Any, list[Tensor]] = {}
            for number, parameter in enumerate(group["params"]):
                if parameter.grad is not None:  # a sharded matrix goes alone, because shards can't be stacked
                    key = tuple(parameter.shape) if type(parameter.data) is Tensor else number
                    shapes.setdefault(key, []).append(parameter)
            for parameters in shapes.values():
                self._step(group, parameters)

    def _step(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """Steps matrices of one shape."""
        momentum = group["momentum"]
        gradients = _gradients(parameters)
        means = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_lerp_(means, gradients, 1 - momentum)
        directions = torch._foreach_lerp(gradients, means, momentum)
        precision = resolve_precision("auto", parameters[0].device)
        if len(parameters) == 1:
            steps = [_orthogonal(directions[0].to(precision)).to(parameters[0].dtype)]
        else:
            steps = list(_orthogonal(torch.stack(directions).to(precision)).to(parameters[0].dtype))
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, steps, alpha=-0.2 * math.sqrt(max(parameters[0].shape)) * group["lr"])


_QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of the polynomial a x + b x^3 + c x^5 that brings singular values near 1 (Jordan et al. 2024)."""


def _orthogonal(matrices: Tensor) -> Tensor:
    """(rows, columns) or (matrices, rows, columns), with the same singular vectors, and singular values near 1 (0.7 to
    1.2), except those that were nearly 0. It takes five Newton-Schulz iterations."""
    add_product = torch.addmm if matrices.dim() == 2 else torch.baddbmm
    tall = matrices.shape[-2] > matrices.shape[-1]
    found = matrices.mT if tall else matrices
    found = found / found.square().sum((-2, -1), keepdim=True).sqrt().clamp(min=1e-7)
    first, third, fifth = _QUINTIC
    for _ in range(5):
        gram = found @ found.mT
        polynomial = add_product(gram, gram, gram, beta=third, alpha=fifth)
        found = add_product(found, polynomial, found, beta=first)
    return found.mT if tall else found


class _Lamb(torch.optim.Optimizer):
    """LAMB (You et al. 2020) as Nvidia implemented it and DeiT III used it.

    Gradients are divided by their global norm if that exceeds 1. For each tensor, AdamW's bias-corrected step plus
    weight decay is scaled by the norm of the weights divided by the step's own norm. Tensors without weight decay are
    not scaled, and neither are those for which one of the norms is 0.
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        with_gradient = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        gradients = [grad for parameters in with_gradient for grad in _gradients(parameters)]
        if gradients:
            divisor = _norm(gradients).clamp(min=1.0)
            for group, parameters in zip(self.param_groups, with_gradient, strict=True):
                if parameters:
                    self._step(group, parameters, divisor)

    def _step(self, group: dict[str, Any], parameters: list[Tensor], divisor: Tensor) -> None:
        """Steps one group. All `parameters` have gradients. Takes memory for two more copies of them."""
        first, second = group["betas"]
        states = [self.state[p] for p in parameters]
        means, squares = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
        steps = [s["step"] for s in states]  # on the CPU, so that reading them waits for no device
        torch._foreach_add_(steps, 1)
        counts = [float(step) for step in steps]

        gradients = torch._foreach_div(_gradients(parameters), divisor)
        torch._foreach_lerp_(means, gradients, 1 - first)
        torch._foreach_mul_(squares, second)
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - second)
        del gradients
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, [math.sqrt(1 - second**count) for count in counts])
        torch._foreach_add_(roots, group["eps"])
        updates = torch._foreach_div(means, roots)
        del roots
        torch._foreach_div_(updates, [1 - first**count for count in counts])
        if group["weight_decay"]:
            torch._foreach_add_(updates, parameters, alpha=group["weight_decay"])
            weights, sizes = _norms(parameters), _norms(updates)
            ratios = torch.where((weights > 0) & (sizes > 0), weights / sizes, 1.0)
            torch._foreach_mul_(updates, list(ratios.unbind()))
        torch._foreach_add_(parameters, updates, alpha=-group["lr"])


# ----------------------------------------------------------------------------------------------------------- clipping


def clip_gradients(parameters: Iterable[Tensor], limit: float | None) -> Tensor:
    """Scales the gradients down to the norm `limit`, in place, if their norm exceeds it.

    Returns the norm of all gradients together before clipping, a number on their device, which need not be finite. With
    sharded parameters, all processes must call this, and each gets the whole norm.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    if not parameters:
        return torch.zeros(())
    norm = _norm(_gradients(parameters))
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


def _gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    """Norm of all tensors together."""
    return torch.linalg.vector_norm(_norms(tensors))


@torch.no_grad()
def _norms(tensors: Sequence[Tensor]) -> Tensor:
    """Norm of each tensor, (tensors,)."""
    return whole(torch.stack(torch._foreach_norm(list(tensors))))


# ------------------------------------------------------------------------------------------------------ learning rate


def peak_lr(settings: Optimizer, batch: int) -> float:
    """The learning rate of the settings, scaled to the batch (Touvron et al. 2020, section 6: lr x batch / 512)."""
    return settings.lr * batch / settings.per_images


def learning_rate(settings: Cosine, peak: float, step: int, total_steps: int, warmup_steps: int = 0) -> float:
    """Learning rate of step `step`, counted from 0.

    It rises in a line from `settings.start` (the rate of step 0) to `peak` (the rate of step `warmup_steps`), then
    falls along half a cosine to `settings.floor` at `total_steps`, and stays there. It changes with every step, whereas
    the original code changes it with every epoch and runs the first two epochs at `start`.
    """
    if step < warmup_steps:
        return settings.start + (peak - settings.start) * step / warmup_steps
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return settings.floor + (peak - settings.floor) * (1 + math.cos(math.pi * done)) / 2


# ----------------------------------------------------------------------------------------------- average of the weights


class EMA:
    """An exponential moving average of the trained parameters, which moves `1 - decay` of the way to them per step.

    In the first steps it moves further, `1 / (updates + 1)` of the way, so that it forgets where it started. Buffers
    are the model's own. It takes as much memory as these parameters, on their device and sharded as they are.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.updates = decay, 0
        self._model = model
        self._parameters: dict[str, Tensor] = _trained(model)
        self._averages = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def update(self, unless: Tensor | None = None) -> None:
        """Follows the parameters. To be called after each step of the optimizer.

        If `unless` is 1, a number on their device, the averages stay as they are. Then call `not_updated` later on.
        """
        self.updates += 1
        share = max(1.0 - self.decay, 1.0 / (self.updates + 1))
        averages, parameters = list(self._averages.values()), list(self._parameters.values())
        if unless is None:
            torch._foreach_lerp_(averages, parameters, share)
            return
        moves = torch._foreach_sub(parameters, averages)
        torch._foreach_mul_(moves, share * (1 - unless))
        torch._foreach_add_(averages, moves)

    def not_updated(self) -> None:
        """Corrects the count after an update that was skipped on the device."""
        self.updates -= 1

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Gives the model the averages as its parameters within the block.

        Afterwards the model has its own parameters again, bit for bit, even if the block raised. Takes memory for one
        more copy of the parameters meanwhile.
        """
        own = [parameter.detach().clone() for parameter in self._parameters.values()]
        try:
            self._put(self._averages.values())
            yield
        finally:
            self._put(own)

    def state(self) -> dict[str, Tensor]:
        """The averages by parameter name, as whole tensors as in `Optimizers.state`, and the count of `updates`."""
        return _gathered(self._averages) | {"updates": torch.tensor(self.updates)}

    @property
    def size(self) -> int:
        """Number of bytes of `state`."""
        return _bytes(self._averages)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restores `state`. Raises like `Optimizers.load_state`."""
        updates = torch.tensor(self.updates)
        _fill(self._averages | {"updates": updates}, state, "the average of the weights")
        self.updates = int(updates)

    @torch.no_grad()
    def _put(self, values: Iterable[Tensor]) -> None:
        for parameter, value in zip(self._parameters.values(), values, strict=True):
            parameter.copy_(value)
        # FSDP2 may keep parameters that it gathered in the last forward pass, which are now out of date.
        for module in self._model.modules():
            if hasattr(module, "reshard"):
                module.reshard()  # type: ignore[operator]


# --------------------------------------------------------------------------------------------------------- flat state


def _gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors. Gathered ones go to main memory, so that a device holds only one of them at a time."""
    return {name: whole(tensor).cpu() if _is_sharded(tensor) else tensor.detach() for name, tensor in tensors.items()}


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    """Number of bytes of whole tensors, whether they are sharded or not."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


@torch.no_grad()
def _fill(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str) -> None:
    """Copies the whole tensors of `state` into those of the same name. Each process copies its share."""
    for problem, names in (("lacks", tensors.keys() - state.keys()), ("knows no", state.keys() - tensors.keys())):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise ValueError(
                f"{what} {problem} {min(names)}{more}; it was saved for another model or optimizer, so "
                "resume with the recipe that it was saved from"
            )
    for name, tensor in tensors.items():
        if tensor.shape != state[name].shape:
            raise ValueError(
                f"{what} has {name} as {tuple(state[name].shape)}, expected {tuple(tensor.shape)}; resume "
                "with the recipe that it was saved from"
            )
    for name, tensor in tensors.items():
        value = state[name].to(tensor.device)
        if _is_sharded(tensor):
            from torch.distributed.tensor import DTensor, distribute_tensor

            assert isinstance(tensor, DTensor)
            value = distribute_tensor(value, tensor.device_mesh, tensor.placements)
        tensor.copy_(value)


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")
