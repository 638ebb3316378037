"""What of a run is there already, and whether it is the same run; no Ray here.

The ``request`` in an output folder's manifest names everything that decides its rows; a run that asks for the same goes on with
the blocks that have no file yet.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from models.fetching import cache_folder, version_of
from models.references import public
from models.stores import make_folder
from models.weights import fingerprint
from pipeline import schema
from pipeline.config import AlignRun, ConfigError, Edit, Pass, Run, TuneRun
from pipeline.manifest import read_manifest
from pipeline.sources import Block, Input

THREADS = 32
"""Files that are looked at side by side: on object stores each takes a while."""
OURS = re.compile(r"part-\d{12}\.parquet")
"""Names of output files; no other file is ever removed."""
TEMPORARY = ".part-*.tmp"
"""What a process that was killed may leave behind."""
WEIGHTS_OF, NUMBER_OF = "weights of ", "number of "
"""Names in a request that begin so are compared only where both requests have them: weights are not fetched for that, records of
earlier versions have none, and a place that changed has a name of its own."""


# ---- the request -----------------------------------------------------------------------------------------------------


def request_of(run: Run, found: Input, edit: Edit | None) -> dict[str, Any]:
    """Flat names and values of everything that decides the rows of one output; JSON as it comes back from a file.

    Numbers of workers, GPUs and images in a batch are not among them: they decide the speed, and the last bit at most.
    """
    request: dict[str, Any] = {
        **_rows(run, found),
        "base model": fingerprint(run.domain.weights),
        "image size": run.domain.image_size,
        **{f"recipe {name}": value for name, value in run.recipe.to_dict().items()},
    }
    if edit is not None:
        request |= {
            "edit": [[part.name, fingerprint(part.file), part.weight] for part in edit.parts],
            "degree": edit.degree,
            "ranges": edit.ranges,
            "score CLIP": run.clip and public(run.clip),
            "identity": run.identity and public(run.identity),
            **_weights([run.clip] if edit.parts else [], [run.identity, run.domain.judge]),
        }
    return _as_read(request)


def alignment_request(run: AlignRun, found: Input) -> dict[str, Any]:
    """The same for aligned faces."""
    model = run.landmark_model
    return _as_read({**_rows(run, found), "size": run.size, "landmark model": model and public(model), **_weights([], [model])})


def _rows(run: Pass, found: Input) -> dict[str, Any]:
    """Which rows there are, what is kept of them, and which of them share a file."""
    return {
        "input": public(found.source.path),
        "input files": found.digest,
        f"{NUMBER_OF}input files": len(found.files),
        "id column": found.source.id_column,
        "image column": found.source.image_column,
        "limit": found.source.limit,
        "columns": found.source.columns,
        "where": found.source.where,
        "block rows": run.resources.block_rows,
        "pixel limit": run.resources.max_pixels,
    }


def tuning_request(run: TuneRun, found: Input) -> dict[str, Any]:
    """The same for the weights of an edit model. How many workers share the images is among it, GPUs and CPUs are not."""
    request: dict[str, Any] = {
        "latents": public(found.source.path),
        "latents files": found.digest,
        f"{NUMBER_OF}latents files": len(found.files),
        "base model": fingerprint(run.domain.weights),
        "attribute": run.attribute,
        "source text": run.source_text,
        "target text": run.target_text,
        "CLIPs": [public(clip) for clip in run.loss_clips],
        "identity": run.identity and public(run.identity),
        **_weights(run.loss_clips, [run.identity]),
        "workers": run.workers,
        **{f"recipe {name}": value for name, value in run.recipe.to_dict().items()},
        **{f"tuning {name}": value for name, value in asdict(run.tuning).items()},
    }
    return _as_read(request)


def _as_read(request: Mapping[str, Any]) -> dict[str, Any]:
    """As it comes back from a file, so that the two can be compared."""
    back: dict[str, Any] = json.loads(json.dumps(request))
    return back


def _weights(clips: Iterable[str | None], files: Iterable[str | Path | None]) -> dict[str, str]:
    """What tells the weights at these places from others that could be there, as far as that is known without fetching them."""
    from models.clip import clip_fingerprint  # slow to import

    known = {str(clip): clip_fingerprint(clip) for clip in clips if clip} | {str(file): version_of(file) for file in files if file}
    return {f"{WEIGHTS_OF}{public(place)}": version for place, version in known.items() if version}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What changed from one request to another, each with both values."""
    compared = [name for name in {**before, **now} if not name.startswith((WEIGHTS_OF, NUMBER_OF)) or (name in before and name in now)]
    names = [name for name in compared if before.get(name) != now.get(name)]
    return [f"{name} was {_said(before.get(name))}, now {_said(now.get(name))}" for name in names]


def _said(value: Any) -> str:
    return "nothing" if value is None else value if isinstance(value, str) else json.dumps(value)


# ---- what is done ----------------------------------------------------------------------------------------------------


def nested(source: str, folder: str) -> list[str]:
    """Why rows may not be written to a folder: it holds input files, which could be replaced, or lies inside the input, which
    would then hold it; empty if neither."""
    (_, given), (fs, root) = url_to_fs(source), url_to_fs(folder)
    inside, outside = (os.path.realpath(p) if "file" in fs.protocol else p.rstrip("/") for p in (given, root))
    if inside == outside or inside.startswith(f"{outside}/"):
        return [f"the input {source} lies in the output {folder}, where it could be replaced; give another output folder"]
    if outside.startswith(f"{inside}/"):
        return [f"the output {folder} lies in the input {source}, which would then hold it; give another output folder"]
    return []


