import http.server
import json
import os
import random
import re
import stat
import threading
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
from support.checks import assert_close, raises_saying, run_python
from support.models import CLASS_OF, build, images, small

from deit import files, weights
from deit.config import DeiTConfig
from deit.model.network import DeiTForImageClassification, DeiTModel
from deit.weights import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def saved(tmp_path):
    """A classifier and the folder it was saved in."""
    model = build("classification", small(id2label={0: "ant", 1: "bee", 2: "cat", 3: "dog", 4: "eel"}))
    model.save_pretrained(tmp_path / "m")
    return model, tmp_path / "m"


load = DeiTForImageClassification.from_pretrained


# ---------------------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("size", ["5GB", "3KB", 2000, "1 KiB"])
@pytest.mark.parametrize("kind", CLASS_OF)
def test_round_trip(kind, size, tmp_path):
    model = build(kind, small())
    model.save_pretrained(tmp_path, max_shard_size=size)
    limit = {"5GB": 5 * 10**9, "3KB": 3000, 2000: 2000, "1 KiB": 1024}[size]
    largest = max(tensor.numel() * 4 for tensor in model.state_dict().values())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) == 1) == (size == "5GB")
    for file in files:
        tensors = safetensors.torch.load_file(file)
        assert sum(t.numel() * 4 for t in tensors.values()) <= max(limit, largest)
    again, info = CLASS_OF[kind].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_close(again.state_dict(), model.state_dict(), 0)


def test_stale_shards_are_removed(saved):
    model, folder = saved
    model.save_pretrained(folder, max_shard_size="2KB")
    assert not (folder / "model.safetensors").exists()
    many = len(list(folder.glob("model-*")))
    model.save_pretrained(folder, max_shard_size="10KB")
    fewer = len(list(folder.glob("model-*")))
    assert many > fewer > 1
    (folder / "model_of_mine.safetensors").write_bytes(b"another's file")
    model.save_pretrained(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors", "model_of_mine.safetensors"]


@pytest.mark.parametrize("size", ["lots", "5 parsecs", "MB"])
def test_refused_shard_size(size, saved):
    with raises_saying(ValueError, f"max_shard_size='{size}' is not understood; give bytes, or a size like 500MB"):
        saved[0].save_pretrained(saved[1], max_shard_size=size)


def test_config_of_a_saved_model(saved):
    content = json.loads((saved[1] / "config.json").read_text())
    assert content["architectures"] == ["DeiTForImageClassification"]
    assert (content["dtype"], content["model_type"]) == ("float32", "deit")
    assert content["id2label"]["3"] == "dog"
    metadata = safetensors.safe_open(saved[1] / "model.safetensors", "pt").metadata()
    assert metadata == {"format": "pt"}  # transformers raises_saying a file without it


def test_failing_write_leaves_the_old_files(saved, monkeypatch):
    _, folder = saved
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full_disk(tensors, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    with raises_saying(OSError, "No space left"):
        build("classification", small(), seed=9).save_pretrained(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    monkeypatch.undo()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("I/O error")))
    with raises_saying(OSError, "I/O error"):
        files.write_text(folder / "config.json", "{}")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_written_files_are_readable_by_others(tmp_path):
    """The temporary file's private mode would otherwise stay."""
    before = os.umask(0o022)
    try:
        files.write_text(tmp_path / "new" / "a.txt", "é")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new" / "a.txt").stat().st_mode) == 0o644
    assert (tmp_path / "new" / "a.txt").read_bytes() == "é".encode()


def test_views_and_shared_storage_are_saved_whole(tmp_path):
    model = build("classification", small())
    model.classifier.weight.data = torch.randn(24, 5).T
    model.save_pretrained(tmp_path)
    assert_close(DeiTForImageClassification.from_pretrained(tmp_path).state_dict(), model.state_dict(), 0)


# ------------------------------------------------------------------------------------------------------- what is read


def test_missing_head(tmp_path):
    backbone = build("backbone", small(hidden_size=96))
    backbone.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="initialised anew") as caught:
        model, info = CLASS_OF["with_teacher"].from_pretrained(tmp_path, num_labels=100, output_loading_info=True)
    heads = [f"{name}.{leaf}" for name in ("cls_classifier", "distillation_classifier") for leaf in ("weight", "bias")]
    assert info == {
        "missing_keys": heads,
        "mismatched_keys": [],
        "error_msgs": [],
        "unexpected_keys": ["deit.pooler.bias", "deit.pooler.weight"],
    }
    assert str(tmp_path / "model.safetensors") in str(caught[0].message)
    assert f"does not give {', '.join(heads)}: initialised anew, train before use" in str(caught[0].message)
    assert caught[0].filename == __file__
    for head in (model.cls_classifier, model.distillation_classifier):
        assert head.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert not head.bias.any()
    assert not torch.equal(model.cls_classifier.weight, model.distillation_classifier.weight)
    assert all(p.requires_grad and not p.is_meta for p in model.parameters())
    with torch.no_grad():
        x = images(model.config)
        assert_close(model.deit(x).last_hidden_state, backbone(x).last_hidden_state, 0)


