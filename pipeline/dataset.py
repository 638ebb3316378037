"""Ray Data: blocks of rows through a pool of actors into Parquet files, every input row accounted for."""

import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from fsspec.core import url_to_fs
from ray.data import DataContext
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import RayActorError

from models.pixelface.avatars import FACTORS
from models.references import public
from models.weights import fingerprint
from pipeline import schema
from pipeline.checks import absolute_weights, base_problems, card_problems, latent_problems, network_weights_problems
from pipeline.config import ConfigError, Edit, Run, Source, versions
from pipeline.faults import AGAIN, JobError, explained, from_bytes
from pipeline.ids import check_ids
from pipeline.inputs import OnFile
from pipeline.isolation import Attempts, finish, last_line
from pipeline.manifest import RUNNING, write_manifest
from pipeline.resume import Done, clear, file_name, finished, nested, output_problems, request_of
from pipeline.sources import Block, Input, absolute, block_problems, find, plan_blocks, read_block
from pipeline.worker import Output, Worker, read_packed

DEATHS = 3
"""So often a block may end its worker process, or lose its node, before it is looked at alone."""
LOST_SHARE, LOST_ALWAYS = 0.05, 10
"""Of all blocks, and at least: so many may do so; more are no matter of single rows."""
PATIENCE = 6 * 3600.0
"""Seconds without any finished block after which a run is given up: a block on a CPU, or waiting for a node, may take hours."""


class AuditError(JobError):
    """The ids of the output are not those of the input: the run must not be trusted."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A checked run: nothing has been started or written yet."""

    run: Run
    found: Input
    blocks: list[Block]
    done: Done
    """What an earlier run of the same request has left."""
    input_ids: np.ndarray
    """Sorted hashes of all input ids."""
    outputs: tuple[Output, ...]
    pending: tuple[Output, ...]
    """Those that lack rows; the others are left as they are."""
    notes: tuple[str, ...] = ()
    """What a person should know of the request, though it is possible."""

    @property
    def model_calls(self) -> int:
        """Network evaluations an image, all edits together."""
        up = self.run.recipe.calls_up if self.run.edits and not self.found.has_latents else 0
        return up + sum(output.model_calls for output in self.outputs)


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


# ---- before anything starts ------------------------------------------------------------------------------------------


def make_plan(run: Run, on_files: OnFile = lambda done, total: None, on_ids: OnFile = lambda done, total: None) -> Plan:
    """Checks everything that can be checked without a model call. Raises ConfigError with every problem found.

    Both functions are called with how much is looked at and how much there is: files, then rows' ids.
    """
    run = absolute_weights(replace(run, source=replace(run.source, path=absolute(run.source.path)), output=absolute(run.output)))
    timesteps, problems = base_problems(run.domain, run.recipe)
    problems += run.problems(timesteps)
    try:
        found = find(run.source, on_files)
    except ConfigError as error:
        raise ConfigError(*problems, *error.problems) from None
    of_cards, notes = card_problems(run)
    problems += latent_problems(run, found) + of_cards + problems_without_weights(run, found)
    if problems:
        raise ConfigError(*problems)
    outputs, blocks = _outputs(run, found), plan_blocks(found, run.resources.block_rows)
    done, pending = Done(), outputs
    problems = block_problems(found, blocks)
    problems += [problem for output in outputs for problem in nested(run.source.path, output.folder)]
    problems += [problem for output in outputs for problem in output_problems(output.folder, output.request, run.overwrite)]
    if problems:
        raise ConfigError(*problems)
    if not run.overwrite:
        pending = tuple(o for o in outputs if len(finished(blocks, [o.folder], run.retry_rejects).starts) < len(blocks))
        done = finished(blocks, [output.folder for output in pending or outputs], run.retry_rejects)
    ids = check_ids(found, lambda rows: on_ids(rows, found.rows))
    return Plan(run=run, found=found, blocks=blocks, done=done, input_ids=ids, outputs=outputs, pending=pending, notes=tuple(notes))


def problems_without_weights(run: Run, found: Input) -> list[str]:
    """Of input, output and scores: what can be told without the weights of any diffusion model."""
    clips = [run.clip] if run.clip and any(edit.parts for edit in run.edits) else []
    problems = network_weights_problems(clips, run.identity) if clips or run.identity else []  # it imports networks
    return problems + _name_problems(run, found) + _output_problems(run)


