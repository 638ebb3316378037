"""What an actor of a run does: a block of rows in, a Parquet file for each output and a receipt out. No Ray here.

What goes wrong travels in the receipt: Ray drops blocks whose process died, and must not drop those that raised.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import schema
from pipeline.config import Edit, Pass, Run
from pipeline.faults import explained, to_bytes
from pipeline.manifest import write_in_one_stroke
from pipeline.resume import file_name
from pipeline.sources import Block, Input, read_block

if TYPE_CHECKING:
    from pipeline.stages import Stage

ROW_GROUP = 100
"""Rows of a row group: what the Hub viewer allows for images."""
RECEIPT = pa.schema({"start": pa.int64(), "rows": pa.int64(), "errors": pa.list_(pa.string()), "batch": pa.int64(), "failure": pa.binary()})
"""Of a block: its first row, how many it has, the reasons of its rejects, images in a model call, or the error that ended it."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """One dataset that a run writes: aligned faces, latents, or one edit."""

    folder: str
    edit: Edit | None
    columns: pa.Schema
    request: dict[str, Any]
    """Everything that decides its rows, as ``pipeline.resume`` compares it."""
    model_calls: int
    """Network evaluations an image, without the way up that all edits of a run share."""
    record: dict[str, Any]
    """What its own record says of how it was made, beside what every record says."""


class BlockWorker:
    """One actor of a run, whatever it makes of its rows."""

    run: Pass

    def __call__(self, table: pa.Table) -> pa.Table:
        return pa.concat_tables([self.receipt(cell, failure) for cell, failure in zip(table["block"], table["failure"], strict=True)])

    def receipt(self, cell: pa.LargeBinaryScalar, failure: pa.BinaryScalar) -> pa.Table:
        """Of a packed block; one that could not be read has brought its failure with it."""
        if failure.is_valid:
            return receipt(failure=failure.as_py())
        try:
            return self.finish(unpack(cell))
        except Exception as error:
            return receipt(failure=to_bytes(error))

    def finish(self, table: pa.Table, withheld: Mapping[int, str] | None = None) -> pa.Table:
        """Computes and writes a block; the rows ``withheld`` become rejects with these reasons. Returns its receipt."""
        start, errors = table[schema.ROW][0].as_py(), []
        for output, done in self.compute(table, withheld or {}):
            write_file(output.folder, file_name(start), done)
            errors = [error for error in done[schema.error_column(output.columns)].to_pylist() if error is not None]
        return receipt(start=start, rows=len(table), errors=errors, batch=self.batch)

    def compute(self, table: pa.Table, withheld: Mapping[int, str]) -> Iterator[tuple[Output, pa.Table]]:
        """The rows of each output that lacks them, one output after the other."""
        raise NotImplementedError

    @property
    def batch(self) -> int:
        """Images in one model call: as asked for, or fewer where memory ran out."""
        return self.run.resources.batch


class Worker(BlockWorker):
    """Walks images up, latents down, or both."""

    def __init__(self, run: Run, outputs: tuple[Output, ...], has_latents: bool):
        import torch  # the driver, which only hands this class on, never needs the networks

        from pipeline.stages import Invert

        torch.set_num_threads(max(1, round(run.resources.cpus)))
        self.run: Run = run
        self.invert = None if has_latents else Invert(run.domain, run.recipe, run.resources)
        self.chains = [(output, edit_stages(run, output.edit)) for output in outputs]

    def compute(self, table: pa.Table, withheld: Mapping[int, str]) -> Iterator[tuple[Output, pa.Table]]:
        folders = wanted(table)
        rows = without(table.drop_columns([schema.ROW, schema.BLOCK]), withheld)
        latents = self.invert(rows) if self.invert else rows
        for output, stages in self.chains:
            if folders and output.folder not in folders:
                continue
            done = latents
            for stage in stages:
                done = stage(done)
            yield output, rejected(done, table["image"], withheld).select(output.columns.names).cast(output.columns)

    @property
    def batch(self) -> int:
        stages = [self.invert, *(stage for _, stages in self.chains for stage in stages)]
        sizes = [stage.batches.size for stage in stages if stage is not None and hasattr(stage, "batches")]
        return min([self.run.resources.batch, *sizes])


def edit_stages(run: Run, edit: Edit | None) -> "list[Stage]":
    """What turns latents into one edit's rows; nothing for the latents themselves."""
    if edit is None:
        return []
    from pipeline.scoring import Score
    from pipeline.stages import Apply

    return [Apply(run.domain, run.recipe, edit, run.resources), Score(run.domain, edit, run.resources, run.clip, run.identity)]


