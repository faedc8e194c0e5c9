"""Merging of similar patch tokens between a block's attention and its MLP (Bolya et al. 2023, arXiv 2210.09461).

Every second patch token is a source, the others are destinations. Each source looks for the destination whose key is
most alike, and the sources with the best matches become part of theirs. A token's size is the number of patches in it.
Blocks after the first count a key as often as its token's size says (proportional attention).

B images, N tokens (prefix and patches), D width, H heads, K head width, S sources, T destinations, M merged sources.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Match(NamedTuple):
    """What becomes of each patch token. Sources and destinations are numbered from 0, each in their own order."""

    kept: Tensor
    """(B, S - M), the sources that stay, in ascending order."""
    merged: Tensor
    """(B, M), the sources that are merged, the best match first."""
    into: Tensor
    """(B, M), the destination of each of these."""


def match(keys: Tensor, count: int) -> Match:
    """Pairs the patch tokens by their keys (B, H, S + T, K), of which `count` are merged.

    Of equal matches, the source and the destination with the lowest numbers win.
    """
    # In float32, because bfloat16 would make many matches equal. Without gradient, because a choice has none.
    directions = F.normalize(keys.detach().float().mean(1), dim=-1)
    with _no_autocast(keys.device.type):
        similarity = directions[:, ::2] @ directions[:, 1::2].transpose(1, 2)  # (B, S, T)
    best, nearest = similarity.max(-1)
    # The ranks are counted, because the sorting of some devices and runtimes has no fixed order for equal values.
    number = torch.arange(best.shape[1], device=best.device)
    one, other = best.unsqueeze(2), best.unsqueeze(1)
    first_of_equals = (other == one).logical_and(number < number.unsqueeze(1))
    rank = (other > one).logical_or(first_of_equals).sum(-1)  # the number of sources that go before
    order = torch.where(rank < count, rank + len(number), number).topk(len(number), largest=False).indices
    stay = len(number) - count
    return Match(order[:, :stay], order[:, stay:], nearest.gather(1, order[:, stay:]))


def merge(x: Tensor, sizes: Tensor | None, match: Match, prefix: int) -> tuple[Tensor, Tensor]:
    """Merges tokens (B, N, D), each with the weight of its size; returns the tokens that are left, and their sizes.

    The first `prefix` tokens stay in front. The sources that stay follow, and then the destinations.
    """
    sizes = x.new_ones(x.shape[:2], dtype=torch.float32) if sizes is None else sizes
    (source, to), (source_size, to_size) = ((t[:, prefix::2], t[:, prefix + 1 :: 2]) for t in (x, sizes))
    moved_size = source_size.gather(1, match.merged).unsqueeze(2)  # (B, M, 1)
    moved = _rows(source, match.merged) * moved_size  # (B, M, D), in float32 or finer
    # A product instead of adding at indices, which has no fixed order on a GPU.
    belongs = match.into.unsqueeze(1) == torch.arange(to.shape[1], device=x.device).unsqueeze(1)  # (B, T, M)
    with _no_autocast(x.device.type):
        total = to_size.unsqueeze(2) + belongs.to(sizes.dtype) @ moved_size  # (B, T, 1)
        to = (to * to_size.unsqueeze(2) + belongs.to(moved.dtype) @ moved) / total
    x = torch.cat([x[:, :prefix], _rows(source, match.kept), to.to(x.dtype)], 1)
    return x, torch.cat([sizes[:, :prefix], source_size.gather(1, match.kept), total.squeeze(2)], 1)


def followed(held: Tensor, match: Match | None, prefix: int) -> Tensor:
    """The number of the token that holds each patch after a merge, (B, patches), from its number before."""
    if match is None:
        return held
    (images, stay), sources = match.kept.shape, match.kept.shape[1] + match.merged.shape[1]
    place = held.new_empty(images, sources)  # of each source among the patch tokens that are left
    place = place.scatter(1, match.kept, torch.arange(stay, device=held.device).expand(images, -1))
    place = place.scatter(1, match.merged, stay + match.into)
    number = held - prefix
    half = number // 2
    return prefix + torch.where(number % 2 == 0, place.gather(1, half), stay + half)


def spread(x: Tensor, held: Tensor) -> Tensor:
    """Gives each patch the value of the token that holds it: (B, N, D) and (B, patches) make (B, patches, D)."""
    return _rows(x, held)


def gathered(row: Tensor, held: Tensor, prefix: int, tokens: int) -> Tensor:
    """Adds up what the patches of each token have: (B, prefix + patches) and (B, patches) make (B, tokens)."""
    found = F.pad(row[:, :prefix], (0, tokens - prefix))
    return found.scatter_add(1, held, row[:, prefix:])


def shared(row: Tensor, held: Tensor, prefix: int) -> Tensor:
    """Shares what each token has among its patches: (B, N) and (B, patches) make (B, prefix + patches)."""
    sizes = torch.zeros_like(row).scatter_add(1, held, torch.ones_like(held, dtype=row.dtype))
    return torch.cat([row[:, :prefix], (row / sizes.clamp(min=1)).gather(1, held)], 1)


def _rows(x: Tensor, numbers: Tensor) -> Tensor:
    return x.gather(1, numbers.unsqueeze(2).expand(-1, -1, x.shape[2]))


def _no_autocast(device: str) -> AbstractContextManager[object]:
    # Only if autocast is on, because `torch.export` writes the context into its graph.
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
