"""Pictures out of a table into files. Ids come from data: no file is written outside the folder, and none over another."""

import hashlib
import io
import re
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from pipeline import schema
from pipeline.config import ConfigError, Source
from pipeline.sources import Input, find
from pipeline.summary import batches

SUFFIXES = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tif"}
LONGEST = 100
"""Bytes of one part of a file's name; what is longer is cut and told apart by a hash."""
DEEPEST = 16
"""Parts of a file's name; of more the last are kept."""


def picture_table(address: str, column: str | None) -> tuple[Input, str]:
    """A table with pictures and the column that they are in: the one asked for, else ``edited``, else ``image``.
    Raises ConfigError if there is none."""
    found = find(Source(path=address))
    if found.kind != "parquet":
        raise ConfigError(f"{address} holds picture files already; give a table that align, invert or edit wrote")
    names = [f.name for f in found.columns if schema.is_image_column(f.type)]
    chosen = column or next((name for name in ("edited", "image") if name in names), "image")
    if chosen not in names or "id" not in found.columns.names:
        raise ConfigError(f"{address} has no pictures in a column {chosen!r} beside an id; it has {', '.join(found.columns.names)}")
    return found, chosen


def pictures(found: Input, column: str) -> Iterator[tuple[str, bytes | None]]:
    """Id and encoded picture of each row in order, None where there is no picture; a few row groups in memory at a time."""
    for batch in batches(found, ["id", column]):
        yield from zip(map(str, batch["id"].to_pylist()), schema.image_bytes(batch[column]), strict=True)


def write_picture(folder: Path, name: str, data: bytes, taken: set[str]) -> Path | None:
    """Writes an encoded picture, its bytes unchanged, to a file of its row's id; None if the bytes are no picture.

    ``taken`` holds the names that were used, so that no two differ in their case only: other systems take them for one. Raises
    OSError if it cannot be written.
    """
    try:
        with Image.open(io.BytesIO(data), formats=tuple(SUFFIXES)) as picture:
            suffix = SUFFIXES.get(picture.format or "")
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError):
        return None
    if suffix is None:
        return None
    for path in (folder / safe_name(name, suffix), folder / safe_name(name, suffix, told_apart=True)):
        if str(path).casefold() in taken:
            continue
        taken.add(str(path).casefold())
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as file:
                file.write(data)
        except (FileExistsError, NotADirectoryError):
            continue
        return path
    raise FileExistsError(f"there are two rows with the id {name!r}")


def safe_name(name: str, suffix: str, told_apart: bool = False) -> Path:
    """A relative path made of an id: its parts without what a file system or a shell could take for something else; never
    absolute, never upwards, never hidden. An id that had to be changed is ``told_apart`` from others by a hash."""
    parts = [re.sub(r"[^\w. -]", "_", part).strip(" .").lstrip("-") for part in name.removesuffix(suffix).split("/")]
    kept = [part.encode()[:LONGEST].decode(errors="ignore").strip(" .") for part in parts if part][-DEEPEST:] or ["_"]
    if told_apart or "/".join(kept) != name.removesuffix(suffix):
        kept[-1] += "-" + hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return Path(*kept[:-1], kept[-1] + suffix)
