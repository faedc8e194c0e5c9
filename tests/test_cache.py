"""The cache in the home folder holds nothing that another user could have written."""

import os
import stat
from types import SimpleNamespace

import pytest
import torch
from support.checks import raises_saying
from support.models import trained_folder

from deit import files
from deit.export import cache
from deit.export.cache import cached_engine
from deit.model.load import load_classifier


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home" / "cache"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def belonging(monkeypatch, *paths, user=12345):
    """Makes paths belong to another user, for everybody who looks."""
    real = os.lstat

    def lstat(path, *more, **options):
        found = real(path, *more, **options)
        if str(path) not in map(str, paths):
            return found
        return SimpleNamespace(
            **{name: getattr(found, name) for name in dir(found) if name.startswith("st_")} | {"st_uid": user}
        )

    monkeypatch.setattr(os, "lstat", lstat)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_it_is_made_for_its_user_alone(home):
    before = os.umask(0)
    try:
        folder = files.cache_folder("engines")
    finally:
        os.umask(before)
    assert folder == home / "cache" / "deit" / "engines"
    assert mode(folder) == mode(folder.parent) == 0o700


def test_a_user_who_keeps_it_elsewhere_may_link_it(home, tmp_path):
    (home / "cache").mkdir()
    (tmp_path / "disk").mkdir()
    (home / "cache" / "deit").symlink_to(tmp_path / "disk")
    assert files.cache_folder("engines").resolve() == tmp_path / "disk" / "engines"


@pytest.mark.parametrize("name", ["deit", "deit/engines"])
@pytest.mark.parametrize("bits", [0o777, 0o1777, 0o770])
def test_what_others_could_have_put_there_is_removed(name, bits, home, monkeypatch):
    monkeypatch.setattr(files, "_is_own_group", lambda group: False)
    folder = files.cache_folder("engines")
    (folder / "planted").mkdir()
    place = home / "cache" / name
    os.chown(place, -1, 54321)
    place.chmod(bits)
    assert list(files.cache_folder("engines").iterdir()) == []
    assert mode(place) == 0o700


def test_what_is_no_cache_is_not_removed(home):
    """XDG_CACHE_HOME may be any folder, and a clone of this project in it would be named as the cache is."""
    clone = home / "cache" / "deit"
    (clone / "src").mkdir(parents=True)
    clone.chmod(0o777)
    with raises_saying(
        PermissionError, "is not used", f"others can write to {clone}, and it also holds src", "set XDG_CACHE_HOME"
    ):
        files.cache_folder("engines")
    assert (clone / "src").is_dir()


@pytest.mark.parametrize("name", ["cache", "cache/deit"])
def test_a_folder_that_can_not_be_made_is_told(name, home):
    """A file in its place stands for a home that is read-only. Callers do without the cache."""
    (home / name).parent.mkdir(exist_ok=True)
    (home / name).touch()
    with raises_saying(PermissionError, "is not used", "it can't be made ([Errno ", home / name, "XDG_CACHE_HOME"):
        files.cache_folder("engines")


def test_the_group_of_one_user_is_no_other_user(home, monkeypatch):
    folder = files.cache_folder("engines")
    (folder / "kept").mkdir()
    os.chown(folder, -1, 54321)
    folder.chmod(0o770)
    monkeypatch.setattr(files, "_is_own_group", lambda group: group == 54321)
    assert [path.name for path in files.cache_folder("engines").iterdir()] == ["kept"]


@pytest.mark.parametrize("name", ["cache/deit/engines", "cache/deit", "cache", "."])
def test_a_folder_of_another_user_is_refused(name, home, monkeypatch):
    files.cache_folder("engines")
    belonging(monkeypatch, place := home / name if name != "." else home)
    with raises_saying(
        PermissionError, "is not used", f"lies in {place}, which belongs to another user", "set XDG_CACHE_HOME"
    ):
        files.cache_folder("engines")


@pytest.mark.parametrize("name", ["cache", "."])
def test_a_folder_above_that_others_can_write_to_is_refused(name, home):
    """They could put their own folder in the place of the cache, unless the sticky bit is set."""
    files.cache_folder("engines")
    place = home / name if name != "." else home
    place.chmod(0o777)
    with raises_saying(PermissionError, f"lies in {place}, which others can write to", "set XDG_CACHE_HOME"):
        files.cache_folder("engines")
    place.chmod(0o1777)
    assert files.cache_folder("engines").is_dir()


def test_the_place_that_a_link_leads_to_is_checked(home, tmp_path, monkeypatch):
    (home / "cache").mkdir()
    (tmp_path / "theirs").mkdir()
    (home / "cache" / "deit").symlink_to(tmp_path / "theirs")
    belonging(monkeypatch, tmp_path / "theirs")
    with raises_saying(PermissionError, f"lies in {tmp_path / 'theirs'}, which belongs to another user"):
        files.cache_folder("engines")


def writable(folder, planted):
    folder.chmod(0o777)


def writable_file(folder, planted):
    (folder / "model.onnx").chmod(0o666)


def linked(folder, planted):
    folder.rename(planted)
    folder.symlink_to(planted)


def linked_file(folder, planted):
    (folder / "model.onnx").rename(planted)
    (folder / "model.onnx").symlink_to(planted)


@pytest.mark.parametrize("change", [writable, writable_file, linked, linked_file])
def test_an_engine_that_others_could_have_written_is_made_anew(change, home, tmp_path, monkeypatch):
    """The names of its folder are known to everybody who has the model."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    classifier = load_classifier(trained_folder(tmp_path / "model", "plain"))
    pixels = torch.rand(2, 3, 16, 16).numpy()
    expected = cached_engine(classifier, "onnx")(pixels)["logits"]
    [folder] = (home / "cache" / "deit" / "engines").iterdir()
    written, write = [], cache.write_float
    monkeypatch.setattr(cache, "write_float", lambda *given: written.append(given[1]) or write(*given))
    assert (cached_engine(classifier, "onnx")(pixels)["logits"] == expected).all()
    assert written == []
    change(folder, tmp_path / "planted")
    assert (cached_engine(classifier, "onnx")(pixels)["logits"] == expected).all()
    assert written == ["onnx"]
    assert folder.is_dir()
    assert not folder.is_symlink()
