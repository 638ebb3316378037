"""A reference becomes a file on this machine. Imports no torch.

Local files are used where they are, those of the Hugging Face hub lie in its own cache, all others in ``cache_folder()``:
each under its SHA-256, found by a record under the hash of its reference. A store is asked once a process whether a file
has changed; if it does not answer, the cache does. Whatever is downloaded is moved into place in one stroke.
"""

import hashlib
import json
import logging
import os
import posixpath
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

from models import stores
from models.hub import hub_file, hub_names
from models.references import MissingError, NotCachedError, Place, UnreachableError, WeightsError, offline, place_of, public

log = logging.getLogger(__name__)


def file_of(reference: str | Path) -> Path:
    """Local copy of one file. Raises WeightsError, in one line that says what to do, if it is missing, may not be read,
    cannot be reached, or has another SHA-256 than the reference says."""
    return _file_at(place_of(reference))


def _file_at(place: Place) -> Path:
    if place.kind == "hub":
        if not place.path:
            raise MissingError(f"{place.repo} does not exist" if place.bare else f"{place} is a repository; write {place}/FILE")
        file = hub_file(place)
    elif place.kind == "remote":
        file = _remote_file(place.path, place.sha256, str(cache_folder()), offline())
    else:
        file = Path(place.path)
        if not file.is_file():
            raise MissingError(f"{file} is a folder, not a file" if file.is_dir() else f"{file} does not exist")
    if place.sha256 and digest(file) != place.sha256:
        raise _wrong(place, digest(file))
    return file


def check_file(reference: str | Path) -> None:
    """Raises WeightsError, as ``file_of`` does, if a file cannot be had; fetches nothing of it."""
    place = place_of(reference)
    if place.kind == "hub" and place.path:
        if place.path not in hub_names(place):
            raise MissingError(f"hf://{place.repo} has no file {place.path}")
    elif place.kind == "remote" and not offline():
        try:
            stores.identity(place.path)
        except UnreachableError:
            _file_at(place)  # which may be in the cache
    else:
        _file_at(place)


def version_of(reference: str | Path) -> str | None:
    """16 hex digits that tell a file from another one at the same place, and fetch nothing of it: of its contents where they are here or
    pinned, else of what its store says of it. None for the hub, whose files are published, and where nothing can be told."""
    place = place_of(reference)
    if place.sha256:
        return place.sha256[:16]
    with suppress(WeightsError):
        if place.kind == "local":
            return digest(_file_at(place))[:16]
        if place.kind == "remote" and not offline():
            said = json.dumps(stores.identity(place.path), sort_keys=True)
            return hashlib.sha256(said.encode()).hexdigest()[:16]
    return None


def first_in(folder: str | Path, names: Iterable[str]) -> tuple[str, Path] | None:
    """The first of ``names`` that a folder has, and a local copy of it; None if it has none of them. Raises WeightsError if
    the folder does not exist, may not be read or cannot be reached, or if only its cache could be looked at, in vain."""
    place, not_cached = _folder_place(folder), None
    for name in names:
        try:
            return name, _file_at(place.child(name))
        except NotCachedError as error:
            not_cached = not_cached or error
        except MissingError:
            continue
    if not_cached:
        raise not_cached
    return None


def names_in(folder: str | Path) -> list[str]:
    """Names of the files directly in a folder, sorted; offline, of those in the cache. Raises as ``first_in``."""
    place = _folder_place(folder)
    if place.kind == "local":
        return sorted(file.name for file in Path(place.path).iterdir() if file.is_file())
    if place.kind == "remote" and not offline():
        return stores.names(place.path)
    if place.kind == "hub":
        files, folder = hub_names(place), place.path
    else:
        records = map(read_record, (cache_folder() / "references").glob("*.json"))
        files, folder = [record.reference for record in records if record], str(place).rstrip("/")
    if folder and not any(file.startswith(f"{folder}/") for file in files):
        raise MissingError(f"{place} does not exist" + (", or nothing of it is in the cache (offline mode is on)" if offline() else ""))
    return sorted(posixpath.basename(file) for file in files if posixpath.dirname(file) == folder)


def _folder_place(folder: str | Path) -> Place:
    place = place_of(folder)
    if place.sha256:
        raise WeightsError(f"{place} is a folder, and #sha256= is of a single file")
    if place.kind == "local" and not Path(place.path).is_dir():
        raise WeightsError(f"{place} is not a folder; give a local folder, a Hugging Face name (org/name) or a URL (s3://, https://)")
    return place


_digests: dict[tuple[str, int, int], str] = {}
"""Of this process, by path, size and time: a base model takes a second to read."""


def digest(file: Path) -> str:
    """SHA-256 of a file; read once a process unless its size or time changes."""
    if _version(file) not in _digests:
        with file.open("rb") as stream:
            _digests[_version(file)] = hashlib.file_digest(stream, "sha256").hexdigest()
    return _digests[_version(file)]


def _version(file: Path) -> tuple[str, int, int]:
    stat = file.stat()
    return str(file), stat.st_size, stat.st_mtime_ns


