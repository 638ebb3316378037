"""Parquet files behind fsspec: footers, some columns of some row groups, rows that fulfil a condition; never more bytes than allowed.

What a file says of its size can be wrong in both directions: a kilobyte decodes to gigabytes where one value is repeated. So sizes
in the footer are checked when a run is planned, and what is really decoded is counted while it is read.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.asyn import AsyncFileSystem

from pipeline.faults import JobError
from pipeline.filters import Condition

MOST_GROUP_ROWS = 2**20
"""Rows of one row group: a file of a kilobyte can claim billions."""
MOST_BATCH_ROWS = 1024
"""Rows that are decoded before their size is looked at."""
_POSITION = "\0position"
_WIDTHS = {"BOOLEAN": 0.125, "INT32": 4, "FLOAT": 4, "INT64": 8, "DOUBLE": 8, "INT96": 8, "BYTE_ARRAY": 4}
"""Bytes in memory of a value of a physical type, at least; of texts and pictures their offset alone."""
NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"


class TooLargeError(JobError):
    """A block that decodes to more bytes than one may have; the message says where and what to do."""


def size_name(size: float) -> str:
    """``2.0 GiB``."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


@contextmanager
def opened(fs: AbstractFileSystem, file: str) -> Iterator[pq.ParquetFile]:
    """A file of which exactly the bytes are fetched that are asked for: one request for its footer, one for each run of columns."""
    how = {"cache_type": "none"} if isinstance(fs, AsyncFileSystem) else {}  # else 50 MiB are read ahead
    with fs.open(file, **how) as stream, pq.ParquetFile(stream, pre_buffer=True) as parquet:
        yield parquet


@dataclass(frozen=True, kw_only=True)
class Footer:
    """Of one file: its columns, and rows and decoded bytes (at least) of each of its row groups."""

    columns: pa.Schema
    counts: tuple[int, ...]
    sizes: tuple[int, ...]


def read_footer(fs: AbstractFileSystem, file: str, wanted: Sequence[str]) -> Footer:
    """``sizes`` are those of the ``wanted`` columns. Raises ArrowException or OSError if it is no Parquet file."""
    with opened(fs, file) as parquet:
        metadata, leaves = parquet.metadata, parquet.schema
        chosen = [i for i in range(len(leaves)) if any(_below(leaves.column(i).path, name) for name in wanted)]
        widths = {i: _WIDTHS.get(leaves.column(i).physical_type, leaves.column(i).length) for i in chosen}
        groups = [metadata.row_group(g) for g in range(metadata.num_row_groups)]
        sizes = tuple(int(sum(_decoded(group.column(i), widths[i]) for i in chosen)) for group in groups)
        return Footer(columns=parquet.schema_arrow, counts=tuple(group.num_rows for group in groups), sizes=sizes)


def _below(path: str, name: str) -> bool:
    return path == name or path.startswith(f"{name}.")


def _decoded(chunk: pq.ColumnChunkMetaData, width: float) -> float:
    return max(chunk.total_uncompressed_size, chunk.num_values * width)


def size_problems(file: str, footer: Footer, most: int) -> list[str]:
    """Why a file's row groups cannot be read as a block; the first reason, or none."""
    for number, (rows, size) in enumerate(zip(footer.counts, footer.sizes, strict=True)):
        if rows > MOST_GROUP_ROWS:
            return [f"row group {number} of {file} has {rows} rows; at most {MOST_GROUP_ROWS} are read together: write smaller row groups"]
        if size > most:
            return [
                f"row group {number} of {file} decodes to {size_name(size)}; --max-block-bytes allows {size_name(most)}: "
                "write smaller row groups, leave columns out with --columns, or allow more"
            ]
    return []


# ---- folders named key=value -----------------------------------------------------------------------------------------


def partition_of(below: str) -> dict[str, str | None]:
    """Keys and values in the folder names of a path, as Hive writes them."""
    pairs = [segment.partition("=") for segment in below.split("/")[:-1] if "=" in segment]
    return {unquote(key): None if value == NULL_PARTITION else unquote(value) for key, _, value in pairs}


def partition_columns(partitions: Sequence[dict[str, str | None]]) -> pa.Schema:
    """Whole numbers where all values are, else text. Raises ValueError if the files do not have the same keys."""
    keys = list(partitions[0])
    if (odd := next((p for p in partitions if list(p) != keys), None)) is not None:
        raise ValueError(f"some files lie in folders named {_folders(keys)}, others in {_folders(list(odd))}")
    values = {key: [p[key] for p in partitions if p[key] is not None] for key in keys}
    return pa.schema([(key, pa.int64() if all(map(_is_number, values[key])) and values[key] else pa.string()) for key in keys])


def _folders(keys: list[str]) -> str:
    return "/".join(f"{key}=..." for key in keys) or "without a ="


def _is_number(value: str | None) -> bool:
    return bool(value and re.fullmatch(r"0|-?[1-9]\d{0,17}", value))  # 007 is a name


def constants_of(below: str, columns: pa.Schema) -> dict[str, pa.Scalar]:
    """The values that a file's folders give to the partition ``columns``."""
    values = partition_of(below)
    return {f.name: pa.scalar(values[f.name]).cast(f.type) if values[f.name] is not None else pa.scalar(None, f.type) for f in columns}


