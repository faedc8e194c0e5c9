"""What all Keras models share: files, `fit`, `.keras` and export. The twin of `deit.model.pretrained`.

B images, N tokens, D width, C classes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

# Triton (PyTorch's compiler) and TensorFlow each bring an LLVM. If TensorFlow is loaded first, the process aborts as
# soon as transformers or an optimizer of torch.optim imports Triton. The other order works, so Triton comes first here.
# If TensorFlow is loaded already, PyTorch does without Triton.
if "tensorflow" in sys.modules:
    sys.modules.setdefault("triton", None)  # type: ignore[arg-type]
else:
    with suppress(ImportError):
        import triton  # noqa: F401

from deit import files, host

try:
    import keras
    from keras import ops
except ImportError as error:
    raise host.missing(
        f"the Keras classes need Keras 3 and one of its back ends, which KERAS_BACKEND names ({error})", "keras"
    ) from None

from deit import weights
from deit.config import DeiTConfig
from deit.model import outputs
from deit.model_keras import saved_model
from deit.weights import hub

# ----------------------------------------------------------------------------------------------- outputs as structures


def _register(cls: type[outputs.ModelOutput]) -> None:
    """Makes Keras, TensorFlow or JAX look into an output as they look into a dictionary."""

    def flatten(output: outputs.ModelOutput) -> tuple[tuple[Any, ...], tuple[str, ...]]:
        return output.to_tuple(), tuple(output.keys())

    def unflatten(names: Iterable[str], values: Iterable[Any]) -> outputs.ModelOutput:
        return cls(**dict(zip(names, values, strict=True)))

    import optree

    optree.register_pytree_node(cls, flatten, unflatten, namespace="keras")  # type: ignore[arg-type]
    if keras.backend.backend() == "jax":
        import jax

        jax.tree_util.register_pytree_node(cls, flatten, unflatten)
    elif keras.backend.backend() == "tensorflow":
        cls.__tf_flatten__ = lambda output: flatten(output)[::-1]  # type: ignore[attr-defined]
        cls.__tf_unflatten__ = classmethod(lambda _, names, values: unflatten(names, values))  # type: ignore[attr-defined]


for _output in (
    outputs.BaseModelOutputWithPooling,
    outputs.MaskedImageModelingOutput,
    outputs.ImageClassifierOutput,
    outputs.DeiTForImageClassificationWithTeacherOutput,
):
    _register(_output)


# ------------------------------------------------------------------------------------------------------------ arguments


class Trace:
    """Holds the caller's dictionary. Keras copies dictionary arguments, but passes this object on as it is."""

    def __init__(self, into: dict[str, Any]):
        self.into = into


def note(trace: Trace | None, name: str, value: Any) -> Any:
    """Keeps `value` under `name` if there is a trace, and returns it."""
    if trace is not None:
        trace.into[name] = value
    return value


def by_name(call: Callable[..., Any]) -> Callable[..., Any]:
    """Lets `call` take its tensors as one dictionary in place of the first argument, because `fit` passes them so."""

    @wraps(call)
    def called(self: Any, pixel_values: Any = None, *args: Any, **kwargs: Any) -> Any:
        if isinstance(pixel_values, Mapping):
            kwargs = {**pixel_values, **kwargs}
            pixel_values = kwargs.pop("pixel_values", None)
            known = [name for name in signature(call).parameters if name not in ("self", "trace")]
            if unknown := sorted(kwargs.keys() - {*known, "trace"}):
                raise ValueError(f"{type(self).__name__} takes no {', '.join(unknown)}; it takes {', '.join(known)}")
        return call(self, pixel_values, *args, **kwargs)

    return called


# --------------------------------------------------------------------------------------------------------------- models


def _weighable(x: Any, y: Any, options: Mapping[str, Any]) -> tuple[Any, Any]:
    weighed = options.get("sample_weight") is not None or options.get("class_weight") is not None
    if not weighed or y is not None or not isinstance(x, Mapping) or "labels" not in x:
        return x, y
    return {name: value for name, value in x.items() if name != "labels"}, x["labels"]