def _outputs(run: Run, found: Input) -> tuple[Output, ...]:
    about = {
        "domain": run.domain.name,
        "family": run.domain.family,
        "domain_fingerprint": fingerprint(run.domain.weights),
        "recipe": run.recipe.to_dict(),
        **_of_latents(found),
    }
    if not run.edits:
        columns = schema.latents_schema(found.user_columns, run.domain.image_size, about)
        request = request_of(run, found, None)
        return (Output(folder=run.output, edit=None, columns=columns, request=request, model_calls=run.recipe.calls_up),)
    factors = tuple(FACTORS) if run.domain.judge else ()
    outputs = []
    for edit in run.edits:
        parts = [{"name": p.name, "weight": p.weight, "fingerprint": fingerprint(p.file)} for p in edit.parts]
        columns = schema.edits_schema(
            found.user_columns, factors, {**about, "edit": parts, "degree": edit.degree, "clip": run.clip}, run.identity is not None
        )
        calls = _calls_down(run, edit)
        folder, request = f"{run.output.rstrip('/')}/{edit.name}", request_of(run, found, edit)
        outputs.append(Output(folder=folder, edit=edit, columns=columns, request=request, model_calls=calls))
    return tuple(outputs)


def _of_latents(found: Input) -> dict[str, Any]:
    """The recipe that made the latents, where there were any: the way down may have another solver, spacing and seed."""
    return {"latents_recipe": schema.about(found.columns).get("recipe")} if found.has_latents else {}


def _calls_down(run: Run, edit: Edit) -> int:
    """Network evaluations an image on the way down: at each rung one for every model that has a weight there."""
    table = edit.weights
    if len(table) == 1:
        return run.recipe.calls_down * sum(w != 0 for w in table[0])
    from models.unet import load_alpha_bars  # only ranges need to know where the rungs are

    rungs = run.recipe.down(load_alpha_bars(run.domain.weights))[:-1]
    return sum(sum(w != 0 for w in table[max(start for start in table if start <= max(rung, 0))]) for rung in rungs)


def _name_problems(run: Run, found: Input) -> list[str]:
    taken = {"id", "image", *schema.HIDDEN, *schema.own_columns(run.kind)}
    clash = [name for name in found.user_columns.names if name in taken]
    return [f"column {name!r} of {run.source.path} has a name that this run writes; rename it first" for name in clash]


def _output_problems(run: Run) -> list[str]:
    try:
        fs, root = url_to_fs(run.output)
        direct = [f for f in fs.ls(root, detail=False) if str(f).endswith(".parquet")] if fs.isdir(root) else []
        if fs.isfile(root):
            return [f"the output {run.output} is a file; give a folder"]
    except (ValueError, ImportError, OSError) as error:
        return [f"the output {run.output} cannot be used: {error}"]
    if root == url_to_fs(run.source.path)[1]:
        return [f"input and output are the same: {run.output}; give another output folder"]
    if direct and run.edits:
        return [f"{run.output} is a dataset itself ({len(direct)} Parquet files); edits need a folder for their folders, give another"]
    try:
        fs.makedirs(root, exist_ok=True)
        fs.touch(f"{root}/.writable", truncate=True)
        fs.rm_file(f"{root}/.writable")
    except OSError as error:
        return [f"the output {run.output} cannot be written to: {error}"]
    return []


# ---- the run ---------------------------------------------------------------------------------------------------------


def block_dataset(found: Input, blocks: list[Block], cpus: float = 0.5) -> ray.data.Dataset:
    """A Ray dataset with the rows of ``blocks``, one Ray block each, read by tasks of ``cpus`` each.

    Ray fuses tasks that need exactly what the following actors need into these actors; others read ahead of them.
    """

    def read(batch: pa.Table) -> pa.Table:
        return read_block(found, blocks[batch["block"][0].as_py()])

    return _numbers(blocks).map_batches(read, batch_size=1, batch_format="pyarrow", num_cpus=cpus)


def _numbers(blocks: list[Block]) -> ray.data.Dataset:
    return ray.data.from_arrow([pa.table({"block": [i]}) for i in range(len(blocks))])


