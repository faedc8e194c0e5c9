"""What is published: a wheel and a source distribution, each whole, and the wheel where it is installed."""

import email
import json
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from deit import host

ROOT = Path(__file__).parents[1]
FILES = {
    str(path.relative_to(ROOT / "src")): path
    for path in sorted((ROOT / "src/deit").rglob("*"))
    if path.is_file() and path.suffix != ".pyc"
}
"""Every file of the package, by its place in it."""


def run(*command, **options):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel and the source distribution."""
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    [wheel], [source] = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, source


@pytest.fixture(scope="module")
def clean(built, tmp_path_factory):
    """The programs of an environment with the wheel, which sees the packages of this one."""
    place = tmp_path_factory.mktemp("env")
    venv.create(place, with_pip=False)
    programs = place / ("Scripts" if os.name == "nt" else "bin")
    run(sys.executable, "-m", "pip", "--python", programs / "python", "install", "--no-deps", "--no-index", built[0])
    own = run(programs / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
    (Path(own) / "others.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    return programs


def test_the_kinds_of_files_that_are_no_code():
    """If this fails, look whether `test_nothing_is_left_out` still sees every kind."""
    kinds = {path.suffix or path.name for path in FILES.values()} - {".py"}
    assert kinds == {".css", ".html", ".js", ".mjs", ".typed", "onnxruntime-LICENSE"}


def test_the_version_has_one_value():
    assert re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE) == [host.VERSION]


def test_the_image_has_a_version_of_python_that_is_tested():
    [image] = re.findall(r"^FROM python:([\d.]+)-", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    named = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
    assert image in named
    assert re.search(rf"tests run on Python {' and '.join(named)}:", (ROOT / "README.md").read_text())


@pytest.mark.slow
def test_nothing_is_left_out(built):
    wheel, source = built
    with zipfile.ZipFile(wheel) as archive:
        found = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
    assert found == {name: path.read_bytes() for name, path in FILES.items()}
    with tarfile.open(source) as archive:
        top = f"deit-{host.VERSION}/"
        inside = {
            member.name.removeprefix(top): archive.extractfile(member).read()
            for member in archive.getmembers()
            if member.isfile()
        }
    assert {name for name in inside if name.startswith("src/")} == {f"src/{name}" for name in FILES}
    for name in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt", "tests/test_package.py"):
        assert inside[name] == (ROOT / name).read_bytes()
    assert not [name for name in inside if "__pycache__" in name or name.startswith((".venv", "runs/", "deit-"))]


@pytest.mark.slow
def test_a_wheel_is_the_same_from_the_source_distribution(built, tmp_path):
    wheel, source = built
    with tarfile.open(source) as archive:
        archive.extractall(tmp_path, filter="data")
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path, tmp_path / source.name[:-7])
    assert (tmp_path / wheel.name).read_bytes() == wheel.read_bytes()


@pytest.mark.slow
def test_what_the_index_shows(built):
    pytest.importorskip("twine")
    run(sys.executable, "-m", "twine", "check", "--strict", *built)
    with zipfile.ZipFile(built[0]) as archive:
        about = email.message_from_bytes(archive.read(f"deit-{host.VERSION}.dist-info/METADATA"))
        licence = archive.read(f"deit-{host.VERSION}.dist-info/licenses/LICENSE")
    assert licence == (ROOT / "LICENSE").read_bytes()
    assert (about["Name"], about["Version"]) == ("deit", host.VERSION)
    assert (about["License-Expression"], about["Requires-Python"]) == ("Apache-2.0", ">=3.11")
    assert about["Description-Content-Type"] == "text/markdown"
    assert about.get_payload(decode=True).decode() == (ROOT / "README.md").read_text()
    assert "Typing :: Typed" in about.get_all("Classifier")
    assert about.get_all("Project-URL")


@pytest.mark.slow
def test_the_wheel_works_where_it_is_installed(clean, tmp_path):
    """In another folder, in an environment that has no path to this source."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "OMP_"))}
    variables["XDG_CACHE_HOME"] = str(tmp_path / "cache")

    def out(program, *arguments):
        return run(clean / program, *arguments, cwd=tmp_path, env=variables)

    place = Path(out("python", "-c", "import deit; print(deit.__file__)"))
    assert place.is_relative_to(clean.parent.resolve())
    assert out("deit", "--version") == f"deit {host.VERSION}"
    assert out("deit", "recipes") == run(sys.executable, "-m", "deit", "recipes")
    done = subprocess.run(
        [clean / "python", "-m", "deit", "doctor", "--json"],
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    found = json.loads(done.stdout)
    assert found["installed"]["deit"] == host.VERSION, done.stderr
    assert found["unknown"] == {}
    assert done.returncode == bool(found["broken"])
    shown = out(
        "python", "-c", "from deit.serve.app import _PAGES; print(sum(p.stat().st_size for p, _ in _PAGES.values()))"
    )
    assert int(shown) == sum(
        FILES[f"deit/{name}"].stat().st_size
        for name in (
            *("serve/page.html", "serve/page.js", "serve/page.css"),
            *("web/shown.js", "web/words.js", "web/shown.css"),
        )
    )
