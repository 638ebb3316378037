"""Ray Data: blocks of rows through a pool of actors into Parquet files, every input row accounted for."""

import pickle
import time
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import DataContext
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import RayActorError

from models.references import EVERY_NODE, public, told_in
from pipeline.aligning import Aligner
from pipeline.config import AlignRun, ConfigError, Source, versions
from pipeline.faults import AGAIN, JobError, explained, from_bytes
from pipeline.ids import check_ids
from pipeline.isolation import Attempts, finish, last_line
from pipeline.manifest import FAILED, FINISHED, RUNNING, read_manifest, write_manifest
from pipeline.plan import Plan
from pipeline.resume import clear, file_name
from pipeline.sources import Block, Input, find, read_block
from pipeline.standing import seconds_spent
from pipeline.worker import BlockWorker, Output, Worker, read_packed

DEATHS = 3
"""So often a block may end its worker process, or lose its node, before it is looked at alone."""
LOST_SHARE, LOST_ALWAYS = 0.05, 10
"""Of all blocks, and at least: so many may do so; more are no matter of single rows."""
PATIENCE = 6 * 3600.0
"""Seconds without any finished block after which a run is given up: a block on a CPU, or waiting for a node, may take hours."""


class AuditError(JobError):
    """The ids of the output are not those of the input: the run must not be trusted."""


@dataclass(kw_only=True)
class Report:
    """How far a run is; updated with each finished block."""

    rows: int
    done: int = 0
    resumed: int = 0
    """Rows among the done ones that an earlier run had finished."""
    reasons: Counter[str] = field(default_factory=Counter)
    batch: int = 0
    """Images in a model call: as asked for, or the fewest to which a worker had to go down."""
    seconds: float = 0.0

    @property
    def rejected(self) -> int:
        return self.reasons.total()

    def add(self, receipt: pa.Table) -> None:
        """A receipt of one or several blocks. Raises the failure that one brings."""
        for block in receipt.to_pylist():
            if block["failure"] is not None:
                raise from_bytes(block["failure"])
            self.done += block["rows"]
            self.reasons.update(block["errors"])
            self.batch = min(self.batch, block["batch"])


# ---- the run ---------------------------------------------------------------------------------------------------------


def block_dataset(found: Input, blocks: list[Block], cpus: float = 0.5) -> ray.data.Dataset:
    """A Ray dataset with the rows of ``blocks``, one Ray block each, read by tasks of ``cpus`` each.

    Ray fuses tasks that need exactly what the following actors need into these actors; others read ahead of them.
    """

    shared = found.shared

    def read(batch: pa.Table) -> pa.Table:
        return read_block(shared, named(batch))

    return _names(blocks).map_batches(read, batch_size=1, batch_format="pyarrow", num_cpus=cpus)


def _names(blocks: list[Block]) -> ray.data.Dataset:
    """One row a block, which says all of it: what is sent along with a function must not grow with the input."""
    return ray.data.from_arrow([pa.table({"block": [pickle.dumps(block)]}) for block in blocks])


def named(row: pa.Table) -> Block:
    """The block of such a row."""
    block = pickle.loads(row["block"][0].as_py())
    assert isinstance(block, Block)
    return block


def execute(plan: Plan, on_progress: Callable[[Report], None] = lambda report: None) -> Report:
    """Runs what is left of a plan on the Ray cluster that is connected. Raises JobError if it cannot go on, AuditError if the
    output's ids are not the input's."""
    started, done = time.monotonic(), plan.done
    report = Report(rows=plan.found.rows, done=done.rows, resumed=done.rows, reasons=Counter(done.reasons), batch=plan.run.resources.batch)
    before = {output.folder: 0.0 if plan.run.overwrite else seconds_spent(output.folder) for output in plan.pending}
    for output, starts in zip(plan.pending, plan.kept, strict=True):
        with explained(f"{output.folder} cannot be written"):
            clear(output.folder, {file_name(start) for start in starts}.__contains__)
            write_manifest(output.folder, _manifest(plan, output, report, RUNNING, before[output.folder]))
    on_progress(report)
    with closing(_receipts(plan, plan.left)) as receipts:
        for receipt in receipts:
            report.add(receipt)
            report.seconds = time.monotonic() - started
            on_progress(report)
    _audit_all(plan)
    for output in plan.pending:
        with explained(f"{output.folder} cannot be written"):
            write_manifest(output.folder, _manifest(plan, output, report, FINISHED, before[output.folder]))
    return report


def _receipts(plan: Plan, blocks: list[Block]) -> Generator[pa.Table]:
    """Computes and writes blocks; yields what became of them: first all through a pool of workers, then, alone, those whose process
    died each time."""
    if not blocks:
        return
    left = {block.start: block for block in blocks}
    with closing(_pass(plan, blocks)) as receipts:
        for receipt in receipts:
            for start in receipt["start"].to_pylist():
                left.pop(start, None)
            yield receipt
    if not left:
        return
    attempts = Attempts(plan.run.resources, *_worker(plan), plan.found.shared)
    try:
        for block in left.values():
            yield finish(attempts, block)
    finally:
        attempts.end()


def _worker(plan: Plan) -> tuple[type[BlockWorker], tuple[Any, ...]]:
    """What the workers of a plan are, and what they are made of."""
    if isinstance(plan.run, AlignRun):
        return Aligner, (plan.run, plan.writing)
    return Worker, (plan.run, plan.writing, plan.found.has_latents)


