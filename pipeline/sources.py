"""From an address to rows: what is there, which rows make a block, and reading one block.

No Ray here. A block is a run of whole row groups (or of picture files, or of a tar's rows), so that every file is read once.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from pipeline import parquet, schema, tars
from pipeline.config import Source
from pipeline.finding import find
from pipeline.inputs import Block, Input, below
from pipeline.schema import MAX_PICTURE_BYTES

__all__ = ["Block", "Input", "absolute", "block_problems", "find", "only_usable", "plan_blocks", "read_block"]


def absolute(address: str) -> str:
    """The same address from every working directory: workers have another than the driver."""
    return address if "://" in address or not address else str(Path(address).absolute())


def only_usable(table: pa.Table) -> pa.Table:
    """The latents of a latents table, without rejects and without the user's columns."""
    return table.filter(pc.is_null(table["error"])).select(["id", "image", "latent"])


def plan_blocks(found: Input, block_rows: int) -> list[Block]:
    """Consecutive blocks of whole row groups with at least ``block_rows`` rows (but the last); the limit cuts the last."""
    blocks: list[Block] = []
    members: list[_Member] = []
    start = pending = 0

    def close() -> None:
        nonlocal start, pending
        rows = min(pending, found.rows - start)
        if rows > 0:
            blocks.append(_block(found, members, start, rows))
        start, pending = start + pending, 0
        members.clear()

    for number, (counts, sizes) in enumerate(zip(found.counts, found.sizes, strict=True)):
        for group, rows in enumerate(counts):
            if start + pending >= found.rows:
                break
            if not rows:
                continue
            members.append((number, group, sizes[group]))
            pending += rows
            if pending >= block_rows:
                close()
    close()
    return blocks


_Member = tuple[int, int, int]
"""The number of a file, of one of its groups, and the bytes of this group in memory."""


def _block(found: Input, members: list[_Member], start: int, rows: int) -> Block:
    size = sum(size for _, _, size in members)
    by_file: dict[int, list[int]] = {}
    for number, group, _ in members:
        by_file.setdefault(number, []).append(group)
    files = tuple(found.files[number] for number in by_file)
    if found.kind == "pictures":
        return Block(start=start, rows=rows, files=files, size=size)
    groups = tuple(map(tuple, by_file.values()))
    # A file's groups follow one another.
    spans = [(found.spans[number][of[0]][0], found.spans[number][of[-1]][1]) for number, of in by_file.items()] if found.spans else []
    return Block(start=start, rows=rows, files=files, groups=groups, spans=tuple(spans), size=size)


def block_problems(found: Input, blocks: list[Block]) -> list[str]:
    """Why blocks are too large to be held in memory: a sentence, or none."""
    most = found.source.max_block_bytes
    large = [block for block in blocks if block.size > most]
    if not large:
        return []
    first, allowed = large[0], parquet.size_name(most)
    return [
        f"{len(large)} of {len(blocks)} blocks of {found.source.path} take more than {allowed}, the first, of {first.rows} rows from "
        f"row {first.start}, {parquet.size_name(first.size)}; lower --block-rows, or allow more with --max-block-bytes"
    ]


# ---- reading one -----------------------------------------------------------------------------------------------------


def read_block(found: Input, block: Block) -> pa.Table:
    """The rows of one block: ``__row__``, ``__block__``, ``id``, ``image``, the user's columns, ``latent`` and ``error``.

    ``__unread__`` says why a picture was not even read, where files of pictures can be too large. Raises TooLargeError.
    """
    fs, root = url_to_fs(found.source.path)
    if found.kind == "pictures":
        return _read_pictures(fs, root, block)
    if found.kind == "tars":
        return _read_tars(fs, found, block)
    return _read_tables(fs, root, found, block)


def _read_tables(fs: AbstractFileSystem, root: str, found: Input, block: Block) -> pa.Table:
    parts, ids = [], []
    for file, groups in zip(block.files, block.groups or (), strict=True):
        name = below(file, root)
        with parquet.opened(fs, file) as stored:
            part, positions = parquet.read_rows(stored, groups, found.read_columns, found.constants(name), found.reading)
        parts.append(part)
        ids += [] if found.has_ids else [f"{name}#{position}" for position in positions]
    table = pa.concat_tables(parts).slice(0, block.rows)
    names = table[found.source.id_column].cast(pa.string()) if found.has_ids else pa.array(ids[: block.rows])
    columns: dict[str, Any] = {**_positions(block), "id": names, "image": schema.image_column(table[found.source.image_column])}
    return pa.table(columns | {name: table[name] for name in found.read_columns if name not in found.leading})


def _read_pictures(fs: AbstractFileSystem, root: str, block: Block) -> pa.Table:
    names = [below(file, root) for file in block.files]
    sizes = [int(fs.size(file) or 0) for file in block.files]
    reasons = [f"the file has {size} bytes; at most {MAX_PICTURE_BYTES} are read" if size > MAX_PICTURE_BYTES else None for size in sizes]
    small = [file for file, reason in zip(block.files, reasons, strict=True) if not reason]
    contents = dict(zip(small, fs.cat_ranges(small, None, None, on_error="raise"), strict=True))  # object stores answer side by side
    rows = [{"bytes": contents.get(file), "path": name} for file, name in zip(block.files, names, strict=True)]
    return pa.table({**_positions(block), "id": pa.array(names), "image": pa.array(rows, schema.IMAGE), **_unread(reasons)})


def _read_tars(fs: AbstractFileSystem, found: Input, block: Block) -> pa.Table:
    rows: list[dict[str, Any]] = []
    picture = found.source.image_column if found.source.image_column != Source.image_column else None
    for file, (begin, end) in zip(block.files, block.spans, strict=True):
        rows += tars.rows(fs, file, begin, end, picture)
    rows = rows[: block.rows]
    return pa.table(
        {
            **_positions(block),
            "id": pa.array([row["id"] for row in rows]),
            "image": pa.array([row["image"] for row in rows], schema.IMAGE),
            **{name: pa.array([row.get(name) for row in rows], pa.string()) for name in found.user_columns.names},
            **_unread([row["reason"] for row in rows]),
        }
    )


def _positions(block: Block) -> dict[str, pa.Array]:
    rows = np.arange(block.start, block.start + block.rows)
    return {schema.ROW: pa.array(rows), schema.BLOCK: pa.array(np.full(block.rows, block.start))}


def _unread(reasons: list[str | None]) -> dict[str, pa.Array]:
    return {schema.UNREAD: pa.array(reasons, pa.string())} if any(reasons) else {}