class PreTrainedKeras(keras.Model):
    """Base class of the models.

    All weights exist from the start. `dtype` is a Keras dtype policy, e.g. "mixed_bfloat16". None is the global one.
    """

    kind: ClassVar[weights.Kind]
    config_class: ClassVar[type[DeiTConfig]] = DeiTConfig
    answer: ClassVar[str] = "logits"
    """The field of the output that compiled losses and metrics use."""

    def __init__(self, config: DeiTConfig, *, name: str | None = None, dtype: Any = None):
        # No autocast of inputs: the model casts images itself, and labels and a teacher's logits keep their type.
        super().__init__(name=name, dtype=dtype, autocast=False)
        self.config = config
        self.built = True

    def __call__(self, *args: Any, trace: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        if trace is not None:
            kwargs["trace"] = Trace(trace)
        if args and isinstance(args[0], Mapping):  # Keras sees into plain dictionaries of tensors only
            options = {name: value for name, value in args[0].items() if value is None or isinstance(value, bool)}
            args = ({name: value for name, value in args[0].items() if name not in options}, *args[1:])
            kwargs = {**options, **kwargs}
        return super().__call__(*args, **kwargs)

    # ---- files

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        saved_model: bool = False,
        version: int = 1,
        safe_serialization: bool = True,
        max_shard_size: int | str = "5GB",
        push_to_hub: bool = False,
        repo_id: str | None = None,
        token: str | bool | None = None,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
    ) -> None:
        """Writes `config.json` and `model.safetensors` (or shards), which the PyTorch classes and `transformers` read.

        Args:
            saved_model: also writes a TensorFlow SavedModel into `saved_model/VERSION`, as `export` does.
            safe_serialization: False asks for an h5 file, which is refused.
            max_shard_size: bytes, or a size like "5GB".
            push_to_hub: uploads the folder afterwards. The options from `repo_id` on are for that, and refused without
                it. `repo_id` is the folder's name if it is not given.

        Raises `ValueError` for a model whose weights are quantised.
        """
        if not safe_serialization:
            raise ValueError(
                "safe_serialization=False asks for an h5 file, which this package reads and doesn't write; leave it out"
            )
        push = files.push_options(
            push_to_hub,
            save_directory,
            repo_id=repo_id,
            token=token,
            private=private,
            revision=revision,
            commit_message=commit_message,
        )
        hub.write_checkpoint(Path(save_directory), self.config, self.tensors(), max_shard_size=max_shard_size)
        if saved_model:
            self.export(Path(save_directory) / "saved_model" / str(version))
        if push_to_hub:
            hub.push_folder(Path(save_directory), **push)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Uploads the model to the hub and returns the commit's address.

        `options` are `token`, `private`, `revision` and `commit_message`.
        """
        return hub.push_saved(self.save_pretrained, repo_id, **options)

    def tensors(self) -> dict[str, np.ndarray]:
        """The weights with the names and shapes of `weights.manifest`, which are PyTorch's.

        Raises `ValueError` for a model whose weights are quantised.
        """
        self._refuse_quantised()
        shapes = self._manifest()
        return {
            name: _to_disk(ops.convert_to_numpy(variable), name, shapes[name])
            for name, variable in self._variables().items()
        }

    def _refuse_quantised(self) -> None:
        for layer in self._flatten_layers():
            if mode := getattr(layer, "quantization_mode", None):
                raise ValueError(
                    f"the weights of {layer.name} are quantised to {mode}, and no file of this model has a place for "
                    "that; save the model before quantize(), and quantize it after loading"
                )

    def _manifest(self) -> dict[str, tuple[int, ...]]:
        backbone = _backbone(self)
        return weights.manifest(
            self.config, self.kind, pooler=backbone.pooler is not None, mask_token=backbone.mask_token is not None
        )

    def _variables(self) -> dict[str, keras.Variable]:
        base = len(weights.BASE) if self.kind == "backbone" else 0
        return {name: _variable(self, name[base:]) for name in self._manifest()}

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config: DeiTConfig | str | Path | None = None,
        revision: str | None = None,
        subfolder: str = "",
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        dtype: Any = None,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **overrides: Any,
    ) -> Any:
        """Reads a model from a folder, a weight file or a hub repository.

        Takes every dialect that the PyTorch classes read, and `tf_model.h5` of `transformers` 4. Needs PyTorch only for
        `.bin` and `.pth` files.

        Args:
            pretrained_model_name_or_path: e.g. `facebook/deit-tiny-distilled-patch16-224`, `runs/x/model`,
                `deit_tiny.pth`.
            config: replaces the file's own config. Needed if there is none and the shapes don't tell the architecture.
                A name or a folder stands for the config that is there.
            dtype: a Keras dtype policy; None is the global one.
            ignore_mismatched_sizes: initialises tensors anew whose shape differs from the model's, instead of raising.
            output_loading_info: returns `(model, info)`. The info has missing, unexpected and mismatched keys.
            overrides: fields of the config, e.g. `num_labels=10`, `id2label=...`, `drop_path_rate=0.1`. With
                `image_size`, the positions are resized after reading (section 3.3 of the paper).

        Returns:
            The model. Parts that the file lacks (a head, a pooler, a mask token) are initialised anew, with a warning.

        Raises:
            FileNotFoundError: the files don't exist or can't be fetched.
            CheckpointError, ValueError: the files are truncated, corrupt, unsafe, unknown or don't fit. Nothing is
                half-loaded.
        """
        where: dict[str, Any] = {
            "revision": revision,
            "subfolder": subfolder,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
            "token": token,
        }
        found = hub.read_checkpoint(pretrained_model_name_or_path, config=config, arrays="numpy", **where)
        return cls.from_checkpoint(
            found,
            dtype=dtype,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            output_loading_info=output_loading_info,
            **overrides,
        )

    @classmethod
    def from_checkpoint(
        cls,
        found: hub.Checkpoint,
        *,
        dtype: Any = None,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **overrides: Any,
    ) -> Any:
        """Like `from_pretrained`, but from a checkpoint that was read already, in NumPy arrays."""
        image_size = overrides.pop("image_size", None)
        config = found.config_for(cls.kind, cls.config_class, overrides)
        options: dict[str, Any] = found.options_for(cls.kind)
        expected = weights.manifest(
            config,
            cls.kind,
            pooler=options.get("add_pooling_layer", False),
            mask_token=options.get("use_mask_token", False),
        )
        fitted = found.fit(expected, ignore_mismatched_sizes)
        if image_size is not None:
            resized = config.replace(image_size=tuple(image_size) if isinstance(image_size, list) else image_size)
            if "deit.position" in fitted.given:
                fitted.given["deit.position"] = weights.resize_positions(fitted.given["deit.position"], config, resized)
            config = resized
        model = cls(config, dtype=dtype, **options)
        model.set_tensors(fitted.given)
        return (model, fitted.info) if output_loading_info else model

    def set_tensors(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Replaces the values of weights. `tensors` has the names and shapes of `weights.manifest`."""
        variables = self._variables()
        for name, value in tensors.items():
            variables[name].assign(_from_disk(value, name))

    # ---- Keras' own file

    def save(self, filepath: str | Path, **options: Any) -> None:
        """`keras.Model.save`. Raises `ValueError` for a model whose weights are quantised, before a file is made."""
        self._refuse_quantised()
        super().save(filepath, **options)

    def get_config(self) -> dict[str, Any]:
        self._refuse_quantised()
        backbone = _backbone(self)
        options = (
            {"add_pooling_layer": backbone.pooler is not None, "use_mask_token": backbone.mask_token is not None}
            if self.kind == "backbone"
            else {}
        )
        return {
            "name": self.name,
            "dtype": keras.saving.serialize_keras_object(self.dtype_policy),
            "config": self.config.to_dict(),
            **options,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any] | DeiTConfig, custom_objects: Any = None) -> Any:
        """A fresh model from what `get_config` gave, or from a `DeiTConfig` as in `transformers`."""
        if isinstance(config, DeiTConfig):
            return cls(config)
        settings = dict(config)
        dtype = settings.pop("dtype", None)
        if isinstance(dtype, dict):
            dtype = keras.saving.deserialize_keras_object(dtype)
        return cls(cls.config_class.from_dict(settings.pop("config")), dtype=dtype, **settings)

    # ---- training

    def own_loss(self, output: Any, given: Mapping[str, Any], training: bool, weights: Any = None) -> Any:
        """The model's own loss, from its output, the tensors of the data by name, and a weight (B,) for each image."""
        raise ValueError(f"{type(self).__name__} has no loss of its own; give compile() a loss")

    def fit(self, x: Any = None, y: Any = None, *args: Any, **options: Any) -> Any:
        """Keras' `fit`. With weights, labels among the inputs become the targets: Keras weighs nothing else."""
        return super().fit(*_weighable(x, y, options), *args, **options)

    def evaluate(self, x: Any = None, y: Any = None, *args: Any, **options: Any) -> Any:
        """Keras' `evaluate`, with the same rule."""
        return super().evaluate(*_weighable(x, y, options), *args, **options)

    def compile(self, *args: Any, **options: Any) -> None:
        """Keras' `compile`. Without `loss`, training minimises the model's own loss."""
        self.loss = self._compile_loss = None  # otherwise, Keras keeps the loss of an earlier call
        super().compile(*args, **options)

    def compile_from_config(self, config: dict[str, Any]) -> None:
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        """Keras' hook for the loss: a compiled loss of the field `answer`, or else the model's own loss."""
        if self._compile_loss is not None:
            return super().compute_loss(x, self._labels(x, y), y_pred[self.answer], sample_weight, training)
        return self.own_loss(y_pred, _named("pixel_values", x) | _named("labels", y), training, sample_weight)

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> dict[str, Any]:
        return super().compute_metrics(x, self._labels(x, y), y_pred[self.answer], sample_weight)

    def _labels(self, x: Any, y: Any) -> Any:
        """The labels, which are among the inputs or the targets."""
        return (_named("pixel_values", x) | _named("labels", y)).get("labels")

    def _result(self, return_dict: bool | None, output: Any) -> Any:
        as_object = self.config.return_dict if return_dict is None else return_dict
        return output if as_object else output.to_tuple()

    # ---- export

    def export(
        self,
        filepath: str | Path,
        format: saved_model.ExportFormat = "tf_saved_model",
        *,
        tolerance: float = 1e-4,
        batch: int | None = None,
    ) -> Path:
        """Writes the model for another runtime, runs the written model, and returns its path if it answers alike.

        Args:
            filepath: the SavedModel's folder, or a `.tflite` file.
            format: `tf_saved_model`, with the endpoint `serve` (and `serving_default`); `litert` for LiteRT (TFLite).
                Both take `pixel_values` (B, channels, height, width) and give the model's output by name.
            tolerance: the largest accepted difference between the outputs on random images.
            batch: B, if the runtime should know it; None for any.

        Raises:
            ValueError: the format is unknown, the back end can't write it, or the outputs differ. No file is left then.
        """
        return saved_model.export(self, Path(filepath), format, tolerance, batch)


