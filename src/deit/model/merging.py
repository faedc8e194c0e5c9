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

_STEPS = 2**20
"""Steps between a similarity of 0 and one of 1. Times the number of sources, it fits the 32 bits of some runtimes."""


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

    Of equal matches, the source and the destination with the lowest numbers win. The matches of two sources are equal
    if they are the same in steps of a millionth.
    """
    # In float32, because bfloat16 would make many matches equal. Without gradient, because a choice has none.
    directions = F.normalize(keys.detach().float().mean(1), dim=-1)
    with _no_autocast(keys.device.type):
        similarity = directions[:, ::2] @ directions[:, 1::2].transpose(1, 2)  # (B, S, T)
    best, nearest = similarity.max(-1)
    # Whole numbers that all differ, because some devices and runtimes sort equal values in no fixed order.
    sources = best.shape[1]
    key = (best * _STEPS).round().long() * sources - torch.arange(sources, device=best.device)
    order = key.topk(sources).indices
    kept = order[:, count:].topk(sources - count, largest=False).values
    return Match(kept, order[:, :count], nearest.gather(1, order[:, :count]))


def merge(x: Tensor, sizes: Tensor | None, match: Match, prefix: int) -> tuple[Tensor, Tensor]:
    """Merges tokens (B, N, D), each with the weight of its size; returns the tokens that are left, and their sizes.

    The first `prefix` tokens stay in front. The sources that stay follow, and then the destinations.
    """
    sizes = x.new_ones(x.shape[:2], dtype=torch.float32) if sizes is None else sizes
    to, to_size = x[:, prefix + 1 :: 2], sizes[:, prefix + 1 :: 2]
    kept, merged = prefix + 2 * match.kept, prefix + 2 * match.merged  # their numbers among all tokens
    moved_size = sizes.gather(1, merged).unsqueeze(2)  # (B, M, 1)
    moved = _rows(x, merged) * moved_size  # (B, M, D), in float32 or finer
    # A product instead of adding at indices, which has no fixed order on a GPU.
    belongs = match.into.unsqueeze(1) == torch.arange(to.shape[1], device=x.device).unsqueeze(1)  # (B, T, M)
    with _no_autocast(x.device.type):
        total = to_size.unsqueeze(2) + belongs.to(sizes.dtype) @ moved_size  # (B, T, 1)
        to = to * (to_size.unsqueeze(2) / total) + (belongs.to(moved.dtype) / total) @ moved
    x = torch.cat([x[:, :prefix], _rows(x, kept), to.to(x.dtype)], 1)
    return x, torch.cat([sizes[:, :prefix], sizes.gather(1, kept), total.squeeze(2)], 1)


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
    # Whole rows, because runtimes copy them faster than they gather single values.
    images, tokens, _ = x.shape
    first = tokens * torch.arange(images, device=x.device).unsqueeze(1)
    return x.flatten(0, 1).index_select(0, (first + numbers).flatten()).unflatten(0, numbers.shape)


def _no_autocast(device: str) -> AbstractContextManager[object]:
    # Only if autocast is on, because `torch.export` writes the context into its graph.
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
