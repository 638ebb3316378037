"""What an edits dataset amounts to, read back from its files, and single rows of it by position; no Ray here.

Everything streams: columns of scores in batches, pictures only of the row groups that hold a row asked for.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from models.attributes import ATTRIBUTES
from pipeline import schema
from pipeline.config import ConfigError, Source
from pipeline.faults import refused
from pipeline.manifest import is_finished, read_manifest
from pipeline.sources import Input, find

MAX_REJECTS = 50
MAX_REASONS = 1000
"""Different reasons that are counted apart; what comes after them is counted as ``OTHER``, so that memory stays bounded."""
OTHER = "other reasons"
FILES = 32
"""Parquet files that are open to one scan."""
_MEANS = ("mae", "ssim", "clip_direction", schema.IDENTITY.name)
_READINGS = ("factors_before", "factors_after")


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The figures of one edits dataset. Means and shares are None where there is nothing to take them over."""

    folder: str
    domain: str
    attribute: str
    """``glasses``, ``glasses_and_hat`` or ``none``."""
    parts: tuple[str, ...]
    """Names of the mixed attributes; empty for a reconstruction."""
    degree: float
    rows: int
    rejected: int
    mae: float | None
    ssim: float | None
    clip_direction: float | None
    identity: float | None
    """Mean cosine of face recognition features of source and edited; None if the run had no weights for it."""
    changeable: int
    """Rows in which at least one wanted value was missing before; what ``success`` is a share of."""
    success: float | None
    """Share of the changeable rows that show every wanted value afterwards."""
    kept: float | None
    """Share of all readings of the other factors, over all rows, that are the same before and after."""
    reasons: Mapping[str, int]
    rejects: tuple[tuple[str, str], ...]
    """Id and reason of the first rejects, ``MAX_REJECTS`` at most."""
    record: Mapping[str, Any]
    """What the run wrote about itself; empty if it has not finished."""

    @property
    def edited(self) -> int:
        return self.rows - self.rejected

    @property
    def model_calls(self) -> int | None:
        """Network evaluations an image on the way down."""
        return self.record.get("model_calls_per_image")

    @property
    def seconds(self) -> float | None:
        """Of the whole run, which may have written other datasets too."""
        return self.record.get("seconds")


# ---- finding ---------------------------------------------------------------------------------------------------------


def edit_folders(address: str) -> list[str]:
    """The edits datasets at an address: itself, or its subfolders in order of name. Raises ConfigError if there are none."""
    with refused(f"{address} cannot be opened"):
        fs, root = url_to_fs(address)
        if not fs.exists(root):
            raise ConfigError(f"there is no folder {address}; give a folder that an edit run wrote")
        if not fs.isdir(root):
            raise ConfigError(f"{address} is a file; give the folder of an edits dataset")
        if _is_edits(fs, root):
            return [address]
        below = sorted(str(entry["name"]).rstrip("/") for entry in fs.ls(root, detail=True) if entry["type"] == "directory")
        found = [_name(folder) for folder in below if not _hidden(folder) and _is_edits(fs, folder)]
    if not found:
        raise ConfigError(f"{address} holds no edits dataset, nor does a folder in it; give a folder that an edit run wrote")
    return [f"{address.rstrip('/')}/{name}" for name in found]


def _name(path: str) -> str:
    return path.rsplit("/", 1)[-1]


def _hidden(path: str) -> bool:
    return _name(path).startswith(("_", "."))


def _is_edits(fs: AbstractFileSystem, folder: str) -> bool:
    """Whether a folder's first Parquet file says that it holds edits; only files right in the folder count."""
    files = sorted(f for f in fs.ls(folder, detail=False) if f.endswith(".parquet") and not _hidden(f))
    if not files:
        return False
    try:
        with fs.open(files[0]) as stream:
            return schema.about(pq.read_schema(stream)).get("kind") == "edits"
    except pa.ArrowInvalid as error:
        raise ConfigError(f"{files[0]} is not a readable Parquet file: {str(error).splitlines()[0][:160]}") from None


