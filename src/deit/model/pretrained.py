"""What all models share: files, the hub, initialisation, resolution, gradient checkpointing, the attention kernel."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Protocol, Self

import torch
from torch import Tensor, nn

from deit import files, weights
from deit.config import DeiTConfig
from deit.image.processor import DeiTImageProcessor
from deit.model import pytrees  # noqa: F401  registers the outputs
from deit.model.checkpointing import Checkpointing
from deit.model.timm_ways import TimmWays
from deit.model.trainer_files import TrainerFiles
from deit.weights import hub
from deit.weights.card import Facts

AttnImplementation = Literal["auto", "eager", "sdpa"]


class Backbone(Protocol):
    """What `PreTrained` needs from the transformer in a model."""

    position: nn.Parameter
    """(1, positions, D)."""
    patch: nn.Conv2d
    dropout: nn.Dropout
    """Dropout of the tokens, before the first block."""
    blocks: nn.ModuleList
    gradient_checkpointing: bool
    checkpointing: Checkpointing

    def relabel(self, config: DeiTConfig) -> None:
        """Replaces the config by `config`, which differs in the labels only."""

    def resize_grid(self, config: DeiTConfig) -> None:
        """Replaces the config by `config`, which differs in the image size only, and fits the positions to its grid."""


class PreTrained(TimmWays, nn.Module):
    """Base class of the models. `backbone` is the transformer in a model."""

    kind: ClassVar[weights.Kind]
    config_class: ClassVar[type[DeiTConfig]] = DeiTConfig
    main_input_name: ClassVar[str] = "pixel_values"
    base_model_prefix: ClassVar[str] = "deit"
    accepts_loss_kwargs: ClassVar[bool] = False
    """Whether `forward` takes `num_items_in_batch`, which `transformers.Trainer` then counts."""
    config: DeiTConfig
    name_or_path: str | Path | None = None
    """What `from_pretrained` read."""
    _where: Mapping[str, Any] = MappingProxyType({})
    """How `from_pretrained` was told to read it, without the token: whoever gets a pickled model would read it."""
    _hook_for_gradients: Any = None

    @property
    def backbone(self) -> Backbone:
        return self.deit  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        return self.backbone.position.device

    @property
    def dtype(self) -> torch.dtype:
        return self.backbone.position.dtype

    @property
    def base_model(self) -> nn.Module:
        """The backbone, as a module."""
        return self.backbone  # type: ignore[return-value]

    def get_input_embeddings(self) -> nn.Module:
        """The module that makes tokens of patches."""
        return self.backbone.patch

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Count of all parameters, or of those that are trained.

        `exclude_embeddings` leaves out tables that are looked up by a number, as in `transformers`. These models have
        none, so it changes nothing.
        """
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the parameters, and of the buffers if wanted."""
        tensors = [*self.parameters(), *(self.buffers() if return_buffers else ())]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def set_attn_implementation(self, name: AttnImplementation) -> None:
        if name not in ("auto", "eager", "sdpa"):
            raise ValueError(f"attn_implementation={name!r} is not known; choose auto, eager or sdpa")
        for block in self.backbone.blocks:
            block.attention.implementation = name  # type: ignore[union-attr]

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Makes the backward pass recompute each block.

        Only one block's activations are in memory at a time, for about a third more computation.

        Args:
            gradient_checkpointing_kwargs: options of `torch.utils.checkpoint.checkpoint`; `use_reentrant` is False
                unless it is among them.
            every_n_layers: recomputes every so many blocks, the first included, and keeps the others' activations.
            offload: keeps what the recomputation starts from in the CPU's memory.
        """
        self.backbone.checkpointing = Checkpointing(dict(gradient_checkpointing_kwargs or {}), every_n_layers, offload)
        self.backbone.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        self.backbone.gradient_checkpointing = False

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.backbone.gradient_checkpointing

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """`gradient_checkpointing_enable`, as later versions of `transformers` 5 call it."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, every_n_layers, offload)

    def activation_checkpointing_disable(self) -> None:
        self.gradient_checkpointing_disable()

    @property
    def is_activation_checkpointing(self) -> bool:
        return self.is_gradient_checkpointing

    def enable_input_require_grads(self) -> None:
        """Lets the tokens of patches require gradients though the patch projection is frozen.

        Adapters in frozen models need that with `use_reentrant` checkpointing.
        """
        self.disable_input_require_grads()
        self._hook_for_gradients = self.get_input_embeddings().register_forward_hook(_require_gradient)

    def disable_input_require_grads(self) -> None:
        if self._hook_for_gradients is not None:
            self._hook_for_gradients.remove()
            self._hook_for_gradients = None

    @torch.no_grad()
    def resize_to(self, image_size: int | tuple[int, int]) -> Self:
        """Adapts the positions for good to images of another size (in pixels: one number or (height, width)).

        The positions are resized by bicubic interpolation, as in the paper for fine-tuning at a higher resolution
        (section 3.3). The tokens before the patches keep theirs. Returns the model itself.
        """
        self.backbone.resize_grid(self.config.replace(image_size=image_size))
        return self

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        save_function: Callable[..., Any] | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "5GB",
        push_to_hub: bool = False,
        repo_id: str | None = None,
        token: str | bool | None = None,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
    ) -> None:
        """Writes `config.json` and `model.safetensors` (or shards) in Hugging Face's format, for `transformers` too.

        Args:
            is_main_process: the processes where this is False write nothing.
            state_dict: values to write in place of the model's own, under our names or those of any dialect. They must
                be all of this model's tensors and no others.
            save_function: not used, because safetensors files are written; for callers of `transformers`.
            safe_serialization: must stay True.
            variant: part of the files' names, e.g. "fp16" for `model.fp16.safetensors`.
            max_shard_size: bytes, or a size like "500MB".
            push_to_hub: uploads the folder afterwards, with a model card and, if it is known, the preprocessing. The
                options from `repo_id` on are for that, and refused without it. `repo_id` is the folder's name if it is
                not given.
        """
        if not safe_serialization:
            raise ValueError(
                "safe_serialization=False asks for a pickle, which runs code when it is loaded, so this package "
                "doesn't write any; leave it out"
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
        if not is_main_process:
            return
        tensors = self._tensors() if state_dict is None else self._own(state_dict)
        hub.write_checkpoint(Path(save_directory), self.config, tensors, max_shard_size=max_shard_size, variant=variant)
        if push_to_hub:
            self._save_processor(Path(save_directory), token=token)
            hub.push_folder(Path(save_directory), facts=self._facts(), **push)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        processor: DeiTImageProcessor | None = None,
        token: str | bool | None = None,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload model",
        max_shard_size: int | str = "5GB",
        variant: str | None = None,
        license: str | None = None,
        base_model: str | None = None,
        datasets: Iterable[str] = (),
        metrics: Mapping[str, float] | None = None,
    ) -> str:
        """Uploads the model with its preprocessing and a model card; returns the commit's address.

        Args:
            processor: None takes the preprocessing of the place that the model was loaded from, if there is one.
            license, datasets, metrics: what the card says, e.g. "apache-2.0", ["imagenet-1k"], {"accuracy": 0.93}.
            base_model: the repository that training started from. None takes the one that the model was loaded from.
        """

        def save(folder: Path) -> None:
            self.save_pretrained(folder, max_shard_size=max_shard_size, variant=variant)
            self._save_processor(folder, processor, token)

        known = self._facts()
        facts = Facts(
            license=license, base_model=base_model or known.base_model, datasets=tuple(datasets), metrics=metrics
        )
        return hub.push_saved(
            save,
            repo_id,
            token=token,
            private=private,
            revision=revision,
            commit_message=commit_message,
            facts=facts,
        )

    def _came_from(self, name_or_path: str | Path | None, where: Mapping[str, Any]) -> None:
        """Keeps where the model was read from, for `push_to_hub`. `where` is as for `from_pretrained`."""
        self.name_or_path = name_or_path
        self._where = {name: value for name, value in where.items() if name != "token"}

    def for_trainer(self, processor: DeiTImageProcessor) -> TrainerFiles:
        """The `processing_class` with which `transformers.Trainer` saves whole folders of this model."""
        return TrainerFiles(self, processor)

    def _save_processor(
        self, folder: Path, processor: DeiTImageProcessor | None = None, token: str | bool | None = None
    ) -> None:
        """Writes the preprocessing beside the model, if it is known and the folder has none. `token` may read it."""
        if processor is None and not (folder / "preprocessor_config.json").exists() and self.name_or_path is not None:
            with suppress(FileNotFoundError):
                processor = DeiTImageProcessor.of_model(self.name_or_path, self.config, **self._where, token=token)
        if processor is not None:
            processor.save_pretrained(folder)

    def _facts(self) -> Facts:
        """What is known of the model's origin: the hub repository that it was loaded from."""
        name = None if self.name_or_path is None else str(self.name_or_path)
        return Facts(base_model=None if name is None or Path(name).expanduser().exists() else name)

    def _own(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a state dict in any dialect under the names of `weights.manifest`, all of this model's."""
        found = hub.of_tensors(state_dict, self.config).tensors
        expected = {name: tuple(tensor.shape) for name, tensor in self._tensors().items()}
        for what, names in (("lacks", expected.keys() - found.keys()), ("also has", found.keys() - expected.keys())):
            if names:
                raise ValueError(
                    f"the state_dict must hold the tensors of this {type(self).__name__}, and it {what} "
                    f"{', '.join(sorted(names)[:5])}; pass the whole state_dict of a model of this class and config"
                )
        for name, tensor in found.items():
            if tuple(tensor.shape) != expected[name]:
                raise ValueError(
                    f"the state_dict has {name} of shape {tuple(tensor.shape)}, expected {expected[name]}; pass the "
                    "state_dict of a model of this config"
                )
        return {name: found[name].detach() for name in expected}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As every module of PyTorch; the names may be those of any dialect."""
        try:
            translate = weights.detect(state_dict) != "ours"
        except ValueError:  # a part of a model
            translate = False
        if translate:
            base = len(weights.BASE) if self.kind == "backbone" else 0
            found = hub.of_tensors(state_dict, self.config).tensors
            state_dict = {name[base:]: tensor for name, tensor in found.items()}
        return super().load_state_dict(state_dict, strict, assign)

    def _tensors(self) -> dict[str, Tensor]:
        """The parameters under the names of `weights.manifest`."""
        base = weights.BASE if self.kind == "backbone" else ""
        return {base + weights.unwrap(name): tensor.detach() for name, tensor in self.state_dict().items()}

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | None,
        *,
        config: DeiTConfig | str | Path | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        revision: str | None = None,
        subfolder: str = "",
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        token: str | bool | None = None,
        variant: str | None = None,
        use_safetensors: bool | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device_map: str | int | torch.device | Mapping[str, Any] | None = None,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        attn_implementation: AttnImplementation = "auto",
        add_pooling_layer: bool | None = None,
        use_mask_token: bool | None = None,
        low_cpu_mem_usage: bool | None = None,
        trust_remote_code: bool | None = None,
        **overrides: Any,
    ) -> Any:
        """Reads a model from a folder, a weight file or a hub repository, in any known dialect.

        Args:
            pretrained_model_name_or_path: e.g. `facebook/deit-tiny-distilled-patch16-224`, `runs/x/model`,
                `deit_tiny.pth`. None takes everything from `config` and `state_dict`.
            config: replaces the file's own config. Needed if there is none and the shapes don't tell the architecture.
                A name or a folder stands for the config that is there.
            state_dict: tensors in any dialect, whose values are loaded in place of the files'.
            force_download: fetches files of the hub again though the cache has them.
            variant: reads the files of that name, e.g. "fp16" for `model.fp16.safetensors`.
            use_safetensors: True reads such files alone, False none of them.
            dtype: the type of the parameters: None for float32, "auto" for the file's. `torch_dtype` is its former
                name.
            device_map: the one device that takes the model, e.g. "cuda:0", 0, "auto" (the accelerator, or else the CPU)
                or {"": "cpu"}.
            ignore_mismatched_sizes: initialises tensors anew whose shape differs from the model's, instead of raising.
            output_loading_info: returns `(model, info)`. The info has missing, unexpected and mismatched keys.
            add_pooling_layer, use_mask_token: whether a backbone has these parts; None takes what the file holds.
            low_cpu_mem_usage: changes nothing, because no tensor is allocated twice in any case.
            trust_remote_code: changes nothing, because no code of a repository is run in any case.
            overrides: fields of the config, e.g. `num_labels=10`, `id2label=...`, `drop_path_rate=0.1`. With
                `image_size`, the positions are resized after reading.

        Returns:
            The model in evaluation mode. Parts that the file lacks (a head, a pooler, a mask token) are initialised
            anew, with a warning.

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
        } | ({"force_download": True} if force_download else {})
        _refuse_undone(overrides)
        _one_device(device_map)
        if state_dict is None and pretrained_model_name_or_path is None:
            raise ValueError("there is nothing to load; give a name or a folder, or config= and state_dict=")
        if state_dict is not None:
            config = pretrained_model_name_or_path if config is None else config
            config = DeiTConfig.from_pretrained(config, **where) if isinstance(config, str | Path) else config
            # Copies, because training would change the tensors that were given, which may be another model's.
            found = hub.of_tensors({name: tensor.detach().clone() for name, tensor in state_dict.items()}, config)
        else:
            found = hub.read_checkpoint(
                pretrained_model_name_or_path,  # type: ignore[arg-type]
                config=config,
                variant=variant,
                use_safetensors=use_safetensors,
                **where,
            )
        loaded = cls.from_checkpoint(
            found,
            dtype=dtype,
            torch_dtype=torch_dtype,
            device_map=device_map,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            output_loading_info=output_loading_info,
            attn_implementation=attn_implementation,
            add_pooling_layer=add_pooling_layer,
            use_mask_token=use_mask_token,
            **overrides,
        )
        model = loaded[0] if output_loading_info else loaded
        model._came_from(pretrained_model_name_or_path, where)
        return loaded

    @classmethod
    def from_checkpoint(
        cls,
        found: hub.Checkpoint,
        *,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device_map: str | int | torch.device | Mapping[str, Any] | None = None,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        attn_implementation: AttnImplementation = "auto",
        add_pooling_layer: bool | None = None,
        use_mask_token: bool | None = None,
        low_cpu_mem_usage: bool | None = None,
        trust_remote_code: bool | None = None,
        **overrides: Any,
    ) -> Any:
        """Like `from_pretrained`, but from a checkpoint that was read already."""
        _refuse_undone(overrides)
        if torch_dtype is not None and dtype is not None and torch_dtype != dtype:
            raise ValueError(f"dtype={dtype} contradicts torch_dtype={torch_dtype}, its former name; give dtype alone")
        device = _one_device(device_map)
        image_size = overrides.pop("image_size", None)
        settings = found.config_for(cls.kind, cls.config_class, overrides)
        options = found.options_for(cls.kind)
        for part, wanted in (("add_pooling_layer", add_pooling_layer), ("use_mask_token", use_mask_token)):
            if wanted is not None and cls.kind != "backbone":
                raise ValueError(f"{part} is an option of DeiTModel and ViTModel, found {cls.__name__}; leave it out")
            if wanted is not None:
                options[part] = wanted
        pooler, mask = (options.get(name, False) for name in ("add_pooling_layer", "use_mask_token"))
        expected = weights.manifest(settings, cls.kind, pooler=pooler, mask_token=mask)
        found.faults(expected, ignore_mismatched_sizes)  # before a model is built that the file can't fill
        with torch.device("meta"):  # no need to allocate and initialise tensors that the file gives
            model = cls(settings, **options)
        info = model._load(found, ignore_mismatched_sizes)
        model.to(device, _dtype(torch_dtype if dtype is None else dtype, found.tensors))
        model.set_attn_implementation(attn_implementation)
        if image_size is not None:
            model.resize_to(tuple(image_size) if isinstance(image_size, list) else image_size)
        model.eval()
        return (model, info) if output_loading_info else model

    def _load(self, found: hub.Checkpoint, ignore_mismatched_sizes: bool) -> dict[str, list[str]]:
        """Replaces this model's tensors, which are on the meta device, by the file's. Initialises the rest."""
        expected = {name: tuple(tensor.shape) for name, tensor in self._tensors().items()}
        fitted = found.fit(expected, ignore_mismatched_sizes)
        base = len(weights.BASE) if self.kind == "backbone" else 0
        state = {name[base:]: tensor for name, tensor in fitted.given.items()}
        self.load_state_dict(state, strict=False, assign=True)
        for parameter in self.parameters():
            parameter.requires_grad_(True)
        own = [name[base:] for name in fitted.fresh]
        place = next(iter(fitted.given.values())).device  # a state dict may lie on a GPU
        for name in own:
            owner, _, leaf = name.rpartition(".")
            module = self.get_submodule(owner)
            setattr(module, leaf, nn.Parameter(torch.empty(getattr(module, leaf).shape, device=place)))
        initialise(self, self.config, own)
        return fitted.info