def test_missing_mask_token_and_decoder(saved):
    model, folder = saved
    with pytest.warns(UserWarning, match=r"does not give deit.mask_token, decoder.weight, decoder.bias: initialised"):
        masked = CLASS_OF["masked_image"].from_pretrained(folder)
    assert masked.deit.mask_token.std().item() == pytest.approx(0.02, rel=0.5)
    assert masked.decoder.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert_close(masked.deit.position, model.deit.position, 0)


def test_backbone_of_a_classifier(saved):
    model, folder = saved
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbone, info = DeiTModel.from_pretrained(folder, output_loading_info=True)
    assert backbone.pooler is None
    assert info["unexpected_keys"] == ["classifier.bias", "classifier.weight"]
    assert_close(backbone.state_dict(), model.deit.state_dict(), 0)


def test_other_number_of_labels(saved):
    model, folder = saved
    with raises_saying(
        files.CheckpointError,
        folder / "model.safetensors",
        "classifier.weight has shape (5, 24), this model expects (9, 24) (and 1 more)",
        "ignore_mismatched_sizes=True",
    ):
        load(folder, num_labels=9)
    with pytest.warns(UserWarning, match="does not give classifier.weight, classifier.bias: initialised anew"):
        other, info = DeiTForImageClassification.from_pretrained(
            folder, num_labels=9, ignore_mismatched_sizes=True, output_loading_info=True
        )
    assert info["mismatched_keys"] == ["classifier.weight", "classifier.bias"]
    assert other.classifier.weight.shape == (9, 24)
    assert 0 < other.classifier.weight.std() < 0.03
    assert other.config.id2label[8] == "LABEL_8"
    assert_close(other.deit.state_dict(), model.deit.state_dict(), 0)


def test_overrides_and_names(saved):
    model = DeiTForImageClassification.from_pretrained(saved[1], drop_path_rate=0.2, attn_implementation="sdpa")
    assert model.config.id2label[3] == "dog"
    assert model.config.drop_path_rates == pytest.approx([0, 0.1, 0.2])
    assert {block.attention.implementation for block in model.deit.blocks} == {"sdpa"}
    with raises_saying(ValueError, "DeiTConfig has no field 'numlabels'"):
        DeiTForImageClassification.from_pretrained(saved[1], numlabels=3)


