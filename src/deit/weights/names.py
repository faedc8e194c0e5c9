"""Every tensor's name and shape, and how other projects name them. Loads no framework: NumPy and PyTorch both work.

Our names are those in the `state_dict()` of a model with a head: the backbone's start with `deit.`, the heads' do not.
`manifest` lists them. A dialect is a literal table from our names to theirs. In it, `{}` stands for the number of a
block. Three names stand for tensors that the dialect stores one by one and that we join. None stands for a tensor that
the dialect cannot express.

D width, M MLP width, C classes, N positions, P patch height and width.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from deit.config import VARIANTS, DeiTConfig

Kind = Literal["backbone", "masked_image", "classification", "with_teacher"]
Table = dict[str, str | tuple[str, str, str] | None]
BASE = "deit."


def manifest(
    config: DeiTConfig, kind: Kind, *, pooler: bool = False, mask_token: bool = False
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a model. The sum of their sizes is the published parameter count."""
    width, hidden, channels = config.hidden_size, config.intermediate_size, config.num_channels
    block: dict[str, tuple[int, ...]] = {"norm1.weight": (width,), "norm1.bias": (width,)}
    block |= {"attention.qkv.weight": (3 * width, width)} | (
        {"attention.qkv.bias": (3 * width,)} if config.qkv_bias else {}
    )
    block |= {"attention.out.weight": (width, width), "attention.out.bias": (width,)}
    scaled = config.layer_scale_init_value is not None
    block |= {"scale1": (width,)} if scaled else {}
    block |= {"norm2.weight": (width,), "norm2.bias": (width,)}
    block |= {"mlp.fc1.weight": (hidden, width), "mlp.fc1.bias": (hidden,)}
    block |= {"mlp.fc2.weight": (width, hidden), "mlp.fc2.bias": (width,)}
    block |= {"scale2": (width,)} if scaled else {}

    tensors: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, width)}
    tensors |= {"distillation_token": (1, 1, width)} if config.distillation_token else {}
    tensors |= {"mask_token": (1, 1, width)} if mask_token or kind == "masked_image" else {}
    tensors["position"] = (1, config.num_prefix_positions + config.num_patches, width)
    tensors |= {"patch.weight": (width, channels, *config.patch_hw), "patch.bias": (width,)}
    for i in range(config.num_hidden_layers):
        tensors |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    tensors |= {"norm.weight": (width,), "norm.bias": (width,)}
    tensors |= {"pooler.weight": (config.pooler_width, width), "pooler.bias": (config.pooler_width,)} if pooler else {}
    tensors = {BASE + name: shape for name, shape in tensors.items()}
    if kind == "masked_image":
        outputs = config.patch_hw[0] * config.patch_hw[1] * channels
        tensors |= {"decoder.weight": (outputs, width, 1, 1), "decoder.bias": (outputs,)}
    elif kind != "backbone" and config.num_labels:
        for head in ("classifier",) if kind == "classification" else ("cls_classifier", "distillation_classifier"):
            tensors |= {f"{head}.weight": (config.num_labels, width), f"{head}.bias": (config.num_labels,)}
    return tensors


def _linear_pairs(pairs: Mapping[str, str | None]) -> Table:
    """The table for the weight and the bias of each module in `pairs`, our name first."""
    return {
        f"{ours}.{leaf}": theirs and f"{theirs}.{leaf}" for ours, theirs in pairs.items() for leaf in ("weight", "bias")
    }


def _qkv(template: str, names: tuple[str, str, str]) -> Table:
    return {
        f"{BASE}blocks.{{}}.attention.qkv.{leaf}": tuple(f"{template}.{name}.{leaf}" for name in names)  # type: ignore[misc]
        for leaf in ("weight", "bias")
    }


