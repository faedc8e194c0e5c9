"""The network and its heads in PyTorch.

B images, N tokens (prefix and patches), D width, H heads, K head width, C classes, R x S grid of patches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deit import weights
from deit.config import DeiTConfig, ViTConfig
from deit.model import merging
from deit.model.blocks import ACTIVATION, Block, Trace, hooked, note
from deit.model.checkpointing import Checkpointing
from deit.model.loss_rules import Distillation, refuse_merging
from deit.model.losses import classification_loss, distillation_loss, masked_image_loss
from deit.model.outputs import (
    BaseModelOutputWithPooling,
    DeiTForImageClassificationWithTeacherOutput,
    ImageClassifierOutput,
    MaskedImageModelingOutput,
)
from deit.model.pretrained import PreTrained, initialise


def _project(patch: nn.Module, pixels: Tensor, rows: int, columns: int) -> Tensor:
    """The projections of all patches, (B, R * S, D). Patches don't overlap, so one matrix product can compute them."""
    if type(patch) is not nn.Conv2d or hooked(patch) or not _product_is_faster(patch, pixels):
        return patch(pixels).flatten(2).transpose(1, 2)
    return _product(patch, pixels, rows, columns)


def _product_is_faster(patch: nn.Conv2d, pixels: Tensor) -> bool:
    """Whether a product takes less time than a convolution, as measured in docs/log.md.

    cuDNN's convolution took 5 of the 92 ms of a step of DeiT-Ti. On a CPU in bfloat16, the gradient of the weights took
    eight times as long as that of a product: a third of a step with patches of 28 pixels.
    """
    if pixels.device.type != "cpu":
        return pixels.device.type == "cuda"
    learns = torch.is_grad_enabled() and patch.weight.requires_grad
    return (learns or torch.is_autocast_enabled("cpu")) and not torch.compiler.is_compiling()


def _product(patch: nn.Conv2d, pixels: Tensor, rows: int, columns: int) -> Tensor:
    """The convolution `patch`, whose stride is its kernel's size, as one product: (B, R * S, D)."""
    height, width = patch.kernel_size
    if torch.is_autocast_enabled(pixels.device.type):
        pixels = pixels.to(torch.get_autocast_dtype(pixels.device.type))  # before the patches are copied
    cut = pixels[:, :, : rows * height, : columns * width].unflatten(3, (columns, width)).unflatten(2, (rows, height))
    patches = cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, R * S, channels * height * width)
    return F.linear(patches, patch.weight.flatten(1), patch.bias)


def _resize_matrix(old: int, new: int) -> Tensor:
    return torch.from_numpy(weights.resize_matrix(old, new)).float()  # (new, old)