@pytest.mark.parametrize(
    ("stored", "asked", "found"),
    [
        (torch.float32, None, torch.float32),
        (torch.bfloat16, None, torch.float32),
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float16, "auto", torch.float16),
        (torch.float32, "bfloat16", torch.bfloat16),
        (torch.float32, "torch.float16", torch.float16),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_dtype(stored, asked, found, saved):
    model, folder = saved
    model.to(stored).save_pretrained(folder)
    assert DeiTConfig.from_pretrained(folder).dtype == str(stored).removeprefix("torch.")
    loaded = DeiTForImageClassification.from_pretrained(folder, dtype=asked)
    assert {p.dtype for p in loaded.parameters()} == {found}
    assert_close(loaded.state_dict(), {k: v.to(found) for k, v in model.state_dict().items()}, 0)


@pytest.mark.parametrize("dtype", ["int8", "half precision"])
def test_refused_dtype(dtype, saved):
    with raises_saying(ValueError, "dtype must be a floating torch dtype, its name"):
        load(saved[1], dtype=dtype)


@pytest.mark.parametrize("place", ["folder", "file", "subfolder", "pth in a folder", "pth in a subfolder"])
def test_places(place, saved):
    model, folder = saved
    source, options = {
        "folder": (folder, {}),
        "file": (folder / "model.safetensors", {}),
        "subfolder": (folder.parent, {"subfolder": "m"}),
        "pth in a folder": (folder, {}),
        "pth in a subfolder": (folder.parent, {"subfolder": "m"}),
    }[place]
    if "pth" in place:
        (folder / "model.safetensors").unlink()
        torch.save({"model": weights.from_ours(model._tensors(), "hf")}, folder / "best.pth")
    assert_close(DeiTForImageClassification.from_pretrained(str(source), **options).state_dict(), model.state_dict(), 0)


def test_config_given(saved):
    """A file alone, and shapes that don't tell the number of heads."""
    model, folder = saved
    (folder / "config.json").unlink()
    with raises_saying(ValueError, folder / "model.safetensors", "shapes don't tell the number of attention heads"):
        load(folder)
    loaded = DeiTForImageClassification.from_pretrained(folder, config=model.config)
    assert loaded.config == model.config
    with torch.no_grad():
        assert_close(loaded(images(model.config)).logits, model(images(model.config)).logits, 1e-6)


# ---------------------------------------------------------------------------------------------------- what is refused


def test_missing_places(tmp_path):
    (tmp_path / "empty").mkdir()
    with raises_saying(
        FileNotFoundError, tmp_path / "no" / "such", "does not exist; give an existing folder, or a hub name like"
    ):
        load(tmp_path / "no" / "such")
    with raises_saying(FileNotFoundError, "best.pth does not exist"):
        load("best.pth")
    with raises_saying(FileNotFoundError, tmp_path / "empty", "holds no weights; expected one of model.safetensors, "):
        load(tmp_path / "empty")
    with raises_saying(FileNotFoundError, "'a b/c' is neither a folder nor a possible hub name"):
        load("a b/c")
    with raises_saying(FileNotFoundError, "model.safetensors of org/none is not in the local cache", "a local folder"):
        load("org/none", cache_dir=tmp_path, local_files_only=True)


@pytest.mark.parametrize("damage", ["empty", "half", "ones", "header"])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "checkpoint.pth"])
def test_damaged_file(name, damage, saved):
    model, folder = saved
    path = folder / name
    if path.suffix != ".safetensors":
        (folder / "model.safetensors").unlink()
        torch.save(weights.from_ours(model._tensors(), "hf"), path)
    whole = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "half": whole[: len(whole) // 2], "ones": b"\xff" * 999, "header": whole[:5]}[damage]
    )
    with raises_saying(files.CheckpointError, path, "truncated", "corrupt", "fetch it again"):
        load(folder)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("legacy", [False, True])
def test_mutated_pickles_load_or_are_refused(legacy, tmp_path):
    """Random bytes in the part that is unpickled: a model or one sentence, never another error."""
    model = build("with_teacher", small(hidden_size=64, num_attention_heads=1))
    path, draw = tmp_path / "m.pth", random.Random(0)
    torch.save(
        {"model": weights.from_ours(model._tensors(), "original")}, path, _use_new_zipfile_serialization=not legacy
    )
    whole, sentences = path.read_bytes(), []
    for _ in range(120):
        mutated = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            mutated[draw.randrange(6000)] = draw.randrange(256)
        path.write_bytes(mutated)
        try:
            CLASS_OF["with_teacher"].from_pretrained(path)
        except ValueError as error:
            sentences.append(str(error))
    assert len(sentences) > 30
    assert all(str(path) in sentence and "\n" not in sentence for sentence in sentences)


