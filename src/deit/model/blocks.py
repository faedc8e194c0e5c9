"""A block of the network in PyTorch: attention and an MLP.

B images, N tokens (prefix and patches), D width, H heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deit.config import DeiTConfig
from deit.model import cpu_training, merging
from deit.model.pretrained import AttnImplementation

Trace = dict[str, Tensor]


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATION: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_new": lambda: nn.GELU("tanh"),
    "gelu_pytorch_tanh": lambda: nn.GELU("tanh"),
    "quick_gelu": QuickGELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "linear": nn.Identity,
}


def note(trace: Trace | None, name: str, value: Tensor) -> Tensor:
    """Keeps `value` under `name` if there is a trace, and returns it."""
    if trace is not None:
        trace[name] = value
    return value


class Attention(nn.Module):
    """Multi-head self-attention. `implementation` chooses the kernel, never the result.

    `sdpa` is PyTorch's fused kernel, `eager` is two batched matmuls. `auto` is `sdpa`, except in training on the CPU,
    because the fused kernel's backward pass is slower there, and under `torch.func` and forward-mode differentiation,
    because the fused kernel has no rule for them. A call that needs the weights or masks heads is `eager`.
    """

    implementation: AttnImplementation

    def __init__(self, config: DeiTConfig):
        super().__init__()
        width = config.hidden_size
        self.heads, self.head_width = config.num_attention_heads, config.head_width
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        self.out = nn.Linear(width, width)
        self.dropout = config.attention_probs_dropout_prob
        self.implementation = "auto"

    def forward(
        self,
        x: Tensor,
        head_mask: Tensor | None = None,
        need_weights: bool = False,
        read: int | None = None,
        sizes: Tensor | None = None,
        need_keys: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What the first `read` tokens (None: all) gather from all tokens, their weights and the keys (B, H, N, K).

        Weights and keys are None unless they are needed. A token counts as many times as `sizes` (B, N) says.
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, self.head_width)).permute(2, 0, 3, 1, 4)  # (B, H, N, K)
        q = q[:, :, :read]
        dropout = self.dropout if self.training else 0.0
        attention = None
        # Adding the logarithm to a score multiplies the weight before the softmax divides by the sum.
        bias = None if sizes is None else sizes.log().to(q.dtype)[:, None, None]  # (B, 1, 1, N)
        if need_weights or head_mask is not None or self._eager(x):
            scores = (q * self.head_width**-0.5) @ k.transpose(-2, -1)  # (B, H, N, N)
            scores = scores if bias is None else scores + bias
            attention = F.dropout(scores.softmax(-1), dropout)
            if head_mask is not None:
                attention = attention * head_mask.view(-1, 1, 1)
            y = attention @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, bias, dropout_p=dropout)
        y = self.out(y.transpose(1, 2).flatten(2))
        return y, attention if need_weights else None, k if need_keys else None

    def _eager(self, x: Tensor) -> bool:
        if self.implementation == "auto":
            return (self.training and x.device.type == "cpu") or cpu_training.transforms_active()
        return self.implementation == "eager"


class MLP(nn.Module):
    def __init__(self, config: DeiTConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACTIVATION[config.hidden_act]()
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


_KNOWN_BY_HAND = {Attention, MLP, nn.Linear, nn.LayerNorm, nn.GELU, nn.Dropout}


def hooked(module: nn.Module) -> bool:
    """Whether somebody watches or changes what the module computes."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _untouched(module: nn.Module) -> bool:
    """Whether `cpu_training` computes this module: it is neither replaced (adapters, parametrizations) nor hooked."""
    return type(module) in _KNOWN_BY_HAND and not hooked(module)


