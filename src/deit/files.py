"""Finds files in a folder or on the Hugging Face hub, reads them whole and writes them at once.

Local folders need no network. `huggingface_hub` is imported only to fetch a file that no local folder has.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, get_args

from deit import host


class CheckpointError(ValueError):
    """A checkpoint can't be read whole. The message names the file, what was found and what to do."""


class NotFetched(FileNotFoundError):
    """A file is not in the local cache, and the hub was not asked, not reachable, or broke off."""


WHERE = ("revision", "subfolder", "cache_dir", "local_files_only", "token", "force_download")
"""The options of `find_file`, which everything that reads files of a model takes."""


def find_file(
    name_or_folder: str | Path,
    filename: str,
    *,
    revision: str | None = None,
    subfolder: str = "",
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    force_download: bool = False,
) -> Path:
    """Path of `filename` in a folder, or in the local cache of a hub repository. Downloads the file if allowed.

    `force_download` fetches a file again that the cache has.

    `HF_HOME`, `HF_TOKEN`, `HF_ENDPOINT` and `HF_HUB_OFFLINE` are respected. Raises `FileNotFoundError` with the reason.
    """
    place = Path(name_or_folder).expanduser()
    if place.is_file():  # a weight file: the model's other files lie beside it
        place = place.parent
    if place.is_dir():
        path = place / subfolder / filename
        if path.is_file():
            return path
        raise FileNotFoundError(f"{path.parent} holds no {filename}")
    name = str(name_or_folder)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or place.suffix in (".pth", ".bin", ".safetensors"):
        raise FileNotFoundError(
            f"{name} does not exist; give an existing folder, or a hub name like facebook/deit-tiny-patch16-224"
        )
    return _download(
        name,
        filename,
        revision=revision,
        subfolder=subfolder or None,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        token=token,
        force_download=force_download,
    )


_PATIENCE = 5.0
"""Seconds for the hub to accept a connection."""
_FORGOTTEN = 60.0
"""Seconds after which a hub that did not is tried again."""
_failed: dict[str, float] = {}
"""When which address did not answer."""


def reachable(address: str, patience: float = _PATIENCE) -> bool:
    """Whether a server accepts a connection within `patience` seconds. The hub's client would try each file six times,
    for half a minute.

    What lies behind a proxy is taken to be reachable.
    """
    import socket  # here and not above, because these slow the start of every command
    import urllib.parse
    import urllib.request

    parts = urllib.parse.urlsplit(address)
    host, port = parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443)
    proxied = {parts.scheme, "all"} & urllib.request.getproxies().keys()
    if proxied and not urllib.request.proxy_bypass(host):
        return True
    if time.monotonic() - _failed.get(address, -_FORGOTTEN) < _FORGOTTEN:
        return False
    try:
        socket.create_connection((host, port), timeout=patience).close()
    except OSError:
        _failed[address] = time.monotonic()
        return False
    return True