class Attack:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize(
    "wrap",
    [lambda a: a, lambda a: {"model": {"x": torch.zeros(1)}, "args": a}, lambda a: {"x": torch.zeros(1), "y": a}],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_code_is_not_run(wrap, legacy, tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "m.pth"
    torch.save(wrap(Attack(marker)), path, _use_new_zipfile_serialization=not legacy)
    with raises_saying(
        files.CheckpointError,
        path,
        "would run code when loaded. Nothing was executed or loaded",
        f"asks for {os.system.__module__}.system",
        "Ask for a safetensors file",
    ):
        load(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([torch.zeros(1)], "should hold a dictionary of tensors, found list"),
        ({"a": torch.zeros(1), "b": 3}, "'b' is int, expected tensors only, or a dictionary with them under \"model\""),
        ({"model": {"a": "text"}}, "'a' is str, expected tensors only"),
        ({"fc.weight": torch.zeros(1)}, "names its tensors like ['fc.weight']; expected Hugging Face's, timm's or"),
    ],
)
def test_other_pickles(content, sentence, tmp_path):
    torch.save(content, tmp_path / "m.pth")
    with raises_saying(ValueError, tmp_path / "m.pth", sentence):
        load(tmp_path / "m.pth")


def altered(saved, change):
    model, folder = saved
    named = dict(weights.from_ours(model._tensors(), "hf"))
    change(named)
    safetensors.torch.save_file({k: v.contiguous() for k, v in named.items()}, folder / "model.safetensors")
    return folder


def test_key_without_a_rule(saved):
    folder = altered(saved, lambda named: named.update({"deit.extra.weight": torch.zeros(1)}))
    with raises_saying(
        ValueError,
        folder / "model.safetensors",
        "no rule for tensor 'deit.extra.weight' (read as hf names)",
        "save the file without it",
    ):
        load(folder)


def test_missing_part_of_qkv(saved):
    folder = altered(saved, lambda named: named.pop("deit.encoder.layer.2.attention.attention.value.weight"))
    with raises_saying(
        ValueError,
        folder / "model.safetensors",
        "deit.blocks.2.attention.qkv.weight is made of query, key and value, and the file has only 2 of the three",
        "fetch it again",
    ):
        load(folder)


def test_missing_tensor(saved):
    folder = altered(saved, lambda named: [named.pop(key) for key in list(named) if "layernorm_after" in key])
    with raises_saying(
        files.CheckpointError,
        folder / "model.safetensors",
        "lacks deit.blocks.0.norm2.weight (and 5 more)",
        "the file is incomplete, or the config is another model's",
    ):
        load(folder)


def test_tensor_of_another_shape(saved):
    folder = altered(saved, lambda named: named.update({"deit.embeddings.cls_token": torch.zeros(1, 1, 7)}))
    with raises_saying(
        files.CheckpointError,
        folder / "model.safetensors",
        "deit.cls_token has shape (1, 1, 7), this model expects (1, 1, 24);",
    ):
        load(folder)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("{", ("is not valid JSON (", "fetch or write it again")),
        ("", ("is not valid JSON",)),
        ("\ud800", ("is not valid JSON",)),
        ("[1]", ("should hold a JSON object, found list",)),
        ('{"model_type": "bert"}', ("model_type is 'bert'; this package reads deit, vit and deit3",)),
        ('{"model_type": "deit", "hidden_size": "wide"}', ("hidden_size must be a whole number", "'wide'")),
    ],
)
def test_bad_config(text, parts, saved):
    path = saved[1] / "config.json"
    path.write_bytes(text.encode(errors="surrogatepass"))
    with raises_saying(ValueError, path, *parts):
        load(saved[1])
    with raises_saying(ValueError, path, *parts):
        DeiTConfig.from_pretrained(saved[1])


