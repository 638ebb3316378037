"""Files behind fsspec: ``s3://``, ``https://`` and whatever other protocols are installed.

Credentials and endpoints are those of the environment, as each protocol's own client reads them (``AWS_ENDPOINT_URL``).
"""

import errno
import os
import posixpath
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec

from models.references import MissingError, UnreachableError, WeightsError, public

_IDENTITY = ("size", "ETag", "etag", "Last-Modified", "LastModified", "Content-MD5", "md5Hash", "generation", "mtime")
"""What stores say of a file and would not say of another."""

OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "oci", "memory"}
"""Protocols that know no folders and no half-written files: an object is there when all of it is."""


def be_patient() -> None:
    """S3 may be busy or out of reach for a minute or two: botocore tries again, waiting longer each time, unless AWS_MAX_ATTEMPTS or
    AWS_RETRY_MODE say otherwise; s3fs tries what still fails four times more. For every S3 file system of this process."""
    if not {"AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE"} & os.environ.keys():
        settings = fsspec.config.conf.setdefault("s3", {}).setdefault("config_kwargs", {})
        settings.setdefault("retries", {"mode": "standard", "total_max_attempts": 8})


be_patient()


def has_folders(filesystem: fsspec.AbstractFileSystem) -> bool:
    """Whether a file system has folders, which must be made, and moves files, as disks do; of wrapped ones the innermost."""
    inside = getattr(filesystem, "fs", None)
    if isinstance(inside, fsspec.AbstractFileSystem):
        return has_folders(inside)
    protocols = {filesystem.protocol} if isinstance(filesystem.protocol, str) else set(filesystem.protocol)
    return protocols.isdisjoint(OBJECT_STORES)


def make_folder(filesystem: fsspec.AbstractFileSystem, path: str) -> None:
    """Where there are folders: an object store needs none, and its client would make a bucket of a name that was mistyped."""
    if has_folders(filesystem):
        filesystem.makedirs(path, exist_ok=True)


def missing_bucket(filesystem: fsspec.AbstractFileSystem, path: str) -> str | None:
    """The bucket of a path if there is none of that name; None where there are no buckets, or nobody may look."""
    bucket = "" if has_folders(filesystem) else path.partition("/")[0]
    try:
        if bucket:
            filesystem.info(bucket)
    except FileNotFoundError:
        return bucket
    except OSError:  # who may not look at a bucket may write to it all the same
        return None
    return None


def identity(url: str) -> dict[str, str]:
    """What a store says of a file: the same unless the file changes. Raises WeightsError, MissingError if there is none."""
    with _explained(url):
        filesystem, path = _filesystem(url)
        about = filesystem.info(path)
    if about.get("type") == "directory":
        raise MissingError(f"{public(url)} is a folder, not a file")
    return {name: str(about[name]) for name in _IDENTITY if about.get(name) is not None}


def names(url: str) -> list[str]:
    """Names of what lies directly in a folder, sorted. Raises WeightsError."""
    with _explained(url):
        filesystem, path = _filesystem(url)
        return sorted({posixpath.basename(urlsplit(str(name)).path) for name in filesystem.ls(path, detail=False)} - {""})


def download(url: str, to: Path, size: int | None) -> None:
    """Writes a file of ``size`` bytes, if that is known. Raises WeightsError; OSError if the disk is full."""
    with _explained(url):
        filesystem, path = _filesystem(url)
        with _progress(posixpath.basename(path)) as callback:
            filesystem.get_file(path, str(to), callback=callback)
    got = to.stat().st_size
    if size not in {None, got} and not url.startswith("http"):  # http may be compressed on its way, and its client counts itself
        raise UnreachableError(f"{public(url)} was cut short: {got} of {size} bytes came; try again")


def _filesystem(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    try:
        filesystem, path = url_to_fs(url)
    except (ImportError, ValueError) as error:  # fsspec says which package is missing
        raise WeightsError(f"{public(url)} cannot be opened: {error}") from None
    filesystem.invalidate_cache()
    return filesystem, path


@contextmanager
def _progress(name: str) -> Iterator[Any]:
    from fsspec.callbacks import DEFAULT_CALLBACK, TqdmCallback

    if not sys.stderr.isatty():
        yield DEFAULT_CALLBACK
        return
    with TqdmCallback({"desc": urlsplit(name).path, "unit": "B", "unit_scale": True, "delay": 2, "leave": False}) as callback:
        yield callback


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turns what fsspec's file systems raise into a WeightsError that says what to do. Of their own texts nothing is
    repeated, since they may hold signatures."""
    failures: tuple[type[Exception], ...] = (
        OSError,
        *_classes("botocore.exceptions", "BotoCoreError", "ClientError"),
        *_classes("aiohttp", "ClientError"),
    )
    try:
        yield
    except failures as error:
        if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise  # of this machine and not of the store
        raise _explanation(url, error) from None


def _classes(module: str, *names: str) -> tuple[type[Exception], ...]:
    """Exceptions of a package that not every store needs."""
    try:
        loaded = import_module(module)
    except ImportError:
        return ()
    return tuple(getattr(loaded, name) for name in names)


def _explanation(url: str, error: BaseException) -> WeightsError:
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    status = next((e.status for e in chain if hasattr(e, "status")), None)
    credentials = _classes("botocore.exceptions", "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError")
    if status in {401, 403, 407} or isinstance(error, (PermissionError, *credentials)):
        return WeightsError(f"{public(url)} may not be read; {how_to_be_allowed(urlsplit(url).scheme)}")
    over_http = any(type(e).__module__.startswith("aiohttp") for e in chain)  # where fsspec calls any failure "not found"
    if status in {404, 410} or (isinstance(error, FileNotFoundError) and not over_http):
        return MissingError(f"{public(url)} does not exist")
    what = f"HTTP {status}" if status else type(chain[-1]).__name__
    return UnreachableError(
        f"{public(url)} cannot be reached ({what}); check the address and the network, or give the path of a local copy"
    )


def how_to_be_allowed(scheme: str) -> str:
    """What to do where a store asks for credentials."""
    if scheme in {"s3", "s3a"}:
        return "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, or FSSPEC_S3_ANON=true for a public bucket"
    if scheme in {"http", "https"}:
        return "use an address that needs no login, or a signed one that has not expired, or give the path of a local copy"
    return f"set the credentials of {scheme}://, or give the path of a local copy"
