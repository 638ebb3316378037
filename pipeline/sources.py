"""From an address to rows: what is there, which rows make a block, and reading one block.

No Ray here. A block is a run of whole row groups (or of picture files), so that every file is read once.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from pipeline import schema
from pipeline.config import ConfigError, Source
from pipeline.schema import SUFFIXES


@dataclass(frozen=True, kw_only=True)
class Block:
    """Rows ``start .. start + rows`` of the input. ``groups`` names row groups per file; None for picture files."""

    start: int
    rows: int
    files: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Input:
    """What was found at an address. ``kind`` is ``parquet`` or ``pictures``."""

    source: Source
    kind: str
    files: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]
    """Rows of each row group of each file; for pictures one group of one row each."""
    columns: pa.Schema
    """As stored; for pictures ``image`` alone."""

    @cached_property
    def rows(self) -> int:
        total = sum(map(sum, self.counts))
        return total if self.source.limit is None else min(total, self.source.limit)

    @property
    def has_ids(self) -> bool:
        return self.source.id_column in self.columns.names

    @property
    def has_latents(self) -> bool:
        return schema.about(self.columns).get("kind") == "latents"

    @cached_property
    def user_columns(self) -> pa.Schema:
        """What passes through unchanged: every column but the id, the image and those that the project made."""
        made = schema.own_columns("latents") if self.has_latents else ()
        known = {self.source.id_column, self.source.image_column, *made}
        return pa.schema([f for f in self.columns if f.name not in known])


def find(source: Source) -> Input:
    """Looks at an address without reading a picture. Raises ConfigError that says what is there instead."""
    if not source.path:
        raise ConfigError("the address of the input is empty")
    try:
        fs, root = url_to_fs(source.path)
        if not fs.exists(root):
            raise ConfigError(f"there is nothing at {source.path}; give a Parquet file, a folder of them, or a folder of pictures")
        everything = sorted(fs.find(root)) if fs.isdir(root) else [root]
    except (ValueError, ImportError, OSError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{source.path} cannot be opened: {error}") from None
    visible = [f for f in everything if f == root or not any(p.startswith(("_", ".")) for p in _below(f, root).split("/"))]
    tables = tuple(f for f in visible if f.lower().endswith(".parquet"))
    pictures = tuple(f for f in visible if f.lower().endswith(SUFFIXES))
    if tables and pictures:
        raise ConfigError(f"{source.path} holds {len(tables)} Parquet files and {len(pictures)} pictures; give a folder with one kind")
    if tables:
        return _find_tables(source, fs, tables)
    if pictures:
        if odd := [f for f in pictures if not _is_text(f)]:
            raise ConfigError(f"the names of {len(odd)} pictures in {source.path} are not UTF-8, e.g. {odd[0]!r}; rename them first")
        columns = pa.schema([(source.image_column, schema.IMAGE)])
        return Input(source=source, kind="pictures", files=pictures, counts=((1,),) * len(pictures), columns=columns)
    what = "is empty" if not everything else "holds no input"
    raise ConfigError(f"{source.path} {what}; expected are .parquet files or pictures ({' '.join(SUFFIXES)})")


def _find_tables(source: Source, fs: fsspec.AbstractFileSystem, files: tuple[str, ...]) -> Input:
    counts, columns, problems = [], None, []
    for file in files:
        try:
            with fs.open(file) as stream, pq.ParquetFile(stream) as table:
                counts.append(tuple(table.metadata.row_group(g).num_rows for g in range(table.metadata.num_row_groups)))
                found = table.schema_arrow
        except (pa.ArrowException, OSError) as error:
            problems.append(f"{file} is not a readable Parquet file: {str(error).splitlines()[0][:160]}")
            continue
        if columns is None:
            columns = found
        elif not found.equals(columns):
            problems.append(f"{file} has other columns or types than {files[0]}; all files of one input must agree")
        elif schema.about(found) != schema.about(columns):
            problems.append(f"{file} was made by another run than {files[0]} (model, recipe or edit differ); give them one by one")
    if columns is not None and not problems:
        problems = _column_problems(source, columns)
    if not problems and not any(map(sum, counts)):
        problems = [f"{source.path} has no rows"]
    if problems or columns is None:
        raise ConfigError(*problems)
    return Input(source=source, kind="parquet", files=files, counts=tuple(counts), columns=columns)


def _is_text(name: str) -> bool:
    """False for a file name whose bytes are not UTF-8, as ids must be."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _column_problems(source: Source, columns: pa.Schema) -> list[str]:
    twice = sorted({name for name in columns.names if columns.names.count(name) > 1})
    if twice:
        return [f"{source.path} has more than one column named {', '.join(map(repr, twice))}; rename them first"]
    return _id_problems(source, columns) + _image_problems(source, columns)


