"""The network and its heads in Keras 3: the twin of `deit.model.network`, class for class, for TensorFlow and JAX.

B images, N tokens (prefix and patches), D width, H heads, K head width, C classes, R x S grid of patches, P x Q pixels
of a patch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from deit import weights
from deit.choices import Head
from deit.config import DeiTConfig, ViTConfig
from deit.model.loss_rules import Distillation, distillation_settings, refuse_merging, same_shape
from deit.model.outputs import (
    BaseModelOutputWithPooling,
    DeiTForImageClassificationWithTeacherOutput,
    ImageClassifierOutput,
    MaskedImageModelingOutput,
)
from deit.model_keras.pretrained import PreTrainedKeras, Trace, by_name, initial, initial_patch, note

import keras  # isort: skip  # after the line above, which says what to install if Keras is missing
from keras import ops  # isort: skip

from deit.model_keras import merging  # isort: skip
from deit.model_keras.blocks import ACTIVATION, Block, linear, norm  # isort: skip
from deit.model_keras.losses import classification_loss, distillation_loss, masked_image_loss  # isort: skip


@keras.saving.register_keras_serializable("deit")
class TFDeiTModel(PreTrainedKeras):
    """The backbone: patches and prefix tokens pass through the blocks (Touvron et al. 2020, sections 3 and 4).

    Args:
        config: sizes and options. With `distillation_token=False`, the model is a plain ViT.
        add_pooling_layer: adds a linear layer and `config.pooler_act` on the class token.
        use_mask_token: adds the token that replaces hidden patches (`bool_masked_pos`).
        dtype: a Keras dtype policy; None is the global one.
    """

    kind = "backbone"
    answer = "last_hidden_state"

    def __init__(
        self,
        config: DeiTConfig,
        add_pooling_layer: bool = True,
        use_mask_token: bool = False,
        *,
        name: str | None = None,
        dtype: Any = None,
    ):
        super().__init__(config, name=name, dtype=dtype)
        width, policy = config.hidden_size, self.dtype_policy
        self.cls_token = self._token("cls_token")
        self.distillation_token = self._token("distillation_token") if config.distillation_token else None
        self.mask_token = self._token("mask_token") if use_mask_token else None
        self.position = self._token("position", config.num_prefix_positions + config.num_patches)
        self.patch = keras.layers.Dense(
            width, kernel_initializer=initial_patch(config), bias_initializer=initial_patch(config), dtype=policy
        )
        self.patch.build((None, config.num_channels * math.prod(config.patch_hw)))
        self.dropout = keras.layers.Dropout(config.hidden_dropout_prob, dtype=policy)
        self.blocks = [Block(config, policy, f"block{i:02}") for i in range(config.num_hidden_layers)]
        self.norm = norm(config, policy)
        self.pooler = linear(config, width, config.pooler_width, policy) if add_pooling_layer else None
        self.pooler_activation = ACTIVATION[config.pooler_act]
        self.depth_seed = keras.random.SeedGenerator() if config.drop_path_rate else None

    def _token(self, name: str, count: int = 1) -> keras.Variable:
        return self.add_weight(shape=(1, count, self.config.hidden_size), initializer=initial(self.config), name=name)

    @by_name
    def call(
        self,
        pixel_values: Any = None,
        bool_masked_pos: Any = None,
        head_mask: Any = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        interpolate_pos_encoding: bool = False,
        training: bool = False,
        depth_draws: Any = None,
        read: int | None = None,
        trace: Trace | None = None,
    ) -> Any:
        """Computes the tokens of a batch of images.

        Args:
            pixel_values: (B, channels, height, width), normalised; or a dictionary of all tensors by name.
            bool_masked_pos: (B, patches), true where the mask token replaces a patch.
            head_mask: (H,) or (blocks, H), a factor for each head's attention weights, 0 to 1.
            output_attentions, output_hidden_states, return_dict: None takes the config's.
            interpolate_pos_encoding: accepts images of another size than `config.image_size`.
            training: turns stochastic depth and dropout on.
            depth_draws: (B, blocks, 2), uniform in [0, 1), for stochastic depth in training. A branch is dropped for an
                image if its number is below the block's rate. None draws the numbers here.
            read: the number of tokens that the caller reads from `last_hidden_state`, from the first on. The last block
                then computes no others. With hidden states, attentions or a trace, it computes all of them.
            trace: a dict to fill with every intermediate by name.

        With `config.merge`, each block returns fewer tokens than it takes, so hidden states and attentions get smaller
        from block to block. `token_of_patch` then says which token holds a patch; it is None if `read` is used.
        """
        config = self.config
        need_weights = config.output_attentions if output_attentions is None else output_attentions
        keep_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        masks = self._head_masks(head_mask)
        x = note(trace, "embeddings", self._embed(pixel_values, bool_masked_pos, interpolate_pos_encoding, training))
        keeps = self._keeps(x, depth_draws, training)
        reads: list[int | None] = [None] * len(self.blocks)
        if reads and not (need_weights or keep_states or trace is not None):
            reads[-1] = read
        states, attentions, sizes = [x], [], None
        held = self._unmerged(x) if config.merge and reads[-1:] == [None] else None
        for i, block in enumerate(self.blocks):
            x, attention, sizes, match = block(
                x, masks[i], keep=keeps[i], read=reads[i], sizes=sizes, training=training
            )
            note(trace, f"block{i:02}", x)
            states.append(x)
            attentions.append(attention)
            if held is not None:
                held.append(merging.followed(held[-1], match, config.num_prefix_tokens))
        x = note(trace, "norm", self.norm(x))
        pooled = None if self.pooler is None else note(trace, "pooler", self.pooler_activation(self.pooler(x[:, 0])))
        return self._result(
            return_dict,
            BaseModelOutputWithPooling(
                last_hidden_state=x,
                pooler_output=pooled,
                hidden_states=tuple(states) if keep_states else None,
                attentions=tuple(attentions) if need_weights else None,
                token_of_patch=None if held is None else tuple(held),
            ),
        )

    def _unmerged(self, x: Any) -> list[Any]:
        """The number of each patch's token (B, patches) before the first block."""
        prefix = self.config.num_prefix_tokens
        return [ops.zeros_like(x[:, prefix:, 0], dtype="int32") + ops.arange(prefix, x.shape[1], dtype="int32")]

    def _keeps(self, x: Any, draws: Any, training: bool) -> Sequence[Any]:
        """The factors (2, B) of each block's branches: 0, or 1 / (1 - rate) so that the expectation stays the same."""
        config = self.config
        shape = (x.shape[0], config.num_hidden_layers, 2)
        if draws is not None and not same_shape(draws.shape, shape):
            raise ValueError(
                f"depth_draws must be {shape}, two for each block of each image; found {tuple(draws.shape)}"
            )
        if not training or config.drop_path_rate == 0.0:
            return [None] * config.num_hidden_layers
        if draws is None:
            draws = keras.random.uniform((ops.shape(x)[0], *shape[1:]), seed=self.depth_seed, dtype="float32")
        rates = np.array(config.drop_path_rates, "float32")[:, None]
        keeps = ops.cast(draws >= rates, "float32") / (1.0 - rates)
        keeps = ops.unstack(ops.transpose(keeps, (1, 2, 0)), config.num_hidden_layers)
        return [keep if rate else None for keep, rate in zip(keeps, config.drop_path_rates, strict=True)]

    def _embed(self, pixels: Any, mask: Any, interpolate: bool, training: bool) -> Any:
        config, (patch_height, patch_width) = self.config, self.config.patch_hw
        if pixels is None:
            raise ValueError("pixel_values are missing; pass a tensor (images, channels, height, width)")
        if len(pixels.shape) != 4 or pixels.shape[1] != config.num_channels:
            raise ValueError(
                f"pixel_values must be (images, {config.num_channels}, height, width), found "
                f"{tuple(pixels.shape)}; DeiTImageProcessor makes them"
            )
        if not keras.backend.is_float_dtype(pixels.dtype):
            raise ValueError(
                f"pixel_values must be normalised floats, found "
                f"{keras.backend.standardize_dtype(pixels.dtype)}; DeiTImageProcessor makes them"
            )
        height, width = pixels.shape[2:]
        if height is None or width is None:
            raise ValueError(
                f"pixel_values must have a known height and width, because a graph is made for one size of images; "
                f"found {tuple(pixels.shape)}"
            )
        if not interpolate and (height, width) != config.image_hw:
            raise ValueError(
                f"images are {height}x{width}, this model takes {config.image_hw[0]}x"
                f"{config.image_hw[1]}; resize them, pass interpolate_pos_encoding=True, or load the "
                "model with image_size="
            )
        rows, columns = config.grid_of(height, width)
        if not rows or not columns:
            raise ValueError(
                f"images of {height}x{width} hold no patch of {patch_height}x{patch_width}; give larger images"
            )
        pixels = ops.cast(pixels[:, :, : rows * patch_height, : columns * patch_width], self.compute_dtype)
        # A convolution over patches that don't overlap is a matrix product. Every back end has that in this layout.
        patches = ops.reshape(pixels, (-1, config.num_channels, rows, patch_height, columns, patch_width))
        patches = ops.reshape(
            ops.transpose(patches, (0, 2, 4, 1, 3, 5)),
            (-1, rows * columns, config.num_channels * patch_height * patch_width),
        )
        patches = self.patch(patches)  # (B, R * S, D)
        if mask is not None:
            hidden = self._mask(mask, patches.shape[0], rows, columns)
            patches = ops.where(hidden, ops.cast(self.mask_token, patches.dtype), patches)
        prefix = ops.concatenate(
            [
                ops.cast(token, patches.dtype)
                for token in (self.cls_token, self.distillation_token)
                if token is not None
            ],
            axis=1,
        )
        position = ops.cast(self._positions(rows, columns), patches.dtype)
        if config.position_on_class_token:
            prefix = prefix + position[:, : config.num_prefix_tokens]
        patches = patches + position[:, config.num_prefix_positions :]
        prefix = ops.broadcast_to(prefix, (ops.shape(patches)[0], *prefix.shape[1:]))
        return self.dropout(ops.concatenate([prefix, patches], axis=1), training=training)

    def _mask(self, mask: Any, batch: int | None, rows: int, columns: int) -> Any:
        if self.mask_token is None:
            raise ValueError(
                "bool_masked_pos needs a mask token; build TFDeiTModel(config, use_mask_token=True) or "
                "TFDeiTForMaskedImageModeling"
            )
        if not same_shape(mask.shape, (batch, rows * columns)):
            raise ValueError(
                f"bool_masked_pos must be ({batch}, {rows * columns}): {rows}x{columns} patches for each "
                f"of {batch} images; found {tuple(mask.shape)}"
            )
        return ops.cast(mask, "bool")[:, :, None]  # (B, R * S, 1)

    def _positions(self, rows: int, columns: int) -> Any:
        """Position embeddings for a grid of patches. Those of the prefix tokens stand in front and don't change."""
        config, prefix = self.config, self.config.num_prefix_positions
        if (rows, columns) == config.grid:
            return self.position
        # In float32 whatever the weights' type, because each value is a weighted sum of 16 neighbours.
        grid = ops.reshape(ops.cast(self.position[:, prefix:], "float32"), (*config.grid, config.hidden_size))
        down, across = (
            weights.resize_matrix(*sizes).astype("float32") for sizes in zip(config.grid, (rows, columns), strict=True)
        )
        grid = ops.matmul(down, ops.reshape(grid, (config.grid[0], -1)))  # (new R, S * D)
        grid = ops.matmul(across, ops.reshape(grid, (rows, config.grid[1], config.hidden_size)))
        grid = ops.reshape(grid, (1, rows * columns, config.hidden_size))
        return ops.concatenate([ops.cast(self.position[:, :prefix], "float32"), grid], axis=1)

    def _head_masks(self, mask: Any) -> Sequence[Any]:
        blocks, heads = self.config.num_hidden_layers, self.config.num_attention_heads
        if mask is None:
            return [None] * blocks
        if tuple(mask.shape) not in ((heads,), (blocks, heads)):
            raise ValueError(f"head_mask must be ({heads},) or ({blocks}, {heads}), found {tuple(mask.shape)}")
        return ops.unstack(ops.broadcast_to(ops.cast(mask, "float32"), (blocks, heads)), blocks)