def _require_gradient(_: nn.Module, __: Any, output: Tensor) -> None:
    output.requires_grad_(True)


_UNDONE = {
    "quantization_config": "models are not quantised when they are loaded; `deit export` writes int8 models",
    "load_in_8bit": "models are not quantised when they are loaded; `deit export` writes int8 models",
    "load_in_4bit": "models are not quantised when they are loaded; `deit export` writes int8 models",
    "max_memory": "a model lies on one device; name it with device_map",
    "offload_folder": "a model lies on one device; name it with device_map",
    "offload_state_dict": "a model lies on one device; name it with device_map",
    "tp_plan": "a model lies on one device; name it with device_map",
    "device_mesh": "a model lies on one device; name it with device_map",
    "from_tf": "the weights' format is seen from their file; leave it out",
    "from_flax": "Flax's files are not read; save them as safetensors with transformers 4",
    "gguf_file": "GGUF files are not read; give a safetensors file",
    "adapter_kwargs": "adapters are not loaded; give the model to peft.PeftModel.from_pretrained",
    "proxies": "the hub's client takes proxies from the environment; set HTTPS_PROXY",
    "weights_only": "no file is ever unpickled beyond its tensors; leave it out",
}
"""Options of `transformers` that are refused, and why."""


def _refuse_undone(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if name in _UNDONE:
            raise ValueError(f"{name}={value!r} is not done by this package: {_UNDONE[name]}")


def _one_device(device_map: Any) -> torch.device | None:
    if isinstance(device_map, Mapping) and len(devices := {str(device) for device in device_map.values()}) == 1:
        device_map = devices.pop()
        device_map = int(device_map) if device_map.isdigit() else device_map
    if device_map is None:
        return None
    if device_map == "auto":
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        return torch.device(device_map)
    except (RuntimeError, TypeError):
        raise ValueError(
            f"device_map={device_map!r} is not one device, and these models are not split over several; name the one "
            'that takes the whole model, e.g. "cuda:0", "cpu" or "auto"'
        ) from None


def _dtype(dtype: torch.dtype | str | None, tensors: Mapping[str, Tensor]) -> torch.dtype:
    if dtype == "auto":
        return next(iter(tensors.values())).dtype
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError('dtype must be a floating torch dtype, its name (e.g. "bfloat16"), or "auto"')
    return dtype or torch.float32


@torch.no_grad()
def initialise(model: nn.Module, config: DeiTConfig, names: list[str] | None = None) -> None:
    """Gives fresh values to all parameters, or to those in `names`, as the original code draws them.

    - Tokens, positions and linear weights: truncated normal with deviation `config.initializer_range`.
    - Biases: zero. LayerNorm: weight one and bias zero. LayerScale: its start value.
    - Patch projection: PyTorch's default for a convolution (uniform within 1/sqrt(fan in)), as in the original code.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta or (names is not None and name not in names):
            continue
        *_, owner, leaf = ("", *name.split("."))
        if owner == "patch":
            bound = 1 / math.sqrt(config.num_channels * math.prod(config.patch_hw))
            parameter.uniform_(-bound, bound)
        elif leaf in ("scale1", "scale2"):
            parameter.fill_(config.layer_scale_init_value or 0.0)
        elif owner.startswith("norm"):
            parameter.fill_(1.0 if leaf == "weight" else 0.0)
        elif leaf == "bias":
            parameter.zero_()
        else:
            nn.init.trunc_normal_(parameter, std=config.initializer_range)
