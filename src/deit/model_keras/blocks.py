"""A block of the network in Keras 3: the twin of `deit.model.blocks`.

B images, N tokens (prefix and patches), D width, H heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deit.config import DeiTConfig
from deit.model_keras.pretrained import initial

import keras  # isort: skip  # after the line above, which says what to install if Keras is missing
from keras import ops  # isort: skip

from deit.model_keras import merging  # isort: skip


def _gelu_tanh(x: Any) -> Any:
    return ops.gelu(x, approximate=True)


ACTIVATION: dict[str, Callable[[Any], Any]] = {
    "gelu": lambda x: ops.gelu(x, approximate=False),
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "quick_gelu": lambda x: x * ops.sigmoid(1.702 * x),
    "relu": ops.relu,
    "silu": ops.silu,
    "swish": ops.silu,
    "tanh": ops.tanh,
    "sigmoid": ops.sigmoid,
    "linear": lambda x: x,
}


def linear(config: DeiTConfig, inputs: int, outputs: int, dtype: Any, bias: bool = True) -> keras.layers.Dense:
    layer = keras.layers.Dense(outputs, use_bias=bias, kernel_initializer=initial(config), dtype=dtype)
    layer.build((None, inputs))
    return layer


def norm(config: DeiTConfig, dtype: Any) -> keras.layers.LayerNormalization:
    layer = keras.layers.LayerNormalization(epsilon=config.layer_norm_eps, dtype=dtype)
    layer.build((None, config.hidden_size))
    return layer


class Attention(keras.layers.Layer):
    """Multi-head self-attention. The attention weights are computed in float32."""

    def __init__(self, config: DeiTConfig, dtype: Any):
        super().__init__(dtype=dtype)
        width = config.hidden_size
        self.heads, self.head_width = config.num_attention_heads, config.head_width
        self.qkv = linear(config, width, 3 * width, dtype, config.qkv_bias)
        self.out = linear(config, width, width, dtype)
        self.dropout = keras.layers.Dropout(config.attention_probs_dropout_prob, dtype="float32")
        self.built = True

    def call(
        self, x: Any, head_mask: Any = None, read: int | None = None, sizes: Any = None, training: bool = False
    ) -> tuple[Any, Any, Any]:
        """What the first `read` tokens (None: all) gather from all tokens, their attention weights (B, H, N, N), and
        the keys (B, H, N, K). A token counts as many times as `sizes` (B, N) says."""
        tokens, width = x.shape[1:]
        qkv = ops.reshape(self.qkv(x), (-1, tokens, 3, self.heads, self.head_width))
        q, k, v = ops.unstack(ops.transpose(qkv, (2, 0, 3, 1, 4)), 3)  # each (B, H, N, K)
        q = q[:, :, :read] * self.head_width**-0.5
        scores = ops.cast(ops.matmul(q, ops.transpose(k, (0, 1, 3, 2))), "float32")  # (B, H, N, N)
        if sizes is not None:
            scores = scores + ops.log(ops.cast(sizes, "float32"))[:, None, None]
        attention = self.dropout(ops.softmax(scores, axis=-1), training=training)
        if head_mask is not None:
            attention = attention * ops.reshape(head_mask, (-1, 1, 1))
        y = ops.transpose(ops.matmul(ops.cast(attention, v.dtype), v), (0, 2, 1, 3))
        return self.out(ops.reshape(y, (-1, y.shape[1], width))), attention, k


class MLP(keras.layers.Layer):
    def __init__(self, config: DeiTConfig, dtype: Any):
        super().__init__(dtype=dtype)
        self.fc1 = linear(config, config.hidden_size, config.intermediate_size, dtype)
        self.activation = ACTIVATION[config.hidden_act]
        self.fc2 = linear(config, config.intermediate_size, config.hidden_size, dtype)
        self.built = True

    def call(self, x: Any) -> Any:
        # TensorFlow fuses product, bias and GELU into one operation for matrices, but not for stacks of matrices.
        y = self.fc2(self.activation(self.fc1(ops.reshape(x, (-1, x.shape[-1])))))
        return ops.reshape(y, (-1, *x.shape[1:]))


class Block(keras.layers.Layer):
    """Pre-norm transformer block.

    Both branches have optional LayerScale. `keep` (2, B) holds stochastic depth's factor of each branch for each image.
    With `read`, the block returns only that many tokens, from the first on. Otherwise `config.merge` of the patch
    tokens are merged between the branches, and `sizes` (B, N) says what the tokens hold already (None: one patch each).
    """

    def __init__(self, config: DeiTConfig, dtype: Any, name: str):
        super().__init__(dtype=dtype, name=name)
        width, value = config.hidden_size, config.layer_scale_init_value
        self.norm1 = norm(config, dtype)
        self.attention = Attention(config, dtype)
        self.scale1 = None if value is None else self._scale("scale1", width, value)
        self.norm2 = norm(config, dtype)
        self.mlp = MLP(config, dtype)
        self.scale2 = None if value is None else self._scale("scale2", width, value)
        self.dropout = keras.layers.Dropout(config.hidden_dropout_prob, dtype=dtype)
        self.merge, self.prefix = config.merge, config.num_prefix_tokens
        self.built = True

    def _scale(self, name: str, width: int, value: float) -> keras.Variable:
        return self.add_weight(shape=(width,), initializer=keras.initializers.Constant(value), name=name)

    def call(
        self,
        x: Any,
        head_mask: Any = None,
        keep: Any = None,
        read: int | None = None,
        sizes: Any = None,
        training: bool = False,
    ) -> tuple[Any, Any, Any, Any]:
        """The tokens, the attention weights, the tokens' sizes, and the match by which patches were merged."""
        first, second = (None, None) if keep is None else (keep[0], keep[1])
        y, attention, keys = self.attention(self.norm1(x), head_mask, read=read, sizes=sizes, training=training)
        x, match = x[:, :read] + self._branch(y, self.scale1, first, training), None
        if read is None and (count := min(self.merge, (x.shape[1] - self.prefix) // 2)):
            match = merging.match(keys[:, :, self.prefix :], count)
            sizes = ops.ones_like(x[:, :, 0], dtype="int32") if sizes is None else sizes
            x, sizes = merging.merge(x, sizes, match, self.prefix)
        x = x + self._branch(self.mlp(self.norm2(x)), self.scale2, second, training)
        return x, attention, sizes, match

    def _branch(self, y: Any, scale: Any, keep: Any, training: bool) -> Any:
        y = self.dropout(y, training=training)
        y = y if scale is None else y * scale
        return y if keep is None else y * ops.reshape(ops.cast(keep, y.dtype), (-1, 1, 1))