class _WithHead(PreTrainedKeras):
    """Base class of the models with a head. The backbone is named `deit`, as users of `transformers` know it."""

    def __init__(self, config: DeiTConfig, *, name: str | None = None, dtype: Any = None, use_mask_token: bool = False):
        super().__init__(config, name=name, dtype=dtype)
        self.deit = TFDeiTModel(config, False, use_mask_token, name="deit", dtype=self.dtype_policy)

    def _classifier(self) -> keras.layers.Layer:
        config = self.config
        return (
            linear(config, config.hidden_size, config.num_labels, self.dtype_policy)
            if config.num_labels
            else keras.layers.Identity(dtype=self.dtype_policy)
        )


@keras.saving.register_keras_serializable("deit")
class TFDeiTForMaskedImageModeling(_WithHead):
    """Predicts the pixels of hidden patches with one linear layer (SimMIM, Xie et al. 2021).

    Works with any grid of patches: non-square images and patches, and other resolutions with
    `interpolate_pos_encoding`. After `compile(optimizer)`, `fit` on `{"pixel_values": …, "bool_masked_pos": …}`
    minimises the loss on the hidden patches.
    """

    kind = "masked_image"
    answer = "reconstruction"

    def __init__(self, config: DeiTConfig, *, name: str | None = None, dtype: Any = None):
        stride = config.encoder_stride
        if config.patch_hw != ((stride, stride) if isinstance(stride, int) else stride):
            raise ValueError(
                f"the decoder paints each patch from its token, so encoder_stride={stride} must equal "
                f"patch_size={config.patch_size}; use config.replace(encoder_stride=...)"
            )
        refuse_merging(config)
        super().__init__(config, name=name, dtype=dtype, use_mask_token=True)
        self.decoder = linear(
            config, config.hidden_size, math.prod(config.patch_hw) * config.num_channels, self.dtype_policy
        )

    @by_name
    def call(
        self,
        pixel_values: Any = None,
        bool_masked_pos: Any = None,
        head_mask: Any = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        interpolate_pos_encoding: bool = False,
        training: bool = False,
        depth_draws: Any = None,
        trace: Trace | None = None,
    ) -> Any:
        """Like `TFDeiTModel.call`. With `bool_masked_pos`, the output has the `loss` on the hidden patches."""
        config, (height, width) = self.config, self.config.patch_hw
        out = self.deit.call(
            pixel_values,
            bool_masked_pos,
            head_mask,
            output_attentions,
            output_hidden_states,
            True,
            interpolate_pos_encoding,
            training,
            depth_draws,
            trace=trace,
        )
        rows, columns = config.grid_of(*pixel_values.shape[2:])
        painted = self.decoder(out.last_hidden_state[:, config.num_prefix_tokens :])  # (B, R * S, channels * P * Q)
        painted = ops.reshape(painted, (-1, rows, columns, config.num_channels, height, width))
        painted = ops.transpose(painted, (0, 3, 1, 4, 2, 5))
        painted = note(
            trace, "reconstruction", ops.reshape(painted, (-1, config.num_channels, rows * height, columns * width))
        )
        found = MaskedImageModelingOutput(
            reconstruction=painted, hidden_states=out.hidden_states, attentions=out.attentions
        )
        if bool_masked_pos is not None:
            found.loss = self.own_loss(
                found, {"pixel_values": pixel_values, "bool_masked_pos": bool_masked_pos}, training
            )
        return self._result(return_dict, found)

    def own_loss(self, output: Any, given: Mapping[str, Any], training: bool, weights: Any = None) -> Any:
        if weights is not None:
            raise ValueError(
                "masked image modelling weighs all images alike, found sample or class weights; leave them out"
            )
        mask = given.get("bool_masked_pos")
        if mask is None:
            raise ValueError(
                "masked image modelling trains on pixel_values and bool_masked_pos, found no mask; give "
                "fit a dictionary with both"
            )
        pixels, (height, width) = given["pixel_values"], self.config.patch_hw
        rows, columns = output.reconstruction.shape[2] // height, output.reconstruction.shape[3] // width
        return masked_image_loss(pixels, output.reconstruction, ops.reshape(mask, (-1, rows, columns)))