def _download(name: str, filename: str, **options: Any) -> Path:
    try:
        from huggingface_hub import constants, errors, hf_hub_download
    except ImportError:
        raise FileNotFoundError(
            str(host.missing(f"there is no folder {name}, and fetching it from the hub needs huggingface_hub", "hub"))
        ) from None
    if not options["local_files_only"] and not constants.HF_HUB_OFFLINE:
        options["local_files_only"] = not reachable(constants.ENDPOINT)
    if options["force_download"] and (options["local_files_only"] or constants.HF_HUB_OFFLINE):
        raise NotFetched(
            f"{filename} of {name} could not be fetched again (offline, no network, or the hub does not answer); "
            "connect, or leave force_download out to read the local cache"
        )
    try:
        return Path(hf_hub_download(name, filename, **options))
    except errors.EntryNotFoundError as error:
        if isinstance(error, errors.LocalEntryNotFoundError):
            raise NotFetched(
                f"{filename} of {name} is not in the local cache and could not be fetched (offline, no network, or the "
                f"hub does not answer), and there is no local folder {name}; check its path, or connect"
            ) from None
        raise FileNotFoundError(f"{name} on the hub holds no {filename}") from None
    except errors.RevisionNotFoundError:
        raise FileNotFoundError(f"{name} on the hub has no revision {options['revision']!r}") from None
    except (errors.RepositoryNotFoundError, errors.GatedRepoError):
        raise FileNotFoundError(
            f"there is neither a folder {name} nor a hub repository of that name that this token "
            "may read; check the name, or pass token="
        ) from None
    except errors.HFValidationError:
        raise FileNotFoundError(f"{name!r} is neither a folder nor a possible hub name (user/model)") from None
    except errors.HfHubHTTPError as error:
        raise FileNotFoundError(
            f"the hub did not send {filename} of {name} ({str(error).splitlines()[0]}); check the token"
        ) from None
    except (OSError, ValueError, TypeError):  # of the disk, or of the options
        raise
    except Exception as error:  # of whichever package the client sends and receives with
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise NotFetched(
            f"{filename} of {name} was not fetched to its end ({reason}); check the network, then give the same "
            "command again"
        ) from None


Cache = Literal["engines", "features", "packages"]
"""What this user's cache may hold: models in other runtimes, features of frozen models, packages for web pages."""


class CacheUnused(PermissionError):
    """The cache can't be made, or others could change it. The message says what was found and what to do."""

    def __init__(self, folder: Path, found: str):
        super().__init__(
            f"the cache {folder} is not used, because {found}; expected folders that only you can change: set "
            "XDG_CACHE_HOME to one of them"
        )


def cache_folder(name: Cache) -> Path:
    """This user's folder for files that can be made again: in `XDG_CACHE_HOME`, by default `~/.cache`.

    Makes the folder if it is missing, so that nobody else can write there. A folder of this user's that others could
    write to is made anew. Raises `CacheUnused` if that would remove anything but a cache, if the folder can't be
    made, if it belongs to another user, or if others could replace it because a folder above it is theirs or open to
    all.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute()
    folder = base / "deit" / name
    try:
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        for part in (folder.parent, folder):
            if part.is_dir() and not part.is_symlink() and _open_to_others(part, sticky=False) and _is_mine(part):
                if part == folder.parent and (other := sorted({*os.listdir(part)} - {*get_args(Cache)})):
                    raise CacheUnused(folder, f"others can write to {part}, and it also holds {other[0]}")
                shutil.rmtree(part)
            part.mkdir(mode=0o700, exist_ok=True)
    except CacheUnused:
        raise
    except OSError as error:  # the home folder may be read-only
        raise CacheUnused(folder, f"it can't be made ({error})") from None
    for place in (folder, Path(os.path.realpath(folder))):
        for part in (place, *place.parents):
            own = part in (place, place.parent)
            if not _is_mine(part) or _open_to_others(part, sticky=not own):
                found = "which others can write to" if _is_mine(part) else "which belongs to another user"
                raise CacheUnused(folder, f"it lies in {part}, {found}")
    return folder


def only_mine(folder: Path) -> bool:
    """Whether a folder and the files in it are no links, and no other user could have written them."""
    return all(
        not path.is_symlink() and _is_mine(path) and not _open_to_others(path, sticky=False)
        for path in (folder, *folder.rglob("*"))
    )


_KEPT = 30 * 24 * 60 * 60
"""Seconds that an unused file or folder stays in a cache."""


def forget_unused(cache: Path) -> None:
    """Removes what nobody used in a cache for a month, by the clock of the file system. Use sets the time of change."""
    with tempfile.TemporaryFile(dir=cache) as file:
        now = os.fstat(file.fileno()).st_mtime
    for other in cache.iterdir():
        with suppress(OSError):
            unused = now - other.stat().st_mtime
            if unused > _KEPT:
                remove(other)
            elif unused < 0:  # the clock was ahead, and it would stay until that time is there again
                os.utime(other)


def remove(path: Path) -> None:
    """Removes a file, a link or a whole folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _is_mine(path: Path) -> bool:
    """Whether a path belongs to this user or to the system's administrator."""
    return not hasattr(os, "getuid") or os.lstat(path).st_uid in (os.getuid(), 0)