def test_missing_shard(saved):
    model, folder = saved
    model.save_pretrained(folder, max_shard_size="3KB")
    gone = sorted(folder.glob("model-*"))[1]
    gone.unlink()
    with raises_saying(
        files.CheckpointError,
        folder / "model.safetensors.index.json",
        f"lists a shard that is missing ({folder} holds no {gone.name})",
        "fetch the checkpoint again",
    ):
        load(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with raises_saying(files.CheckpointError, folder / "model.safetensors.index.json", "has no weight_map"):
        load(folder)


# ------------------------------------------------------------------------------------------------------------ the hub


def test_hub_cache(saved, tmp_path):
    """A repository that was fetched before needs no network."""
    model, folder = saved
    repository = tmp_path / "cache" / "models--org--tiny"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        file.rename(snapshot / file.name)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for options in ({}, {"revision": "main"}, {"revision": COMMIT}):
        loaded = DeiTForImageClassification.from_pretrained(
            "org/tiny", cache_dir=tmp_path / "cache", local_files_only=True, **options
        )
        assert_close(loaded.state_dict(), model.state_dict(), 0)
    config = DeiTConfig.from_pretrained("org/tiny", cache_dir=tmp_path / "cache", local_files_only=True)
    assert config.id2label[1] == "bee"


class Hub(http.server.BaseHTTPRequestHandler):
    """The hub's answers to HEAD and GET of `/org/tiny/resolve/v1/FILE`."""

    folder: Path
    seen: list[tuple[str, str, str | None]]

    def answer(self):
        self.seen.append((self.command, self.path, self.headers.get("Authorization")))
        match = re.fullmatch(r"/(\w+/\w+)/resolve/(\w+)/([\w./-]+)", self.path)
        repository, revision, name = match.groups() if match else ("", "", "")
        error = (
            "RepoNotFound"
            if repository != "org/tiny"
            else "RevisionNotFound"
            if revision not in ("v1", COMMIT)
            else None
            if (self.folder / name).is_file()
            else "EntryNotFound"
        )
        body = b"" if error else (self.folder / name).read_bytes()
        if self.headers.get("Authorization") == "Bearer wrong":
            self.send_response(401)
            self.send_header("X-Error-Message", "Invalid credentials in Authorization header")
            self.end_headers()
            return
        self.send_response(404 if error else 200)
        self.send_header("X-Error-Code", error) if error else self.send_header("ETag", f'"{name}-{len(body)}"')
        if error in (None, "EntryNotFound"):
            self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_GET = do_HEAD = answer

    def log_message(self, *_):
        pass


@pytest.fixture
def served(saved, tmp_path):
    """The environment of a process that knows a loopback hub, and what that hub was asked."""
    handler = type("Handler", (Hub,), {"folder": saved[1], "seen": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": None,
        "HF_TOKEN": None,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_CACHE": None,
        "NO_PROXY": "127.0.0.1",
    }
    yield environment, handler.seen
    server.shutdown()
    server.server_close()


FETCH = """
from deit import DeiTForImageClassification
model = DeiTForImageClassification.from_pretrained("org/tiny", revision="v1", {})
print(model.classifier.bias.double().sum().item(), model.config.id2label[3])
"""


def test_hub(served, saved, tmp_path):
    environment, seen = served
    expected = f"{saved[0].classifier.bias.double().sum().item()} dog"
    assert run_python(FETCH.format("token='secret'"), **environment) == expected
    assert {path for command, path, _ in seen if command == "GET"} == {
        f"/org/tiny/resolve/{COMMIT if COMMIT in path else 'v1'}/{name}"
        for _, path, _ in seen
        for name in ("model.safetensors", "config.json")
        if path.endswith(name)
    }
    assert {token for _, _, token in seen} == {"Bearer secret"}
    assert (tmp_path / "home/hub/models--org--tiny/snapshots" / COMMIT / "config.json").is_file()
    seen.clear()
    assert run_python(FETCH.format(""), **environment | {"HF_HUB_OFFLINE": "1"}) == expected
    assert run_python(FETCH.format("local_files_only=True"), **environment) == expected
    assert seen == []
    assert run_python(FETCH.format(""), **environment | {"HF_TOKEN": "mine"}) == expected
    assert {token for _, _, token in seen} == {"Bearer mine"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            "'org/none'",
            "there is neither a folder org/none nor a hub repository of that name that this token may read; "
            "check the name, or pass token=",
        ),
        (
            "'org/tiny', revision='v1', token='wrong'",
            "the hub did not send model.safetensors of org/tiny (Client error '401 Unauthorized' for url "
            "'ENDPOINT/org/tiny/resolve/v1/model.safetensors'); check the token",
        ),
        ("'org/tiny', revision='v9'", "org/tiny on the hub has no revision 'v9'"),
        ("'org/tiny', revision='v1', subfolder='deep'", "org/tiny on the hub holds no model.safetensors"),
    ],
)
def test_hub_refuses(arguments, sentence, served):
    code = (
        "from deit import DeiTForImageClassification\n"
        f"try: DeiTForImageClassification.from_pretrained({arguments})\n"
        "except FileNotFoundError as error: print(error)"
    )
    assert run_python(code, **served[0]) == sentence.replace("ENDPOINT", served[0]["HF_ENDPOINT"])


