"""Models fetched from the hub and pushed to it."""

import http.server
import re
import socket
import struct
import threading
from pathlib import Path

import pytest
import torch
from support.checks import assert_close, run_python
from support.models import build, small

from deit import files, weights
from deit.config import DeiTConfig
from deit.model.network import DeiTForImageClassification
from deit.weights import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
load = DeiTForImageClassification.from_pretrained


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
    resets: bool

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
        if self.command == "GET" and self.resets:
            self.wfile.write(body[: len(body) // 2])
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()  # in a way that the other end sees as a reset
        elif self.command == "GET":
            self.wfile.write(body)

    do_GET = do_HEAD = answer

    def log_message(self, *_):
        pass


@pytest.fixture
def served(saved, tmp_path, request):
    """The environment of a process that knows a loopback hub, and what that hub was asked. As a parameter, whether it
    resets the connection within each file."""
    handler = type("Handler", (Hub,), {"folder": saved[1], "seen": [], "resets": getattr(request, "param", False)})
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


@pytest.mark.parametrize("served", [True], indirect=True)
def test_a_connection_that_is_reset_is_one_sentence(served):
    """It is no OSError of Python, but an error of the client's transport."""
    code = (
        "from deit import DeiTConfig\n"
        "try: DeiTConfig.from_pretrained('org/tiny', revision='v1')\n"
        "except FileNotFoundError as error: print(error)"
    )
    found = re.fullmatch(
        r"config\.json of org/tiny was not fetched to its end \((.+)\); check the network, then give the same command "
        "again",
        run_python(code, **served[0]),
    )
    assert found is not None
    assert "reset" in found[1]


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
        "config.json of org/tiny is not in the local cache and could not be fetched (offline, no network, or the hub "
        "does not answer), and there is no local folder org/tiny; check its path, or connect"
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
    huggingface_hub = pytest.importorskip("huggingface_hub")
    done = []

    class Api:
        def __init__(self, token=None):
            done.append(("token", token))

        def create_repo(self, repo_id, **options):
            done.append(("create", repo_id, options))
            return huggingface_hub.RepoUrl(
                f"https://hub/{repo_id if '/' in repo_id else f'me/{repo_id}'}", "https://hub"
            )

        def create_branch(self, repo_id, **options):
            done.append(("branch", repo_id, options))

        def upload_folder(self, *, folder_path, **options):
            files = {p.name: p.read_bytes() for p in Path(folder_path).iterdir()}
            done.append(("upload", options, files))
            return "https://hub/commit/1"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return done


def test_push(saved, uploads):
    model, folder = saved
    assert (
        model.push_to_hub("org/ants", token="secret", private=True, revision="dev", commit_message="First")
        == "https://hub/commit/1"
    )
    token, create, branch, (_, options, files) = uploads
    assert token == ("token", "secret")
    assert create == ("create", "org/ants", {"private": True, "exist_ok": True})
    assert branch == ("branch", "org/ants", {"branch": "dev", "exist_ok": True})  # which the hub does not make itself
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


@pytest.mark.parametrize("revision", [None, "refs/pr/3"])
def test_push_that_needs_no_branch(revision, saved, uploads):
    saved[0].push_to_hub("org/ants", revision=revision)
    assert [what for what, *_ in uploads] == ["token", "create", "upload"]
    assert uploads[-1][1]["revision"] == revision


def test_push_of_a_saved_folder(saved, uploads):
    """What lies in the folder goes along, and a card that is there stays."""
    model, folder = saved
    (folder / "README.md").write_text("mine")
    (folder / "preprocessor_config.json").write_text("{}")
    model.save_pretrained(folder, push_to_hub=True, repo_id="org/ants")
    assert set(uploads[-1][2]) == {"config.json", "model.safetensors", "README.md", "preprocessor_config.json"}
    assert uploads[-1][2]["README.md"] == b"mine"
    model.save_pretrained(folder, push_to_hub=True)
    assert uploads[-1][1]["repo_id"] == "me/m"


def test_a_name_without_an_owner_is_the_users(saved, uploads):
    """The hub creates such a repository for the user, and then knows it by its whole name alone."""
    model, _ = saved
    model.push_to_hub("ants", revision="dev")
    _, create, branch, (_, options, files) = uploads
    assert [each[1] for each in (create, branch)] == ["ants", "me/ants"]
    assert options["repo_id"] == "me/ants"
    assert 'model = deit.load_model("me/ants")' in files["README.md"].decode()
    model.config.push_to_hub("ants")
    assert uploads[-1][1]["repo_id"] == "me/ants"


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


@pytest.mark.parametrize("name", ["ALL_PROXY", "HTTP_PROXY", "all_proxy"])
def test_what_lies_behind_a_proxy_is_not_asked_directly(monkeypatch, name):
    """Its client sends everything through ALL_PROXY, too, unless the host is named in NO_PROXY."""

    def refused(*_, **__):
        raise ConnectionRefusedError

    for other in ("all", "http", "https", "no"):
        monkeypatch.delenv(f"{other}_proxy", raising=False)
        monkeypatch.delenv(f"{other}_proxy".upper(), raising=False)
    monkeypatch.setattr(socket, "create_connection", refused)
    monkeypatch.setattr(files, "_failed", {})
    assert not files.reachable("http://hub.invalid")
    monkeypatch.setenv(name, "socks5://127.0.0.1:9")
    assert files.reachable("http://hub.invalid")
    monkeypatch.setenv("NO_PROXY", "hub.invalid")
    assert not files.reachable("http://hub.invalid")


@pytest.mark.parametrize("closed", [True, False])
def test_a_hub_that_is_not_there_is_tried_once_and_at_once(tmp_path, closed):
    """Its client would try six times for each file, half a minute long, with a line for every time."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    address = f"http://127.0.0.1:{port}" if closed else "http://no-such-hub.invalid"
    code = """
import socket, sys, time
from deit import files
from deit.weights import hub
asked, connect = [], socket.create_connection
def counted(*place, **options):
    asked.append(sys._getframe(1).f_globals["__name__"])
    return connect(*place, **options)
socket.create_connection = counted
began = time.monotonic()
for read in (hub.read_checkpoint, hub.read_checkpoint):
    try: read("org/tiny")
    except FileNotFoundError as error: print(error)
files._failed.clear()
try: read("org/tiny")
except FileNotFoundError: print(asked.count('deit.files'), time.monotonic() - began < 30)
"""
    environment = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": None, "NO_PROXY": "*"}
    sentence = (
        "model.safetensors of org/tiny is not in the local cache and could not be fetched (offline, no network, or the "
        "hub does not answer), and there is no local folder org/tiny; check its path, or connect"
    )
    assert run_python(code, **environment).splitlines() == [sentence, sentence, "2 True"]