def output_problems(folder: str, request: Mapping[str, Any], overwrite: bool = False) -> list[str]:
    """Why a run may not go on in a folder that holds rows, or replace them; empty if they are of the same request, or there are none."""
    fs, root = url_to_fs(folder)
    files = _files(fs, root)
    if not files:
        return []
    if strange := [name for name in files if not OURS.fullmatch(name)]:
        return [f"{folder} holds {len(strange)} Parquet files that no run wrote, like {strange[0]}; give another folder"]
    if overwrite:
        return []
    before = read_manifest(folder).get("request")
    if before is None:
        return [f"{folder} holds {len(files)} Parquet files of something else already; give another folder, or --overwrite"]
    changed = differences(before, request)
    return [f"{folder} was made by another request ({'; '.join(changed)}); give another folder, or --overwrite"] if changed else []


Kept = dict[int, list[str]]
"""Of one output: first row of each block that it has whole, which names its file -> reasons of the rejects in it."""


@dataclass(kw_only=True)
class Done:
    """The blocks that every output has whole."""

    starts: set[int] = field(default_factory=set)
    """First rows of these blocks."""
    rows: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    """Of the rejects among them."""


def file_name(start: int) -> str:
    """Of the block whose first row has this position."""
    return f"part-{start:012d}.parquet"


def finished(blocks: Iterable[Block], folder: str, retry_rejects: bool) -> Kept:
    """The blocks that an output need not be given again. With ``retry_rejects`` those with a reject must be."""
    fs, root = url_to_fs(folder)
    names = set(_files(fs, root))
    candidates = [b for b in blocks if file_name(b.start) in names]

    def look(block: Block) -> list[str] | None:
        return errors_in(fs, f"{root}/{file_name(block.start)}", block.rows)

    with ThreadPoolExecutor(THREADS) as pool:
        looked = zip(candidates, pool.map(look, candidates), strict=True)
        return {block.start: errors for block, errors in looked if errors is not None and not (retry_rejects and errors)}


def done_by_all(blocks: Iterable[Block], outputs: Sequence[Kept]) -> Done:
    """What no output needs any more; nothing where there are no outputs."""
    done = Done()
    for block in blocks:
        if outputs and all(block.start in kept for kept in outputs):
            done.starts.add(block.start)
            done.rows += block.rows
            done.reasons.update(outputs[-1][block.start])
    return done


def errors_in(fs: AbstractFileSystem, file: str, rows: int) -> list[str] | None:
    """The reasons of the rejects in an output file; None if it is damaged or does not hold so many rows."""
    try:
        errors = error_of_each(fs, file)
    except DAMAGED:
        return None
    except OSError as error:  # as damaged pages are told; those of a store have a number
        if error.errno is not None or isinstance(error, PermissionError):  # those of S3 have no number
            raise
        return None
    return [error for error in errors if error is not None] if len(errors) == rows else None


DAMAGED = (pa.ArrowException, KeyError, ValueError)
"""What reading a file raises that is no Parquet file of ours, or was one; beside it an OSError."""


def error_of_each(fs: AbstractFileSystem, file: str) -> list[str | None]:
    """What the rows of an output file say of why they are rejects. Raises one of ``DAMAGED``, or OSError."""
    with fs.open(file) as stream, pq.ParquetFile(stream) as parquet:
        name = schema.error_column(parquet.schema_arrow)
        return parquet.read(columns=[name])[name].to_pylist()


def clear(folder: str, keep: Callable[[str], bool]) -> None:
    """Makes the folder and removes its Parquet files but those whose names are to be kept, and what a killed process left."""
    fs, root = url_to_fs(folder)
    make_folder(fs, root)
    leftovers = [str(file) for file in fs.glob(f"{root}/{TEMPORARY}")]
    for file in [*leftovers, *(f"{root}/{name}" for name in _files(fs, root) if OURS.fullmatch(name) and not keep(name))]:
        fs.rm_file(file)


@contextmanager
def alone(places: Iterable[str]) -> Iterator[None]:
    """Keeps other processes of this machine and user from writing to the same local places, until this one leaves or ends, however it
    ends. Object stores, and file systems without locks, know no such thing. Raises ConfigError if another one is writing there."""
    folder = cache_folder() / "locks"
    with ExitStack() as stack:
        for fs, path in map(url_to_fs, places):
            if "file" not in fs.protocol:
                continue
            with suppress(OSError, NotImplementedError):
                folder.mkdir(parents=True, exist_ok=True)
                lock = FileLock(folder / f"{hashlib.sha256(os.path.realpath(path).encode()).hexdigest()[:32]}.lock")
                try:
                    stack.enter_context(lock.acquire(blocking=False))
                except Timeout:
                    raise ConfigError(f"another process is writing to {path}; wait for it or stop it, or give another place") from None
        yield


def _files(fs: AbstractFileSystem, root: str) -> list[str]:
    """Names of the Parquet files right in a folder."""
    if not fs.isdir(root):
        return []
    fs.invalidate_cache()
    names = (str(path).rstrip("/").rpartition("/")[2] for path in fs.ls(root, detail=False))
    return sorted(name for name in names if name.endswith(".parquet") and not name.startswith((".", "_")))