def _open_to_others(path: Path, *, sticky: bool) -> bool:
    """Whether other users can change a path. `sticky` allows folders like /tmp, where nobody removes what is another's.

    The group that many systems make for each user counts as the user.
    """
    found = os.lstat(path)
    if not hasattr(os, "getuid") or stat.S_ISLNK(found.st_mode) or (sticky and found.st_mode & stat.S_ISVTX):
        return False
    shared = found.st_mode & stat.S_IWGRP and found.st_gid != 0 and not _is_own_group(found.st_gid)
    return bool(shared or found.st_mode & stat.S_IWOTH)


def _is_own_group(group: int) -> bool:
    import grp
    import pwd

    try:
        return group == os.getgid() and grp.getgrgid(group).gr_name == pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return False


MAX_JSON = 8 * 2**20
"""Largest JSON file that is read, in bytes. The labels of ImageNet-21k take a third of it."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `CheckpointError` for anything else, and for what readers disagree about: keys
    that are there twice, and numbers that are not finite."""
    if (size := path.stat().st_size) > MAX_JSON:
        raise CheckpointError(
            f"{path} takes {size / 2**20:.0f} MiB, expected at most {MAX_JSON / 2**20:.0f} MiB of JSON; fetch or write "
            "it again"
        )
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        reason = "brackets in too many brackets" if isinstance(error, RecursionError) else error
        raise CheckpointError(f"{path} is not valid JSON ({reason}); fetch or write it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} should hold a JSON object, found {type(content).__name__}")
    return content


def parse_json(text: str) -> Any:
    """Like `json.loads`, but strict: raises `ValueError` for a key that is there twice, NaN and infinity."""
    return json.loads(text, object_pairs_hook=_once, parse_constant=_no_number, parse_float=_finite)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is too large for a number")
    return value


