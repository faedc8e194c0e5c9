"""Merging of similar patch tokens in Keras 3: the twin of `deit.model.merging`, which explains it.

B images, N tokens (prefix and patches), D width, H heads, K head width, S sources, T destinations, M merged sources.
Numbers and sizes of tokens are int32, because Keras would cast floats to the precision of a layer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from keras import ops

_STEPS = 2**20
"""Steps between a similarity of 0 and one of 1, as in `deit.model.merging`."""


class Match(NamedTuple):
    """What becomes of each patch token. Sources and destinations are numbered from 0, each in their own order."""

    kept: Any
    """(B, S - M), the sources that stay, in ascending order."""
    merged: Any
    """(B, M), the sources that are merged, the best match first."""
    into: Any
    """(B, M), the destination of each of these."""


def match(keys: Any, count: int) -> Match:
    """Pairs the patch tokens by their keys (B, H, S + T, K), of which `count` are merged.

    Of equal matches, the source and the destination with the lowest numbers win. The matches of two sources are equal
    if they are the same in steps of a millionth.
    """
    keys = ops.mean(ops.cast(ops.stop_gradient(keys), "float32"), axis=1)
    directions = keys / ops.maximum(ops.sqrt(ops.sum(keys * keys, axis=-1, keepdims=True)), 1e-12)
    similarity = ops.matmul(directions[:, ::2], ops.transpose(directions[:, 1::2], (0, 2, 1)))  # (B, S, T)
    best = ops.max(similarity, axis=-1)
    sources, destinations = similarity.shape[1:]
    # Keras' argmax has operations that LiteRT lacks.
    highest = ops.where(similarity == best[:, :, None], ops.arange(destinations, dtype="int32"), destinations)
    nearest = ops.min(highest, axis=-1)
    key = ops.arange(sources, dtype="int32") - ops.cast(ops.round(best * _STEPS), "int32") * sources
    order = ops.cast(ops.argsort(key, axis=-1), "int32")
    merged = order[:, :count]
    return Match(ops.sort(order[:, count:], axis=-1), merged, ops.take_along_axis(nearest, merged, axis=1))


def merge(x: Any, sizes: Any, match: Match, prefix: int) -> tuple[Any, Any]:
    """Merges tokens (B, N, D), each with the weight of its size; returns the tokens that are left, and their sizes.

    The first `prefix` tokens stay in front. The sources that stay follow, and then the destinations.
    """
    (source, to), (source_size, to_size) = ((t[:, prefix::2], t[:, prefix + 1 :: 2]) for t in (x, sizes))
    moved_size = ops.cast(ops.take_along_axis(source_size, match.merged, axis=1), "float32")[:, :, None]  # (B, M, 1)
    moved = ops.cast(_rows(source, match.merged), "float32") * moved_size  # (B, M, D)
    to_size = ops.cast(to_size, "float32")[:, :, None]
    belongs = ops.cast(match.into[:, None] == ops.arange(to.shape[1], dtype="int32")[:, None], "float32")  # (B, T, M)
    total = to_size + ops.matmul(belongs, moved_size)  # (B, T, 1)
    to = ops.cast(to, "float32") * (to_size / total) + ops.matmul(belongs / total, moved)
    x = ops.concatenate([x[:, :prefix], _rows(source, match.kept), ops.cast(to, x.dtype)], axis=1)
    kept_size = ops.take_along_axis(source_size, match.kept, axis=1)
    return x, ops.concatenate([sizes[:, :prefix], kept_size, ops.cast(ops.round(total[:, :, 0]), "int32")], axis=1)


def followed(held: Any, match: Match | None, prefix: int) -> Any:
    """The number of the token that holds each patch after a merge, (B, patches), from its number before."""
    if match is None:
        return held
    stay = match.kept.shape[1]
    # The inverse of the order in which the sources lie, and for each of them the number of its token.
    lies = ops.argsort(ops.concatenate([match.kept, match.merged], axis=1), axis=-1)
    token = ops.concatenate([ops.zeros_like(match.kept) + ops.arange(stay, dtype="int32"), stay + match.into], axis=1)
    number = held - prefix
    half = number // 2
    place = ops.take_along_axis(token, ops.cast(lies, "int32"), axis=1)
    return prefix + ops.where(number % 2 == 0, ops.take_along_axis(place, half, axis=1), stay + half)


def _rows(x: Any, numbers: Any) -> Any:
    return ops.take_along_axis(x, ops.repeat(numbers[:, :, None], x.shape[2], axis=2), axis=1)