def receipt(**values: Any) -> pa.Table:
    """One row of ``RECEIPT``."""
    return pa.Table.from_pylist([values], RECEIPT)


def write_file(folder: str, name: str, table: pa.Table) -> None:
    """Writes one Parquet file under its final name in one stroke: readers never see half of it, a retry replaces it.
    Raises JobError if there is no room or no permission."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=ROW_GROUP, write_page_index=True)
    with explained(f"{folder}/{name} cannot be written"):
        write_in_one_stroke(folder, name, sink.getvalue().to_pybytes())


# ---- rows that must not be touched -----------------------------------------------------------------------------------


def without(table: pa.Table, withheld: Mapping[int, str]) -> pa.Table:
    """The table without the pictures of some rows (by position), so that no stage decodes or walks them."""
    if not withheld:
        return table
    kept = pa.array([None if row in withheld else row for row in range(len(table))], pa.int64())
    table = table.set_column(table.column_names.index("image"), "image", table["image"].take(kept))
    return _with_errors(table, withheld) if "error" in table.column_names else table


def rejected(done: pa.Table, pictures: pa.ChunkedArray, withheld: Mapping[int, str]) -> pa.Table:
    """What became of such a table, with all pictures again and the reasons for the rows that were withheld."""
    if not withheld:
        return done
    return _with_errors(done.set_column(done.column_names.index("image"), "image", pictures), withheld)


def _with_errors(table: pa.Table, errors: Mapping[int, str]) -> pa.Table:
    column = [errors.get(row, error) for row, error in enumerate(table["error"].to_pylist())]
    return table.set_column(table.column_names.index("error"), "error", pa.array(column, pa.string()))


# ---- blocks on their way ---------------------------------------------------------------------------------------------


def read_packed(found: Input, block: Block) -> pa.Table:
    """A block as a single row, so that Ray, which counts batches in rows, can neither cut it nor join it to another; or its failure."""
    try:
        return pack(read(found, block)).append_column("failure", pa.nulls(1, pa.binary()))
    except Exception as error:
        return pa.table({"block": pa.nulls(1, pa.large_binary()), "failure": pa.array([to_bytes(error)], pa.binary())})


def read(found: Input, block: Block) -> pa.Table:
    """The rows of a block. Raises JobError that names its files if they cannot be read."""
    more = f" and {len(block.files) - 1} more" if len(block.files) > 1 else ""
    with explained(f"{block.files[0]}{more} cannot be read"):
        table = read_block(found, block)
    return table.replace_schema_metadata({**(table.schema.metadata or {}), schema.WANTED: json.dumps(block.wanted)})


def wanted(table: pa.Table) -> list[str]:
    """Folders of the outputs that lack a block that was read; empty if all do."""
    return list(json.loads((table.schema.metadata or {}).get(schema.WANTED, b"[]")))


def pack(table: pa.Table) -> pa.Table:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    data = sink.getvalue()
    ends = pa.py_buffer(np.array([0, data.size], np.int64))
    return pa.table({"block": pa.Array.from_buffers(pa.large_binary(), 1, [None, ends, data])})


def unpack(cell: pa.LargeBinaryScalar) -> pa.Table:
    """The block that ``pack`` made a cell of; nothing is copied."""
    return pa.ipc.open_stream(cell.as_buffer()).read_all()
