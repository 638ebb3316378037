"""Ids of an input: read by themselves, compared by their hashes."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
from fsspec.core import url_to_fs

from pipeline import parquet
from pipeline.config import ConfigError
from pipeline.inputs import Input, below, side_by_side


def ids(found: Input) -> Iterator[list[str | None]]:
    """The ids of each file in order, those of rows beyond the limit left out; nothing but the id column is read."""
    for number, rows in _files(found):
        yield _of_file(found, number)[:rows]


def _files(found: Input) -> Iterator[tuple[int, int]]:
    """The number of each file that has rows within the limit, and how many."""
    left = found.rows
    for number, counts in enumerate(found.counts):
        rows = min(left, sum(counts))
        left -= rows
        if rows:
            yield number, rows


def _of_file(found: Input, number: int) -> list[str | None]:
    fs, root = url_to_fs(found.source.path)
    file = found.files[number]
    name = below(file, root)
    if found.kind == "pictures":
        return [name]
    if found.kind == "tars":
        return list(found.keys[number])
    groups = [group for group, rows in enumerate(found.counts[number]) if rows]
    column = [found.source.id_column] if found.has_ids else []
    with parquet.opened(fs, file) as stored:
        table, positions = parquet.read_rows(stored, groups, column, found.constants(name), found.reading)
    if found.has_ids:
        return list(table[found.source.id_column].cast(pa.string()).to_pylist())
    return [f"{name}#{position}" for position in positions]


def hash_ids(names: list[str | None]) -> np.ndarray:
    """uint64 hashes: eight bytes a row, to compare sets of ids of any size."""
    return np.fromiter(map(_hash, names), np.uint64, len(names))


def _hash(name: str | None) -> int:
    text = "\0null" if name is None else name
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def check_ids(found: Input, on_rows: Callable[[int], object] = lambda rows: None) -> np.ndarray:
    """Sorted hashes of all input ids. Raises ConfigError with examples if an id is null or stands twice.

    ``on_rows`` is called with the number of rows looked at.
    """
    hashed = np.sort(_hashes(found, on_rows))
    twice = set(hashed[1:][hashed[1:] == hashed[:-1]].tolist())
    nulls = found.has_ids and bool((hashed == np.uint64(_hash(None))).any())
    if twice or nulls:
        seen = Counter(i for names in ids(found) for i in names if i is None or _hash(i) in twice)
        where = f"column {found.source.id_column!r}" if found.kind == "parquet" else "the names of files in the tars"
        if None in seen:
            raise ConfigError(f"{where} has {seen[None]} null ids; every row needs its own")
        examples = ", ".join(f"{name!r} ({count} times)" for name, count in seen.most_common(3) if count > 1)
        raise ConfigError(f"ids must be unique, but {where} {'has' if found.kind == 'parquet' else 'have'} {examples}")
    return hashed


def _hashes(found: Input, on_rows: Callable[[int], object]) -> np.ndarray:
    """Of the ids of all rows in order."""
    if found.kind != "parquet":  # nothing is read
        return np.concatenate([hash_ids(names) for names in ids(found)])
    files = list(_files(found))
    ends = np.cumsum([rows for _, rows in files]).tolist()
    parts = side_by_side(lambda file: hash_ids(_of_file(found, file[0])[: file[1]]), files, lambda done, _: on_rows(ends[done - 1]))
    return np.concatenate(parts)