def _wrong(place: Place, got: str) -> WeightsError:
    return WeightsError(f"{place} should have SHA-256 {place.sha256} and has {got}; get the right file or correct the digest")


# ---- the cache -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """What is known of a downloaded file."""

    reference: str
    """Without credentials."""
    name: str
    sha256: str
    size: int
    mtime_ns: int
    source: dict[str, str]
    """What its store said of it; another answer means another file."""


def cache_folder() -> Path:
    """``$DIFFUSIONCLIP_CACHE``; else ``diffusionclip`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    chosen = os.environ.get("DIFFUSIONCLIP_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffusionclip"


@lru_cache(maxsize=1024)
def _remote_file(url: str, sha256: str | None, cache: str, offline: bool) -> Path:
    entry = Path(cache, "references", f"{_key(url)}.json")
    record = read_record(entry)
    if record and (offline or record.sha256 == sha256) and intact(_copy(entry, record), entry):
        return _copy(entry, record)
    if offline:
        raise NotCachedError(
            f"{public(url)} is not in the cache {cache} and offline mode is on (DIFFUSIONCLIP_OFFLINE or HF_HUB_OFFLINE); "
            "use it once where there is a network, or give the path of a local copy"
        )
    try:
        source = stores.identity(url)
    except UnreachableError as error:
        if record and intact(_copy(entry, record), entry):
            log.warning("%s; using the copy in the cache", error)
            return _copy(entry, record)
        raise
    if file := _current(entry, source):
        return file
    with locked(entry):
        return _current(entry, source) or _download(url, sha256, source, entry)


def _key(url: str) -> str:
    """Name of a reference's record: the hash of what says which file it is, and not of who asks for it."""
    parts = urlsplit(url)
    return hashlib.sha256(urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])).encode()).hexdigest()


def read_record(entry: Path) -> Record | None:
    """None if there is none that can be read."""
    try:
        return Record(**json.loads(entry.read_text()))
    except (OSError, TypeError, ValueError):
        return None


def write_record(entry: Path, record: Record) -> None:
    write_in_one_stroke(entry, json.dumps(asdict(record), indent=2).encode())


def intact(file: Path, entry: Path) -> bool:
    """Whether a file is there and has its record's contents; it is read only if its size or time is not as recorded.
    Raises WeightsError if it is damaged."""
    record = read_record(entry)
    if record is None or not file.is_file():
        return False
    if _version(file)[1:] == (record.size, record.mtime_ns):
        _digests[_version(file)] = record.sha256
    elif digest(file) != record.sha256:
        raise WeightsError(
            f"{file}, the copy of {record.reference}, is damaged: it should have SHA-256 {record.sha256} and has {digest(file)}; "
            "delete it and run again"
        )
    else:
        with suppress(OSError):  # a cache that may only be read serves as well
            write_record(entry, replace(record, mtime_ns=file.stat().st_mtime_ns))
    return True


def _copy(entry: Path, record: Record) -> Path:
    return entry.parents[1] / "files" / record.sha256 / record.name


def _current(entry: Path, source: dict[str, str]) -> Path | None:
    """The copy of a file whose store still says of it what it said when it was copied. A store that says no more than the size
    is never believed: another file may be as long."""
    if not source.keys() - {"size"}:
        return None
    record = read_record(entry)
    return _copy(entry, record) if record and record.source == source and intact(_copy(entry, record), entry) else None


def _download(url: str, sha256: str | None, source: dict[str, str], entry: Path) -> Path:
    name = posixpath.basename(urlsplit(url.partition("::")[0]).path) or "file"
    part = entry.with_name(f"{entry.stem}.{uuid4().hex}.part")
    try:
        stores.download(url, part, int(source["size"]) if "size" in source else None)
        stat, got = part.stat(), digest(part)
        if sha256 and got != sha256:
            raise _wrong(Place("remote", url, sha256=sha256), got)
        record = Record(public(url), name, got, stat.st_size, stat.st_mtime_ns, source)
        file = _copy(entry, record)
        file.parent.mkdir(parents=True, exist_ok=True)
        part.replace(file)
        write_record(entry, record)
        intact(file, entry)  # so that it need not be read again
        return file
    except OSError as error:
        raise cache_error(entry.parents[1], error) from None
    finally:
        part.unlink(missing_ok=True)


def write_in_one_stroke(file: Path, data: bytes) -> None:
    """Readers see the old contents or the new ones, never half."""
    part = file.with_name(f".{file.name}.{uuid4().hex}.part")
    try:
        part.write_bytes(data)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def locked(entry: Path) -> Iterator[None]:
    """One process of a machine at a time, so that one downloads and the others wait for it. Only traffic is at stake: a
    file system that knows no locks does no harm."""
    from filelock import FileLock

    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(entry.with_suffix(".lock"))
        with suppress(NotImplementedError):
            lock.acquire()
    except OSError as error:
        raise cache_error(entry.parents[1], error) from None
    try:
        yield
    finally:
        lock.release()


def cache_error(folder: Path, error: Exception) -> WeightsError:
    reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else type(error).__name__
    return WeightsError(f"cannot write to the cache {folder} ({reason}); make room there, or set DIFFUSIONCLIP_CACHE to another folder")