def make_parent(path: Path) -> None:
    if path.parent.exists() and not path.parent.is_dir():
        raise FileExistsError(f"{path.parent} is a file, expected a folder; choose another folder")
    path.parent.mkdir(parents=True, exist_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`. If the block ends without an error, the temporary file replaces `path`.

    So readers never see half a file. A process that is killed leaves the temporary file, which `sweep` removes.
    """
    make_parent(path)
    temporary = _temporary(path)
    try:
        with told_if_full(path):
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)  # safetensors lets only the owner read its files, but a server may be another user
            _flush(temporary)
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Returns when the disk has the file. Windows flushes no file that is open for reading alone."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except PermissionError:  # the copy of a file that is read-only
        descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class DiskFull(OSError):
    """There is no room to write a file. The message names it, and says what to do."""

    def __init__(self, path: Path, reason: str, move: str = "free space, then give the same command again"):
        super().__init__(f"{path} can't be written ({reason}); what was finished before is untouched; {move}")
        self.reason = reason


def free_bytes(folder: Path) -> int | None:
    """Number of bytes that are free on the disk of a folder; None if the system doesn't say."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def refuse_full(path: Path, needs: str, needed: int, free: int | None) -> None:
    """Raises `DiskFull` before anything is written, if fewer than `needed` bytes are `free`. `needs` says it."""
    if free is not None and free < needed:
        raise DiskFull(path, f"{os.strerror(errno.ENOSPC)}: {needs}, and {free / 2**20:.1f} MiB are free")


_FULL = 2**16
"""Free bytes below which an error that names no reason is taken for one of a full disk."""


@contextmanager
def told_if_full(path: Path) -> Iterator[None]:
    """Raises `DiskFull` if the block fails because there is no room for `path`, however a library says that."""
    try:
        yield
    except DiskFull as error:
        raise DiskFull(path, error.reason) from error
    except Exception as error:
        words = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT)]
        reason = next((each for each in words if each in str(error)), "")
        if not reason and not isinstance(error, ValueError):
            with suppress(OSError):
                reason = words[0] if shutil.disk_usage(path.parent).free < _FULL else ""
        if not reason:
            raise
        raise DiskFull(path, reason) from error


@contextmanager
def replacing_folder(folder: Path, *, check: Callable[[Path], None]) -> Iterator[Path]:
    """A temporary folder beside `folder`. If the block ends without an error, the temporary folder replaces `folder`.

    Readers see either the former folder or the new one, each of them whole. Right before the replacement, `check` is
    called with `folder`; it may refuse by raising. If the process is killed during the replacement, `restore_folder`
    brings the former folder back.
    """
    make_parent(folder)
    temporary = _temporary(folder)
    former = temporary.with_name(temporary.name + _FORMER)
    try:
        with told_if_full(folder):
            temporary.mkdir()
            yield temporary
            for path in temporary.iterdir():
                _flush(path)
        check(folder)
        if folder.exists():
            folder.rename(former)
        try:
            temporary.rename(folder)
        except OSError:
            if former.exists():
                former.rename(folder)
            raise
        shutil.rmtree(former, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


_FORMER = ".former"
_HEX = "[0-9a-f]" * 8


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")


def remove_folder(folder: Path) -> None:
    """Removes a folder, all at once for whoever looks for it. What a killed process leaves of it, `sweep` removes."""
    hidden = _temporary(folder)
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def sweep(folder: Path, *names: str) -> None:
    """Removes the temporary files and folders that killed processes left in `folder` for `names`, which may be
    patterns.

    Nobody else may be writing under these names, so call it where they are `held`.
    """
    for name in names:
        for left in folder.glob(f".{name}.{_HEX}"):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def restore_folder(folder: Path) -> None:
    """Undoes a replacement by `replacing_folder` that a killed process left half done, and removes what it left.

    Call it where `folder` is `held`.
    """
    for former in sorted(folder.parent.glob(f".{folder.name}.{_HEX}{_FORMER}")):
        if folder.exists():
            shutil.rmtree(former, ignore_errors=True)
        else:
            former.rename(folder)
    sweep(folder.parent, folder.name)


# -------------------------------------------------------------------------------------------------------------- writing


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_archive(path: Path, save: Callable[[io.BytesIO], None]) -> None:
    """Writes what PyTorch saves, by way of main memory. Its own writer ends the whole process when the disk is full."""
    archive = io.BytesIO()
    save(archive)
    path.write_bytes(archive.getbuffer())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def upload(
    folder: Path,
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload model",
    describe: Callable[[str], object] | None = None,
) -> str:
    """Uploads a folder to the hub, and creates the repository and the branch `revision` if they are missing.

    A `repo_id` without an owner is one of the token's owner. `describe` is called with the whole name, before the
    upload. Returns the commit's address.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise host.missing("pushing to the hub needs huggingface_hub", "hub") from None
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/"):  # the hub makes no branch by itself
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    if describe is not None:
        describe(repo_id)
    return str(api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message))


def upload_saved(save: Callable[[Path], object], repo_id: str, **options: Any) -> str:
    """`upload` of what `save` writes, and of nothing else."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        return upload(Path(folder), repo_id, **options)


def push_options(push_to_hub: bool, folder: str | os.PathLike[str], **options: Any) -> dict[str, Any]:
    """The options of `upload` that were given; those of a call that does not push are refused.

    The repository's name is the folder's if no `repo_id` is given.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if not push_to_hub and given:
        raise ValueError(
            f"{', '.join(given)} is for the hub, and nothing is pushed; pass push_to_hub=True, or leave it out"
        )
    return {"repo_id": Path(folder).resolve().name, **given}
