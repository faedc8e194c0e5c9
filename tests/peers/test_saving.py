"""`save_pretrained`, `from_pretrained` and the methods of a model, called as code written for `transformers` does."""

import inspect
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from support.checks import assert_close, raises_saying
from support.hugging_face import CLASSES, hf_prefix, pair
from support.models import LABELS, build, images, saved, small

import deit
from deit import weights
from deit.export.convert import convert
from deit.files import CheckpointError
from deit.image.processor import BatchFeature, DeiTImageProcessor

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("quiet_transformers")

load = deit.DeiTForImageClassification.from_pretrained


def names(folder):
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def model():
    return build("classification", small(id2label=LABELS))


# -------------------------------------------------------------------------------------------------------------- saving


PLACES = {
    "DeiTForImageClassification": ("from_pretrained", "save_pretrained"),
    "DeiTConfig": ("from_pretrained", "save_pretrained", "from_dict", "from_json_file", "to_json_file"),
    "DeiTImageProcessor": ("from_pretrained", "save_pretrained", "from_dict", "from_json_file"),
}


@pytest.mark.parametrize(("name", "method"), [(name, method) for name, methods in PLACES.items() for method in methods])
def test_the_first_argument_has_the_same_keyword(name, method):
    first = [
        next(key for key in inspect.signature(getattr(getattr(library, name), method)).parameters if key != "self")
        for library in (deit, transformers)
    ]
    assert first[0] == first[1]


def test_keywords_of_the_places(model, tmp_path):
    """As people type them."""
    processor = DeiTImageProcessor.paper(16)
    for each in (model, processor, model.config):
        each.save_pretrained(save_directory=tmp_path)
    again = deit.DeiTForImageClassification.from_pretrained(pretrained_model_name_or_path=tmp_path)
    assert_close(again.state_dict(), model.state_dict(), 0)
    assert DeiTImageProcessor.from_pretrained(pretrained_model_name_or_path=tmp_path) == processor
    assert deit.DeiTConfig.from_pretrained(pretrained_model_name_or_path=tmp_path).id2label == LABELS
    with pytest.raises(TypeError, match="unexpected keyword argument 'folder'"):
        model.save_pretrained(folder=tmp_path)


@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_variant(size, tmp_path):
    """The files have the names that `transformers` gives them, and each library reads the other's."""
    ours, theirs = pair("DeiTForImageClassification", small())
    for folder, each in (("ours", ours), ("theirs", theirs)):
        each.save_pretrained(tmp_path / folder, variant="fp16", max_shard_size=size)
    assert ("model.fp16.safetensors" in names(tmp_path / "ours")) == (size == "5GB")
    if size == "5GB":
        assert names(tmp_path / "ours") == names(tmp_path / "theirs")
    else:
        assert "model.safetensors.index.fp16.json" in names(tmp_path / "ours") & names(tmp_path / "theirs")
        assert any(name.startswith("model.fp16-00001-of-000") for name in names(tmp_path / "ours"))
    for folder in ("ours", "theirs"):
        assert_close(load(tmp_path / folder, variant="fp16").state_dict(), ours.state_dict(), 0)
        assert_close(deit.load_model(tmp_path / folder, variant="fp16").state_dict(), ours.state_dict(), 0)
        again = transformers.DeiTForImageClassification.from_pretrained(tmp_path / folder, variant="fp16")
        assert_close(again.state_dict(), theirs.state_dict(), 0)
    with raises_saying(FileNotFoundError, "holds no weights; expected one of model.safetensors, "):
        load(tmp_path / "ours")
    with raises_saying(
        FileNotFoundError, "holds no weights of variant 'bf16'; expected one of model.bf16.safetensors, "
    ):
        load(tmp_path / "ours", variant="bf16")


def test_variants_lie_side_by_side(model, tmp_path):
    """Saving one leaves the other alone, and replaces its own former shards."""
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, variant="fp16", max_shard_size="20KB")
    model.save_pretrained(tmp_path, variant="fp16")
    assert names(tmp_path) == {"config.json", "model.safetensors", "model.fp16.safetensors"}
    with raises_saying(ValueError, "variant='../up' is part of a file's name; use letters"):
        model.save_pretrained(tmp_path, variant="../up")


