"""A block's forward and backward pass for training on the CPU, written by hand.

The values and the operations are those of autograd on `Block`, without what autograd adds between them: copies between
precisions, a separate pass that scales the scores, gradients that are added in fresh memory. If stochastic depth drops
a branch for an image, the branch is not computed. This saves about a tenth of a step of DeiT-Ti (docs/log.md). Only the
gradients that somebody needs are computed, so frozen layers cost none. The backward pass computes the activation again,
and in float32 the norms and the attention weights too. It saves an eighth to a third of the memory, for 2 % of a step.

B images, N tokens, D width, H heads, K head width. R images are kept by stochastic depth, which are all of them if the
caller wants the keys. M tokens, the first ones, are read by the caller: all tokens, except in the last block of a
classifier.

A backward pass that is differentiated itself, or that runs for many gradients at once, is autograd's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

_aten = torch.ops.aten


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type in which matrices are multiplied: autocast's if it is on, or else that of `x`."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def transforms_active() -> bool:
    """Whether `torch.func` or forward-mode differentiation is at work. They know ordinary operations only."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


class _OfAttention(NamedTuple):
    """One value for each input of `AttentionBranch`, in their order: itself, its gradient, or if that is needed."""

    x: Any
    keep: Any = None
    read: Any = None
    heads: Any = None
    eps: Any = None
    dtype: Any = None
    need_keys: Any = None
    sizes: Any = None
    norm_weight: Any = None
    norm_bias: Any = None
    qkv_weight: Any = None
    qkv_bias: Any = None
    out_weight: Any = None
    out_bias: Any = None
    scale: Any = None


class _OfMLP(NamedTuple):
    """One value for each input of `MLPBranch`, in their order: itself, its gradient, or if that is needed."""

    x: Any
    keep: Any = None
    approximate: Any = None
    eps: Any = None
    dtype: Any = None
    norm_weight: Any = None
    norm_bias: Any = None
    fc1_weight: Any = None
    fc1_bias: Any = None
    fc2_weight: Any = None
    fc2_bias: Any = None
    scale: Any = None