@keras.saving.register_keras_serializable("deit")
class TFDeiTForImageClassification(_WithHead):
    """A linear classifier on the class token.

    `fit` takes any Keras loss of the logits. After `compile(optimizer)`, it takes the model's own loss for `labels`.
    """

    kind = "classification"

    def __init__(self, config: DeiTConfig, *, name: str | None = None, dtype: Any = None):
        super().__init__(config, name=name, dtype=dtype)
        self.classifier = self._classifier()

    @by_name
    def call(
        self,
        pixel_values: Any = None,
        head_mask: Any = None,
        labels: Any = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        interpolate_pos_encoding: bool = False,
        training: bool = False,
        depth_draws: Any = None,
        trace: Trace | None = None,
    ) -> Any:
        """Like `TFDeiTModel.call`. With `labels`, the output has the `loss`.

        `labels` are class indices (B,), or (B, C) for multi-label and regression.
        """
        out = self.deit.call(
            pixel_values,
            None,
            head_mask,
            output_attentions,
            output_hidden_states,
            True,
            interpolate_pos_encoding,
            training,
            depth_draws,
            1,
            trace,
        )
        logits = note(trace, "logits", self.classifier(out.last_hidden_state[:, 0]))
        loss = None if labels is None else classification_loss(logits, labels, self.config)
        return self._result(
            return_dict,
            ImageClassifierOutput(
                loss=loss,
                logits=logits,
                hidden_states=out.hidden_states,
                attentions=out.attentions,
                token_of_patch=out.token_of_patch,
            ),
        )

    def own_loss(self, output: Any, given: Mapping[str, Any], training: bool, weights: Any = None) -> Any:
        if given.get("labels") is None:
            raise ValueError("classification trains on labels, found none; give fit images and labels")
        return classification_loss(output.logits, given["labels"], self.config, weights)