def execute(plan: Plan, on_progress: Callable[[Report], None] = lambda report: None) -> Report:
    """Runs what is left of a plan on the Ray cluster that is connected. Raises JobError if it cannot go on, AuditError if the
    output's ids are not the input's."""
    started, done = time.monotonic(), plan.done
    report = Report(rows=plan.found.rows, done=done.rows, resumed=done.rows, reasons=Counter(done.reasons), batch=plan.run.resources.batch)
    kept = {file_name(start) for start in done.starts}
    for output in plan.pending:
        with explained(f"{output.folder} cannot be written"):
            clear(output.folder, kept.__contains__)
            write_manifest(output.folder, _manifest(plan, output, report, RUNNING))
    on_progress(report)
    left = [block for block in plan.blocks if block.start not in done.starts]
    with closing(_receipts(plan, left)) as receipts:
        for receipt in receipts:
            report.add(receipt)
            report.seconds = time.monotonic() - started
            on_progress(report)
    for output in plan.outputs:
        audit(plan.input_ids, output.folder)
    for output in plan.pending:
        with explained(f"{output.folder} cannot be written"):
            write_manifest(output.folder, _manifest(plan, output, report, "finished"))
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
    attempts = Attempts(plan.run.resources, Worker, (plan.run, plan.pending, plan.found.has_latents), plan.found)
    try:
        for block in left.values():
            yield finish(attempts, block)
    finally:
        attempts.end()


def _pass(plan: Plan, blocks: list[Block]) -> Generator[pa.Table]:
    """The receipts of blocks as a pool of workers finishes them. A block that died ``DEATHS`` times has none."""
    run = plan.run
    on_gpu = run.resources.gpus > 0
    most = max(LOST_ALWAYS, int(LOST_SHARE * len(blocks)))
    with (
        warnings.catch_warnings(),
        _settings(max_errored_blocks=most, actor_init_retry_on_errors=True, execution_no_progress_timeout_s=PATIENCE),
    ):
        warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")  # Ray has no other place for max_task_retries yet
        rows, kind = _read_ahead(plan.found, blocks) if on_gpu else (_numbers(blocks), _reading(Worker, plan.found, blocks))
        receipts = rows.map_batches(
            kind,
            fn_constructor_args=(run, plan.pending, plan.found.has_latents),
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
        if told := re.search(r"models\.references\.\w+Error: (.+)", str(error)):  # of a constructor: Ray keeps no more than the text
            raise JobError(f"{told[1]}; every node must be able to get the weights: mend that, {AGAIN}") from error
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


def _read_ahead(found: Input, blocks: list[Block]) -> tuple[ray.data.Dataset, type[Worker]]:
    """Packed blocks, read beside the GPUs by tasks of their own, for workers."""

    def read(batch: pa.Table) -> pa.Table:
        return read_packed(found, blocks[batch["block"][0].as_py()])

    return _numbers(blocks).map_batches(read, batch_size=1, batch_format="pyarrow", num_cpus=0.5, max_retries=DEATHS - 1), Worker


def _reading(kind: type[Worker], found: Input, blocks: list[Block]) -> type[Worker]:
    """Workers that read their blocks themselves: it costs next to nothing beside a CPU's arithmetic, and there may be no CPU left for
    tasks. (Ray would fuse tasks into actors, but not into those whose retries are limited.)"""

    class Reading(kind):  # type: ignore[valid-type, misc]
        def __call__(self, table: pa.Table) -> pa.Table:
            return super().__call__(read_packed(found, blocks[table["block"][0].as_py()]))

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


def audit(input_ids: np.ndarray, folder: str) -> None:
    """The hard gate: every input id (sorted hashes) stands in the output exactly once. Raises AuditError otherwise."""
    try:
        out = find(Source(path=folder))
        written = check_ids(out)
    except ConfigError as error:  # as it would be told of an input
        raise AuditError(f"the output cannot be checked: {error}; give the same command again, or --overwrite") from None
    if not np.array_equal(written, input_ids):
        lost, foreign = len(np.setdiff1d(input_ids, written)), len(np.setdiff1d(written, input_ids))
        raise AuditError(f"{folder}: {lost} input ids are missing and {foreign} ids are not of the input; run again with --overwrite")


def _manifest(plan: Plan, output: Output, report: Report, state: str) -> dict[str, Any]:
    run, edit = plan.run, output.edit
    return {
        "state": state,
        "updated": datetime.now(UTC).isoformat(timespec="seconds"),
        "request": output.request,
        "command": run.command,
        "kind": run.kind,
        "input": public(run.source.path),
        "domain": run.domain.name,
        "recipe": run.recipe.to_dict(),
        **_of_latents(plan.found),
        "edit": [{**asdict(part), "file": public(part.file)} for part in edit.parts] if edit else None,
        "degree": edit.degree if edit else None,
        "ranges": edit.ranges if edit else None,
        "score_clip": public(run.clip) if edit and run.clip else None,
        "rows": report.rows,
        "resumed_rows": report.resumed,
        "rejected": report.rejected,
        "reasons": dict(report.reasons.most_common(20)),
        "batch": report.batch,
        "model_calls_per_image": output.model_calls,
        "seconds": round(report.seconds, 2),
        "versions": versions(),
    }