def _named(name: str, data: Any) -> dict[str, Any]:
    """The data as a dictionary by name. Data that are no dictionary are put under `name`."""
    return dict(data) if isinstance(data, Mapping) else {} if data is None else {name: data}


def _backbone(model: PreTrainedKeras) -> Any:
    """The transformer in a model.

    It is no property, because Keras walks through properties when it saves. It would not end for a backbone, which is
    its own transformer.
    """
    return getattr(model, "deit", model)


def _variable(owner: Any, name: str) -> keras.Variable:
    """The variable with a name of `weights.manifest`. Keras has other names for some of them."""
    *path, leaf = name.split(".")
    for part in path:
        owner = owner[int(part)] if part.isdigit() else getattr(owner, part)
    if isinstance(owner, keras.layers.LayerNormalization):
        leaf = {"weight": "gamma", "bias": "beta"}[leaf]
    elif leaf == "weight":
        leaf = "kernel"
    return getattr(owner, leaf)


def _to_disk(value: np.ndarray, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A weight in the shape of `weights.manifest`. Here, all kernels are matrices (in, out), even the patch projection.

    Its patches don't overlap, so it is a matrix product.
    """
    return value.T.reshape(shape) if name.endswith(".weight") else value


def _from_disk(value: np.ndarray, name: str) -> np.ndarray:
    return value.reshape(len(value), -1).T if name.endswith(".weight") and value.ndim > 1 else value


def initial(config: DeiTConfig) -> keras.initializers.Initializer:
    """The initializer of tokens, positions and linear weights. Each needs a new one: a single one repeats its values.

    The original code cuts the normal distribution at plus and minus 2, which is a hundred standard deviations away.
    """
    return keras.initializers.RandomNormal(stddev=config.initializer_range)


def initial_patch(config: DeiTConfig) -> keras.initializers.Initializer:
    """The initializer of the patch projection, weight and bias: PyTorch's default for a convolution.

    The original code keeps that default.
    """
    bound = 1 / math.sqrt(config.num_channels * math.prod(config.patch_hw))
    return keras.initializers.RandomUniform(-bound, bound)