class AttentionBranch(torch.autograd.Function):
    """x (B, N, D) -> x[:, :M] + keep * scale * attention(norm(x))[:, :M], and the keys (B, H, N, K), without gradient.

    `qkv_bias`, `scale` (D,), `keep` (B,) and `sizes` (B, N) may be None. The keys are None unless `need_keys`. A token
    counts as many times as `sizes` says.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        keep: Tensor | None,
        read: int,
        heads: int,
        eps: float,
        dtype: torch.dtype,
        need_keys: bool,
        sizes: Tensor | None,
        norm_weight: Tensor,
        norm_bias: Tensor,
        qkv_weight: Tensor,
        qkv_bias: Tensor | None,
        out_weight: Tensor,
        out_bias: Tensor,
        scale: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        rows = None if need_keys else _kept(keep)
        inside = x if rows is None else x[rows]
        (images, tokens, width), head_width = inside.shape, inside.shape[2] // heads
        normed, mean, rstd = _norm(inside, norm_weight, norm_bias, eps, dtype)  # (R * N, D)
        qkv_matrix, out_matrix = qkv_weight.to(dtype), out_weight.to(dtype)
        qkv = _linear(normed, qkv_matrix, qkv_bias).view(images, tokens, 3, heads, head_width)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).contiguous().view(3, images * heads, tokens, head_width)
        q = q[:, :read]
        counted = None
        if sizes is not None:
            counted = (sizes if rows is None else sizes[rows]).log().to(dtype).repeat_interleave(heads, 0).unsqueeze(1)
        attention = _attention(q, k, counted)
        y = torch.bmm(attention, v).view(images, heads, read, head_width).transpose(1, 2).reshape(-1, width)
        branch = _linear(y, out_matrix, out_bias)  # (R * M, D)
        ctx.save_for_backward(
            mean,
            rstd,
            _worth_keeping(normed),
            q,
            k,
            v,
            counted,
            _worth_keeping(attention),
            y,
            qkv_matrix,
            out_matrix,
            None if scale is None else branch,
            rows,
            x,
            keep,
            sizes,
            norm_weight,
            norm_bias,
            qkv_weight,
            qkv_bias,
            out_weight,
            out_bias,
            scale,
        )
        ctx.settings = read, heads, eps, dtype, need_keys
        keys = k.unflatten(0, (images, heads)) if need_keys else None
        if keys is not None:
            ctx.mark_non_differentiable(keys)
        return _added(x[:, :read], branch, scale, rows, keep), keys

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor | None) -> _OfAttention:
        (
            mean,
            rstd,
            normed,
            q,
            k,
            v,
            counted,
            attention,
            y,
            qkv_matrix,
            out_matrix,
            branch,
            rows,
            x,
            keep,
            *parameters,
        ) = ctx.saved_tensors
        given = _OfAttention(x, keep, *ctx.settings, *parameters)
        if _only_autograd_can(gradient):
            return _OfAttention(*_differentiated(attention_branch, given, ctx.needs_input_grad, gradient))
        inside = x if rows is None else x[rows]
        (images, tokens, width), heads, read = inside.shape, given.heads, gradient.shape[1]
        head_width, dtype = width // heads, given.dtype
        wanted = _OfAttention(*ctx.needs_input_grad)
        through_norm = (wanted.x, wanted.norm_weight, wanted.norm_bias)
        d_branch, d_scale = _into_branch(gradient, branch, given.scale, rows, keep, dtype)  # (R * M, D)
        found = _OfAttention(
            x=None,
            out_weight=_outer(d_branch, y) if wanted.out_weight else None,
            out_bias=_summed(d_branch) if wanted.out_bias else None,
            scale=d_scale,
        )
        if not any((*through_norm, wanted.qkv_weight, wanted.qkv_bias)):
            return found
        d_y = (d_branch @ out_matrix).view(images, read, heads, head_width).transpose(1, 2)
        d_y = d_y.reshape(images * heads, read, head_width)
        attention = _attention(q, k, counted) if attention is None else attention
        d_scores = torch._softmax_backward_data(torch.bmm(d_y, v.transpose(1, 2)), attention, -1, dtype)
        d_qkv = q.new_empty(images, tokens, 3, heads, head_width)
        d_qkv[:, read:, 0] = 0.0
        parts = (
            _scaled_bmm(d_scores, k, head_width**-0.5),
            _scaled_bmm(d_scores.transpose(1, 2), q, head_width**-0.5),
            torch.bmm(attention.transpose(1, 2), d_y),
        )
        for i, part in enumerate(parts):
            d_qkv[:, : part.shape[1], i] = part.unflatten(0, (images, heads)).transpose(1, 2)
        d_qkv = d_qkv.view(images * tokens, 3 * width)
        d_x, d_norm_weight, d_norm_bias = _norm_backward(
            d_qkv, qkv_matrix, inside, mean, rstd, given.norm_weight, given.norm_bias, through_norm
        )
        return found._replace(
            x=_through(d_x, gradient, rows, len(x)),
            norm_weight=d_norm_weight,
            norm_bias=d_norm_bias,
            qkv_weight=_outer(d_qkv, _normed(normed, inside, given)) if wanted.qkv_weight else None,
            qkv_bias=_summed(d_qkv) if wanted.qkv_bias else None,
        )


class MLPBranch(torch.autograd.Function):
    """x (B, N, D) -> x + keep * scale * fc2(gelu(fc1(norm(x)))). `approximate` is as in `torch.nn.GELU`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        keep: Tensor | None,
        approximate: str,
        eps: float,
        dtype: torch.dtype,
        norm_weight: Tensor,
        norm_bias: Tensor,
        fc1_weight: Tensor,
        fc1_bias: Tensor,
        fc2_weight: Tensor,
        fc2_bias: Tensor,
        scale: Tensor | None,
    ) -> Tensor:
        rows = _kept(keep)
        inside = x if rows is None else x[rows]
        normed, mean, rstd = _norm(inside, norm_weight, norm_bias, eps, dtype)
        fc1_matrix, fc2_matrix = fc1_weight.to(dtype), fc2_weight.to(dtype)
        before = _linear(normed, fc1_matrix, fc1_bias)
        after = F.gelu(before, approximate=approximate)
        branch = _linear(after, fc2_matrix, fc2_bias)
        ctx.save_for_backward(
            mean,
            rstd,
            _worth_keeping(normed),
            before,
            fc1_matrix,
            fc2_matrix,
            None if scale is None else branch,
            rows,
            x,
            keep,
            norm_weight,
            norm_bias,
            fc1_weight,
            fc1_bias,
            fc2_weight,
            fc2_bias,
            scale,
        )
        ctx.settings = approximate, eps, dtype
        return _added(x, branch, scale, rows, keep)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> _OfMLP:
        mean, rstd, normed, before, fc1_matrix, fc2_matrix, branch, rows, x, keep, *parameters = ctx.saved_tensors
        given = _OfMLP(x, keep, *ctx.settings, *parameters)
        if _only_autograd_can(gradient):
            return _OfMLP(*_differentiated(mlp_branch, given, ctx.needs_input_grad, gradient))
        inside = x if rows is None else x[rows]
        wanted = _OfMLP(*ctx.needs_input_grad)
        through_norm = (wanted.x, wanted.norm_weight, wanted.norm_bias)
        d_branch, d_scale = _into_branch(gradient, branch, given.scale, rows, keep, given.dtype)
        found = _OfMLP(
            x=None,
            fc2_weight=_outer(d_branch, F.gelu(before, approximate=given.approximate)) if wanted.fc2_weight else None,
            fc2_bias=_summed(d_branch) if wanted.fc2_bias else None,
            scale=d_scale,
        )
        if not any((*through_norm, wanted.fc1_weight, wanted.fc1_bias)):
            return found
        d_before = _aten.gelu_backward(d_branch @ fc2_matrix, before, approximate=given.approximate)
        d_x, d_norm_weight, d_norm_bias = _norm_backward(
            d_before, fc1_matrix, inside, mean, rstd, given.norm_weight, given.norm_bias, through_norm
        )
        return found._replace(
            x=_through(d_x, gradient, rows, len(x)),
            norm_weight=d_norm_weight,
            norm_bias=d_norm_bias,
            fc1_weight=_outer(d_before, _normed(normed, inside, given)) if wanted.fc1_weight else None,
            fc1_bias=_summed(d_before) if wanted.fc1_bias else None,
        )


