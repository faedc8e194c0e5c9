"""The calls that timm's optimizers, trainers and feature extractors make on a model.

B images, N tokens, D width, R x S grid of patches.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from deit.model import merging

_NEVER_DECAYED = ("cls_token", "distillation_token", "mask_token", "position")
_HEADS = ("classifier", "cls_classifier", "distillation_classifier")


class TimmWays:
    """Methods of `timm.models.VisionTransformer` for every model of this family, with timm's meaning."""

    def no_weight_decay(self: Any) -> set[str]:
        """Names of the tokens and positions. Biases and norms have one dimension, which timm.optim sees by itself."""
        return {name for name, _ in self.named_parameters() if name.rpartition(".")[2] in _NEVER_DECAYED}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns for layer-wise learning rates: the stem, each block, and what comes after the last. `coarse` is the
        same, because there is one stage of blocks."""
        return {
            "stem": r"^(?:deit\.)?(?:cls_token|distillation_token|mask_token|position|patch)",
            "blocks": [(r"^(?:deit\.)?blocks\.(\d+)", None), (r"^(?:deit\.)?norm", (99999,))],
        }

    def set_grad_checkpointing(self: Any, enable: bool = True) -> None:
        self.backbone.gradient_checkpointing = enable

    def set_input_size(self: Any, img_size: int | tuple[int, int] | None = None, patch_size: Any = None) -> None:
        """`resize_to`. Raises `ValueError` for another patch size, which a trained projection has no values for."""
        if patch_size is not None and _pair(patch_size) != self.config.patch_hw:
            raise ValueError(
                f"patch_size={patch_size} differs from the model's {self.config.patch_size}; build a model of that "
                "patch size, and start it from this one's files"
            )
        if img_size is not None:
            self.resize_to(img_size if isinstance(img_size, int) else tuple(img_size))

    def get_classifier(self: Any) -> nn.Module | tuple[nn.Module, ...]:
        """The head, or both heads of a distilled model. `nn.Identity` for a backbone."""
        heads = tuple(getattr(self, name) for name in _HEADS if hasattr(self, name))
        return heads if len(heads) > 1 else heads[0] if heads else nn.Identity()

    def reset_classifier(self: Any, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces every head by a fresh one of `num_classes` outputs, 0 for none, and drops the names of the labels.

        Raises `ValueError` for a model without heads, and for a pooling other than the class token's.
        """
        names = [name for name in _HEADS if hasattr(self, name)]
        if not names:
            raise ValueError(f"a {type(self).__name__} has no head to reset; take DeiTForImageClassification")
        if global_pool not in (None, "token"):
            raise ValueError(f"global_pool={global_pool!r} is not known here; this family classifies by its tokens")
        self.backbone.relabel(self.config.replace(num_labels=num_classes))
        for name in names:
            head = self.fresh_head()
            setattr(self, name, head.to(self.device, self.dtype))

    def forward_features(self: Any, x: Tensor) -> Tensor:
        """All tokens (B, N, D) after the final LayerNorm, of images (B, channels, height, width)."""
        return self.backbone(x, return_dict=True).last_hidden_state

    def forward_head(self: Any, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, classes) of the tokens (B, N, D) that `forward_features` gives; with `pre_logits` what the heads
        see, (B, D). A distilled model takes the mean over its two heads."""
        heads = [getattr(self, name) for name in _HEADS if hasattr(self, name)]
        seen = [x[:, place] for place in range(max(1, len(heads)))]
        if not pre_logits:
            seen = [head(token) for head, token in zip(heads, seen, strict=False)] or seen
        return torch.stack(seen).mean(0)

    def forward_intermediates(
        self: Any,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The patches after chosen blocks, and after them `forward_features`. A merged patch has its token's value.

        Args:
            indices: numbers of blocks, negative ones from the end; an integer is as many of the last; None is all.
            return_prefix_tokens: each intermediate is a pair with the tokens before the patches, (B, prefix, D).
            norm: applies the final LayerNorm to each intermediate.
            stop_early: has no effect on the values; all blocks are computed.
            output_fmt: `NCHW` is (B, D, R, S), `NLC` is (B, patches, D).
            intermediates_only: leaves `forward_features` out.

        Raises `ValueError` for another format and for blocks that there are not.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r} is not known; choose NCHW or NLC")
        count = self.config.num_hidden_layers
        chosen = list(range(count)) if indices is None else indices
        if isinstance(chosen, int):
            chosen = list(range(count - chosen, count))
        if wrong := [i for i in chosen if not -count <= i < count]:
            raise ValueError(f"the model has {count} blocks, found the number {wrong[0]}; choose from 0 to {count - 1}")
        out = self.backbone(x, output_hidden_states=True, return_dict=True)
        prefix, grid = self.config.num_prefix_tokens, self.config.grid_of(*x.shape[2:])
        found = []
        for i in sorted(i % count for i in chosen):
            tokens = out.hidden_states[i + 1]
            tokens = self.backbone.norm(tokens) if norm else tokens
            held = None if out.token_of_patch is None else out.token_of_patch[i + 1]
            patches = tokens[:, prefix:] if held is None else merging.spread(tokens, held)
            if output_fmt == "NCHW":
                patches = patches.transpose(1, 2).unflatten(2, grid)
            found.append((patches, tokens[:, :prefix]) if return_prefix_tokens else patches)
        return found if intermediates_only else (out.last_hidden_state, found)


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)