@pytest.mark.parametrize("dialect", ["ours", "hf", "hf5", "timm"])
def test_state_dict(dialect, model, tmp_path):
    other = build("classification", model.config.replace(), seed=3)
    state = other.state_dict() if dialect == "ours" else weights.from_ours(other._tensors(), dialect)
    model.save_pretrained(tmp_path, state_dict=state)
    assert_close(load(tmp_path).state_dict(), other.state_dict(), 0)


@pytest.mark.parametrize("kind", ["backbone", "masked_image", "with_teacher"])
def test_state_dict_of_every_class(kind, tmp_path):
    model, other = build(kind, small()), build(kind, small(), seed=3)
    model.save_pretrained(tmp_path, state_dict=other.state_dict())
    assert_close(type(model).from_pretrained(tmp_path).state_dict(), other.state_dict(), 0)


def test_refused_state_dicts(model, tmp_path):
    state = model.state_dict()
    whole = "the state_dict must hold the tensors of this DeiTForImageClassification, and it "
    with raises_saying(ValueError, f"{whole}lacks classifier.bias; pass the whole"):
        model.save_pretrained(tmp_path, state_dict={k: v for k, v in state.items() if k != "classifier.bias"})
    with raises_saying(ValueError, f"{whole}also has deit.pooler.bias"):
        model.save_pretrained(tmp_path, state_dict={**state, "deit.pooler.bias": torch.ones(24)})
    with raises_saying(ValueError, "the state_dict has classifier.bias of shape (2,), expected (5,)"):
        model.save_pretrained(tmp_path, state_dict={**state, "classifier.bias": torch.ones(2)})
    assert names(tmp_path) == set()


@pytest.mark.parametrize("part", ["block", "backbone"])
def test_compiled_parts_save_as_themselves(part, model, tmp_path):
    """`torch.compile` wraps a module, and the names of its tensors say so."""
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if part == "block":
        model.deit.blocks[1] = torch.compile(model.deit.blocks[1])
    else:
        model.deit = torch.compile(model.deit)
    assert model.state_dict().keys() != expected.keys()
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b", state_dict=model.state_dict())
    for folder in ("a", "b"):
        assert_close(load(tmp_path / folder).state_dict(), expected, 0)


def test_tensors_that_no_file_has_a_place_for(model, tmp_path):
    torch.nn.utils.parametrizations.weight_norm(model.deit.blocks[0].mlp.fc1)
    with raises_saying(
        ValueError,
        "the model has the tensor deit.blocks.0.mlp.fc1.parametrizations.weight.original0, and no file of this family "
        "has a place for it; merge adapters, remove parametrizations",
    ):
        model.save_pretrained(tmp_path)
    assert names(tmp_path) == set()


def test_other_processes_save_nothing(model, tmp_path):
    model.save_pretrained(tmp_path / "m", is_main_process=False)
    assert not (tmp_path / "m").exists()