class DeiTModel(PreTrained):
    """The backbone: patches and prefix tokens pass through the blocks (Touvron et al. 2020, sections 3 and 4).

    Args:
        config: sizes and options. With `distillation_token=False`, the model is a plain ViT.
        add_pooling_layer: adds a linear layer and `config.pooler_act` on the class token.
        use_mask_token: adds the token that replaces hidden patches (`bool_masked_pos`).
    """

    kind = "backbone"
    distillation_token: Tensor | None
    mask_token: Tensor | None

    def __init__(self, config: DeiTConfig, add_pooling_layer: bool = True, use_mask_token: bool = False):
        super().__init__()
        self._config = config.replace()  # attributes that are set on it stay with this model
        width = config.hidden_size
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.distillation_token = nn.Parameter(torch.empty(1, 1, width)) if config.distillation_token else None
        self.mask_token = nn.Parameter(torch.empty(1, 1, width)) if use_mask_token else None
        self.position = nn.Parameter(torch.empty(1, config.num_prefix_positions + config.num_patches, width))
        self.patch = nn.Conv2d(config.num_channels, width, config.patch_hw, config.patch_hw)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.pooler = nn.Linear(width, config.pooler_width) if add_pooling_layer else None
        self.pooler_activation = ACTIVATION[config.pooler_act]()
        self.gradient_checkpointing = False
        self.checkpointing = Checkpointing()
        initialise(self, config)

    @property
    def config(self) -> DeiTConfig:  # type: ignore[override]
        return self._config

    @property
    def backbone(self) -> DeiTModel:
        return self

    def forward(
        self,
        pixel_values: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        head_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        interpolate_pos_encoding: bool = False,
        *,
        depth_draws: Tensor | None = None,
        read: int | None = None,
        trace: Trace | None = None,
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """Computes the tokens of a batch of images.

        Args:
            pixel_values: (B, channels, height, width), normalised.
            bool_masked_pos: (B, patches), true where the mask token replaces a patch.
            head_mask: (H,) or (blocks, H), a factor for each head's attention weights, 0 to 1.
            output_attentions, output_hidden_states, return_dict: None takes the config's.
            interpolate_pos_encoding: accepts images of another size than `config.image_size`.
            depth_draws: (B, blocks, 2), uniform in [0, 1), for stochastic depth in training. A branch is dropped for an
                image if its number is below the block's rate. None draws the numbers here.
            read: the number of tokens that the caller reads from `last_hidden_state`, from the first on. The last block
                then computes no others. With hidden states, attentions, a trace or hooks on that block or on `norm`, it
                computes all of them.
            trace: a dict to fill with every intermediate by name.

        With `config.merge`, each block returns fewer tokens than it takes, so hidden states and attentions get smaller
        from block to block. `token_of_patch` then says which token holds a patch; it is None if `read` is used.
        """
        config = self.config
        need_weights = config.output_attentions if output_attentions is None else output_attentions
        keep_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        masks = self._head_masks(head_mask)
        keeps = self._keeps(pixel_values, depth_draws)
        x = note(trace, "embeddings", self._embed(pixel_values, bool_masked_pos, interpolate_pos_encoding))
        reads: list[int | None] = [None] * len(self.blocks)
        if reads and not (need_weights or keep_states or trace is not None or self._watched()):
            reads[-1] = read
        states, attentions, sizes = [x], [], None
        held = self._unmerged(x) if config.merge and reads[-1:] == [None] else None
        for i, block in enumerate(self.blocks):
            given = x, masks[i], need_weights, keeps[i], reads[i], sizes
            if self.gradient_checkpointing and self.training:
                x, attention, sizes, match = self.checkpointing(i, block, *given)
            else:
                x, attention, sizes, match = block(*given)
            note(trace, f"block{i:02}", x)
            states.append(x)
            attentions.append(attention)
            if held is not None:
                held.append(merging.followed(held[-1], match, config.num_prefix_tokens))
        x = note(trace, "norm", self.norm(x))
        pooled = None if self.pooler is None else note(trace, "pooler", self.pooler_activation(self.pooler(x[:, 0])))
        return _result(
            self,
            return_dict,
            BaseModelOutputWithPooling(
                last_hidden_state=x,
                pooler_output=pooled,
                hidden_states=tuple(states) if keep_states else None,
                attentions=tuple(attentions) if need_weights else None,
                token_of_patch=None if held is None else tuple(held),
            ),
        )

    def _unmerged(self, x: Tensor) -> list[Tensor]:
        """The number of each patch's token (B, patches) before the first block."""
        return [torch.arange(self.config.num_prefix_tokens, x.shape[1], device=x.device).expand(x.shape[0], -1)]

    def _watched(self) -> bool:
        """Whether hooks see what the last block and the norm after it compute. They expect all tokens."""
        return any(hooked(module) for part in (self.blocks[-1], self.norm) for module in part.modules())

    def _keeps(self, pixels: Tensor | None, draws: Tensor | None) -> Sequence[Tensor | None]:
        """The factors (2, B) of each block's branches: 0, or 1 / (1 - rate) so that the expectation stays the same."""
        config = self.config
        shape = (0 if pixels is None else pixels.shape[0], config.num_hidden_layers, 2)
        if draws is not None and draws.shape != shape:
            raise ValueError(
                f"depth_draws must be {shape}, two for each block of each image; found {tuple(draws.shape)}"
            )
        if pixels is None or not self.training or config.drop_path_rate == 0.0:
            return [None] * config.num_hidden_layers
        draws = torch.rand(shape) if draws is None else draws
        rates = torch.tensor(config.drop_path_rates, device=draws.device).view(-1, 1)
        keeps = (draws >= rates).float() / (1.0 - rates)
        keeps = keeps.permute(1, 2, 0).to(pixels.device, non_blocking=True)
        return [
            keep if rate and block.training else None
            for keep, rate, block in zip(keeps, config.drop_path_rates, self.blocks, strict=True)
        ]

    def _embed(self, pixels: Tensor | None, mask: Tensor | None, interpolate: bool) -> Tensor:
        config = self.config
        if pixels is None:
            raise ValueError("pixel_values are missing; pass a tensor (images, channels, height, width)")
        if pixels.dim() != 4 or pixels.shape[1] != config.num_channels:
            raise ValueError(
                f"pixel_values must be (images, {config.num_channels}, height, width), found "
                f"{tuple(pixels.shape)}; DeiTImageProcessor makes them"
            )
        if not pixels.is_floating_point():
            raise ValueError(
                f"pixel_values must be normalised floats, found {pixels.dtype}; DeiTImageProcessor makes them"
            )
        height, width = pixels.shape[2:]
        if not interpolate and (height, width) != config.image_hw:
            raise ValueError(
                f"images are {height}x{width}, this model takes {config.image_hw[0]}x"
                f"{config.image_hw[1]}; resize them, pass interpolate_pos_encoding=True, or call "
                "model.resize_to"
            )
        rows, columns = config.grid_of(height, width)
        if not rows or not columns:
            raise ValueError(
                f"images of {height}x{width} hold no patch of {config.patch_hw[0]}x{config.patch_hw[1]}; give larger "
                "images"
            )
        patches = _project(self.patch, pixels.to(self.patch.weight.dtype), rows, columns)  # (B, R * S, D)
        batch = patches.shape[0]
        if mask is not None:
            hidden = self._mask(mask, batch, rows, columns)
            patches = torch.where(hidden, self.mask_token.to(patches.dtype), patches)  # type: ignore[union-attr]
        prefix = [self.cls_token] + ([self.distillation_token] if self.distillation_token is not None else [])
        tokens = torch.cat([*(token.expand(batch, -1, -1) for token in prefix), patches], dim=1)
        position = self._positions(rows, columns)
        if not config.position_on_class_token:
            position = F.pad(position, (0, 0, config.num_prefix_tokens, 0))
        return self.dropout(tokens + position)

    def _mask(self, mask: Tensor, batch: int, rows: int, columns: int) -> Tensor:
        if self.mask_token is None:
            raise ValueError(
                "bool_masked_pos needs a mask token; build DeiTModel(config, use_mask_token=True) or "
                "DeiTForMaskedImageModeling"
            )
        if mask.shape != (batch, rows * columns):
            raise ValueError(
                f"bool_masked_pos must be ({batch}, {rows * columns}): {rows}x{columns} patches for each "
                f"of {batch} images; found {tuple(mask.shape)}"
            )
        return mask.bool().unsqueeze(-1)  # (B, R * S, 1)

    def _positions(self, rows: int, columns: int) -> Tensor:
        """Position embeddings for a grid of patches. Those of the prefix tokens stand in front and don't change."""
        if (rows, columns) == self.config.grid:
            return self.position
        prefix, grid = self.position.tensor_split([self.config.num_prefix_positions], dim=1)
        grid = grid.unflatten(1, self.config.grid)  # (1, R, S, D)
        # In float32 whatever the parameters' type, because each value is a weighted sum of 16 neighbours.
        down = _resize_matrix(self.config.grid[0], rows).to(grid.device)
        across = _resize_matrix(self.config.grid[1], columns).to(grid.device)
        resized = torch.einsum("rR,sS,bRSd->brsd", down, across, grid.float()).to(grid.dtype)
        return torch.cat([prefix, resized.flatten(1, 2)], dim=1)

    def relabel(self, config: DeiTConfig) -> None:
        self._config = config

    def resize_grid(self, config: DeiTConfig) -> None:
        position = self._positions(*config.grid).detach().clone()
        self.position = nn.Parameter(position, requires_grad=self.position.requires_grad)
        self._config = config

    def _head_masks(self, mask: Tensor | None) -> list[Tensor] | list[None]:
        blocks, heads = self.config.num_hidden_layers, self.config.num_attention_heads
        if mask is None:
            return [None] * blocks
        if mask.shape not in ((heads,), (blocks, heads)):
            raise ValueError(f"head_mask must be ({heads},) or ({blocks}, {heads}), found {tuple(mask.shape)}")
        return list(mask.to(self.dtype).expand(blocks, heads))


def _result(model: PreTrained, return_dict: bool | None, output: Any) -> Any:
    as_object = model.config.return_dict if return_dict is None else return_dict
    return output if as_object else output.to_tuple()


class _WithHead(PreTrained):
    """Base class of the models with a head. The backbone is named `deit`, as users of `transformers` know it."""

    def __init__(self, config: DeiTConfig, use_mask_token: bool = False):
        super().__init__()
        self.deit = DeiTModel(config, add_pooling_layer=False, use_mask_token=use_mask_token)

    @property
    def config(self) -> DeiTConfig:  # type: ignore[override]
        return self.deit.config

    def fresh_head(self) -> nn.Module:
        """A classifier of `config.num_labels` outputs with fresh values."""
        return _classifier(self.config)


def _classifier(config: DeiTConfig) -> nn.Module:
    if not config.num_labels:
        return nn.Identity()
    linear = nn.Linear(config.hidden_size, config.num_labels)
    initialise(linear, config)
    return linear


class DeiTForMaskedImageModeling(_WithHead):
    """Predicts the pixels of hidden patches with one linear layer (SimMIM, Xie et al. 2021).

    Works with any grid of patches: non-square images and patches, and other resolutions with
    `interpolate_pos_encoding`.
    """

    kind = "masked_image"

    def __init__(self, config: DeiTConfig):
        if config.patch_hw != _as_pair(config.encoder_stride):
            raise ValueError(
                f"the decoder paints each patch from its token, so encoder_stride={config.encoder_stride} must "
                f"equal patch_size={config.patch_size}; use config.replace(encoder_stride=...)"
            )
        refuse_merging(config)
        super().__init__(config, use_mask_token=True)
        outputs = math.prod(config.patch_hw) * config.num_channels
        self.decoder = nn.Conv2d(config.hidden_size, outputs, kernel_size=1)
        initialise(self.decoder, config)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        head_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        interpolate_pos_encoding: bool = False,
        *,
        depth_draws: Tensor | None = None,
        trace: Trace | None = None,
    ) -> MaskedImageModelingOutput | tuple[Any, ...]:
        """Like `DeiTModel.forward`. With `bool_masked_pos`, the output has the `loss` on the hidden patches."""
        out = self.deit(
            pixel_values,
            bool_masked_pos,
            head_mask,
            output_attentions,
            output_hidden_states,
            True,
            interpolate_pos_encoding,
            depth_draws=depth_draws,
            trace=trace,
        )
        config = self.config
        rows, columns = config.grid_of(*pixel_values.shape[2:])  # type: ignore[union-attr]
        tokens = out.last_hidden_state[:, config.num_prefix_tokens :]
        painted = self.decoder(tokens.transpose(1, 2).unflatten(2, (rows, columns)))  # (B, channels * P * P, R, S)
        height, width = config.patch_hw
        painted = painted.unflatten(1, (config.num_channels, height, width)).permute(0, 1, 4, 2, 5, 3)
        painted = note(trace, "reconstruction", painted.flatten(4, 5).flatten(2, 3))  # (B, channels, R * P, S * P)
        loss = None
        if bool_masked_pos is not None:
            loss = masked_image_loss(
                pixel_values,  # type: ignore[arg-type]
                painted,
                bool_masked_pos.unflatten(1, (rows, columns)),
            )
        return _result(
            self,
            return_dict,
            MaskedImageModelingOutput(
                loss=loss, reconstruction=painted, hidden_states=out.hidden_states, attentions=out.attentions
            ),
        )