# Hugging Face's names on disk, in all versions of transformers (5.x renamed modules in memory but still writes these).
# The model's own prefix, `deit.` or `vit.`, is `BASE` here. A backbone that was saved alone has no prefix.
HF: Table = {
    "deit.cls_token": "deit.embeddings.cls_token",
    "deit.distillation_token": "deit.embeddings.distillation_token",
    "deit.mask_token": "deit.embeddings.mask_token",
    "deit.position": "deit.embeddings.position_embeddings",
    **_linear_pairs(
        {
            "deit.patch": "deit.embeddings.patch_embeddings.projection",
            "deit.blocks.{}.norm1": "deit.encoder.layer.{}.layernorm_before",
            "deit.blocks.{}.attention.out": "deit.encoder.layer.{}.attention.output.dense",
            "deit.blocks.{}.norm2": "deit.encoder.layer.{}.layernorm_after",
            "deit.blocks.{}.mlp.fc1": "deit.encoder.layer.{}.intermediate.dense",
            "deit.blocks.{}.mlp.fc2": "deit.encoder.layer.{}.output.dense",
            "deit.norm": "deit.layernorm",
            "deit.pooler": "deit.pooler.dense",
            "classifier": "classifier",
            "cls_classifier": "cls_classifier",
            "distillation_classifier": "distillation_classifier",
            "decoder": "decoder.0",
        }
    ),
    **_qkv("deit.encoder.layer.{}.attention.attention", ("query", "key", "value")),
    "deit.blocks.{}.scale1": "deit.encoder.layer.{}.layer_scale1.lambda1",  # as transformers names it in DINOv2
    "deit.blocks.{}.scale2": "deit.encoder.layer.{}.layer_scale2.lambda1",
}

# The state_dict() of transformers 5 in memory, as people save it with torch.save.
HF5: Table = {
    **HF,
    **_linear_pairs(
        {
            "deit.blocks.{}.norm1": "deit.layers.{}.layernorm_before",
            "deit.blocks.{}.attention.out": "deit.layers.{}.attention.o_proj",
            "deit.blocks.{}.norm2": "deit.layers.{}.layernorm_after",
            "deit.blocks.{}.mlp.fc1": "deit.layers.{}.mlp.fc1",
            "deit.blocks.{}.mlp.fc2": "deit.layers.{}.mlp.fc2",
        }
    ),
    **_qkv("deit.layers.{}.attention", ("q_proj", "k_proj", "v_proj")),
    "deit.blocks.{}.scale1": "deit.layers.{}.layer_scale1.lambda1",
    "deit.blocks.{}.scale2": "deit.layers.{}.layer_scale2.lambda1",
}

TIMM: Table = {
    "deit.cls_token": "cls_token",
    "deit.distillation_token": "dist_token",
    "deit.mask_token": None,
    "deit.position": "pos_embed",
    **_linear_pairs(
        {
            "deit.patch": "patch_embed.proj",
            "deit.blocks.{}.norm1": "blocks.{}.norm1",
            "deit.blocks.{}.attention.qkv": "blocks.{}.attn.qkv",
            "deit.blocks.{}.attention.out": "blocks.{}.attn.proj",
            "deit.blocks.{}.norm2": "blocks.{}.norm2",
            "deit.blocks.{}.mlp.fc1": "blocks.{}.mlp.fc1",
            "deit.blocks.{}.mlp.fc2": "blocks.{}.mlp.fc2",
            "deit.norm": "norm",
            "deit.pooler": None,
            "classifier": "head",
            "cls_classifier": "head",  # stands for two of our names; head_dist in the file tells which
            "distillation_classifier": "head_dist",
            "decoder": None,
        }
    ),
    "deit.blocks.{}.scale1": "blocks.{}.ls1.gamma",
    "deit.blocks.{}.scale2": "blocks.{}.ls2.gamma",
}

# The .pth files of facebookresearch/deit: timm's names of 2020, and DeiT III's own names for LayerScale.
ORIGINAL: Table = {
    **TIMM,
    "deit.blocks.{}.scale1": "blocks.{}.gamma_1",
    "deit.blocks.{}.scale2": "blocks.{}.gamma_2",
}

