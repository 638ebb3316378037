"""``_run.json`` beside the rows of a dataset: what made them. Written before the first row and again at the end."""

import errno
import json
from collections.abc import Mapping
from typing import Any
from uuid import uuid4

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from models.stores import has_folders
from pipeline.config import ConfigError

RECORD = "_run.json"
RUNNING, FINISHED, FAILED = "running", "finished", "failed its audit"
"""The ``state`` of a manifest: of a run that goes on or was stopped, of one whose rows are all there, of one whose ids are wrong."""


def read_manifest(folder: str) -> dict[str, Any]:
    """Empty where there is none. Raises ConfigError if it is damaged."""
    fs, root = url_to_fs(folder)
    if not fs.exists(f"{root}/{RECORD}"):
        return {}
    try:
        manifest = json.loads(fs.cat_file(f"{root}/{RECORD}"))
    except ValueError as error:
        raise ConfigError(f"{folder}/{RECORD} is damaged: {error}") from None
    if not isinstance(manifest, dict):
        raise ConfigError(f"{folder}/{RECORD} is damaged: it holds no JSON object")
    return manifest


def is_finished(manifest: Mapping[str, Any]) -> bool:
    """Whether the run came to its end and its ids were right; a record that does not say is taken for one that did."""
    return bool(manifest.get("state", FINISHED) == FINISHED)


def write_manifest(folder: str, manifest: Mapping[str, Any]) -> None:
    """In one stroke: whoever reads meanwhile sees the old one or the new one."""
    write_in_one_stroke(folder, RECORD, (json.dumps(manifest, indent=2) + "\n").encode())


def write_in_one_stroke(folder: str, name: str, data: bytes) -> None:
    """A file under its final name only when it is whole; one that was there is replaced."""
    fs, root = url_to_fs(folder)
    if not has_folders(fs):  # object stores show a file when it is complete
        fs.pipe_file(f"{root}/{name}", data)
        return
    part = f"{root}/.{name}.{uuid4().hex}.tmp"  # two attempts at one block must not share it
    try:
        fs.pipe_file(part, data)
        _replace(fs, part, f"{root}/{name}")
    except OSError:
        fs.rm_file(part) if fs.exists(part) else None  # half a file would only fill a full disk
        raise


def _replace(fs: AbstractFileSystem, part: str, file: str) -> None:
    """Renames. Some file systems (SMB, HDFS) do not rename over a file that is there, and one (WebHDFS) does not say so."""
    try:
        fs.mv(part, file)
    except OSError as error:
        if error.errno != errno.EEXIST and not isinstance(error, FileExistsError):
            raise
    if fs.exists(part):
        fs.rm_file(file)
        fs.mv(part, file)
