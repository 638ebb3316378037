"""How far a run is, read from its output folder alone: while it runs, after it stopped, from any machine."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from pipeline.config import ConfigError
from pipeline.faults import refused
from pipeline.manifest import RECORD, read_manifest
from pipeline.resume import THREADS


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Of one dataset."""

    folder: str
    state: str
    """``finished``, or ``running``, which a killed run is said to be too."""
    rows: int
    done: int
    reasons: Counter[str]
    """Of the rejects among the done ones."""
    started: datetime
    """Or finished, where the run has."""
    latest: datetime | None
    """When the newest file was written."""
    resumed: int
    seconds: float | None
    """Of a finished run."""

    @property
    def left(self) -> int:
        return self.rows - self.done

    @property
    def rate(self) -> float | None:
        """Rows a second since the run started, up to its newest file; None where nothing can be said."""
        seconds = self.seconds or ((self.latest - self.started).total_seconds() if self.latest else 0)
        new = self.done - self.resumed
        return new / seconds if new > 0 and seconds > 0 else None


def standings(address: str) -> list[Standing]:
    """Of the dataset at an address, or of all in the folders right below. Raises ConfigError if there is none."""
    with refused(f"{address} cannot be opened"):
        fs, root = url_to_fs(address)
        if not fs.isdir(root):
            raise ConfigError(f"there is no folder {address}; give one that invert or edit writes to")
        below = sorted(
            str(entry["name"]).rstrip("/").rpartition("/")[2] for entry in fs.ls(root, detail=True) if entry["type"] == "directory"
        )
        folders = [address, *(f"{address.rstrip('/')}/{name}" for name in below)]
        found = [(folder, manifest) for folder in folders if (manifest := read_manifest(folder))]
    if not found:
        raise ConfigError(f"{address} holds no {RECORD}, nor does a folder in it; give the output of invert or edit")
    return [_standing(folder, manifest) for folder, manifest in found]


def _standing(folder: str, manifest: dict[str, Any]) -> Standing:
    fs, root = url_to_fs(folder)
    files = [str(file) for file in fs.glob(f"{root}/part-*.parquet")]
    done, reasons = 0, Counter[str]()
    with ThreadPoolExecutor(THREADS) as pool:
        for rows, errors in pool.map(lambda file: _read(fs, file), files):
            done += rows
            reasons.update(errors)
    times = [fs.modified(file) for file in files]
    return Standing(
        folder=folder,
        state=str(manifest.get("state", "finished")),
        rows=int(manifest.get("rows", done)),
        done=done,
        reasons=reasons,
        started=datetime.fromisoformat(manifest["updated"]) if "updated" in manifest else max(times, default=datetime.now(UTC)),
        latest=max(times, default=None),
        resumed=int(manifest.get("resumed_rows", 0)),
        seconds=manifest.get("seconds") if manifest.get("state") == "finished" else None,
    )


def _read(fs: AbstractFileSystem, file: str) -> tuple[int, list[str]]:
    """Rows and reasons of rejects of one file; none of a file that is being replaced."""
    try:
        with fs.open(file) as stream, pq.ParquetFile(stream) as parquet:
            errors = parquet.read(columns=["error"])["error"]
    except (pa.ArrowException, OSError, KeyError):
        return 0, []
    return len(errors), [error for error in errors.to_pylist() if error is not None]