# Hugging Face's names of DINOv2: the blocks have those of timm but for attention and LayerScale.
DINOV2: Table = {
    **HF,
    **_linear_pairs(
        {
            "deit.blocks.{}.norm1": "deit.encoder.layer.{}.norm1",
            "deit.blocks.{}.norm2": "deit.encoder.layer.{}.norm2",
            "deit.blocks.{}.mlp.fc1": "deit.encoder.layer.{}.mlp.fc1",
            "deit.blocks.{}.mlp.fc2": "deit.encoder.layer.{}.mlp.fc2",
        }
    ),
}

# The same in the memory of transformers 5.
DINOV2_5: Table = {
    **DINOV2,
    **_linear_pairs({"deit.blocks.{}.attention.out": "deit.encoder.layer.{}.attention.o_proj"}),
    **_qkv("deit.encoder.layer.{}.attention", ("q_proj", "k_proj", "v_proj")),
}

# Our own state_dict(), as torch.save, accelerate, Lightning and FSDP write it.
OURS: Table = {name: name for name in HF}

DIALECTS: dict[str, Table] = {
    "hf": HF,
    "hf5": HF5,
    "dinov2": DINOV2,
    "dinov2-5": DINOV2_5,
    "timm": TIMM,
    "original": ORIGINAL,
    "ours": OURS,
}

_WITH_BASE = ("hf", "hf5", "dinov2", "dinov2-5", "ours")
"""Dialects whose names begin with a base's name, unless a backbone was saved alone."""

_ROOTS = {
    part.partition(".")[0]
    for table in DIALECTS.values()
    for theirs in table.values()
    if theirs is not None
    for whole in (theirs if isinstance(theirs, tuple) else (theirs,))
    for part in (whole, whole.removeprefix(BASE))
} | {"vit", "dinov2"}
"""What the names of a dialect begin with, with the base's name and without it."""

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def _fold(name: str) -> tuple[str, str | None]:
    """`blocks.7.norm1.bias` -> (`blocks.{}.norm1.bias`, `7`)."""
    if name.startswith("decoder."):
        return name, None
    number = _NUMBER.search(name)
    return (name, None) if number is None else (_NUMBER.sub("{}", name, count=1), number.group())


def detect(names: Iterable[str]) -> str:
    """The dialect of a file, by the names of its tensors. Raises `ValueError` if none fits."""
    names = [unwrap(name) for name in names]
    marks = {
        "hf": ".layernorm_before.",
        "dinov2": ".attention.attention.query.",
        "dinov2-5": ".attention.q_proj.",
        "timm": ".attn.qkv.weight",
        "ours": ".attention.qkv.weight",
    }
    if any(marks["hf"] in name for name in names):
        return "hf5" if any(".q_proj." in name for name in names) else "hf"
    if any(marks["dinov2"] in name for name in names):
        return "dinov2"
    if any(marks["dinov2-5"] in name for name in names):
        return "dinov2-5"
    if any(marks["timm"] in name for name in names):
        return "original" if any(name.endswith(".gamma_1") for name in names) else "timm"
    if any(marks["ours"] in name for name in names):
        return "ours"
    raise ValueError(
        f"no DeiT or ViT checkpoint known to this package names its tensors like {names[:3]}; expected "
        "Hugging Face's, timm's, facebookresearch/deit's or this package's names"
    )


