"""What was found at an address, and which of its rows are read together."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import pyarrow as pa

from pipeline import parquet, schema
from pipeline.config import Source
from pipeline.filters import condition

THREADS = 16
"""Files that are looked at side by side: on object stores each takes a while."""
OnFile = Callable[[int, int], object]
"""Called with the number of files looked at and of all files."""
Wanted = TypeVar("Wanted")


@dataclass(frozen=True, kw_only=True)
class Block:
    """Rows ``start .. start + rows`` of the input. ``groups`` names row groups per file; None for picture files."""

    start: int
    rows: int
    files: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...] | None = None
    spans: tuple[tuple[int, int], ...] = ()
    """Of tars: which bytes of each file."""
    size: int = 0
    """Bytes that they take in memory, as far as their files say."""
    wanted: tuple[str, ...] = ()
    """Folders of the outputs that lack them, where others of the same run have them; empty: all lack them."""


@dataclass(frozen=True, kw_only=True)
class Input:
    """What was found at an address. ``kind`` is ``parquet``, ``pictures`` or ``tars``."""

    source: Source
    kind: str
    files: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]
    """Rows of each row group of each file, without those that the filter leaves out; for pictures one group of one row each."""
    sizes: tuple[tuple[int, ...], ...]
    """Bytes of these groups in memory."""
    columns: pa.Schema
    """As stored; for pictures ``image`` alone; for tars also the texts beside the pictures."""
    partitions: pa.Schema = field(default_factory=lambda: pa.schema([]))
    """Those of the columns that are in the names of folders (``key=value``) and not in the files."""
    keys: tuple[tuple[str, ...], ...] = ()
    """Of tars: the ids of each file's rows."""
    spans: tuple[tuple[tuple[int, int], ...], ...] = ()
    """Of tars: where each group of rows begins and ends."""
    records: tuple[str, ...] = ()
    """Folders at the address in which a run of this project has left its record."""
    digest: str = ""
    """Of the names, sizes and versions of all files, as far as their store tells."""

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
        """What passes through unchanged: every column but the id, the image, those that the project made, and unwanted ones; with what
        the input's metadata say of them."""
        made = schema.own_columns("latents") if self.has_latents else ()
        known = {self.source.id_column, self.source.image_column, *made}
        kept = self.source.columns
        wanted = [f for f in self.columns if f.name not in known and (kept is None or f.name in kept)]
        return pa.schema(wanted, self.columns.metadata)

    @property
    def leading(self) -> tuple[str, ...]:
        """The columns that become ``id`` and ``image``."""
        return (*([self.source.id_column] if self.has_ids else []), self.source.image_column)

    @property
    def read_columns(self) -> list[str]:
        """What is read of a table, conditions aside."""
        return [*self.leading, *self.user_columns.names, *(schema.own_columns("latents") if self.has_latents else ())]

    @cached_property
    def reading(self) -> parquet.Reading:
        where = self.source.where
        return parquet.Reading(condition=condition(where, self.columns) if where else None, most=self.source.max_block_bytes)

    @property
    def shared(self) -> "Input":
        """What all workers need of it: without what grows with the number of files, since a block names its own."""
        return replace(self, files=(), counts=(), sizes=(), keys=(), spans=(), records=())

    def constants(self, below: str) -> dict[str, pa.Scalar]:
        """The values of partition columns of the file with this path below the address."""
        return parquet.constants_of(below, self.partitions)


def side_by_side(work: Callable[[Any], Wanted], things: Sequence[Any], on_file: OnFile = lambda done, total: None) -> list[Wanted]:
    """``work`` on each of many things, in threads; results in the order of the things."""
    with ThreadPoolExecutor(THREADS) as pool:
        results = []
        for result in pool.map(work, things):
            results.append(result)
            on_file(len(results), len(things))
        return results


def below(file: str, root: str) -> str:
    """A file's path below the address, or its name where the address is the file itself."""
    return file.removeprefix(root).lstrip("/") or file.rsplit("/", 1)[-1]