def test_options_of_save_pretrained(model, tmp_path):
    """Each is in the signature; whatever is not is refused by its name."""
    model.save_pretrained(tmp_path, save_function=torch.save, safe_serialization=True)
    assert names(tmp_path) == {"config.json", "model.safetensors"}
    with raises_saying(TypeError, "max_shard_sise"):
        model.save_pretrained(tmp_path, max_shard_sise="1GB")
    with raises_saying(ValueError, "safe_serialization=False asks for a pickle, which runs code when it is loaded"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    theirs = set(inspect.signature(transformers.DeiTModel.save_pretrained).parameters)
    missing = theirs - set(inspect.signature(model.save_pretrained).parameters)
    # The last three are of PEFT, of names on disk, and of sharded training.
    assert missing == {"self", "kwargs", "save_peft_format", "save_original_format", "distributed_checkpoint"}


@pytest.mark.parametrize("saved", ["model", "config", "processor"])
@pytest.mark.parametrize("option", ["repo_id", "token", "private", "revision", "commit_message"])
def test_options_of_pushing_without_pushing(saved, option, model, tmp_path):
    one = {"model": model, "config": model.config, "processor": DeiTImageProcessor()}[saved]
    with raises_saying(ValueError, f"{option} is for the hub, and nothing is pushed; pass push_to_hub=True"):
        one.save_pretrained(tmp_path / "m", **{option: "x"})
    assert not (tmp_path / "m").exists()


# ------------------------------------------------------------------------------------------------------------- loading


def test_use_safetensors(model, tmp_path):
    other = build("classification", small(id2label=LABELS), seed=3)
    model.save_pretrained(tmp_path)
    torch.save(weights.from_ours(other._tensors(), "hf"), tmp_path / "pytorch_model.bin")
    for option, expected in ((None, model), (True, model), (False, other)):
        assert_close(load(tmp_path, use_safetensors=option).state_dict(), expected.state_dict(), 0)
    (tmp_path / "model.safetensors").unlink()
    with raises_saying(FileNotFoundError, "holds no weights with use_safetensors=True; expected one of model.safe"):
        load(tmp_path, use_safetensors=True)
    with raises_saying(ValueError, "use_safetensors=True contradicts the file"):
        load(tmp_path / "pytorch_model.bin", use_safetensors=True)


@pytest.mark.parametrize("name", ["DeiTModel", "ViTModel"])
@pytest.mark.parametrize("held", [False, True])
def test_optional_parts(name, held, tmp_path):
    """A backbone gets the parts that are asked for: from the file if it has them, or else new ones."""
    config = small(distillation_token=name == "DeiTModel")
    options = {"add_pooling_layer": held, "use_mask_token": held}
    ours, theirs = pair(name, config, **options)
    ours.save_pretrained(tmp_path)
    cls, other = getattr(deit, name), getattr(transformers, name)
    x = images(config)
    plain = cls.from_pretrained(tmp_path, add_pooling_layer=False, use_mask_token=False)
    expected = other.from_pretrained(tmp_path, add_pooling_layer=False, use_mask_token=False)
    assert (plain.pooler, plain.mask_token) == (None, None)
    with torch.no_grad():
        assert_close(dict(plain(x)), dict(expected(x)))
    if held:
        whole = cls.from_pretrained(tmp_path, **options)
        assert_close(whole.state_dict(), ours.state_dict(), 0)
        assert_close(whole(x).pooler_output, theirs(x).pooler_output)
    else:
        with pytest.warns(UserWarning, match=r"does not give deit.mask_token, deit.pooler.weight, deit.pooler.bias"):
            whole = cls.from_pretrained(tmp_path, add_pooling_layer=True, use_mask_token=True)
        assert whole(x).pooler_output.shape == (2, 24)
        assert whole.mask_token.shape == (1, 1, 24)


def test_dtype(model, tmp_path):
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert load(tmp_path).dtype == torch.float32
    for options in ({"torch_dtype": "auto"}, {"torch_dtype": torch.bfloat16}, {"dtype": "bfloat16"}):
        assert load(tmp_path, **options).dtype == torch.bfloat16
    assert load(tmp_path, dtype=torch.float16, torch_dtype=torch.float16).dtype == torch.float16
    with raises_saying(ValueError, "dtype=float16 contradicts torch_dtype=bfloat16, its former name; give dtype"):
        load(tmp_path, dtype="float16", torch_dtype="bfloat16")


@pytest.mark.parametrize("place", ["cpu", torch.device("cpu"), {"": "cpu"}, {"deit": "cpu", "classifier": "cpu"}])
def test_device(place, model, tmp_path):
    model.save_pretrained(tmp_path)
    assert load(tmp_path, device_map=place).device == torch.device("cpu")
    assert deit.load_model(tmp_path, device_map=place).device == torch.device("cpu")


def test_device_that_is_chosen(model, tmp_path):
    model.save_pretrained(tmp_path)
    expected = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    assert load(tmp_path, device_map="auto").device.type == expected
    assert load(tmp_path, device_map="meta").device.type == "meta"


@pytest.mark.parametrize("place", ["balanced", {"deit": "cpu", "classifier": "cuda:0"}, {}])
def test_several_devices(place, model, tmp_path):
    model.save_pretrained(tmp_path)
    with raises_saying(ValueError, f"device_map={place!r} is not one device, and these models are not split"):
        load(tmp_path, device_map=place)


@pytest.mark.parametrize("name", CLASSES)
def test_config_and_state_dict(name):
    """`from_pretrained(None, config=..., state_dict=...)`, with the names in memory of either library."""
    config = small(distillation_token=name.startswith("DeiT"))
    ours, theirs = pair(name, config)
    cls = getattr(deit, name, deit.DeiTForMaskedImageModeling)
    for state in (
        ours.state_dict(),
        theirs.state_dict(),
        weights.from_ours(ours._tensors(), "hf", prefix=hf_prefix(name)),
    ):
        again, info = cls.from_pretrained(None, config=config, state_dict=state, output_loading_info=True)
        assert not any(info.values())
        assert_close(again.state_dict(), ours.state_dict(), 0)
    given = {"pixel_values": images(config)}
    with torch.no_grad():
        assert_close(again(**given).to_tuple(), theirs(**given).to_tuple())


def test_a_state_dict_stays_what_it_is():
    """Training a model changes none of the tensors that it was loaded from."""
    other = build("classification", small())
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    for state in (other.state_dict(), other.state_dict(keep_vars=True), weights.from_ours(other._tensors(), "timm")):
        model = load(None, config=other.config, state_dict=state)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        model(images(model.config), labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
        assert not torch.equal(model.deit.norm.bias, before["deit.norm.bias"])
        assert_close(other.state_dict(), before, 0)


def test_a_state_dict_decides_where_the_model_lies():
    """Its new parts lie there too."""
    backbone = build("backbone", small())
    state = {name: tensor.to("meta") for name, tensor in backbone.state_dict().items()}
    with pytest.warns(UserWarning, match=r"does not give classifier.weight, classifier.bias: initialised anew"):
        model = load(None, config=backbone.config, state_dict=state)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_state_dict_beside_a_folder(model, tmp_path):
    model.save_pretrained(tmp_path)
    other = build("classification", model.config, seed=3)
    again = load(tmp_path, state_dict=other.state_dict())
    assert_close(again.state_dict(), other.state_dict(), 0)
    assert again.config.id2label == LABELS
    assert_close(load(None, config=tmp_path, state_dict=other.state_dict()).state_dict(), other.state_dict(), 0)
    with raises_saying(ValueError, "there is nothing to load; give a name or a folder, or config= and state_dict="):
        load(None)
    with raises_saying(CheckpointError, "the state_dict lacks deit.norm.bias"):
        load(
            None, config=model.config, state_dict={k: v for k, v in other.state_dict().items() if k != "deit.norm.bias"}
        )


def test_options_that_change_nothing(model, tmp_path):
    model.save_pretrained(tmp_path)
    for options in (
        {"low_cpu_mem_usage": True},
        {"low_cpu_mem_usage": False},
        {"trust_remote_code": True},
        {"force_download": True},
    ):
        assert_close(load(tmp_path, **options).state_dict(), model.state_dict(), 0)
        assert_close(deit.load_model(tmp_path, **options).state_dict(), model.state_dict(), 0)


def test_download_is_forced(model, tmp_path, monkeypatch):
    """The hub's client is told so for every file."""
    import huggingface_hub

    model.save_pretrained(tmp_path)
    asked = []

    def fetch(_, filename, *, force_download, **__):
        asked.append((filename, force_download))
        return str(tmp_path / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    for local in ({}, {"local_files_only": True}):
        with raises_saying(
            FileNotFoundError, "model.safetensors of org/tiny could not be fetched again", "leave force"
        ):
            load("org/tiny", force_download=True, **local)
    assert asked == []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("deit.files.reachable", lambda _: True)
    for force in (True, False):
        load("org/tiny", force_download=force)
    assert asked == [(name, force) for force in (True, False) for name in ("config.json", "model.safetensors")]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"quantization_config": {}}, "quantization_config={} is not done by this package: models are not quantised"),
        ({"load_in_8bit": True}, "models are not quantised when they are loaded; `deit export` writes int8 models"),
        ({"max_memory": {0: "1GB"}}, "a model lies on one device; name it with device_map"),
        ({"from_flax": True}, "Flax's files are not read"),
        ({"gguf_file": "x.gguf"}, "GGUF files are not read"),
        ({"add_pooling_layer": True}, "add_pooling_layer is an option of DeiTModel and ViTModel, found DeiTForImage"),
        ({"use_mask_token": False}, "use_mask_token is an option of DeiTModel and ViTModel"),
        ({"hiden_size": 3}, "DeiTConfig has no field 'hiden_size'"),
    ],
)
def test_refused_options(options, reason, model, tmp_path):
    model.save_pretrained(tmp_path)
    for call in (load, deit.load_model):
        with raises_saying(ValueError, reason):
            call(tmp_path, **options)