def unwrap(name: str) -> str:
    """The name without what wrappers add: DistributedDataParallel in front, torch.compile and FSDP anywhere."""
    name = re.sub(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.", "", name)
    return name.removeprefix("module.")


def _common_prefix(names: Iterable[str]) -> str:
    """What all names begin with though no dialect's do, such as Lightning's `model.`; empty if there is none."""
    prefix, rest = "", list(names)
    while len(heads := {name.partition(".")[0] for name in rest}) == 1 and not heads <= _ROOTS:
        head = heads.pop() + "."
        if not all(name.startswith(head) for name in rest):
            break
        prefix, rest = prefix + head, [name.removeprefix(head) for name in rest]
    return prefix


def to_ours(tensors: Mapping[str, Any], *, join: Callable[[Sequence[Any]], Any], file: str) -> dict[str, Any]:
    """Renames a checkpoint's tensors to our names, and joins those that we keep fused.

    `join` concatenates arrays along the first axis. Raises `ValueError`, naming `file`, for a key that no rule covers.
    """
    tensors = {unwrap(name): value for name, value in tensors.items()}
    try:
        dialect = detect(tensors)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    if prefix := _common_prefix(tensors):
        warnings.warn(f"{file}: every name begins with {prefix!r}, and is read without it", stacklevel=3)
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    rules: dict[str, tuple[str, int | None]] = {}
    skipped = "classifier" if "head_dist.weight" in tensors else "cls_classifier"
    for ours, theirs in DIALECTS[dialect].items():
        if dialect in ("timm", "original") and ours.startswith(f"{skipped}."):
            continue
        if isinstance(theirs, tuple):
            rules |= {part: (ours, i) for i, part in enumerate(theirs)}
        elif theirs is not None:
            rules[theirs] = (ours, None)
    if dialect == "timm":
        rules["mask_token"] = ("deit.mask_token", None)  # facebookresearch/dinov2 has timm's names, and this one

    found: dict[str, Any] = {}
    parts: dict[str, dict[int, Any]] = {}
    for name, value in tensors.items():
        folded, number = _fold(_add_base(name) if dialect in _WITH_BASE else name)
        if folded not in rules:
            why = next((why for part, why in _UNKNOWN_PARTS.items() if part in name), "this package can't place it")
            raise ValueError(
                f"{file}: no rule for tensor {name!r} (read as {dialect} names); {why}, so nothing was loaded. If it "
                "is no part of the model, save the file without it"
            )
        ours, part = rules[folded]
        if ours == "deit.mask_token":
            value = value.reshape(1, 1, -1)  # DINOv2's is (1, D)
        ours = ours if number is None else ours.replace("{}", number)
        if part is None:
            found[ours] = value
        else:
            parts.setdefault(ours, {})[part] = value
    for ours, three in parts.items():
        if len(three) < 3:
            raise ValueError(
                f"{file}: {ours} is made of query, key and value, and the file has only {len(three)} of "
                "the three; it is incomplete, fetch it again"
            )
        found[ours] = join([three[i] for i in range(3)])
    return found


_UNKNOWN_PARTS = {
    "register_tokens": "this package's models have no register tokens",
    "reg_token": "this package's models have no register tokens",
    ".weights_in.": "this package's blocks have a plain MLP, no SwiGLU",
    ".mlp.w12.": "this package's blocks have a plain MLP, no SwiGLU",
    ".gate_proj.": "this package's blocks have a plain MLP, no SwiGLU",
    "norm_pre.": "this package's models don't normalise the tokens before the blocks",
    "fc_norm.": "this package classifies by the class token, not by a normalised mean",
    ".q_norm.": "this package's attention doesn't normalise queries and keys",
    ".k_norm.": "this package's attention doesn't normalise queries and keys",
    "attn_pool.": "this package classifies by the class token, not by attention pooling",
}
"""Parts of the names of other ViTs' tensors, and what they mean."""


_TF_NAME = re.compile(
    r"(?:.*/)?((?:embeddings|encoder|layernorm|pooler|classifier|cls_classifier|"
    r"distillation_classifier|decoder)/.+?)(?::0)?"
)
_TF_LEAF = {"kernel": "weight", "gamma": "weight", "beta": "bias"}


def from_tensorflow(tensors: Mapping[str, np.ndarray], *, file: str) -> dict[str, np.ndarray]:
    """Turns the tensors of `transformers` 4's TensorFlow classes into the names and layout of its PyTorch classes.

    Names are like `tf_dei_t_model/deit/encoder/layer_._0/attention/attention/query/kernel:0`. Matrices (in, out) become
    (out, in), and convolutions (height, width, in, out) become (out, in, height, width). Raises `ValueError`, naming
    `file`, for a name of another kind.
    """
    found = {}
    for name, value in tensors.items():
        match = _TF_NAME.fullmatch(name)
        leaf = name.removesuffix(":0").rpartition("/")[2]
        axes = {2: (1, 0), 4: (3, 2, 0, 1)}.get(np.ndim(value)) if leaf == "kernel" else tuple(range(np.ndim(value)))
        if match is None or axes is None:
            raise ValueError(
                f"{file}: {name!r} is no tensor of the TensorFlow classes of transformers; expected names "
                "like .../encoder/layer_._0/attention/attention/query/kernel:0"
            )
        path = match.group(1).replace("layer_._", "layer/").split("/")[:-1]
        found[".".join([*path, _TF_LEAF.get(leaf, leaf)])] = np.ascontiguousarray(np.transpose(value, axes))
    return found


_HEADS = ("classifier.", "cls_classifier.", "distillation_classifier.", "decoder.")


def _add_base(name: str) -> str:
    if name.startswith(_HEADS):
        return name
    return BASE + re.sub(r"^(deit|vit|dinov2)\.", "", name)


def from_ours(tensors: Mapping[str, Any], dialect: str, *, prefix: str = BASE) -> dict[str, Any]:
    """Renames our tensors to a dialect's names, and splits those that it stores one by one.

    `prefix` replaces `deit.` in Hugging Face's names: `vit.` for a plain ViT, nothing for a backbone that is saved
    alone. Raises `ValueError` if the dialect has no name for a tensor.
    """
    table = DIALECTS[dialect]
    named: dict[str, Any] = {}
    for ours, value in tensors.items():
        folded, number = _fold(ours)
        if folded not in table:
            raise ValueError(
                f"the model has the tensor {ours}, and no file of this family has a place for it; merge adapters, "
                "remove parametrizations, or save the state_dict() with torch.save"
            )
        theirs = table[folded]
        if theirs is None:
            raise ValueError(f"{dialect} has no name for {ours}; convert a classification model, or keep --to hf")
        for i, name in enumerate(theirs if isinstance(theirs, tuple) else (theirs,)):
            name = name if number is None else name.replace("{}", number)
            if name.startswith(BASE):
                name = prefix + name.removeprefix(BASE)
            if isinstance(theirs, tuple):
                third = value.shape[0] // 3
                named[name] = value[i * third : (i + 1) * third]
            else:
                named[name] = value
    return named


def kind_of(names: Iterable[str]) -> Kind:
    """The kind of model that a set of our tensor names belongs to."""
    heads = {name.split(".")[0] for name in names} - {"deit"}
    if "distillation_classifier" in heads:
        return "with_teacher"
    if "decoder" in heads:
        return "masked_image"
    return "classification" if "classifier" in heads else "backbone"


def infer_config(tensors: Mapping[str, Any], *, file: str) -> DeiTConfig:
    """The config of a checkpoint that has no `config.json`, from the shapes of its tensors (under our names).

    Shapes don't tell the number of attention heads, so it is that of the published size, or else `width / 64`. Images
    are assumed to be square. Everything else is the paper's (LayerNorm epsilon 1e-6).
    """
    try:
        width, channels, *patch = tensors["deit.patch.weight"].shape
        hidden = tensors["deit.blocks.0.mlp.fc1.weight"].shape[0]
        positions = tensors["deit.position"].shape[1]
    except KeyError as error:
        raise ValueError(f"{file}: tensor {error} is missing; this is not a whole model") from None
    depth = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("deit.blocks."))
    scaled, distilled = "deit.blocks.0.scale1" in tensors, "deit.distillation_token" in tensors
    prefix = 2 if distilled else 1
    side = int((positions - (0 if scaled else prefix)) ** 0.5)
    on_class = side * side + prefix == positions
    if not on_class and side * side != positions:
        raise ValueError(f"{file}: {positions} positions are not a square grid of patches; pass the model's config")
    head = next((tensors[h] for h in ("classifier.weight", "cls_classifier.weight") if h in tensors), None)
    known = [v.num_attention_heads for v in VARIANTS.values() if (v.hidden_size, v.num_hidden_layers) == (width, depth)]
    if not known and width % 64:
        raise ValueError(
            f"{file}: shapes don't tell the number of attention heads of a model of width {width}; pass "
            "the model's config"
        )
    pixels = (side * patch[0], side * patch[1])
    square = patch[0] == patch[1]
    return DeiTConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=known[0] if known else width // 64,
        intermediate_size=hidden,
        layer_norm_eps=1e-6,
        num_channels=channels,
        image_size=pixels[0] if square else pixels,
        patch_size=patch[0] if square else tuple(patch),
        encoder_stride=patch[0] if square else 16,
        qkv_bias="deit.blocks.0.attention.qkv.bias" in tensors,
        num_labels=0 if head is None else head.shape[0],
        distillation_token=distilled,
        position_on_class_token=on_class,
        layer_scale_init_value=(1e-5 if on_class else 1e-4) if scaled else None,  # DINOv2's or DeiT III's
        drop_path_schedule="constant" if scaled else "linear",
    )