def open_edits(folder: str) -> Input:
    """The files and row counts of one edits dataset. Raises ConfigError if it is none or its files disagree."""
    found = find(Source(path=folder))
    if schema.about(found.columns).get("kind") != "edits":
        raise ConfigError(f"{folder} is not an edits dataset; give a folder that an edit run wrote")
    return found


def read_record(folder: str) -> dict[str, Any]:
    """What the run wrote about itself beside the rows; empty where it has not finished. Raises ConfigError if it is damaged."""
    manifest = read_manifest(folder)
    return manifest if is_finished(manifest) else {}


# ---- figures ---------------------------------------------------------------------------------------------------------


def summarise(folder: str) -> Summary:
    """The figures of one edits dataset; no picture is read. Raises ConfigError if the folder holds none."""
    found = open_edits(folder)
    about = schema.about(found.columns)
    attribute, degree = _name_and_degree(found, about)
    parts = about.get("edit") or []
    changes = wanted_values(str(about.get("family", "")), parts, degree)
    tally = _Tally(changes=changes)
    columns = [n for n in ("id", "error", *_MEANS, *_READINGS) if n in found.columns.names]
    for batch in batches(found, columns):
        tally.add(batch)
    return Summary(
        folder=folder,
        domain=str(about.get("domain", "")),
        attribute=attribute,
        parts=tuple(str(part["name"]) for part in parts),
        degree=degree,
        rows=tally.rows,
        rejected=tally.reasons.total(),
        **{name: tally.means[name].value for name in _MEANS},
        changeable=tally.success.count,
        success=tally.success.value,
        kept=tally.kept.value,
        reasons=dict(tally.reasons.most_common()),
        rejects=tuple(tally.rejects),
        record=read_record(folder),
    )


def wanted_values(family: str, parts: Sequence[Mapping[str, Any]], degree: float) -> dict[str, str | None] | None:
    """Factor -> the value that an edit should give it; empty for a reconstruction, None where that is not known.

    The value is None where there is no right one: two attributes of a mix want different values, or one is taken away.
    """
    wanted: dict[str, str | None] = {}
    for part in parts:
        attribute = ATTRIBUTES.get((family, part["name"]))
        if attribute is None or attribute.changes is None:
            return None
        factor, value = attribute.changes
        clear = wanted.get(factor, value) == value and degree * part.get("weight", 1) >= 0
        wanted[factor] = value if clear else None
    return wanted


def _name_and_degree(found: Input, about: Mapping[str, Any]) -> tuple[str, float]:
    """As the metadata say; the rows of one dataset all repeat it."""
    names = [str(part["name"]) for part in about.get("edit") or []]
    degree = about.get("degree")
    if degree is None:
        raise ConfigError(f"{found.source.path} does not say in its metadata at what degree it was edited; edit the images again")
    return "_and_".join(names) or "none", float(degree)


@dataclass
class _Mean:
    total: float = 0.0
    count: int = 0

    @property
    def value(self) -> float | None:
        return self.total / self.count if self.count else None

    def add(self, values: pa.Array) -> None:
        """Numbers or booleans; nulls do not count."""
        self.total += pc.sum(values).as_py() or 0
        self.count += len(values) - values.null_count