# ------------------------------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize("name", CLASSES)
def test_what_a_model_says_of_itself(name):
    ours, theirs = pair(name, small(distillation_token=name.startswith("DeiT")))
    for model in (ours, theirs):
        model.get_input_embeddings().requires_grad_(False)
    for options in ({}, {"only_trainable": True}, {"exclude_embeddings": True}):
        assert ours.num_parameters(**options) == theirs.num_parameters(**options)
    assert ours.num_parameters(only_trainable=True) < ours.num_parameters()
    assert ours.get_memory_footprint() == theirs.get_memory_footprint() == 4 * ours.num_parameters()
    assert ours.half().get_memory_footprint(return_buffers=False) == 2 * ours.num_parameters()
    assert ours.main_input_name == theirs.main_input_name == "pixel_values"
    assert ours.base_model is ours.backbone
    assert (ours.base_model is ours) == (theirs.base_model is theirs)
    found, expected = (sum(p.numel() for p in m.get_input_embeddings().parameters()) for m in (ours, theirs))
    assert found == expected


@pytest.mark.parametrize("dialect", ["hf", "hf5", "timm", "original", "ours"])
def test_load_state_dict(dialect, model):
    other = build("classification", model.config, seed=3)
    state = other.state_dict() if dialect == "ours" else weights.from_ours(other._tensors(), dialect)
    found = model.load_state_dict(state)
    assert (found.missing_keys, found.unexpected_keys) == ([], [])
    assert_close(model.state_dict(), other.state_dict(), 0)


