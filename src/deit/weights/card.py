"""The README.md of a hub repository: metadata that the hub indexes, what the model is, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deit.config import DeiTConfig


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a model card says that the files don't. What is None is not said."""

    license: str | None = None
    """As the hub spells it, e.g. `apache-2.0`."""
    base_model: str | None = None
    """The hub repository that training started from."""
    datasets: Sequence[str] = ()
    """The data that it was trained on: names of the hub's data sets, or any others."""
    metrics: Mapping[str, float] | None = None
    """Results by name, e.g. `{"accuracy": 0.93}`."""


NOTHING_KNOWN = Facts()


def model_card(config: DeiTConfig, name: str, facts: Facts = NOTHING_KNOWN) -> str:
    """The card's text. `config` is one that was read from a saved model: it names the architecture."""
    architecture = config.extra["architectures"][0]
    head = architecture.removeprefix("DeiT").removeprefix("ViT")
    classifies = head.startswith("ForImageClassification")
    labels: Sequence[str] = list((config.id2label or {}).values())
    shown = ", ".join(labels[:20]) + (f" and {len(labels) - 20} more" if len(labels) > 20 else "")
    classes = f"\nClasses: {shown}.\n" if classifies else ""
    kind = "with" if config.distillation_token else "without"
    return f"""---
{_metadata(config, "image-classification" if classifies else "image-feature-extraction", facts)}---
# {name.rsplit("/", maxsplit=1)[-1]}

A vision transformer {kind} a distillation token: width {config.hidden_size}, {config.num_hidden_layers} blocks,
{config.num_attention_heads} heads, patches of {config.patch_hw[0]}x{config.patch_hw[1]} pixels, images of
{config.image_hw[0]}x{config.image_hw[1]}.
{classes}{_said(facts)}
{_loading(config, architecture, head, name)}"""


def _metadata(config: DeiTConfig, task: str, facts: Facts) -> str:
    lines = ["library_name: deit", f"pipeline_tag: {task}"]
    lines += [f"license: {facts.license}"] if facts.license else []
    lines += [f"base_model: {facts.base_model}"] if facts.base_model else []
    for key, values in (("datasets", list(facts.datasets)), ("metrics", list(facts.metrics or {}))):
        lines += [f"{key}:", *(f"- {value}" for value in values)] if values else []
    return "\n".join([*lines, "tags:", f"- {config.model_type}"]) + "\n"


def _said(facts: Facts) -> str:
    lines = [f"Licence: {facts.license}."] if facts.license else []
    lines += [f"Training started from {facts.base_model}."] if facts.base_model else []
    lines += [f"Training data: {', '.join(facts.datasets)}."] if facts.datasets else []
    lines += [f"{name}: {value:.4g}." for name, value in (facts.metrics or {}).items()]
    return "\n" + "\n".join(lines) + "\n" if lines else ""


def _loading(config: DeiTConfig, architecture: str, head: str, name: str) -> str:
    """How to load it, in each library that can."""
    parts = [("deit", f'import deit\n\nmodel = deit.load_model("{name}")')]
    if config.model_type != "deit3":  # which transformers does not know
        parts.append(
            ("transformers", f'import transformers\n\nmodel = transformers.{architecture}.from_pretrained("{name}")')
        )
    plain = head == "ForImageClassification" and not config.distillation_token
    if (plain or head == "ForImageClassificationWithTeacher") and config.layer_norm_eps <= 1e-6:
        parts.append(
            (
                "timm",
                "import timm\nfrom deit.export.convert import convert\n\n"
                f'folder = convert("{name}", "timm", "converted")\n'
                'model = timm.create_model(f"local-dir:{folder}", pretrained=True)',
            )
        )
    keras = {"ViTForMaskedImageModeling": "DeiTForMaskedImageModeling"}.get(architecture, architecture)
    parts.append(("Keras", f'import deit\n\nmodel = deit.TF{keras}.from_pretrained("{name}")'))
    return "\n".join(f"With {library}:\n\n```python\n{code}\n```\n" for library, code in parts)
