"""What a run will read, write and compute, from a look at its input: plain arithmetic and a few sampled rows; no Ray, no model call."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from models.recipe import Tuning
from pipeline import codec, schema
from pipeline.config import Resources
from pipeline.sources import Block, Input, read_block

T = TypeVar("T")
FILES = 256
"""Input files whose sizes are asked for; of more, so many evenly spread ones."""
BLOCKS, ROWS = 4, 64
"""Blocks of the input that rows are sampled from, and rows altogether."""
ROW_GROUP = 100


def spread(things: Sequence[T], most: int) -> list[T]:
    """At most so many of them, evenly spread."""
    count = min(most, len(things))
    return [things[i * len(things) // count] for i in range(count)]


# ---- bytes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What some rows of the input say about all of them. Sizes are bytes a row, times seconds of one core a row."""

    rows: int
    reasons: tuple[str, ...]
    """Of those whose picture cannot be used."""
    read: float
    latents: float
    """Of a file of latents: the picture, the user's columns and the latent itself."""
    edits: tuple[float, float]
    """Of a file of edits, at least and likely: with the source's own pixels in place of the edited ones, and with the noise of
    one step of 255 on them that a network leaves even where the source is flat."""
    decoding: float
    encoding: float
    scoring: float


def bytes_read(found: Input) -> float:
    """Bytes of input files a row; exact up to ``FILES`` files."""
    fs, _ = url_to_fs(found.source.path)
    chosen = spread(range(len(found.files)), FILES)
    rows = sum(sum(found.counts[i]) for i in chosen)
    return sum(fs.size(found.files[i]) for i in chosen) / max(1, rows)


def sample_rows(found: Input, blocks: Sequence[Block]) -> pa.Table:
    """The first rows of evenly spread blocks, as ``read_block`` gives them."""
    chosen = spread(blocks, BLOCKS)
    return pa.concat_tables(read_block(found, block).slice(0, ceil(ROWS / len(chosen))) for block in chosen)


def sample(found: Input, blocks: Sequence[Block], size: int, factors: Sequence[str], max_pixels: int) -> Sample:
    """Reads some rows and writes them, in memory, as a run would; ``size`` is that of the domain's images."""
    table = sample_rows(found, blocks)
    pictures, errors = codec.decode_column(table["image"], size, max_pixels)
    good = [p for p in pictures if p is not None]
    decoding, _ = timed(lambda: codec.decode_column(table["image"], size, max_pixels))
    encoding, plain = timed(lambda: [codec.encode_png(p) for p in good])
    compare(good[:1], plain[:1])  # the first time imports and allocates
    noisy = [codec.encode_png(p) for p in with_noise(good)]
    latents, edits = schema.latents_schema(found.user_columns, size, {}), schema.edits_schema(found.user_columns, factors, {})
    rows, of_file = len(table), blocks[0].rows
    return Sample(
        rows=len(table),
        reasons=tuple(error for error in errors if error),
        read=bytes_read(found),
        latents=bytes_written(latents_table(table, pictures, size), latents, of_file),
        edits=(bytes_written(edits_table(table, plain), edits, of_file), bytes_written(edits_table(table, noisy), edits, of_file)),
        decoding=decoding / rows,
        encoding=encoding / rows,
        scoring=timed(lambda: compare(good, plain))[0] / rows,
    )


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Seconds of computing, whatever else the machine does, and the result."""
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


def compare(pictures: Sequence[np.ndarray], encoded: Sequence[bytes]) -> None:
    """What scores take beside the networks: edits are decoded again, differences and similarity computed."""
    from models.metrics import mean_absolute_error, structural_similarity  # slow to import

    if pictures:
        source = codec.to_tensor(list(pictures))
        edited = codec.to_tensor([codec.decode(data, source.shape[-1]) for data in encoded])
        mean_absolute_error(source, edited)
        structural_similarity(source, edited)


def with_noise(pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
    """uint8 pictures with -1, 0 or 1 added to every number."""
    rng = np.random.default_rng(0)
    return [np.clip(p.astype(np.int16) + rng.integers(-1, 2, p.shape), 0, 255).astype(np.uint8) for p in pictures]


def latents_table(table: pa.Table, pictures: Sequence[np.ndarray | None], size: int) -> pa.Table:
    """The rows with latents as compressible as real ones: not at all."""
    rng = np.random.default_rng(0)
    latents = [None if p is None else rng.standard_normal((3, size, size), np.float32) for p in pictures]
    return _with(table, "latent", codec.latents_to_arrow(latents, size))


def edits_table(table: pa.Table, edited: Sequence[bytes]) -> pa.Table:
    """The rows with edits; those of rejects are missing at the end, which does not change what they take."""
    cells = [{"bytes": data, "path": None} for data in edited]
    return _with(table, "edited", pa.array(cells + [None] * (len(table) - len(cells)), schema.IMAGE))


def _with(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    return (table.drop_columns([name]) if name in table.column_names else table).append_column(name, column)


def bytes_written(table: pa.Table, columns: pa.Schema, of_file: int) -> float:
    """Bytes a row of Parquet files of so many rows, written as runs write theirs; columns that the rows lack are null."""
    there = {f.name: table[f.name] if f.name in table.column_names else pa.nulls(len(table), f.type) for f in columns}
    whole, written = pa.table(there).cast(columns), 0
    for start in range(0, len(whole), of_file):
        sink = pa.BufferOutputStream()
        pq.write_table(whole.slice(start, of_file), sink, row_group_size=ROW_GROUP, write_page_index=True)
        written += sink.getvalue().size
    return written / len(whole)


# ---- computing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Networks:
    """Floating-point operations for one image: of a call of the base model and of its training, and of what looks at pictures."""

    call: float
    training: float = 0.0
    """A call and its backward pass."""
    trained: int = 0
    """Numbers that training changes."""
    clip: float = 0.0
    """All CLIPs together."""
    identity: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is to be computed."""

    rows: int
    images: int
    """That the networks see: rows, and what fills up the last batch of each block."""
    calls: int
    """Evaluations of the base model, or of edit models, altogether; each of one image."""
    flops: float
    cpu_seconds: float = 0.0
    """Of one core beside them: pictures decoded, encoded, compared."""
    parts: int = 1
    """Blocks, or attributes: what workers take as a whole."""


