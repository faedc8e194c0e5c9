"""What a run trains: all of a model, its head, its last blocks, or adapters; each from every kind of start."""

import json
import math
import os
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from support.checks import assert_close, raises_saying
from support.models import CLASS_OF, build, images, small, trained_folder
from support.runs import assert_same_end, photos, small_recipe, stopped_at

from deit import Predictor, load_model, weights
from deit.config import VARIANTS, ConvNetConfig, TimmConfig
from deit.data.batches import TrainingBatches
from deit.data.folders import read_data
from deit.model import timm_classifier
from deit.model.timm_classifier import TimmClassifier
from deit.recipe import (
    SGD,
    AdamW,
    Compute,
    Cosine,
    Distilled,
    HeadOnly,
    LastBlocks,
    LoRA,
    MaskedImage,
    Muon,
    Recipe,
    Supervised,
    override,
    steps,
)
from deit.train import checkpoint, objectives, optim
from deit.train.build import build_model, find_sources
from deit.train.loop import train
from deit.train.tuning import tune

timm = pytest.importorskip("timm")
QUIET = Console(quiet=True)
CLASSES = ("a", "b", "c")
PLAIN = small(distillation_token=False, num_labels=None, drop_path_rate=0.3)
CONVNET = TimmConfig(architecture="test_resnet", image_size=32)
TUNINGS = [None, HeadOnly(), LastBlocks(count=1), LoRA(rank=2, targets="all")]


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return read_data(photos(photos(root), split="val", count=3), holdout=0.1, seed=0)


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    """The model of a recipe and the weights that it starts from, by kind; weights of timm's are a file."""
    root = tmp_path_factory.mktemp("starts")
    folder = trained_folder(root / "folder", kind="plain", labels="xyz")
    torch.save(weights.from_ours(build("classification", PLAIN, seed=4)._tensors(), "timm"), root / "vit.pth")
    torch.manual_seed(1)
    resnet = timm.create_model("test_resnet", num_classes=7, zero_init_last=False)  # so that every branch counts
    torch.save(resnet.state_dict(), root / "resnet.pth")
    return {
        "folder": (PLAIN, str(folder)),
        "file": (PLAIN, str(root / "vit.pth")),
        "installed": (CONVNET, "installed"),
        "timm": (CONVNET, str(root / "resnet.pth")),
        "scratch": (PLAIN, ""),
    }


@pytest.fixture(autouse=True)
def package(starts, monkeypatch):
    """An installed package with weights of test_resnet."""
    monkeypatch.setattr(timm_classifier, "installed_weights", lambda name: Path(starts["timm"][1]))


def recipe_of(model, start, tuning, **parts):
    given = {"model": model, "start": start, "tuning": tuning, "schedule": Cosine(total=steps(3)), "ema": 0.5}
    return small_recipe(**{**given, **parts})


def run(recipe, splits, out, **options):
    return train(recipe, *splits, out, device="cpu", console=QUIET, **options)


def saved_tensors(out):
    return load_file(checkpoint.saved(out / "checkpoints")[-1])


def own(model):
    """The tensors of a model by the names in its folder's file."""
    return dict(getattr(model, "model", model).state_dict())


@pytest.mark.parametrize("tuning", TUNINGS, ids=str)
@pytest.mark.parametrize("start", ["folder", "file", "installed", "timm", "scratch"])
def test_from_every_start_to_an_answer(start, tuning, starts, splits, tmp_path):
    model, place = starts[start]
    if isinstance(tuning, LoRA):
        pytest.importorskip("peft")
    if start == "file":  # shapes don't tell the number of attention heads at this width, so the config is beside it
        model.replace(num_labels=5).save_pretrained(tmp_path / "file")
        os.link(place, tmp_path / "file" / "weights.pth")
        place = str(tmp_path / "file")
    if start == "scratch" and tuning is not None:
        with raises_saying(ValueError, "keeps weights as they are, and without a start they are random", "set start"):
            recipe_of(model, place, tuning)
        return
    recipe = recipe_of(model, place, tuning)
    before, out = own(build_model(recipe, CLASSES)), tmp_path / "run"
    found = run(recipe, splits, out)
    [answer] = Predictor(found.model)([splits[1].files[0]])
    assert sorted(label["label"] for label in answer) == list(CLASSES)
    after = own(load_model(found.model))
    assert after.keys() == before.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == expected_changes(tuning, before)
    assert (out / "adapter").exists() == isinstance(tuning, LoRA)
    # Neither gradients nor state of the optimizer nor an average of what is frozen.
    names = saved_tensors(out).keys()
    for part in ("optim", "ema"):
        kept = {name.split(".", 1)[1] for name in names if name.startswith(f"{part}.")} - {"updates"}
        kept = {name.removesuffix(".exp_avg") for name in kept if part == "ema" or name.endswith(".exp_avg")}
        if not isinstance(tuning, LoRA):
            floats = {name for name in changed if "running_" not in name and "num_batches" not in name}
            assert {name.removeprefix("model.") for name in kept} == floats
        else:
            assert all("lora_" in name or "modules_to_save" in name for name in kept)