# ---- rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What is read of the files of one input."""

    condition: Condition | None = None
    most: int = 2**31
    """Bytes that one call may decode to."""


def read_rows(
    parquet: pq.ParquetFile, groups: Sequence[int], columns: Sequence[str], constants: dict[str, pa.Scalar], how: Reading
) -> tuple[pa.Table, np.ndarray]:
    """Some columns of the rows of some row groups that fulfil the condition, and these rows' positions in the file.

    Raises TooLargeError.
    """
    needed = dict.fromkeys([*columns, *(how.condition.columns if how.condition else ())])
    positions = _positions(parquet.metadata, groups)
    table = _bounded(parquet, groups, [name for name in needed if name not in constants], how.most)
    whole = pa.table({_POSITION: positions}) if table is None else table.append_column(_POSITION, pa.array(positions))
    for name in needed:
        if name in constants:
            whole = whole.append_column(name, pa.repeat(constants[name], len(positions)))
    if how.condition:
        whole = whole.filter(how.condition.expression)
    return whole.select(list(columns)), whole[_POSITION].to_numpy()


def _positions(metadata: pq.FileMetaData, groups: Sequence[int]) -> np.ndarray:
    starts = np.cumsum([0, *(metadata.row_group(g).num_rows for g in range(metadata.num_row_groups))])
    return np.concatenate([np.arange(starts[g], starts[g + 1]) for g in groups] or [np.empty(0, np.int64)])


def _bounded(parquet: pq.ParquetFile, groups: Sequence[int], columns: list[str], most: int) -> pa.Table | None:
    """Some columns, decoded in batches that cannot be larger than allowed if the footer is right; None without columns."""
    if not columns:
        return None
    metadata = parquet.metadata
    largest = max((chunk.total_uncompressed_size for g in groups for chunk in _chunks(metadata.row_group(g))), default=0)
    rows = max(1, min(MOST_BATCH_ROWS, most // max(1, largest)))  # no value is larger than its column's part of a row group
    batches, size = [], 0
    for batch in parquet.iter_batches(rows, row_groups=list(groups), columns=columns):
        size += sum((c.indices if isinstance(c, pa.DictionaryArray) else c).nbytes for c in batch.columns)
        if size > most:
            raise TooLargeError(
                f"rows of the input decode to more than {size_name(most)}, though their file says less; if that is meant, "
                "allow more with --max-block-bytes"
            )
        batches.append(batch)
    whole = pa.Table.from_batches(batches) if batches else parquet.schema_arrow.empty_table()
    return whole.select(columns)


def _chunks(group: pq.RowGroupMetaData) -> Iterator[pq.ColumnChunkMetaData]:
    return (group.column(i) for i in range(group.num_columns))


# ---- conditions ------------------------------------------------------------------------------------------------------


def files_that_may_match(
    files: Sequence[str], constants: Sequence[dict[str, pa.Scalar]], condition: Condition, columns: pa.Schema
) -> list[str]:
    """Those that the names of their folders do not exclude; none is opened."""
    fmt, nowhere = pads.ParquetFileFormat(), pafs.LocalFileSystem()
    fragments = [
        fmt.make_fragment(str(number), filesystem=nowhere, partition_expression=_guarantee(values))
        for number, values in enumerate(constants)
    ]
    dataset: Any = pads.FileSystemDataset(fragments, columns, fmt, nowhere)
    return [files[int(fragment.path)] for fragment in dataset.get_fragments(filter=condition.expression)]


def _guarantee(values: dict[str, pa.Scalar]) -> pc.Expression:
    whole = pc.scalar(True)
    for name, value in values.items():
        whole = whole & (pc.field(name) == value if value.is_valid else pc.field(name).is_null())
    return whole


def matching(fs: AbstractFileSystem, file: str, constants: dict[str, pa.Scalar], columns: pa.Schema, how: Reading) -> tuple[int, ...]:
    """Rows of each row group that fulfil the condition. Groups that their statistics exclude are not read."""
    assert how.condition
    with opened(fs, file) as parquet:
        counts = np.zeros(parquet.metadata.num_row_groups, np.int64)
        groups = _groups_that_may_match(fs, file, constants, how.condition, columns)
        if groups:
            _, positions = read_rows(parquet, groups, [], constants, how)
            ends = np.cumsum([parquet.metadata.row_group(g).num_rows for g in range(len(counts))])
            np.add.at(counts, np.searchsorted(ends, positions, side="right"), 1)
    return tuple(counts.tolist())


def _groups_that_may_match(
    fs: AbstractFileSystem, file: str, constants: dict[str, pa.Scalar], condition: Condition, columns: pa.Schema
) -> list[int]:
    how = {"cache_type": "none"} if isinstance(fs, AsyncFileSystem) else {}
    with fs.open(file, **how) as stream:
        fragment = pads.ParquetFileFormat().make_fragment(stream, partition_expression=_guarantee(constants))
        return [group.id for group in fragment.subset(filter=condition.expression, schema=columns).row_groups]
