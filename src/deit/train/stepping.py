"""One step of a run: gradients, the numbers to log, and the decision whether to take or to skip it.

A step needs memory. So `fit` finds out before the first one how much, and lack of memory later on divides the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from deit.config import DeiTConfig
from deit.data.batches import Batch
from deit.data.draws import Stream, draws
from deit.machine import alone, available_memory, free_memory, out_of_memory, synchronised
from deit.recipe import MICRO_BATCHES_REFUSED, Recipe
from deit.train import memory, optim
from deit.train.records import amount
from deit.train.runs import State, Unread, Work
from deit.train.tuning import normalises_batches

_MOST_SKIPPED = 5
"""Number of steps in a row without a finite loss and gradient that stop the run."""


class Diverged(RuntimeError):
    """The loss is not finite again and again."""


def take(
    work: Work,
    state: State,
    batch: Batch,
    wishes: tuple[bool, ...],
    say: Callable[[str], None],
    meanwhile: Callable[[], None] | None = None,
) -> tuple[dict[str, float], list[bool]]:
    """Takes one step, or skips it if the loss or the gradient is not finite. Calls `meanwhile` while a GPU computes.

    Returns the logged numbers and, for each of `wishes`, whether any process has it. On a GPU, these are usually those
    of the step before, because the GPU would stand still while the host reads its numbers and then gives it new work.
    So the GPU decides by itself whether to skip. `settle` reads what is left.
    """
    buffers = [buffer.clone() for buffer in work.model.buffers()]  # running statistics change in the forward pass
    names, means = _gradients(work, state, batch, buffers, say)
    norm = optim.clip_gradients(work.model.parameters(), work.optim.clip).detach().float() / work.us.world
    asked = torch.tensor(wishes, dtype=torch.float32).to(work.us.device, non_blocking=True)
    totals = work.us.sum(torch.cat([means, norm.reshape(1), asked]))
    names = [*names, "gradient_norm"]
    state.step += 1
    unread = Unread.of(state.step, names, totals)
    meanwhile = meanwhile or (lambda: None)
    if work.decides:
        earlier = settle(work, state, say) or ({}, [False] * len(wishes))
        judged = torch.stack([totals[names.index(name)] for name in ("loss", "gradient_norm")])
        skip = 1.0 - judged.isfinite().all().float()
        work.optimizers.step(skip)
        if work.average:
            work.average.update(skip)
        for buffer, kept in zip(work.model.buffers(), buffers, strict=True):
            buffer.copy_(torch.where(skip > 0, kept, buffer))
        work.optimizers.zero_grad()
        work.unread = unread
        meanwhile()
        return earlier
    meanwhile()
    numbers, wanted = unread.read()
    if _is_finite(numbers):
        work.optimizers.step()
        if work.average:
            work.average.update()
        work.optimizers.zero_grad()
    else:
        _undo(work, buffers)
    _count(work, state, unread.step, numbers, say)
    return numbers, wanted


def settle(work: Work, state: State, say: Callable[[str], None]) -> tuple[dict[str, float], list[bool]] | None:
    """Reads what `take` has left unread, if anything. Then `state` is that of the model."""
    unread, work.unread = work.unread, None
    if unread is None:
        return None
    numbers, wanted = unread.read()
    if work.average and not _is_finite(numbers):
        work.average.not_updated()
    _count(work, state, unread.step, numbers, say)
    return numbers, wanted


def _is_finite(numbers: Mapping[str, float]) -> bool:
    return math.isfinite(numbers["loss"]) and math.isfinite(numbers["gradient_norm"])


def _count(work: Work, state: State, step: int, numbers: Mapping[str, float], say: Callable[[str], None]) -> None:
    """Counts a step that was taken or skipped. Raises `Diverged` if too many in a row were skipped."""
    if _is_finite(numbers):
        state.skipped_in_a_row = 0
        state.counted += 1
        for name, value in numbers.items():
            state.sums[name] = state.sums.get(name, 0.0) + value
        return
    state.skipped += 1
    state.skipped_in_a_row += 1
    say(f"step {step} is skipped: loss {numbers['loss']}, gradient norm {numbers['gradient_norm']}")
    if state.skipped_in_a_row >= _MOST_SKIPPED:
        optimizer = work.optim
        raise Diverged(
            f"{work.recipe.name}: the loss or its gradient was not finite in {_MOST_SKIPPED} steps in a row, up to "
            f"{step}; the last good checkpoint and model are kept. Lower optim.lr (now {optimizer.lr}), set optim.clip "
            f"(now {optimizer.clip}), lengthen schedule.warmup, or set compute.precision=float32"
        )


def _gradients(
    work: Work, state: State, batch: Batch, buffers: list[Tensor], say: Callable[[str], None]
) -> tuple[list[str], Tensor]:
    """Computes the gradients of the mean loss over the global batch. Returns this process's share of the logged means.

    If memory runs out, the micro-batches are halved and the batch is computed again.
    """
    while True:
        try:
            return _accumulated(work, state, batch, work.computing, _depth_draws(work, state))
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if work.us.world > 1:  # the others wait in a collective operation
                raise _too_large(work, batch) from error
        _undo(work, buffers)
        _halve(work, batch, say)


def fit(work: Work, state: State, batch: Batch, say: Callable[[str], None]) -> None:
    """Divides the batch into micro-batches that fit into memory, in all processes alike, before the first step.

    First, the need of memory is measured on a few images. Then many processes compute their shares by themselves, with
    results that are not used. Without this trial, a process that runs out of memory in a collective operation would
    leave the others waiting. A sharded model can't be computed by one process, so it is not tried.
    """
    if work.recipe.compute.parallel == "shard" and work.us.world > 1:
        return
    _divide(work, state, batch, say)
    while work.us.world > 1:
        failed = False
        try:
            _try(work, state, batch, _depth_draws(work, state))
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            failed = True
        if not work.us.sum(torch.tensor(float(failed), device=work.us.device)).item():
            return
        _halve(work, batch, say)


def _try(work: Work, state: State, batch: Batch, depth: Tensor | None) -> None:
    """Computes a batch in this process alone, and leaves everything as it was."""
    buffers = [buffer.clone() for buffer in work.model.buffers()]
    devices = [work.us.device] if work.us.device.type == "cuda" else []
    try:
        with alone(work.model), torch.random.fork_rng(devices):
            _accumulated(work, state, batch, work.model, depth)
    finally:
        _undo(work, buffers)


def _divide(work: Work, state: State, batch: Batch, say: Callable[[str], None]) -> None:
    """Measures the memory that a step needs, says it, and divides the batch if it would not fit.

    On a GPU it does nothing, because lack of memory is an error there, which the step itself survives.
    """
    recipe, us = work.recipe, work.us
    images = (work.total - state.step) * recipe.data.batch
    if us.device.type == "cuda" or not memory.worthwhile(images, (recipe.data.batch + 1) // 2 // us.world):
        return
    room = available_memory(us.device)
    whole, depth = replace(work, accumulate=1), _depth_draws(work, state)
    kept = None if depth is None else torch.ones_like(depth)  # no branch is dropped, which takes most memory

    def compute(few: Batch) -> None:
        with torch.compiler.set_stance("force_eager") if work.compiled else nullcontext():
            _try(whole, state, few, kept)

    try:
        need = memory.measured(compute, batch)
    except (RuntimeError, MemoryError) as error:
        if us.world > 1 or not out_of_memory(error):
            raise
        return  # the step itself will say it
    plans = us.gather(
        memory.plan(need, len(batch), work.accumulate, not normalises_batches(work.model, work.tuned), room)
    )
    chosen = max(plans, key=lambda each: (not each.fits, each.parts, each.need))
    if chosen.room is None:
        say(f"a step needs about {amount(chosen.need)} of memory")
        return
    found = f"about {amount(chosen.whole)} of memory, and {amount(chosen.room)} are free"
    if not chosen.fits:
        if normalises_batches(work.model, work.tuned):
            raise RuntimeError(f"a step needs {found}; {_batch_norm_advice(work)}")
        raise RuntimeError(
            f"a step needs {found}; in the smallest parts it needs {amount(chosen.need)}. Set "
            "compute.checkpoint_blocks=True, take a smaller model, or free memory"
        )
    if chosen.parts == work.accumulate:
        say(f"a step needs {found}")
        return
    work.accumulate = chosen.parts
    say(
        f"a step would need {found}: the batch is now computed in {chosen.parts} parts, which need "
        f"{amount(chosen.need)}; the result is the same"
    )


def _batch_norm_advice(work: Work) -> str:
    return (
        f"{MICRO_BATCHES_REFUSED}: set data.batch below {work.recipe.data.batch} (the learning rate follows it), or "
        "take a smaller model"
    )


def _halve(work: Work, batch: Batch, say: Callable[[str], None]) -> None:
    if normalises_batches(work.model, work.tuned):
        raise RuntimeError(f"out of memory with {len(batch)} images at once; {_batch_norm_advice(work)}")
    if work.accumulate >= (len(batch) + 1) // 2:  # mirror images can't be separated
        raise _too_large(work, batch)
    work.accumulate *= 2
    free_memory()
    say(f"out of memory: the batch is now computed in {work.accumulate} parts; the result is the same")


def _too_large(work: Work, batch: Batch) -> RuntimeError:
    pairs = (len(batch) + 1) // 2
    return RuntimeError(  # the size is computed, because to divide the batch takes memory
        f"out of memory with micro-batches of {min(len(batch), 2 * -(-pairs // work.accumulate))} images; set "
        f"compute.accumulate above {work.accumulate} or compute.checkpoint_blocks=True, or take a smaller "
        "model"
    )


def _undo(work: Work, buffers: list[Tensor]) -> None:
    work.optimizers.zero_grad()
    for buffer, kept in zip(work.model.buffers(), buffers, strict=True):
        buffer.copy_(kept)


def _accumulated(
    work: Work, state: State, batch: Batch, computing: nn.Module, depth: Tensor | None
) -> tuple[list[str], Tensor]:
    recipe, us = work.recipe, work.us
    torch.manual_seed(int(draws(recipe.seed, state.step, us.rank, 0, stream=Stream.DROPOUT).integers(2**62)))
    for kept in work.tuned.frozen:  # an evaluation has put the whole model into training
        kept.eval()
    parts = batch.to(us.device).parts(work.accumulate)
    totals: list[Tensor] = []
    for i, part in enumerate(parts):
        share = len(part) / recipe.data.batch
        rows = None if depth is None else torch.cat([each[part.positions] for each in depth])
        part = work.batches.mix(part.finished())
        with synchronised(computing, i == len(parts) - 1):
            with torch.autocast(us.device.type, work.precision, enabled=work.precision != torch.float32):
                found = work.objective(computing, part, rows)
            # DDP and FSDP take the mean over processes, but the loss is a sum of shares.
            (found["loss"] * (share * us.world)).backward()
        totals.append(torch.stack([value.detach().float() for value in found.values()]) * share)
    return list(found), torch.stack(totals).sum(0)


def _depth_draws(work: Work, state: State) -> Tensor | None:
    return depth_draws(work.recipe, state.step, work.objective.passes)


def depth_draws(recipe: Recipe, step: int, passes: int) -> Tensor | None:
    """(passes, batch, blocks, 2) for the global batch, so that each image's stochastic depth is the same however the
    batch is divided. None if the model has no stochastic depth."""
    config = recipe.model
    if not isinstance(config, DeiTConfig) or not config.drop_path_rate:
        return None
    shape = (passes, recipe.data.batch, config.num_hidden_layers, 2)
    return torch.from_numpy(draws(recipe.seed, step, 0, 0, stream=Stream.DEPTH).random(shape, dtype="float32"))
