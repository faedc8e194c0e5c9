"""What every model of the family has: files, the hub, fresh values, resolution, checkpointing, choice of attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self

import torch
from torch import Tensor, nn

from deit import weights
from deit.config import DeiTConfig
from deit.model import pytrees  # noqa: F401  registers the outputs
from deit.weights import hub

AttnImplementation = Literal["auto", "eager", "sdpa"]


class Backbone(Protocol):
    """What the models' base needs of the transformer in them."""

    position: nn.Parameter
    """(1, positions, D)."""
    blocks: nn.ModuleList
    gradient_checkpointing: bool

    def resize_grid(self, config: DeiTConfig) -> None:
        """Takes `config` in place of its own, which differs in the image size, and fits the positions to its grid."""


class PreTrained(nn.Module):
    """Base of the models; `backbone` is the transformer in them."""

    kind: ClassVar[weights.Kind]
    config_class: ClassVar[type[DeiTConfig]] = DeiTConfig
    config: DeiTConfig

    @property
    def backbone(self) -> Backbone:
        return self.deit  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        return self.backbone.position.device

    @property
    def dtype(self) -> torch.dtype:
        return self.backbone.position.dtype

    def num_parameters(self, only_trainable: bool = False) -> int:
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)

    def set_attn_implementation(self, name: AttnImplementation) -> None:
        if name not in ("auto", "eager", "sdpa"):
            raise ValueError(f"attn_implementation={name!r} is not known; choose auto, eager or sdpa")
        for block in self.backbone.blocks:
            block.attention.implementation = name  # type: ignore[union-attr]

    def gradient_checkpointing_enable(self) -> None:
        """Recomputes each block in the backward pass: activations of one block at a time, for about a third more
        computation."""
        self.backbone.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        self.backbone.gradient_checkpointing = False

    @torch.no_grad()
    def resize_to(self, image_size: int | tuple[int, int]) -> Self:
        """Adapts the positions to images of another size (pixels, one number or (height, width)), once and for all.

        Bicubic, as the paper does for fine-tuning at higher resolution (section 3.3); tokens before the patches keep
        theirs. Returns the model itself.
        """
        self.backbone.resize_grid(self.config.replace(image_size=image_size))
        return self

    def save_pretrained(
        self, folder: str | Path, *, max_shard_size: int | str = "5GB", push_to_hub: bool = False, **push: Any
    ) -> None:
        """Writes `config.json` and `model.safetensors` (or shards) as Hugging Face names them; `transformers` reads
        them."""
        hub.write_checkpoint(Path(folder), self.config, self._tensors(), max_shard_size=max_shard_size)
        if push_to_hub:
            hub.push_folder(Path(folder), push.pop("repo_id", Path(folder).name), **push)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Uploads the model (`token`, `private`, `revision`, `commit_message`); returns the commit's address."""
        return hub.push_saved(self.save_pretrained, repo_id, **options)

    def _tensors(self) -> dict[str, Tensor]:
        """Parameters under the names of `weights.manifest`."""
        base = weights.BASE if self.kind == "backbone" else ""
        return {base + name: tensor.detach() for name, tensor in self.state_dict().items()}

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        *,
        config: DeiTConfig | None = None,
        revision: str | None = None,
        subfolder: str = "",
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        dtype: torch.dtype | str | None = None,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        attn_implementation: AttnImplementation = "auto",
        **overrides: Any,
    ) -> Any:
        """A model in evaluation mode from a folder, a weight file, or a hub repository, in any known dialect.

        Args:
            name_or_folder: e.g. `facebook/deit-tiny-distilled-patch16-224`, `runs/x/model`, `deit_tiny.pth`.
            config: replaces the file's own, and is needed where there is none and shapes can't tell.
            dtype: of the parameters; None is float32, "auto" is the file's.
            ignore_mismatched_sizes: tensors of another shape than the model's are left at their fresh initialisation.
            output_loading_info: returns `(model, info)`, info with missing, unexpected and mismatched keys.
            overrides: fields of the config, e.g. `num_labels=10`, `id2label=...`, `drop_path_rate=0.1`. With
                `image_size`, the positions are resized after reading.

        Returns:
            The model; what the file lacks (a head, a pooler, a mask token) is initialised anew, with a warning.

        Raises:
            FileNotFoundError: nothing there, or not reachable.
            CheckpointError, ValueError: truncated, corrupt, unsafe, unknown or ill-fitting; nothing is half-loaded.
        """
        where: dict[str, Any] = {
            "revision": revision,
            "subfolder": subfolder,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
            "token": token,
        }
        found = hub.read_checkpoint(name_or_folder, config=config, **where)
        return cls.from_checkpoint(
            found,
            dtype=dtype,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            output_loading_info=output_loading_info,
            attn_implementation=attn_implementation,
            **overrides,
        )

    @classmethod
    def from_checkpoint(
        cls,
        found: hub.Checkpoint,
        *,
        dtype: torch.dtype | str | None = None,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        attn_implementation: AttnImplementation = "auto",
        **overrides: Any,
    ) -> Any:
        """`from_pretrained` of a checkpoint that is read already."""
        image_size = overrides.pop("image_size", None)
        settings = found.config_for(cls.kind, cls.config_class, overrides)
        with torch.device("meta"):  # neither allocates nor initialises what the file is about to give
            model = cls(settings, **found.options_for(cls.kind))
        info = model._load(found, ignore_mismatched_sizes)
        model.to(_dtype(dtype, found.tensors))
        model.set_attn_implementation(attn_implementation)
        if image_size is not None:
            model.resize_to(tuple(image_size) if isinstance(image_size, list) else image_size)
        model.eval()
        return (model, info) if output_loading_info else model

    def _load(self, found: hub.Checkpoint, ignore_mismatched_sizes: bool) -> dict[str, list[str]]:
        """Puts the file's tensors in place of this model's (on the meta device), and initialises the rest."""
        expected = {name: tuple(tensor.shape) for name, tensor in self._tensors().items()}
        fitted = found.fit(expected, ignore_mismatched_sizes)
        base = len(weights.BASE) if self.kind == "backbone" else 0
        state = {name[base:]: tensor for name, tensor in fitted.given.items()}
        self.load_state_dict(state, strict=False, assign=True)
        for parameter in self.parameters():
            parameter.requires_grad_(True)
        own = [name[base:] for name in fitted.fresh]
        for name in own:
            owner, _, leaf = name.rpartition(".")
            module = self.get_submodule(owner)
            setattr(module, leaf, nn.Parameter(torch.empty(getattr(module, leaf).shape)))
        initialise(self, self.config, own)
        return fitted.info


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
    """Fresh values as the original code draws them, for all parameters or those in `names`.

    Tokens, positions and linear weights: truncated normal of `config.initializer_range`; biases zero; LayerNorm one
    and zero; LayerScale at its start value; patch projection: PyTorch's own for a convolution (uniform within
    1/sqrt(fan in)), which the original leaves as it is.
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