@dataclass(kw_only=True)
class _Tally:
    """What has been counted so far."""

    changes: Mapping[str, str | None] | None
    rows: int = 0
    means: dict[str, _Mean] = field(default_factory=lambda: {name: _Mean() for name in _MEANS})
    success: _Mean = field(default_factory=_Mean)
    kept: _Mean = field(default_factory=_Mean)
    reasons: Counter[str] = field(default_factory=Counter)
    rejects: list[tuple[str, str]] = field(default_factory=list)

    def add(self, batch: pa.RecordBatch) -> None:
        self.rows += len(batch)
        for name in _MEANS:
            if name in batch.schema.names:
                self.means[name].add(batch[name])
        if batch["error"].null_count < len(batch):
            self._add_rejects(batch.filter(pc.is_valid(batch["error"])))
        if _READINGS[0] in batch.schema.names and self.changes is not None:
            self._add_readings(batch[_READINGS[0]], batch[_READINGS[1]], self.changes)

    def _add_rejects(self, batch: pa.RecordBatch) -> None:
        for name, reason in zip(batch["id"].to_pylist(), batch["error"].to_pylist(), strict=True):
            known = reason in self.reasons or len(self.reasons) < MAX_REASONS
            self.reasons[reason if known else OTHER] += 1
            if len(self.rejects) < MAX_REJECTS:
                self.rejects.append((name, reason))

    def _add_readings(self, before: pa.StructArray, after: pa.StructArray, changes: Mapping[str, str | None]) -> None:
        lacking, reached = [], []
        for factor in (f.name for f in before.type):
            was, became = pc.struct_field(before, factor), pc.struct_field(after, factor)
            if factor not in changes:
                self.kept.add(pc.equal(was, became))
            elif changes[factor] is not None:
                lacking.append(pc.not_equal(was, changes[factor]))
                reached.append(pc.equal(became, changes[factor]))
        if lacking and len(lacking) == len(changes):
            self.success.add(_all(reached, pc.and_).filter(_all(lacking, pc.or_)))


def _all(columns: list[pa.Array], join: Any) -> pa.Array:
    """Several boolean columns as one; a null in one is a null in the result, and such rows do not count."""
    joined = columns[0]
    for column in columns[1:]:
        joined = join(joined, column)
    return joined


def batches(found: Input, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Some columns of all rows in order, a few row groups in memory at a time; other columns are not read."""
    fs, _ = url_to_fs(found.source.path)
    for start in range(0, len(found.files), FILES):  # a dataset keeps the footers of all its files
        files = list(found.files[start : start + FILES])
        dataset = pads.dataset(files, schema=found.columns, filesystem=fs, format="parquet")
        yield from dataset.to_batches(columns=list(columns), batch_readahead=4)


# ---- single rows -----------------------------------------------------------------------------------------------------


def spread(total: int, count: int) -> list[int]:
    """At most ``count`` positions below ``total``, evenly spaced: the middles of equal sections. Always the same ones."""
    count = min(total, count)
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def locate(found: Input, ids: Sequence[str]) -> dict[str, int]:
    """Positions of ids that are there; reads the id column until all are found."""
    wanted, start = pa.array(ids, pa.string()), 0
    places: dict[str, int] = {}
    for batch in batches(found, ["id"]):
        hits = np.flatnonzero(pc.is_in(batch["id"], value_set=wanted).to_numpy(zero_copy_only=False))
        places |= {batch["id"][int(hit)].as_py(): start + int(hit) for hit in hits}
        start += len(batch)
        if len(places) == len(ids):
            break
    return places


def rows_at(found: Input, positions: Sequence[int], columns: Sequence[str]) -> dict[int, dict[str, Any]]:
    """Position -> row as a dict of ``columns``. One row group at a time is read, and none that holds no such row."""
    fs, _ = url_to_fs(found.source.path)
    groups = [(file, g) for file, counts in zip(found.files, found.counts, strict=True) for g in range(len(counts))]
    starts = np.cumsum([0, *(rows for counts in found.counts for rows in counts)]).tolist()
    needed: dict[int, list[int]] = {}
    for position in sorted(positions):
        needed.setdefault(bisect_right(starts, position) - 1, []).append(position)
    rows: dict[int, dict[str, Any]] = {}
    for number, inside in needed.items():
        file, group = groups[number]
        with fs.open(file) as stream, pq.ParquetFile(stream) as parquet:
            table = parquet.read_row_group(group, columns=list(columns)).take([p - starts[number] for p in inside])
        rows |= dict(zip(inside, table.to_pylist(), strict=True))
    return rows