def test_load_parts_of_a_state_dict(model):
    """What is no whole model goes to PyTorch as it is."""
    found = model.load_state_dict({"classifier.bias": torch.ones(5)}, strict=False)
    assert "deit.norm.bias" in found.missing_keys
    assert_close(model.classifier.bias, torch.ones(5), 0)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({"classifier.bias": torch.ones(5)})
    with raises_saying(ValueError, "no rule for tensor 'blocks.0.attn.rel_pos'"):
        model.load_state_dict({**weights.from_ours(model._tensors(), "timm"), "blocks.0.attn.rel_pos": torch.ones(1)})


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("enabled", [False, True])
def test_gradients_behind_a_frozen_projection(reentrant, enabled):
    """With reentrant checkpointing, a model with frozen first layers has gradients only if its inputs require them."""
    grads = []
    for model in pair("ViTForImageClassification", small(distillation_token=False), attn="sdpa"):
        model.train().requires_grad_(False)
        block = model.deit.blocks[0] if hasattr(model, "deit") else model.vit.layers[0]
        block.mlp.fc2.weight.requires_grad_(True)
        model.classifier.requires_grad_(True)
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        if enabled:
            model.enable_input_require_grads()
        model(images(small()), labels=torch.tensor([0, 1])).loss.backward()
        grads.append(block.mlp.fc2.weight.grad)
        model.disable_input_require_grads()
    assert all((grad is None) == (reentrant and not enabled) for grad in grads)
    if grads[0] is not None:
        assert_close(*grads)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize(("every", "recomputed"), [(1, [2, 2, 2]), (2, [2, 1, 2]), (5, [2, 1, 1])])
def test_checkpointing(every, recomputed, offload):
    """Which blocks run twice, and gradients that are those without it."""
    model, x, labels = build("classification", small()).train(), images(small()), torch.tensor([0, 1])
    model(x, labels=labels).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    runs = [0, 0, 0]

    def count(number):
        return lambda *_: runs.__setitem__(number, runs[number] + 1)

    for i, block in enumerate(model.deit.blocks):
        block.register_forward_pre_hook(count(i))
    model.gradient_checkpointing_enable({"use_reentrant": False}, every_n_layers=every, offload=offload)
    assert model.is_gradient_checkpointing
    assert model.is_activation_checkpointing
    model(x, labels=labels).loss.backward()
    assert runs == recomputed
    assert_close({name: p.grad for name, p in model.named_parameters()}, expected)
    model.activation_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def test_refused_checkpointing(model):
    with raises_saying(ValueError, "torch.utils.checkpoint.checkpoint has no option reentrant; it has use_reentrant"):
        model.gradient_checkpointing_enable({"reentrant": False})
    with raises_saying(ValueError, "every_n_layers must be a whole number of at least 1, found 0"):
        model.gradient_checkpointing_enable(every_n_layers=0)
    assert not model.is_gradient_checkpointing