class Block(nn.Module):
    """Pre-norm transformer block.

    Both branches have optional LayerScale. `keep` (2, B) holds stochastic depth's factor of each branch for each image.
    With `read`, the block returns only that many tokens, from the first on. Otherwise `config.merge` of the patch
    tokens are merged between the branches, and `sizes` (B, N) says what the tokens hold already (None: one patch each).

    In training on the CPU, `cpu_training` computes both branches, because it gives the same values with less work.
    Autograd takes over if only it can do what is needed: dropout, attention weights, another activation, compilation,
    `torch.func`, forward-mode differentiation, hooks on the parts, replaced parts.
    """

    scale1: Tensor | None
    scale2: Tensor | None

    def __init__(self, config: DeiTConfig):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        scaled = config.layer_scale_init_value is not None
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attention = Attention(config)
        self.scale1 = nn.Parameter(torch.empty(width)) if scaled else None
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(config)
        self.scale2 = nn.Parameter(torch.empty(width)) if scaled else None
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.merge, self.prefix = config.merge, config.num_prefix_tokens

    def forward(
        self,
        x: Tensor,
        head_mask: Tensor | None = None,
        need_weights: bool = False,
        keep: Tensor | None = None,
        read: int | None = None,
        sizes: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, merging.Match | None]:
        """The tokens, the attention weights, the tokens' sizes, and the match by which patches were merged."""
        first, second = (None, None) if keep is None else keep
        by_hand, attention, match = self._by_hand(x, head_mask, need_weights), None, None
        count = min(self.merge, (x.shape[1] - self.prefix) // 2) if read is None else 0
        if by_hand:
            x, keys = self._attention_by_hand(x, first, x.shape[1] if read is None else read, sizes, count > 0)
        else:
            y, attention, keys = self.attention(self.norm1(x), head_mask, need_weights, read, sizes, count > 0)
            x = x[:, :read] + self._branch(y, self.scale1, first, x.dtype)
        if keys is not None:
            match = merging.match(keys[:, :, self.prefix :], count)
            x, sizes = merging.merge(x, sizes, match, self.prefix)
        if by_hand:
            return self._mlp_by_hand(x, second), None, sizes, match
        x = x + self._branch(self.mlp(self.norm2(x)), self.scale2, second, x.dtype)
        return x, attention, sizes, match

    def _by_hand(self, x: Tensor, head_mask: Tensor | None, need_weights: bool) -> bool:
        return (
            self.training
            and x.device.type == "cpu"
            and torch.is_grad_enabled()
            and not need_weights
            and head_mask is None
            and self.attention.implementation == "auto"
            and self.attention.dropout == 0.0
            and self.dropout.p == 0.0
            and not torch.compiler.is_compiling()
            and not cpu_training.transforms_active()
            and all(_untouched(part) for child in self.children() for part in child.modules())
        )

    def _attention_by_hand(
        self, x: Tensor, keep: Tensor | None, read: int, sizes: Tensor | None, need_keys: bool
    ) -> tuple[Tensor, Tensor | None]:
        attention, dtype = self.attention, cpu_training.compute_dtype(x)
        with torch.autocast("cpu", enabled=False):  # the branches choose the type of each operation themselves
            return cpu_training.AttentionBranch.apply(
                x,
                keep,
                read,
                attention.heads,
                self.norm1.eps,
                dtype,
                need_keys,
                sizes,
                self.norm1.weight,
                self.norm1.bias,
                attention.qkv.weight,
                attention.qkv.bias,
                attention.out.weight,
                attention.out.bias,
                self.scale1,
            )

    def _mlp_by_hand(self, x: Tensor, keep: Tensor | None) -> Tensor:
        mlp, dtype = self.mlp, cpu_training.compute_dtype(x)
        with torch.autocast("cpu", enabled=False):
            return cpu_training.MLPBranch.apply(
                x,
                keep,
                mlp.activation.approximate,
                self.norm2.eps,
                dtype,
                self.norm2.weight,
                self.norm2.bias,
                mlp.fc1.weight,
                mlp.fc1.bias,
                mlp.fc2.weight,
                mlp.fc2.bias,
                self.scale2,
            )

    def _branch(self, y: Tensor, scale: Tensor | None, keep: Tensor | None, dtype: torch.dtype) -> Tensor:
        y = self.dropout(y)
        y = y if scale is None else y * scale
        # The factor stays in float32, because bfloat16 would round 1 / 0.9 to 1.1094.
        return y if keep is None else (y * keep.view(-1, 1, 1)).to(dtype)