def expected_changes(tuning, tensors):
    """The names of the tensors that a training moves, running statistics included."""
    convnet = "fc.weight" in tensors
    moved = {
        None: "",
        HeadOnly(): "fc" if convnet else "classifier",
        LastBlocks(count=1): ("layer4", "fc") if convnet else ("deit.blocks.2", "deit.norm", "classifier"),
    }
    if isinstance(tuning, LoRA) and convnet:
        matrices = {name for name, value in tensors.items() if value.ndim == 4}
        return matrices | {"fc.weight", "fc.bias"}
    if isinstance(tuning, LoRA):
        ends = tuple(f"{layer}.weight" for layer in ("qkv", "out", "fc1", "fc2"))
        return {name for name in tensors if name.endswith(ends) or name.startswith("classifier")}
    return {name for name in tensors if name.startswith(moved[tuning])}


# ------------------------------------------------------------------------------------------------------- what is frozen


def test_frozen_parts_compute_as_in_evaluation(starts):
    """No stochastic depth in frozen blocks, however large its rate; the trained block has it."""
    model, place = starts["folder"]
    recipe = recipe_of(model.replace(drop_path_rate=0.9, drop_path_schedule="constant"), place, LastBlocks(count=1))
    net = build_model(recipe, CLASSES)
    x, states = images(model, 4), {}
    draws = torch.rand(4, 3, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = net.eval()(x, output_hidden_states=True).hidden_states
    tuned = tune(net.train(), recipe.tuning)
    for part in tuned.frozen:
        part.eval()
    states = net(x, depth_draws=draws, output_hidden_states=True).hidden_states
    assert_close(states[:3], expected[:3])
    assert not states[2].requires_grad
    assert (states[3] - expected[3]).abs().max() > 0.1


@pytest.mark.parametrize("tuning", TUNINGS[1:], ids=str)
def test_statistics_of_frozen_batch_norm_stay(tuning, starts, splits, tmp_path):
    """And a batch may then be computed in parts, if none is trained."""
    model, place = starts["timm"]
    before = own(build_model(recipe_of(model, place, tuning), CLASSES))
    run(recipe_of(model, place, tuning, ema=0.0), splits, tmp_path / "whole")
    after = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    for name in after:
        if "running_" in name or "num_batches" in name:
            trained = isinstance(tuning, LastBlocks) and "layer4" in name
            assert torch.equal(after[name], before[name]) != trained, name
    parts = recipe_of(model, place, tuning, ema=0.0, compute=Compute(precision="float32", workers=0, accumulate=2))
    if isinstance(tuning, LastBlocks):
        with raises_saying(ValueError, "compute.accumulate is 2", "would train another model"):
            run(parts, splits, tmp_path / "parts")
    else:
        run(parts, splits, tmp_path / "parts")
        assert_close(load_file(tmp_path / "parts" / "model" / "model.safetensors"), after)


@pytest.mark.parametrize("tuning", [None, LastBlocks(count=1)], ids=str)
def test_statistics_of_the_start_stay_where_layers_are_trained(tuning, starts, splits, tmp_path):
    """Scales and shifts are trained, and a batch may be computed in parts. A plain loop in evaluation mode gives the
    same weights."""
    model, place = starts["timm"]
    parts = {"ema": 0.0, "statistics": "start", "optim": SGD(lr=1e-2, per_images=8, momentum=0.0, weight_decay=0.0)}
    recipe = recipe_of(model, place, tuning, schedule=Cosine(total=steps(3)), **parts)
    start = build_model(recipe, CLASSES)
    run(recipe, splits, tmp_path / "whole")
    after = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    for name, value in own(start).items():
        if "running_" in name or "num_batches" in name:
            assert torch.equal(after[name], value), name
    assert not torch.equal(after["layer4.0.bn1.weight"], own(start)["layer4.0.bn1.weight"])

    divided = replace(recipe, compute=replace(recipe.compute, accumulate=2))
    run(divided, splits, tmp_path / "parts")
    assert_close(load_file(tmp_path / "parts" / "model" / "model.safetensors"), after)

    tune(start.eval(), tuning)
    batches = TrainingBatches(splits[0], recipe)
    for step, batch in enumerate(islice(batches.from_step(0), 3)):
        mixed = batches.mix(batch.finished())
        torch.nn.functional.cross_entropy(start(mixed.pixels).logits, mixed.labels).backward()
        rate = 1e-5 + (1e-2 - 1e-5) * (1 + math.cos(math.pi * step / 3)) / 2
        for parameter in start.parameters():
            if parameter.grad is not None:
                with torch.no_grad():
                    parameter -= rate * parameter.grad
                parameter.grad = None
    assert_close(own(start), after)


def test_statistics_of_a_start_need_one(starts):
    with raises_saying(ValueError, "statistics=start keeps those of the start", "set start, or statistics=batch"):
        replace(recipe_of(*starts["timm"], None), start="", statistics="start")


@pytest.mark.parametrize("architecture", ["test_resnet", "test_efficientnet", "test_vit", "tf_efficientnet_lite0"])
@pytest.mark.parametrize("count", [1, 2])
def test_the_last_groups_are_timms(architecture, count):
    model = TimmClassifier(TimmConfig(architecture=architecture))
    groups = timm.models.group_parameters(model.model, model.model.group_matcher(coarse=True))
    last = {f"model.{name}" for number in sorted(groups)[-1 - count :] for name in groups[number]}
    tune(model, LastBlocks(count=count))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == last
    with raises_saying(ValueError, "tuning.count=40, and the model has", "groups of layers between its stem and its"):
        tune(model, LastBlocks(count=40))


def test_layer_decay_of_adapters(starts):
    """An adapter has the rate of its block."""
    pytest.importorskip("peft")
    model, place = starts["folder"]
    net = build_model(recipe_of(model, place, LoRA(rank=2)), CLASSES)
    tune(net, LoRA(rank=2))
    groups = optim.parameter_groups(net, AdamW(lr=1e-3, per_images=8, layer_decay=0.5))
    names = {parameter: name for name, parameter in net.named_parameters()}
    scales = {names[parameter]: group["lr_scale"] for group in groups for parameter in group["params"]}
    assert len(scales) == 3 * 2 * 2 + 2
    for name, scale in scales.items():
        assert scale == (0.5 ** (3 - int(name.split(".")[2])) if "lora_" in name else 1.0), name


# ------------------------------------------------------------------------------------------------------------- adapters


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


@pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning")  # peft, of a model in memory
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("start", ["folder", "timm"])
def test_the_adapter_on_its_base_answers_like_the_merged_model(start, dropout, starts, splits, tmp_path, peft):
    model, place = starts[start]
    tuning = LoRA(rank=3, alpha=12, dropout=dropout, targets="attention" if start == "folder" else "all")
    recipe = recipe_of(model, place, tuning, optim=AdamW(lr=3e-2, per_images=8))
    run(recipe, splits, tmp_path)
    base = build_model(recipe, CLASSES).eval()
    x = torch.randn(2, 3, *model.image_hw, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = base(x).logits
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(x).logits
        merged = load_model(tmp_path / "model")(x).logits
    assert_close(merged, adapted)
    assert (merged - plain).abs().max() > 0.05
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    said = (config["base_model_name_or_path"], config["r"], config["lora_alpha"], config["lora_dropout"])
    assert said == (place, 3, 12, dropout)
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_gradients_of_adapters(targets, starts, peft):
    """W + s B A has the gradient G, computed by hand in a plain model: then A has s B^T G, and B has s G A^T."""
    model, place = starts["folder"]
    recipe = recipe_of(model.replace(drop_path_rate=0.0), place, LoRA(rank=2, alpha=6, targets=targets))
    net = build_model(recipe, CLASSES).train()
    tuned = tune(net, recipe.tuning)
    layers = {name: part for name, part in net.named_modules() if hasattr(part, "lora_A")}
    generator, plain = torch.Generator().manual_seed(2), build_model(recipe, CLASSES).train()
    with torch.no_grad():
        for name, layer in layers.items():
            for part in (layer.lora_A["default"], layer.lora_B["default"]):
                part.weight.copy_(0.2 * torch.randn(part.weight.shape, generator=generator))
            product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            plain.get_submodule(name).weight.add_(3 * product)
    x = images(model, 4)
    for each in (net, plain):
        for part in tuned.frozen if each is net else ():
            part.eval()
        each(x).logits.square().sum().backward()
    assert len(layers) == 3 * (2 if targets == "attention" else 4)
    for name, layer in layers.items():
        whole = plain.get_submodule(name).weight.grad
        first, second = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert_close(first.grad, 3 * second.T @ whole, 1e-4)
        assert_close(second.grad, 3 * whole @ first.T, 1e-4)
        assert layer.base_layer.weight.grad is None
    assert_close(net.classifier.modules_to_save["default"].weight.grad, plain.classifier.weight.grad, 1e-4)


@pytest.mark.parametrize("start", ["folder", "timm"])
@pytest.mark.parametrize("tuning", [LastBlocks(count=1), LoRA(rank=2, dropout=0.3, targets="all")], ids=str)
def test_resumes_to_the_bit(tuning, start, starts, splits, tmp_path):
    recipe = recipe_of(*starts[start], tuning, schedule=Cosine(total=steps(6)), evaluate=steps(2))
    run(recipe, splits, tmp_path / "whole")
    with stopped_at(3, objectives.SupervisedObjective):
        run(recipe, splits, tmp_path / "broken")
    run(recipe, splits, tmp_path / "broken", resume=True)
    assert_same_end(tmp_path / "broken", tmp_path / "whole")
    if isinstance(tuning, LoRA):
        one, other = (
            load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("broken", "whole")
        )
        assert_close(one, other, 0)


def test_layers_that_are_never_called_get_no_adapter(peft):
    """timm's BEiT multiplies by the weights of its `qkv` itself, so an adapter there would be silent."""
    sizes = {"embed_dim": 24, "depth": 2, "num_heads": 3, "img_size": 32}
    model = TimmClassifier(TimmConfig(architecture="beit_base_patch16_224", image_size=32, model_args=sizes))
    with raises_saying(ValueError, "beit_base_patch16_224 computes with the weights of model.blocks.0.attn.qkv"):
        tune(model, LoRA())


def test_convnets_have_no_attention(peft):
    with raises_saying(
        ValueError, "test_resnet has no linear layers of attention for adapters; set tuning.targets=all"
    ):
        tune(TimmClassifier(CONVNET), LoRA())


def test_without_peft(starts, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with raises_saying(ImportError, 'tuning=LoRA needs peft: pip install "deit[lora]"'):
        find_sources(recipe_of(*starts["folder"], LoRA()))


# --------------------------------------------------------------------------------------------------------------- recipe


@pytest.mark.parametrize("tuning", TUNINGS, ids=str)
def test_recipes_survive_json_and_settings(tuning, starts):
    recipe = recipe_of(*starts["folder"], tuning)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    written = f"tuning={tuning}".replace("'", '"')
    assert override(replace(recipe, tuning=None), [written]) == recipe


def test_recipes_of_before_train_the_whole_model(starts):
    values = recipe_of(*starts["folder"], HeadOnly()).to_dict()
    del values["tuning"]
    assert Recipe.from_dict(values).tuning is None


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"model": ConvNetConfig(), "start": "", "tuning": LoRA()}, "the built-in ConvNet has no start"),
        ({"objective": MaskedImage(unit=4), "tuning": HeadOnly()}, "masked images train the whole model"),
        ({"tuning": LoRA(), "optim": Muon(lr=1e-3, others_lr=1e-3, per_images=8)}, "tuning=LoRA keeps them"),
        ({"objective": Supervised(cosub=True), "tuning": HeadOnly()}, "set objective.cosub=False"),
        ({"tuning": LastBlocks(count=4)}, "tuning.count=4, and the model has 3 blocks; set it to at most"),
    ],
)
def test_what_has_no_meaning_is_refused(parts, said, starts):
    with raises_saying(ValueError, "recipe small: ", said):
        recipe_of(**{"model": PLAIN, "start": starts["folder"][1], **parts})


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("tuning=head", "tuning: expected HeadOnly or LastBlocks or LoRA, found 'head'"),
        ("tuning=LastBlocks(count=0)", "for the head alone, choose HeadOnly()"),
        ("tuning=LoRA(rank=0)", "rank and alpha must be at least 1, found rank=0"),
        ("tuning=LoRA(dropout=1.0)", "dropout must be from 0.0 to 0.999"),
        ("tuning=LoRA(targets=mlp)", "expected attention or all, found 'mlp'"),
    ],
)
def test_mistakes_are_named(setting, said, starts):
    with raises_saying(ValueError, said):
        override(recipe_of(*starts["folder"], None), [setting])