@keras.saving.register_keras_serializable("deit")
class TFDeiTForImageClassificationWithTeacher(_WithHead):
    """Two linear classifiers: the class token's learns from labels, the distillation token's from a teacher.

    `logits` are the mean of both heads' logits. After `compile(optimizer)`, `fit` minimises the paper's loss
    (section 4). It needs images, `labels` and `teacher_logits` by name, each of them among the inputs or the targets. A
    loss that is given to `compile` applies to the mean of the logits and uses no teacher.
    """

    kind = "with_teacher"

    def __init__(self, config: DeiTConfig, *, name: str | None = None, dtype: Any = None):
        if not config.distillation_token:
            raise ValueError(
                "a model with a teacher needs a distillation token, found distillation_token=False in the "
                "config; use TFDeiTForImageClassification, or config.replace(distillation_token=True)"
            )
        super().__init__(config, name=name, dtype=dtype)
        self.cls_classifier = self._classifier()
        self.distillation_classifier = self._classifier()
        self._distillation: dict[str, Any] = {}

    @by_name
    def call(
        self,
        pixel_values: Any = None,
        head_mask: Any = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        interpolate_pos_encoding: bool = False,
        training: bool = False,
        labels: Any = None,
        teacher_logits: Any = None,
        depth_draws: Any = None,
        trace: Trace | None = None,
    ) -> Any:
        """Like `TFDeiTModel.call`. With labels, the output can have the `loss`.

        With `labels` and `teacher_logits`, it is `losses.distillation_loss`, hard or as `compile` says. With `labels`
        alone, it is the loss of the fused logits, but only in evaluation, because such a training would ignore the
        teacher.

        Args:
            labels: class indices (B,), or probabilities (B, C) for mixed labels.
            teacher_logits: (B, C), or the teacher's decisions (B,) for hard distillation.
        """
        out = self.deit.call(
            pixel_values,
            None,
            head_mask,
            output_attentions,
            output_hidden_states,
            True,
            interpolate_pos_encoding,
            training,
            depth_draws,
            2,
            trace,
        )
        cls_logits = note(trace, "cls_logits", self.cls_classifier(out.last_hidden_state[:, 0]))
        distillation_logits = note(
            trace, "distillation_logits", self.distillation_classifier(out.last_hidden_state[:, 1])
        )
        found = DeiTForImageClassificationWithTeacherOutput(
            logits=(cls_logits + distillation_logits) / 2,
            cls_logits=cls_logits,
            distillation_logits=distillation_logits,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            token_of_patch=out.token_of_patch,
        )
        # Without labels here, they are among the targets of `fit`, and `own_loss` gets them from there.
        if labels is not None:
            found.loss = self.own_loss(found, {"labels": labels, "teacher_logits": teacher_logits}, training)
        return self._result(return_dict, found)

    def own_loss(self, output: Any, given: Mapping[str, Any], training: bool, weights: Any = None) -> Any:
        labels, teacher_logits = given.get("labels"), given.get("teacher_logits")
        if labels is not None and teacher_logits is not None:
            return distillation_loss(
                output.cls_logits,
                output.distillation_logits,
                labels,
                teacher_logits,
                **self._distillation,
                weights=weights,
            )
        if labels is not None and not training:
            return classification_loss(output.logits, labels, self.config, weights)
        raise ValueError(
            "distillation trains on labels and teacher_logits together, found only "
            f"{'images' if labels is None else 'labels'}; pass both, or train "
            "TFDeiTForImageClassification"
        )

    def compile(
        self,
        *args: Any,
        distillation: Distillation = "hard",
        distillation_weight: float | None = None,
        temperature: float | None = None,
        **options: Any,
    ) -> None:
        """Keras' `compile`, with the options of `losses.distillation_loss` for the model's own loss.

        Args:
            distillation: "hard" (eq. 3) or "soft" (eq. 2).
            distillation_weight: the teacher's share of the loss; None takes the paper's.
            temperature: tau of soft distillation; None takes the paper's.
        """
        distillation_settings(distillation, distillation_weight, temperature)
        self._distillation = {"kind": distillation, "weight": distillation_weight, "temperature": temperature}
        super().compile(*args, **options)

    def get_compile_config(self) -> dict[str, Any]:
        config = super().get_compile_config()
        if not config:
            return {}
        kind, weight, temperature = (self._distillation[name] for name in ("kind", "weight", "temperature"))
        return {**config, "distillation": kind, "distillation_weight": weight, "temperature": temperature}