def _id_problems(source: Source, columns: pa.Schema) -> list[str]:
    if source.id_column not in columns.names:
        asked = source.id_column != Source.id_column  # the usual name may be missing: then ids are made
        return [f"{source.path} has no column {source.id_column!r}; it has {', '.join(columns.names)}"] if asked else []
    kind = columns.field(source.id_column).type
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    if any(is_kind(plain) for is_kind in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_integer)):
        return []
    return [f"column {source.id_column!r} of {source.path} must be text or whole numbers; it is {kind}"]


def _image_problems(source: Source, columns: pa.Schema) -> list[str]:
    if source.image_column not in columns.names:
        usable = [f.name for f in columns if schema.is_image_column(f.type)]
        hint = f"; image columns are: {', '.join(usable)}" if usable else ""
        return [f"{source.path} has no column {source.image_column!r}; it has {', '.join(columns.names)}{hint}"]
    kind = columns.field(source.image_column).type
    if not schema.is_image_column(kind):
        return [f"column {source.image_column!r} of {source.path} must be binary or struct{{bytes, path}}; it is {kind}"]
    return []


def absolute(address: str) -> str:
    """The same address from every working directory: workers have another than the driver."""
    return address if "://" in address or not address else str(Path(address).absolute())


def only_usable(table: pa.Table) -> pa.Table:
    """The latents of a latents table, without rejects and without the user's columns."""
    return table.filter(pc.is_null(table["error"])).select(["id", "image", "latent"])


def plan_blocks(found: Input, block_rows: int) -> list[Block]:
    """Consecutive blocks of whole row groups with at least ``block_rows`` rows (but the last); the limit cuts the last."""
    blocks: list[Block] = []
    members: list[tuple[str, int]] = []
    start = pending = 0

    def close() -> None:
        nonlocal start, pending
        rows = min(pending, found.rows - start)
        if rows > 0:
            blocks.append(_block(found.kind, members, start, rows))
        start, pending = start + pending, 0
        members.clear()

    for file, counts in zip(found.files, found.counts, strict=True):
        for group, rows in enumerate(counts):
            if start + pending >= found.rows:
                break
            members.append((file, group))
            pending += rows
            if pending >= block_rows:
                close()
    close()
    return blocks


def _block(kind: str, members: list[tuple[str, int]], start: int, rows: int) -> Block:
    if kind == "pictures":
        return Block(start=start, rows=rows, files=tuple(f for f, _ in members))
    by_file: dict[str, list[int]] = {}
    for file, group in members:
        by_file.setdefault(file, []).append(group)
    return Block(start=start, rows=rows, files=tuple(by_file), groups=tuple(map(tuple, by_file.values())))