@pytest.mark.parametrize("target", [(torch.bfloat16,), ("cpu", torch.float16), ("cpu",), ("meta",)])
def test_batch_feature_casts_floats_alone(target):
    """As in `transformers`: labels stay whole numbers."""
    content = {"pixel_values": torch.rand(2, 3), "labels": torch.tensor([1, 2]), "mask": torch.tensor([True, False])}
    found, expected = BatchFeature(**content), transformers.BatchFeature(dict(content))
    assert found.to(*target) is found
    expected.to(*target)
    for name, value in expected.items():
        assert (found[name].dtype, found[name].device) == (value.dtype, value.device)
    assert found.labels.dtype == torch.int64
    with raises_saying(ValueError, "labels is an object of type list, .to() needs torch tensors"):
        BatchFeature(labels=[1]).to("cpu")


# ------------------------------------------------------------------------------------------------------------- the hub


@pytest.fixture
def uploads(monkeypatch):
    """Stands in for the hub's client: the names and the contents of each upload."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    done = []

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **options):
            return huggingface_hub.RepoUrl(
                f"https://hub/{repo_id if '/' in repo_id else f'me/{repo_id}'}", "https://hub"
            )

        def create_branch(self, repo_id, **options):
            pass

        def upload_folder(self, *, folder_path, **options):
            files = {path.name: path.read_text(errors="replace") for path in folder_path.iterdir()}
            done.append((options, files))
            return "https://hub/commit/1"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return done


def test_push_with_preprocessing(model, uploads, tmp_path):
    """That of the folder that the model came from, or the one that is given."""
    model.save_pretrained(tmp_path / "m")
    processor = DeiTImageProcessor(size=20, crop_size=16)
    processor.save_pretrained(tmp_path / "m")
    loaded = load(tmp_path / "m")
    loaded.push_to_hub("org/ants")
    loaded.save_pretrained(tmp_path / "n", push_to_hub=True)
    other = DeiTImageProcessor.paper(16)
    model.push_to_hub("org/ants", processor=other)
    model.push_to_hub("org/ants")
    assert [options["repo_id"] for options, _ in uploads] == ["org/ants", "me/n", "org/ants", "org/ants"]
    found = [files.get("preprocessor_config.json") for _, files in uploads]
    assert found == [processor.to_json_string(), processor.to_json_string(), other.to_json_string(), None]


def test_no_token_stays_in_a_model(model, uploads, tmp_path, monkeypatch):
    """Whoever gets the pickled model would read it. What a push reads of the model's place, it reads with its own."""
    model.save_pretrained(tmp_path / "m")
    DeiTImageProcessor.paper(16).save_pretrained(tmp_path / "m")
    loaded = load(tmp_path / "m", token="hf_secret", revision="v1")
    assert b"hf_secret" not in pickle.dumps(loaded)
    of_model, asked = DeiTImageProcessor.of_model, []

    def asking(*place, **where):
        asked.append((where["token"], where["revision"]))
        return of_model(*place, **where)

    monkeypatch.setattr(DeiTImageProcessor, "of_model", asking)
    loaded.push_to_hub("org/ants", token="hf_pushing")
    loaded.save_pretrained(tmp_path / "n", push_to_hub=True, token="hf_saving")
    assert asked == [("hf_pushing", "v1"), ("hf_saving", "v1")]


@pytest.mark.parametrize("form", ["timm", "file", "unnamed class"])
def test_every_loaded_model_knows_where_it_came_from(form, uploads, tmp_path):
    """`load_model` too, whatever tells it the class: a push takes the preprocessing from that place."""
    plain, folder = build("classification", small(id2label=LABELS, distillation_token=False)), tmp_path / "m"
    saved(plain, folder)
    if form == "timm":
        convert(folder, "timm", tmp_path / "place")
    else:
        content = json.loads((folder / "config.json").read_text())
        del content["architectures"]
        (folder / "config.json").write_text(json.dumps(content))
        folder.rename(tmp_path / "place")
    place = tmp_path / "place" / "model.safetensors" if form == "file" else tmp_path / "place"
    loaded, _ = deit.load_model(place, output_loading_info=True)
    assert loaded.name_or_path == place
    loaded.push_to_hub("org/ants")
    found = DeiTImageProcessor.from_dict(json.loads(uploads[-1][1]["preprocessor_config.json"]))
    x = Image.fromarray((np.arange(1200) % 251).astype(np.uint8).reshape(20, 20, 3))
    np.testing.assert_allclose(found([x]).pixel_values, DeiTImageProcessor.paper(16)([x]).pixel_values, atol=1e-6)