def resize_matrix(old: int, new: int) -> np.ndarray:
    """The (new, old) matrix that resamples a line of `old` values to `new` values by bicubic interpolation, in float64.

    The kernel is that of PyTorch's `interpolate(mode="bicubic", align_corners=False)`, which the original code uses for
    fine-tuning, and so does `transformers`: Keys' kernel with a = -0.75, borders repeated, no antialiasing. It is a
    matrix so that all frameworks resize alike.
    """
    a = -0.75
    centre = (np.arange(new) + 0.5) * old / new - 0.5
    left = np.floor(centre)
    matrix = np.zeros((new, old))
    for tap in (-1, 0, 1, 2):
        x = np.abs(centre - left - tap)
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = a * (((x - 5) * x + 8) * x - 4)
        column = np.clip(left + tap, 0, old - 1)
        # A comparison instead of an index lets torch.compile trace this with sizes that it does not know yet.
        matrix = matrix + np.where(x <= 1, near, far)[:, None] * (column[:, None] == np.arange(old))
    return matrix


def resize_positions(position: np.ndarray, old: DeiTConfig, new: DeiTConfig) -> np.ndarray:
    """Position embeddings (1, positions, D) for the images of another config. The prefix tokens keep theirs."""
    if old.grid == new.grid:
        return position
    prefix, grid = np.split(position, [old.num_prefix_positions], axis=1)
    down, across = (resize_matrix(*sizes) for sizes in zip(old.grid, new.grid, strict=True))
    grid = grid.reshape(*old.grid, -1).astype(np.float64)
    resized = np.einsum("rR,sS,RSd->rsd", down, across, grid).reshape(1, new.num_patches, -1)
    return np.concatenate([prefix, resized.astype(position.dtype)], axis=1)


def resize_kernel(kernel: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A patch projection (width, channels, height, width) for patches of another `size` (height, width), in float64.

    Of all kernels of the new size, this one answers to resized patches most nearly as the old one answers to the
    patches themselves: the pseudo-inverse of the resize (FlexiViT, Beyer et al. 2022, section 3.4).
    """
    down, across = (np.linalg.pinv(resize_matrix(old, new).T) for old, new in zip(kernel.shape[2:], size, strict=True))
    return np.einsum("hH,wW,dcHW->dchw", down, across, kernel.astype(np.float64))