def test_unanswering_hub_is_waited_for_once(saved, tmp_path, monkeypatch):
    """The client retries for half a minute before it gives up on a file."""
    import huggingface_hub

    waited = []

    def unreachable(name, filename, *, local_files_only, **_):
        waited.append((filename, local_files_only))
        if filename == "pytorch_model.bin" and local_files_only:
            return str(path)
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    path = tmp_path / "pytorch_model.bin"
    torch.save(weights.from_ours(saved[0]._tensors(), "hf"), path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    loaded = load("org/tiny", config=saved[0].config)
    assert_close(loaded.state_dict(), saved[0].state_dict(), 0)
    assert waited == [("model.safetensors", False), ("model.safetensors.index.json", True), ("pytorch_model.bin", True)]


def test_unreachable_hub(tmp_path):
    code = (
        "from deit import DeiTConfig\n"
        "try: DeiTConfig.from_pretrained('org/tiny')\n"
        "except FileNotFoundError as error: print(error)"
    )
    sentence = (
        "config.json of org/tiny is not in the local cache and could not be fetched (offline, no network, or "
        "the hub does not answer); connect, or give a local folder"
    )
    assert run_python(code, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path)) == sentence


def test_local_folder_without_hub_package(saved):
    model, folder = saved
    code = f"""
import sys
sys.modules["huggingface_hub"] = None
from deit import DeiTForImageClassification
print(DeiTForImageClassification.from_pretrained({str(folder)!r}).classifier.bias.double().sum().item())
try:
    DeiTForImageClassification.from_pretrained("org/tiny")
except FileNotFoundError as error:
    print(error)
"""
    assert run_python(code).splitlines() == [
        str(model.classifier.bias.double().sum().item()),
        'there is no folder org/tiny, and fetching it from the hub needs huggingface_hub: pip install "deit[hub]"',
    ]


@pytest.fixture
def uploads(monkeypatch):
    """Stands in for the hub's client: what it was asked to do, and the files as they were then."""
    done = []

    class Api:
        def __init__(self, token=None):
            done.append(("token", token))

        def create_repo(self, repo_id, **options):
            done.append(("create", repo_id, options))

        def upload_folder(self, *, folder_path, **options):
            files = {p.name: p.read_bytes() for p in Path(folder_path).iterdir()}
            done.append(("upload", options, files))
            return "https://hub/commit/1"

    monkeypatch.setattr(pytest.importorskip("huggingface_hub"), "HfApi", Api)
    return done


def test_push(saved, uploads):
    model, folder = saved
    assert (
        model.push_to_hub("org/ants", token="secret", private=True, revision="dev", commit_message="First")
        == "https://hub/commit/1"
    )
    token, create, (_, options, files) = uploads
    assert token == ("token", "secret")
    assert create == ("create", "org/ants", {"private": True, "exist_ok": True})
    assert options == {"repo_id": "org/ants", "revision": "dev", "commit_message": "First"}
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert files["config.json"] == (folder / "config.json").read_bytes()
    card = files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: deit\npipeline_tag: image-classification\n")
    for part in (
        "- deit\n---",
        "# ants\n",
        "width 24, 3 blocks,\n3 heads, patches of 4x4 pixels, images of\n16x16",
        "Classes: ant, bee, cat, dog, eel.",
        'model = deit.load_model("org/ants")',
    ):
        assert part in card


def test_push_of_a_saved_folder(saved, uploads):
    """What lies in the folder goes along, and a card that is there stays."""
    model, folder = saved
    (folder / "README.md").write_text("mine")
    (folder / "preprocessor_config.json").write_text("{}")
    model.save_pretrained(folder, push_to_hub=True, repo_id="org/ants")
    assert set(uploads[-1][2]) == {"config.json", "model.safetensors", "README.md", "preprocessor_config.json"}
    assert uploads[-1][2]["README.md"] == b"mine"
    model.save_pretrained(folder, push_to_hub=True)
    assert uploads[-1][1]["repo_id"] == "m"


def test_card_of_a_model_without_classifier(saved, uploads):
    build("masked_image", small()).push_to_hub("org/masks")
    card = uploads[-1][2]["README.md"].decode()
    assert "pipeline_tag: image-feature-extraction\n" in card
    assert "Classes" not in card


def test_card_of_many_classes():
    config = small(num_labels=25, distillation_token=False, extra={"architectures": ["ViTForImageClassification"]})
    card = hub.model_card(config, "x/y")
    assert "LABEL_19 and 5 more." in card
    assert "without a distillation token" in card
    assert "- vit\n" in card