class DeiTForImageClassification(_WithHead):
    """A linear classifier on the class token."""

    kind = "classification"
    accepts_loss_kwargs = True

    def __init__(self, config: DeiTConfig):
        super().__init__(config)
        self.classifier = _classifier(config)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        head_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        interpolate_pos_encoding: bool = False,
        *,
        num_items_in_batch: Tensor | int | None = None,
        depth_draws: Tensor | None = None,
        trace: Trace | None = None,
    ) -> ImageClassifierOutput | tuple[Any, ...]:
        """Like `DeiTModel.forward`. With `labels`, the output has the `loss`.

        `labels` are class indices (B,), or (B, C) for multi-label and regression.

        `num_items_in_batch` is the number of labels in a whole step of several batches. The loss is then the sum over
        this batch, divided by that number, so that the batches' losses add up to the step's mean.
        """
        out = self.deit(
            pixel_values,
            None,
            head_mask,
            output_attentions,
            output_hidden_states,
            True,
            interpolate_pos_encoding,
            depth_draws=depth_draws,
            read=1,
            trace=trace,
        )
        logits = note(trace, "logits", self.classifier(out.last_hidden_state[:, 0]))
        loss = None if labels is None else classification_loss(logits, labels, self.config, num_items_in_batch)
        return _result(
            self,
            return_dict,
            ImageClassifierOutput(
                loss=loss,
                logits=logits,
                hidden_states=out.hidden_states,
                attentions=out.attentions,
                token_of_patch=out.token_of_patch,
            ),
        )