def images_of(blocks: Sequence[int], batch: int) -> int:
    """Images that networks see of blocks with so many rows: every batch is filled up."""
    return sum(ceil(rows / batch) * batch for rows in blocks)


def pass_work(blocks: Sequence[int], batch: int, calls: int, networks: Networks, scored: tuple[int, int]) -> Work:
    """Of a pass over blocks with so many rows. ``calls``: an image, on all ways; ``scored``: edits that CLIP looks at, and edits."""
    images, (with_clip, edits) = images_of(blocks, batch), scored
    looks = 2 * (with_clip * networks.clip + edits * networks.identity)  # at the source and at the edit
    rows = sum(blocks)
    flops = images * calls * networks.call + rows * looks
    return Work(rows=rows, images=images, calls=images * calls, flops=flops, parts=len(blocks))


def tuning_work(rows: int, tuning: Tuning, networks: Networks) -> Work:
    """Of teaching one attribute with at most ``rows`` latents, if no training stops early."""
    available = min(rows, tuning.images + tuning.held_out)
    held_out = min(tuning.held_out, available)
    images, steps = available - held_out, tuning.steps_down
    trained, judged = images * tuning.epochs * steps, held_out * tuning.epochs * steps
    referred = (images + held_out) * steps if tuning.reference == "reconstruction" else 0
    again = trained if tuning.memory == "checkpoint" else 0
    losses = images * tuning.epochs * (steps if tuning.memory == "stepwise" else 1)
    looked = 3 * losses + 2 * held_out * tuning.epochs  # a look, another, and back through one of them
    flops = trained * networks.training + (judged + referred + again) * networks.call + looked * networks.clip
    if tuning.id_weight:
        flops += looked * networks.identity
    return Work(rows=images + held_out, images=images, calls=trained + judged + referred, flops=flops)


# ---- time ------------------------------------------------------------------------------------------------------------


def seconds(work: Work, flops_a_second: float, workers: int, share: float) -> float:
    """From the first row to the last, for workers that have ``share`` of a device each and take whole parts."""
    if not work.parts:
        return 0.0
    workers = min(workers, work.parts)
    turns = ceil(work.parts / workers) / work.parts  # of all the work, what the busiest worker does
    return turns * (work.flops / flops_a_second / share + work.cpu_seconds)


def devices(resources: Resources, parts: int) -> float:
    """GPUs, or without any, actors, that a pass occupies."""
    return min(resources.workers, max(1, parts)) * (resources.gpus or 1.0)