# ---------------------------------------------------------------------------------------------------- through autograd


def attention_branch(of: _OfAttention) -> Tensor:
    """What `AttentionBranch` computes, in operations that autograd can differentiate any number of times."""
    x = of.x
    normed = F.layer_norm(x, x.shape[-1:], of.norm_weight, of.norm_bias, of.eps)
    qkv = F.linear(normed, of.qkv_weight, of.qkv_bias).unflatten(-1, (3, of.heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, N, K)
    scores = (q[:, :, : of.read] * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    attention = (scores if of.sizes is None else scores + of.sizes.log().to(q.dtype)[:, None, None]).softmax(-1)
    y = F.linear((attention @ v).transpose(1, 2).flatten(2), of.out_weight, of.out_bias)
    return x[:, : of.read] + _gained(y, of.scale, of.keep)


def mlp_branch(of: _OfMLP) -> Tensor:
    """What `MLPBranch` computes, in operations that autograd can differentiate any number of times."""
    normed = F.layer_norm(of.x, of.x.shape[-1:], of.norm_weight, of.norm_bias, of.eps)
    y = F.gelu(F.linear(normed, of.fc1_weight, of.fc1_bias), approximate=of.approximate)
    return of.x + _gained(F.linear(y, of.fc2_weight, of.fc2_bias), of.scale, of.keep)


def _gained(y: Tensor, scale: Tensor | None, keep: Tensor | None) -> Tensor:
    y = y if scale is None else y * scale
    return y if keep is None else y * keep.to(y.dtype).view(-1, 1, 1)


def _only_autograd_can(gradient: Tensor) -> bool:
    """Whether the backward pass is differentiated (`create_graph`), or runs for many gradients (`is_grads_batched`)."""
    return torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(gradient)


def _differentiated(
    branch: Callable[[Any], Tensor], given: Any, wanted: tuple[bool, ...], gradient: Tensor
) -> list[Tensor | None]:
    """The gradient of each input of a branch, as a function that can be differentiated again if autograd records."""
    twice = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast("cpu", given.dtype, enabled=given.dtype != given.x.dtype):
        # Views, so that each gradient is that of the branch alone, though the inputs depend on each other elsewhere.
        own = [value.view_as(value) if need else value for value, need in zip(given, wanted, strict=True)]
        y = branch(type(given)(*own))
    asked = [value for value, need in zip(own, wanted, strict=True) if need]
    found = iter(torch.autograd.grad(y, asked, gradient.to(y.dtype), create_graph=twice))
    return [next(found) if need else None for need in wanted]


# ------------------------------------------------------------------------------------------------ what both branches do


def _kept(keep: Tensor | None) -> Tensor | None:
    """The images (R,) for which the branch is computed. None: all."""
    return None if keep is None else keep.nonzero().squeeze(1)


def _norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    normed, mean, rstd = _aten.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
    return normed.to(dtype).flatten(0, 1), mean, rstd


def _worth_keeping(value: Tensor) -> Tensor | None:
    """The value if it is in bfloat16, which takes half the memory. To compute it again would cost a larger part of a
    step there."""
    return None if value.dtype == torch.float32 else value


def _normed(kept: Tensor | None, x: Tensor, given: _OfAttention | _OfMLP) -> Tensor:
    """What the norm gave for x: as it was kept, or computed again."""
    return _norm(x, given.norm_weight, given.norm_bias, given.eps, given.dtype)[0] if kept is None else kept


def _norm_backward(
    d_product: Tensor,
    matrix: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of the norm's input, weight and bias, from that of the product with a matrix (out, in) after it.
    None for those that aren't wanted, and no work if none is."""
    if not any(wanted):
        return None, None, None
    gradient = (d_product @ matrix).to(x.dtype).view(x.shape)
    return _aten.native_layer_norm_backward(gradient, x, x.shape[-1:], mean, rstd, weight, bias, wanted)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.dtype == torch.float32:
        y = x @ weight.t()
        return y if bias is None else y.add_(bias)  # `addmm` writes the bias everywhere first, which takes longer
    # In bfloat16, a weight that is transposed in memory multiplies a fifth faster, and the copy is nearly free.
    weight = weight.t().contiguous()
    return x @ weight if bias is None else torch.addmm(bias.to(x.dtype), x, weight)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """a^T b: from (rows, A) and (rows, B) to (A, B)."""
    # Two halves, with the narrower matrix transposed, are a tenth faster than one product over so many rows.
    if len(a) % 2:
        return a.t() @ b
    if a.shape[1] > b.shape[1]:
        return _outer(b, a).t()
    return torch.bmm(a.unflatten(0, (2, -1)).transpose(1, 2), b.unflatten(0, (2, -1))).sum(0)


def _summed(x: Tensor) -> Tensor:
    """(rows, columns) -> (columns,)."""
    return (x.new_ones(1, len(x)) @ x)[0]  # takes half the time of `x.sum(0)`


def _attention(q: Tensor, k: Tensor, counted: Tensor | None) -> Tensor:
    """Weights (R * H, M, N) of queries (R * H, M, K) and keys (R * H, N, K). `counted` (R * H, 1, N), the logarithms of
    sizes, is added to the scores."""
    return _scaled_bmm(q, k.transpose(1, 2), q.shape[-1] ** -0.5, counted).softmax(-1)


def _scaled_bmm(a: Tensor, b: Tensor, scale: float, added: Tensor | None = None) -> Tensor:
    if added is None:
        return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=scale)
    return torch.baddbmm(added, a, b, alpha=scale)


def _added(x: Tensor, branch: Tensor, scale: Tensor | None, rows: Tensor | None, keep: Tensor | None) -> Tensor:
    """x (B, M, D) plus the branch (R * M, D), for those images for which the branch was computed (None: all)."""
    if scale is not None:
        branch = branch * scale
    branch = branch.view(-1, *x.shape[1:])
    if keep is None:
        return x + branch
    if rows is None:
        return x + (branch * keep.view(-1, 1, 1)).to(x.dtype)
    return x.clone().index_add_(0, rows, (branch * keep[rows].view(-1, 1, 1)).to(x.dtype))


def _into_branch(
    gradient: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    rows: Tensor | None,
    keep: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of what `_added` adds to x: of the branch (R * M, D), and of the scale (D,)."""
    if keep is not None:
        gradient, keep = (gradient, keep) if rows is None else (gradient[rows], keep[rows])
        gradient = gradient * keep.view(-1, 1, 1)
    gradient = gradient.flatten(0, 1)
    if scale is None or branch is None:
        return gradient.to(dtype), None
    return (gradient * scale).to(dtype), (gradient * branch).sum(0)


def _through(d_inside: Tensor | None, gradient: Tensor, rows: Tensor | None, images: int) -> Tensor | None:
    """The gradient of x (B, N, D), from those of the branch's input (R, N, D) and of the sum (B, M, D)."""
    if d_inside is None:
        return None
    d_x = d_inside if rows is None else d_inside.new_zeros(images, *d_inside.shape[1:]).index_add_(0, rows, d_inside)
    d_x[:, : gradient.shape[1]] += gradient
    return d_x