class DeiTForImageClassificationWithTeacher(_WithHead):
    """Two linear classifiers: the class token's learns from labels, the distillation token's from a teacher.

    `logits` are the mean of both heads' logits, as the original code and `transformers` fuse them. `fuse_heads` also
    gives the paper's sum of softmaxes, and either head alone.
    """

    kind = "with_teacher"
    accepts_loss_kwargs = True

    def __init__(self, config: DeiTConfig):
        if not config.distillation_token:
            raise ValueError(
                "a model with a teacher needs a distillation token, found distillation_token=False in the "
                "config; use DeiTForImageClassification, or config.replace(distillation_token=True)"
            )
        super().__init__(config)
        self.cls_classifier = _classifier(config)
        self.distillation_classifier = _classifier(config)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        head_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        interpolate_pos_encoding: bool = False,
        *,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        teacher_logits: Tensor | None = None,
        distillation: Distillation = "hard",
        distillation_weight: float | None = None,
        temperature: float | None = None,
        depth_draws: Tensor | None = None,
        trace: Trace | None = None,
    ) -> DeiTForImageClassificationWithTeacherOutput | tuple[Any, ...]:
        """Like `DeiTModel.forward`. With labels, the output can have the `loss`.

        With `labels` and `teacher_logits`, it is `losses.distillation_loss`. With `labels` alone, it is the loss of the
        fused logits, but only in evaluation, because such a training would ignore the teacher.

        Args:
            labels: class indices (B,), or probabilities (B, C) for mixed labels.
            num_items_in_batch: as for `DeiTForImageClassification`.
            teacher_logits: (B, C), or the teacher's decisions (B,) for hard distillation.
            distillation, distillation_weight, temperature: as in `losses.distillation_loss`.
        """
        out = self.deit(
            pixel_values,
            None,
            head_mask,
            output_attentions,
            output_hidden_states,
            True,
            interpolate_pos_encoding,
            depth_draws=depth_draws,
            read=2,
            trace=trace,
        )
        cls_logits = note(trace, "cls_logits", self.cls_classifier(out.last_hidden_state[:, 0]))
        distillation_logits = note(
            trace, "distillation_logits", self.distillation_classifier(out.last_hidden_state[:, 1])
        )
        logits = (cls_logits + distillation_logits) / 2
        loss = None
        if labels is not None and teacher_logits is not None:
            loss = distillation_loss(
                cls_logits,
                distillation_logits,
                labels,
                teacher_logits,
                kind=distillation,
                weight=distillation_weight,
                temperature=temperature,
            )
            if num_items_in_batch is not None:
                loss = loss * labels.numel() / num_items_in_batch
        elif labels is not None and not self.training:
            loss = classification_loss(logits, labels, self.config, num_items_in_batch)
        elif (labels is None) != (teacher_logits is None):
            raise ValueError(
                "distillation trains on labels and teacher_logits together, found only "
                f"{'labels' if teacher_logits is None else 'teacher_logits'}; pass both, or train "
                "DeiTForImageClassification"
            )
        return _result(
            self,
            return_dict,
            DeiTForImageClassificationWithTeacherOutput(
                loss=loss,
                logits=logits,
                cls_logits=cls_logits,
                distillation_logits=distillation_logits,
                hidden_states=out.hidden_states,
                attentions=out.attentions,
                token_of_patch=out.token_of_patch,
            ),
        )


class ViTModel(DeiTModel):
    """`DeiTModel` without a distillation token."""

    config_class = ViTConfig

    def __init__(self, config: DeiTConfig, add_pooling_layer: bool = True, use_mask_token: bool = False):
        _refuse_distillation_token(config)
        super().__init__(config, add_pooling_layer, use_mask_token)


class ViTForImageClassification(DeiTForImageClassification):
    """`DeiTForImageClassification` without a distillation token. The backbone is also named `vit`."""

    config_class = ViTConfig

    def __init__(self, config: DeiTConfig):
        _refuse_distillation_token(config)
        super().__init__(config)

    @property
    def vit(self) -> DeiTModel:
        return self.deit


def _refuse_distillation_token(config: DeiTConfig) -> None:
    if config.distillation_token:
        raise ValueError(
            "a ViT has no distillation token, found distillation_token=True in the config; use the DeiT "
            "class, or ViTConfig"
        )


def _as_pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


__all__ = [
    "DeiTForImageClassification",
    "DeiTForImageClassificationWithTeacher",
    "DeiTForMaskedImageModeling",
    "DeiTModel",
    "PreTrained",
    "ViTForImageClassification",
    "ViTModel",
]