def read_block(found: Input, block: Block) -> pa.Table:
    """The rows of one block: ``__row__``, ``__block__``, ``id``, ``image``, the user's columns, ``latent`` and ``error``."""
    fs, root = url_to_fs(found.source.path)
    if block.groups is None:
        return _read_pictures(fs, root, block)
    tables, ids = [], []
    for file, groups in zip(block.files, block.groups, strict=True):
        with fs.open(file) as stream, pq.ParquetFile(stream) as parquet:
            tables.append(parquet.read_row_groups(list(groups)))
            ids += _made_ids(_below(file, root), parquet.metadata, groups)
    table = pa.concat_tables(tables).slice(0, block.rows)
    names = table[found.source.id_column].cast(pa.string()) if found.has_ids else pa.array(ids[: block.rows])
    columns: dict[str, Any] = {
        **_positions(block),
        "id": names,
        "image": schema.image_column(table[found.source.image_column]),
    }
    rest = list(found.user_columns.names) + (list(schema.own_columns("latents")) if found.has_latents else [])
    return pa.table(columns | {name: table[name] for name in rest})


def _read_pictures(fs: fsspec.AbstractFileSystem, root: str, block: Block) -> pa.Table:
    names = [_below(file, root) for file in block.files]
    rows = [{"bytes": fs.cat_file(file), "path": name} for file, name in zip(block.files, names, strict=True)]
    return pa.table(
        {
            **_positions(block),
            "id": pa.array(names),
            "image": pa.array(rows, schema.IMAGE),
        }
    )


def _positions(block: Block) -> dict[str, pa.Array]:
    rows = np.arange(block.start, block.start + block.rows)
    return {schema.ROW: pa.array(rows), schema.BLOCK: pa.array(np.full(block.rows, block.start))}


def _below(file: str, root: str) -> str:
    """A file's path below the address, or its name where the address is the file itself."""
    return file.removeprefix(root).lstrip("/") or file.rsplit("/", 1)[-1]


def _made_ids(file: str, metadata: pq.FileMetaData, groups: tuple[int, ...]) -> list[str]:
    offsets = np.cumsum([0, *(metadata.row_group(g).num_rows for g in range(metadata.num_row_groups))])
    return [f"{file}#{row}" for g in groups for row in range(offsets[g], offsets[g + 1])]


def ids(found: Input, blocks: list[Block]) -> Iterator[list[str | None]]:
    """The ids of each block in order, reading nothing but the id column."""
    fs, root = url_to_fs(found.source.path)
    for block in blocks:
        if block.groups is None:
            yield [_below(file, root) for file in block.files]
            continue
        made: list[str | None] = []
        for file, groups in zip(block.files, block.groups, strict=True):
            with fs.open(file) as stream, pq.ParquetFile(stream) as parquet:
                if found.has_ids:
                    column = parquet.read_row_groups(list(groups), columns=[found.source.id_column])[found.source.id_column]
                    made += column.cast(pa.string()).to_pylist()
                else:
                    made += _made_ids(_below(file, root), parquet.metadata, groups)
        yield made[: block.rows]


def hash_ids(batches: Iterator[list[str | None]]) -> np.ndarray:
    """Sorted uint64 hashes of ids: eight bytes a row, to compare sets of ids of any size."""
    hashed = [np.fromiter((_hash(i) for i in batch), np.uint64, len(batch)) for batch in batches]
    return np.sort(np.concatenate(hashed)) if hashed else np.empty(0, np.uint64)


def _hash(name: str | None) -> int:
    text = "\0null" if name is None else name
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def check_ids(found: Input, blocks: list[Block]) -> np.ndarray:
    """Sorted hashes of all input ids. Raises ConfigError with examples if an id is null or stands twice."""
    hashed = hash_ids(ids(found, blocks))
    twice = set(hashed[1:][hashed[1:] == hashed[:-1]].tolist())
    nulls = _hash(None) in set(hashed.tolist()) if found.has_ids else False
    if twice or nulls:
        seen = Counter(i for batch in ids(found, blocks) for i in batch if i is None or _hash(i) in twice)
        if None in seen:
            raise ConfigError(f"column {found.source.id_column!r} has {seen[None]} null ids; every row needs its own")
        examples = ", ".join(f"{name!r} ({count} times)" for name, count in seen.most_common(3) if count > 1)
        raise ConfigError(f"ids must be unique, but column {found.source.id_column!r} has {examples}")
    return hashed