def test_push_of_config_and_processor(model, uploads, tmp_path):
    """Each uploads its own file and no other."""
    processor = DeiTImageProcessor()
    assert model.config.push_to_hub("org/a", revision="dev") == "https://hub/commit/1"
    processor.push_to_hub("org/b", commit_message="Mine")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "secret.txt").write_text("mine")
    processor.save_pretrained(tmp_path / "c", push_to_hub=True, repo_id="org/c")
    model.config.save_pretrained(tmp_path / "c", push_to_hub=True)
    assert [list(files) for _, files in uploads] == [
        ["config.json"],
        ["preprocessor_config.json"],
        ["preprocessor_config.json"],
        ["config.json"],
    ]
    assert [options["repo_id"] for options, _ in uploads] == ["org/a", "org/b", "org/c", "me/c"]
    assert [options["commit_message"] for options, _ in uploads] == [
        "Upload config",
        "Mine",
        "Upload processor",
        "Upload config",
    ]
    assert uploads[0][0]["revision"] == "dev"
    assert json.loads(uploads[0][1]["config.json"]) == model.config.to_dict()


def test_card(model, uploads, monkeypatch):
    """It says what is known, and nothing else; its metadata are those that the hub's own reader finds."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    model.push_to_hub(
        "org/ants",
        license="apache-2.0",
        base_model="facebook/deit-tiny-distilled-patch16-224",
        datasets=["imagenet-1k", "ants"],
        metrics={"accuracy": 0.93},
    )
    card = uploads[-1][1]["README.md"]
    data = huggingface_hub.ModelCard(card).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "deit", "image-classification")
    assert data.base_model == "facebook/deit-tiny-distilled-patch16-224"
    assert (data.datasets, data.metrics, data.tags) == (["imagenet-1k", "ants"], ["accuracy"], ["deit"])
    for part in (
        "Licence: apache-2.0.\n",
        "Training started from facebook/deit-tiny-distilled-patch16-224.\n",
        "Training data: imagenet-1k, ants.\n",
        "accuracy: 0.93.\n",
    ):
        assert part in card
    model.push_to_hub("org/ants")
    card = uploads[-1][1]["README.md"]
    data = huggingface_hub.ModelCard(card).data
    assert (data.license, data.base_model, data.datasets, data.metrics) == (None, None, None, None)
    assert not any(word in card for word in ("Licence", "Training", "accuracy"))


def test_card_names_the_base_model(model, uploads, tmp_path):
    """The repository that it was loaded from; a folder is no name on the hub."""
    model.save_pretrained(tmp_path / "m")
    loaded = load(tmp_path / "m")
    loaded.push_to_hub("org/ants")
    assert "base_model" not in uploads[-1][1]["README.md"]
    loaded.name_or_path = "org/before"
    loaded.push_to_hub("org/ants")
    assert "\nbase_model: org/before\n" in uploads[-1][1]["README.md"]


LIBRARIES = {
    ("classification", True): ["deit", "transformers", "Keras"],  # one head on a distilled model: not in timm
    ("classification", False): ["deit", "transformers", "timm", "Keras"],
    ("with_teacher", True): ["deit", "transformers", "timm", "Keras"],
    ("masked_image", True): ["deit", "transformers", "Keras"],
    ("backbone", False): ["deit", "transformers", "Keras"],
}


@pytest.mark.parametrize(("kind", "distilled"), LIBRARIES)
def test_card_loads(kind, distilled, uploads, tmp_path, monkeypatch):
    """The code that a card shows runs, and the model answers as the one that was pushed."""
    model = build(kind, small(distillation_token=distilled, num_labels=5))
    model.push_to_hub("org/ants", processor=DeiTImageProcessor.paper(16))
    card = uploads[-1][1]["README.md"]
    shown = dict(part.split(":\n\n```python\n") for part in card.replace("```\n", "").split("With ")[1:])
    assert list(shown) == LIBRARIES[kind, distilled]
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("org/ants")
    DeiTImageProcessor.paper(16).save_pretrained("org/ants")
    x = images(model.config)
    with torch.no_grad():
        expected = model(x)
        for library in [name for name in shown if name != "Keras"]:
            scope: dict = {}
            exec(shown[library], scope)
            found = scope["model"].eval()(x)
            key = next(iter(expected))
            assert_close(found if library == "timm" else found[key], expected[key])
    assert shown["Keras"].split("deit.")[-1].split(".")[0] in dir(deit)  # Keras has tests in processes of its own
