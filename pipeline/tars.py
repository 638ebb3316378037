"""Webdataset tars: members whose names agree up to the first dot are one row. Nothing is extracted, and no name is used as a path.

A tar has no index, so planning reads it once from front to end; blocks are byte ranges of it afterwards.
"""

import io
import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.asyn import AsyncFileSystem

from pipeline.faults import JobError
from pipeline.schema import MAX_PICTURE_BYTES, SUFFIXES

TEXTS = ("txt", "text", "caption", "cls", "json")
"""Members with these extensions become columns of text; others but pictures are left out."""
GROUP_ROWS = 16
"""Rows that are read together at least, as a row group is."""
READ_AHEAD = 4 * 2**20
MOST_HEADER_BYTES = 2**20
"""Of names and other headers that a tar may ask to hold in memory."""
_NAME = re.compile(r"(?P<key>(?:.*/)?[^./][^./]*)\.(?P<extension>[^/]+)", re.DOTALL)


class TarError(JobError):
    """A tar that cannot be read; the message says why."""


@dataclass(kw_only=True)
class Contents:
    """What planning needs to know of one tar."""

    keys: list[str] = field(default_factory=list)
    pictures: dict[str, str] = field(default_factory=dict)
    """Extensions that pictures have -> the first such member."""
    texts: set[str] = field(default_factory=set)
    counts: list[int] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)
    """First byte and end of each group of rows."""
    sizes: list[int] = field(default_factory=list)
    """Bytes of what is kept of each group."""
    several: str | None = None
    """A key with more than one picture."""


def look(fs: AbstractFileSystem, file: str) -> Contents:
    """Reads the headers of a tar. Raises TarError if it is damaged."""
    found, current, kinds = Contents(), None, 0
    with _opened(fs, file, 0) as tar:
        for member, key, extension in _members(tar, file):
            start = int(member.offset)
            if key != current:
                current, kinds = key, 0
                if not found.counts or found.counts[-1] >= GROUP_ROWS:
                    found.counts.append(0)
                    found.spans.append((start, start))
                    found.sizes.append(0)
                found.keys.append(key)
                found.counts[-1] += 1
            if is_picture(extension):
                kinds += 1
                found.pictures.setdefault(extension, member.name)
                found.several = found.several or (key if kinds > 1 else None)
            elif extension in TEXTS:
                found.texts.add(extension)
            found.spans[-1] = (found.spans[-1][0], int(member.offset_data) + int(member.size))
            found.sizes[-1] += int(member.size) if member.size <= MAX_PICTURE_BYTES else 0
    return found


def is_picture(extension: str) -> bool:
    """Of extensions as ``jpg`` or ``mask.png``."""
    return f".{extension}".lower().endswith(SUFFIXES)


def rows(fs: AbstractFileSystem, file: str, start: int, end: int, picture: str | None) -> list[dict[str, Any]]:
    """The rows between two bytes of a tar: ``id``, ``image``, ``reason`` (why there is no image although there should be one) and texts.

    ``picture``: the extension of the pictures to take; None takes any.
    """
    made: list[dict[str, Any]] = []
    with _opened(fs, file, start) as tar:
        for member, key, extension in _members(tar, file):
            if member.offset >= end:
                break
            if not made or made[-1]["id"] != key:
                made.append({"id": key, "image": None, "reason": None})
            wanted = extension == picture if picture else is_picture(extension)
            if not wanted and extension not in TEXTS:
                continue
            if member.size > MAX_PICTURE_BYTES:
                made[-1]["reason"] = f"the member .{extension} has {member.size} bytes; at most {MAX_PICTURE_BYTES} are read"
                continue
            content = _content(tar, member, file)
            made[-1] |= {"image": {"bytes": content, "path": member.name}} if wanted else {extension: content.decode(errors="replace")}
    return made


def _members(tar: tarfile.TarFile, file: str) -> Iterator[tuple[tarfile.TarInfo, str, str]]:
    """Plain files with a key and an extension; links, devices, folders, holes and hidden files are left out."""
    last = -1
    while (member := _next(tar, file)) is not None:
        if member.offset <= last or member.size < 0:  # a size below zero leads back to where one was
            raise TarError(f"{file} is not a readable tar: a header at byte {last} points backwards")
        last = int(member.offset)
        name = _NAME.fullmatch(member.name)
        if name and member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse():
            yield member, name["key"], name["extension"].lower()


def _next(tar: tarfile.TarFile, file: str) -> tarfile.TarInfo | None:
    try:
        member = tar.next()
        tar.members.clear()  # type: ignore[attr-defined]  # else tarfile keeps all of them
        if member is None and _after(tar, tar.offset, tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile takes damage for the end
            raise tarfile.ReadError(f"what stands at byte {tar.offset} is no header")
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise TarError(f"{file} is not a readable tar: {str(error)[:160] or 'it ends too early'}") from None
    return member


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, file: str) -> bytes:
    data = _after(tar, int(member.offset_data), int(member.size))
    if len(data) < member.size:
        raise TarError(f"{file} is not a readable tar: it ends within a member")
    return data


def _after(tar: tarfile.TarFile, start: int, size: int) -> bytes:
    assert isinstance(tar.fileobj, _Headers)
    tar.fileobj.seek(start)
    return bytes(tar.fileobj.stream.read(size))


@contextmanager
def _opened(fs: AbstractFileSystem, file: str, start: int) -> Iterator[tarfile.TarFile]:
    how: dict[str, Any] = {"cache_type": "readahead", "block_size": READ_AHEAD} if isinstance(fs, AsyncFileSystem) else {}
    with fs.open(file, **how) as stream:
        stream.seek(start)
        try:
            tar = tarfile.open(fileobj=_Headers(stream), mode="r:", errors="surrogateescape")  # noqa: SIM115
        except (tarfile.TarError, EOFError, ValueError) as error:
            raise TarError(f"{file} is not a readable tar: {error}") from None
        with tar:
            yield tar


class _Headers(io.RawIOBase):
    """A stream of which headers, which tarfile holds in memory whole, cannot ask for much."""

    def __init__(self, stream: Any):
        self.stream = stream

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MOST_HEADER_BYTES:
            raise tarfile.ReadError("a header asks for too much memory")
        return bytes(self.stream.read(size))

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self.stream.seek(offset, whence))

    def tell(self) -> int:
        return int(self.stream.tell())

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True