def fuse_heads(cls_logits: Any, distillation_logits: Any, head: Head = "fused") -> Any:
    """Class probabilities (B, C) from the two heads' logits (B, C), as `deit.model.heads.fuse_heads` defines them."""
    cls_logits, distillation_logits = (ops.cast(x, "float32") for x in (cls_logits, distillation_logits))
    match head:
        case "fused":
            return ops.softmax((cls_logits + distillation_logits) / 2)
        case "softmax":
            return (ops.softmax(cls_logits) + ops.softmax(distillation_logits)) / 2
        case "class":
            return ops.softmax(cls_logits)
        case "distillation":
            return ops.softmax(distillation_logits)
    raise ValueError(f"head={head!r} is not known; choose fused, class, distillation or softmax")


@keras.saving.register_keras_serializable("deit")
class TFViTModel(TFDeiTModel):
    """`TFDeiTModel` without a distillation token."""

    config_class = ViTConfig

    def __init__(
        self,
        config: DeiTConfig,
        add_pooling_layer: bool = True,
        use_mask_token: bool = False,
        *,
        name: str | None = None,
        dtype: Any = None,
    ):
        _refuse_distillation_token(config)
        super().__init__(config, add_pooling_layer, use_mask_token, name=name, dtype=dtype)


@keras.saving.register_keras_serializable("deit")
class TFViTForImageClassification(TFDeiTForImageClassification):
    """`TFDeiTForImageClassification` without a distillation token. The backbone is also named `vit`."""

    config_class = ViTConfig

    def __init__(self, config: DeiTConfig, *, name: str | None = None, dtype: Any = None):
        _refuse_distillation_token(config)
        super().__init__(config, name=name, dtype=dtype)

    @property
    def vit(self) -> TFDeiTModel:
        return self.deit


def _refuse_distillation_token(config: DeiTConfig) -> None:
    if config.distillation_token:
        raise ValueError(
            "a ViT has no distillation token, found distillation_token=True in the config; use the DeiT "
            "class, or ViTConfig"
        )
