"""How far a run is, read from its output folder alone: while it runs, after it stopped, from any machine."""

from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from models.references import public
from pipeline.config import ConfigError
from pipeline.faults import refused
from pipeline.manifest import FAILED, FINISHED, RECORD, RUNNING, is_finished, read_manifest
from pipeline.resume import DAMAGED, THREADS, error_of_each


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Of one dataset."""

    folder: str
    state: str
    """As in ``pipeline.manifest``; a killed run is said to be running too."""
    rows: int
    done: int
    reasons: Counter[str]
    """Of the rejects among the done ones."""
    started: datetime
    """Or finished, where the run has."""
    latest: datetime | None
    """When the newest file was written."""
    resumed: int
    """Rows among the done ones that runs before the latest had finished."""
    seconds: float | None
    """Of a finished run, with all that went before it."""

    @property
    def left(self) -> int:
        return self.rows - self.done

    @property
    def rate(self) -> float | None:
        """Rows a second: of a finished run over all its time, else since it was last started, up to its newest file. None where
        nothing can be said."""
        seconds = self.seconds or ((self.latest - self.started).total_seconds() if self.latest else 0)
        new = self.done if self.seconds else self.done - self.resumed
        return new / seconds if new > 0 and seconds > 0 else None


def standings(address: str) -> list[Standing]:
    """Of the dataset at an address, or of all in the folders right below. Raises ConfigError if there is none."""
    with refused(f"{public(address)} cannot be opened"):
        folders = folders_at(address)
        if not folders:
            raise ConfigError(f"there is no folder {public(address)}; give one that align, invert or edit writes to")
        found = [(folder, manifest) for folder in folders if (manifest := read_manifest(folder))]
    if not found:
        raise ConfigError(f"{address} holds no {RECORD}, nor does a folder in it; give the output of align, invert or edit")
    return [_standing(folder, manifest) for folder, manifest in found]


def folders_at(address: str) -> list[str]:
    """The folder at an address and those right below it; none if it is no folder. Raises ConfigError if it cannot be opened."""
    try:
        fs, root = url_to_fs(address)
        entries = fs.ls(root, detail=True) if fs.isdir(root) else None
    except (ValueError, ImportError, OSError) as error:
        raise ConfigError(f"{address} cannot be opened: {error}") from None
    if entries is None:
        return []
    below = sorted(str(entry["name"]).rstrip("/").rpartition("/")[2] for entry in entries if entry["type"] == "directory")
    top = address.rstrip("/")
    return [top, *(f"{top}/{name}" for name in below)]


def unfinished(folders: Iterable[str]) -> list[str]:
    """Why datasets may not be worked on: their runs have not come to an end, so that rows are missing, or ended with wrong ids, or rows
    were lost since then; a sentence for each. Folders without a record of a run are passed over."""
    found = [(folder, read_manifest(folder)) for folder in dict.fromkeys(folders)]
    suspect = [(_standing(f, manifest), manifest) for f, manifest in found if not is_finished(manifest) or _has_other_files(f, manifest)]
    return [_told(standing, manifest) for standing, manifest in suspect if standing.left or not is_finished(manifest)]


def _has_other_files(folder: str, manifest: dict[str, Any]) -> bool:
    """Whether a finished run wrote more or fewer files than are there, so that it is worth looking into them."""
    fs, root = url_to_fs(folder)
    return "files" in manifest and len(fs.glob(f"{root}/part-*.parquet")) != manifest["files"]


def _told(standing: Standing, manifest: dict[str, Any]) -> str:
    command = f": {manifest['command']}" if manifest.get("command") else ""
    if standing.state == FINISHED:
        return (
            f"{standing.folder} has {standing.done} of the {standing.rows} rows that its run wrote; remove {RECORD} there if that is "
            f"meant, or give the command that made it again for the others{command}"
        )
    if standing.state == FAILED:
        return (
            f"{standing.folder} failed its audit: its ids are not those of its input; give the command that made it again first, "
            f"with --overwrite if it fails again{command}"
        )
    return (
        f"{standing.folder} is not finished, {standing.left} of {standing.rows} rows are left; wait for its run, or, if that was stopped, "
        f"give the same command again first{command}"
    )


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
        seconds=manifest.get("seconds") if is_finished(manifest) else None,
    )


def seconds_spent(folder: str) -> float:
    """By all runs that have written to a dataset; that of a run which did not come to its end counts up to its newest file."""
    manifest = read_manifest(folder)
    seconds = float(manifest.get("seconds") or 0)
    if manifest.get("state") != RUNNING or "updated" not in manifest:
        return seconds
    fs, root = url_to_fs(folder)
    times = [fs.modified(str(file)) for file in fs.glob(f"{root}/part-*.parquet")]
    started = datetime.fromisoformat(manifest["updated"])
    return seconds + max(0.0, (max(times, default=started) - started).total_seconds())


def _read(fs: AbstractFileSystem, file: str) -> tuple[int, list[str]]:
    """Rows and reasons of rejects of one file; none of a file that is being replaced."""
    try:
        errors = error_of_each(fs, file)
    except (*DAMAGED, OSError):
        return 0, []
    return len(errors), [error for error in errors if error is not None]