def _pass(plan: Plan, blocks: list[Block]) -> Generator[pa.Table]:
    """The receipts of blocks as a pool of workers finishes them. A block that died ``DEATHS`` times has none."""
    run, (worker, arguments) = plan.run, _worker(plan)
    on_gpu = run.resources.gpus > 0
    most = max(LOST_ALWAYS, int(LOST_SHARE * len(blocks)))
    with (
        warnings.catch_warnings(),
        _settings(max_errored_blocks=most, actor_init_retry_on_errors=True, execution_no_progress_timeout_s=PATIENCE),
    ):
        warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")  # Ray has no other place for max_task_retries yet
        rows, kind = (_read_ahead(plan.found.shared, blocks), worker) if on_gpu else (_names(blocks), reading(worker, plan.found.shared))
        receipts = rows.map_batches(
            kind,
            fn_constructor_args=arguments,
            compute=_pool(min(run.resources.workers, len(blocks))),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=run.resources.cpus,
            num_gpus=run.resources.gpus or None,
            max_task_retries=DEATHS - 1,  # Ray's own default is for ever
        )
    try:
        yield from receipts.iter_batches(batch_size=None, batch_format="pyarrow")
    except RayActorError as error:
        if told := told_in(str(error)):  # of a constructor: Ray keeps no more than the text
            raise JobError(f"on a worker, {told}; {EVERY_NODE}: mend that, {AGAIN}") from error
        if error.actor_init_failed:
            raise
        raise JobError(
            f"more than {most} blocks of rows ended their worker process, which is no matter of single rows ({last_line(error)}); "
            f"look at the memory and the drivers of the nodes, {AGAIN}"
        ) from error
    except ExecutionTimeoutError as error:
        raise JobError(
            f"no block of rows was finished for {PATIENCE / 3600:g} hours; see that there are nodes with --gpus {run.resources.gpus:g} "
            f"and --cpus {run.resources.cpus:g} for a worker, {AGAIN}"
        ) from error


def _read_ahead(found: Input, blocks: list[Block]) -> ray.data.Dataset:
    """Packed blocks, read beside the GPUs by tasks of their own."""

    def read(batch: pa.Table) -> pa.Table:
        return read_packed(found, named(batch))

    return _names(blocks).map_batches(read, batch_size=1, batch_format="pyarrow", num_cpus=0.5, max_retries=DEATHS - 1)


def reading(kind: type[BlockWorker], found: Input) -> type[BlockWorker]:
    """Workers that read their blocks themselves: it costs next to nothing beside a CPU's arithmetic, and there may be no CPU left for
    tasks. (Ray would fuse tasks into actors, but not into those whose retries are limited.)"""

    class Reading(kind):  # type: ignore[valid-type, misc]
        def __call__(self, table: pa.Table) -> pa.Table:
            return super().__call__(read_packed(found, named(table)))

    return Reading


@contextmanager
def _settings(**wanted: Any) -> Iterator[None]:
    """Settings of Ray Data for the datasets that are made meanwhile."""
    context = DataContext.get_current()
    before = {name: getattr(context, name) for name in wanted}
    for name, value in wanted.items():
        setattr(context, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)


def _pool(most: int) -> ray.data.ActorPoolStrategy:
    """Actors start together, as far as there is room for them, and idle ones are given back."""
    return ray.data.ActorPoolStrategy(min_size=1, initial_size=most, max_size=most)


def _audit_all(plan: Plan) -> None:
    """Audits every output; the record of one that fails says so, since nobody may go on with its rows."""
    for output in plan.outputs:
        try:
            audit(plan.input_ids, output.folder)
        except AuditError:
            with explained(f"{output.folder} cannot be written"):
                seconds = round(seconds_spent(output.folder), 2)
                write_manifest(output.folder, {**read_manifest(output.folder), "state": FAILED, "seconds": seconds})
            raise


def audit(input_ids: np.ndarray, folder: str) -> None:
    """The hard gate: every input id (sorted hashes) stands in the output exactly once. Raises AuditError otherwise."""
    try:
        with explained(f"{folder} cannot be read"):
            written = check_ids(find(Source(path=folder)))
    except ConfigError as error:  # as it would be told of an input
        raise AuditError(f"the output cannot be checked: {error}; give the same command again, or --overwrite") from None
    if not np.array_equal(written, input_ids):
        lost, foreign = len(np.setdiff1d(input_ids, written)), len(np.setdiff1d(written, input_ids))
        raise AuditError(
            f"{public(folder)}: {lost} input ids are missing and {foreign} ids are not of the input; run again with --overwrite"
        )


def _manifest(plan: Plan, output: Output, report: Report, state: str, seconds_before: float) -> dict[str, Any]:
    run = plan.run
    return {
        "state": state,
        "updated": datetime.now(UTC).isoformat(timespec="seconds"),
        "request": output.request,
        "command": run.command,
        "kind": run.kind,
        "input": public(run.source.path),
        **output.record,
        "rows": report.rows,
        "files": len(plan.blocks),
        "resumed_rows": plan.rows_kept(output),
        "rejected": report.rejected,
        "reasons": dict(report.reasons.most_common(20)),
        "batch": report.batch,
        "seconds": round(seconds_before + report.seconds, 2),
        "versions": versions(),
    }