# --------------------------------------------------------------------------------------------------------------- DINOv2


def dinov2(folder, layout):
    """A small DINOv2 of `transformers`, and its weights in one of both layouts."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=1, image_size=70, patch_size=14
    )
    torch.manual_seed(3)
    model = transformers.Dinov2Model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    if layout == "transformers":
        model.save_pretrained(folder)
        return model, str(folder)
    ours = weights.to_ours(model.state_dict(), join=torch.cat, file="memory")
    mask = ours.pop("deit.mask_token")
    named = {**weights.from_ours(ours, "timm"), "mask_token": mask[0]}
    torch.save(named, folder / "dinov2_vits14_pretrain.pth")
    return model, str(folder / "dinov2_vits14_pretrain.pth")


@pytest.mark.parametrize("layout", ["transformers", "original"])
@pytest.mark.parametrize("pixels", [70, 42])
def test_starts_from_dinov2(layout, pixels, tmp_path):
    """At its own size and at another one, where `transformers` resizes the positions in the same way."""
    theirs, start = dinov2(tmp_path, layout)
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 1}
    model = VARIANTS["dinov2-small"].replace(**sizes, image_size=pixels, num_labels=2)
    net = build_model(recipe_of(model, start, None), CLASSES).eval()
    x = images(model, 2)
    with torch.no_grad():
        found, expected = net.deit(x).last_hidden_state, theirs(x).last_hidden_state
    assert_close(found, expected)
    assert_close(found[:, 0], theirs(x).pooler_output)
    # A student has a fresh distillation token, which the start must not leave frozen.
    student = recipe_of(model.replace(distillation_token=True), start, None, objective=Distilled(teacher="t"))
    taught = build_model(student, CLASSES)
    assert isinstance(taught, CLASS_OF["with_teacher"])
    for name, value in net.deit.state_dict().items():
        if name != "position":
            assert torch.equal(taught.deit.state_dict()[name], value), name
    assert torch.equal(taught.deit.position[:, 2:], net.deit.position[:, 1:])
    assert torch.equal(taught.deit.position[:, 0], net.deit.position[:, 0])
    with raises_saying(ValueError, "has no distillation token, and tuning=LoRA would keep a random one", "tuning=None"):
        build_model(replace(student, tuning=LoRA()), CLASSES)


@pytest.mark.parametrize("size", ["small", "base"])
def test_the_published_sizes_of_dinov2(size):
    """Shapes as in the published files, which have positions for 37 x 37 patches and no classifier."""
    transformers = pytest.importorskip("transformers")
    config, wide = VARIANTS[f"dinov2-{size}"], 384 if size == "small" else 768
    assert (config.grid, config.patch_hw, config.image_hw) == ((16, 16), (14, 14), (224, 224))
    with torch.device("meta"):
        theirs = transformers.Dinov2Model(
            transformers.Dinov2Config(hidden_size=wide, num_attention_heads=wide // 64, image_size=518)
        )
    named = weights.to_ours(theirs.state_dict(), join=torch.cat, file="memory")
    expected = {name: tuple(value.shape) for name, value in named.items() if name != "deit.mask_token"}
    found = weights.manifest(config.replace(image_size=518), "classification")
    assert {name: shape for name, shape in found.items() if not name.startswith("classifier")} == expected


def test_registers_are_refused_as_a_start(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2WithRegistersConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=3)
    transformers.Dinov2WithRegistersModel(config).save_pretrained(tmp_path)
    with raises_saying(ValueError, "register tokens"):
        build_model(recipe_of(PLAIN, str(tmp_path), None), CLASSES)
