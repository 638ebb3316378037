"""Ray Data: blocks of rows through a pool of actors into Parquet files, every input row accounted for."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from fsspec.core import url_to_fs

from models.domains import Domain
from models.pixelface.avatars import FACTORS
from models.recipe import Recipe
from models.references import public
from models.weights import WeightsError, fingerprint, load_card
from pipeline import schema
from pipeline.config import ConfigError, Edit, Run, Source, versions
from pipeline.manifest import RUNNING, write_in_one_stroke, write_manifest
from pipeline.resume import Done, clear, file_name, finished, nested, output_problems, request_of
from pipeline.sources import Block, Input, absolute, check_ids, find, plan_blocks, read_block

if TYPE_CHECKING:
    from pipeline.stages import Stage

ROW_GROUP = 100
"""Rows of a row group: what the Hub viewer allows for images."""


class AuditError(RuntimeError):
    """The ids of the output are not those of the input: the run must not be trusted."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """One dataset that a run writes: latents, or one edit."""

    folder: str
    edit: Edit | None
    columns: pa.Schema
    request: dict[str, Any]
    """Everything that decides its rows, as ``pipeline.resume`` compares it."""
    model_calls: int
    """Network evaluations an image, without the way up that all edits of a run share."""


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
    seconds: float = 0.0

    @property
    def rejected(self) -> int:
        return self.reasons.total()


# ---- before anything starts ------------------------------------------------------------------------------------------


def make_plan(run: Run) -> Plan:
    """Checks everything that can be checked without a model call. Raises ConfigError with every problem found."""
    run = replace(run, source=replace(run.source, path=absolute(run.source.path)), output=absolute(run.output))
    problems = run.problems()
    try:
        found = find(run.source)
    except ConfigError as error:
        raise ConfigError(*problems, *error.problems) from None
    problems += _latent_problems(run, found) + _edit_problems(run) + problems_without_weights(run, found)
    if problems:
        raise ConfigError(*problems)
    outputs, blocks = _outputs(run, found), plan_blocks(found, run.resources.block_rows)
    done, pending = Done(), outputs
    problems = [problem for output in outputs for problem in nested(run.source.path, output.folder)]
    problems += [problem for output in outputs for problem in output_problems(output.folder, output.request, run.overwrite)]
    if problems:
        raise ConfigError(*problems)
    if not run.overwrite:
        pending = tuple(o for o in outputs if len(finished(blocks, [o.folder], run.retry_rejects).starts) < len(blocks))
        done = finished(blocks, [output.folder for output in pending or outputs], run.retry_rejects)
    ids = check_ids(found, blocks)
    return Plan(run=run, found=found, blocks=blocks, done=done, input_ids=ids, outputs=outputs, pending=pending)


def problems_without_weights(run: Run, found: Input) -> list[str]:
    """Of input, output and scores: what can be told without the weights of any diffusion model."""
    return _clip_problems(run) + _name_problems(run, found) + _output_problems(run)


def _outputs(run: Run, found: Input) -> tuple[Output, ...]:
    about = {
        "domain": run.domain.name,
        "family": run.domain.family,
        "domain_fingerprint": fingerprint(run.domain.weights),
        "recipe": run.recipe.to_dict(),
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


def _calls_down(run: Run, edit: Edit) -> int:
    """Network evaluations an image on the way down: at each rung one for every model that has a weight there."""
    table = edit.weights
    if len(table) == 1:
        return run.recipe.calls_down * sum(w != 0 for w in table[0])
    from models.unet import load_alpha_bars  # only ranges need to know where the rungs are

    rungs = run.recipe.down(load_alpha_bars(run.domain.weights))[:-1]
    return sum(sum(w != 0 for w in table[max(start for start in table if start <= max(rung, 0))]) for rung in rungs)


def latent_mismatch(found: Input, domain: Domain, wanted: dict[str, Any]) -> list[str]:
    """What keeps latents from being used with this domain and recipe, by name; empty if they fit."""
    about = schema.about(found.columns)
    problems = []
    if about.get("domain_fingerprint") != fingerprint(domain.weights):
        problems.append(
            f"the latents at {found.source.path} were made by base model {about.get('domain')} "
            f"({about.get('domain_fingerprint')}), not by {domain.name} ({fingerprint(domain.weights)}); invert the images again"
        )
    made_with = Recipe.from_dict(about.get("recipe", {})).of_latent()  # what an older record does not name was at its default
    for name, value in wanted.items():
        made = made_with.get(name)
        if made != value:
            problems.append(f"the latents at {found.source.path} were made with {name} {made}, but {value} is asked for")
    return problems


def _latent_problems(run: Run, found: Input) -> list[str]:
    if not found.has_latents:
        return []
    if not run.edits:
        return [f"{run.source.path} holds latents already; give images"]
    return latent_mismatch(found, run.domain, run.recipe.of_latent())


def _edit_problems(run: Run) -> list[str]:
    problems = []
    for part in {part.name: part for edit in run.edits for part in edit.parts}.values():
        try:
            card = load_card(part.file)
        except WeightsError as error:
            problems.append(str(error))
            continue
        if card.domain_fingerprint != fingerprint(run.domain.weights):
            problems.append(
                f"edit model {part.name} ({part.file}) belongs to base model {card.domain} ({card.domain_fingerprint}), "
                f"not to {run.domain.name} ({fingerprint(run.domain.weights)}); fine-tune it again"
            )
    return problems


def _clip_problems(run: Run) -> list[str]:
    if run.clip is None or not any(edit.parts for edit in run.edits):
        return []
    from models.clip import clip_problems  # it may take seconds

    return clip_problems(run.clip)


def _name_problems(run: Run, found: Input) -> list[str]:
    taken = {"id", "image", schema.ROW, schema.BLOCK, *schema.own_columns(run.kind)}
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


# ---- on the workers --------------------------------------------------------------------------------------------------


class Worker:
    """One actor of a run: blocks of rows in, a Parquet file for each output and a receipt out."""

    def __init__(self, run: Run, outputs: tuple[Output, ...], has_latents: bool):
        import torch  # the driver, which only hands this class on, never needs the networks

        from pipeline.stages import Invert

        torch.set_num_threads(max(1, round(run.resources.cpus)))
        self.invert = None if has_latents else Invert(run.domain, run.recipe, run.resources)
        self.chains = [(output, edit_stages(run, output.edit)) for output in outputs]

    def __call__(self, table: pa.Table) -> pa.Table:
        receipts = [self._finish(unpack(cell)) for cell in table["block"]]
        errors = pa.array([errors for _, errors in receipts], pa.list_(pa.string()))
        return pa.table({"rows": pa.array([rows for rows, _ in receipts]), "errors": errors})

    def _finish(self, table: pa.Table) -> tuple[int, list[str]]:
        name = file_name(table[schema.ROW][0].as_py())
        table = table.drop_columns([schema.ROW, schema.BLOCK])
        latents = self.invert(table) if self.invert else table
        errors: list[str] = []
        for output, stages in self.chains:
            done = latents
            for stage in stages:
                done = stage(done)
            done = done.select(output.columns.names).cast(output.columns)
            write_file(output.folder, name, done)
            errors = [error for error in done["error"].to_pylist() if error is not None]
        return len(table), errors


def edit_stages(run: Run, edit: Edit | None) -> "list[Stage]":
    """What turns latents into one edit's rows; nothing for the latents themselves."""
    if edit is None:
        return []
    from pipeline.scoring import Score
    from pipeline.stages import Apply

    return [Apply(run.domain, run.recipe, edit, run.resources), Score(run.domain, edit, run.resources, run.clip, run.identity)]


def split_blocks(table: pa.Table) -> Iterator[pa.Table]:
    """One table a block: a pool may hand several blocks to an actor at once, but each has a file of its own."""
    for start in pc.unique(table[schema.BLOCK]).to_pylist():
        yield table.filter(pc.equal(table[schema.BLOCK], start))


def write_file(folder: str, name: str, table: pa.Table) -> None:
    """Writes one Parquet file under its final name in one stroke: readers never see half of it, a retry replaces it."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=ROW_GROUP, write_page_index=True)
    write_in_one_stroke(folder, name, sink.getvalue().to_pybytes())


# ---- the run ---------------------------------------------------------------------------------------------------------


def pack(table: pa.Table) -> pa.Table:
    """A block as a single row, so that Ray, which counts batches in rows, can neither cut it nor join it to another."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    data = sink.getvalue()
    ends = pa.py_buffer(np.array([0, data.size], np.int64))
    return pa.table({"block": pa.Array.from_buffers(pa.large_binary(), 1, [None, ends, data])})


def unpack(cell: pa.LargeBinaryScalar) -> pa.Table:
    """The block that ``pack`` made a cell of; nothing is copied."""
    return pa.ipc.open_stream(cell.as_buffer()).read_all()


def block_dataset(found: Input, blocks: list[Block], cpus: float = 0.5, packed: bool = False) -> ray.data.Dataset:
    """A Ray dataset with the rows of ``blocks``, one Ray block each, read by tasks of ``cpus`` each; ``packed``, one row each.

    Ray fuses tasks that need exactly what the following actors need into these actors; others read ahead of them.
    """

    def read(batch: pa.Table) -> pa.Table:
        table = read_block(found, blocks[batch["block"][0].as_py()])
        return pack(table) if packed else table

    numbers = ray.data.from_arrow([pa.table({"block": [i]}) for i in range(len(blocks))])
    return numbers.map_batches(read, batch_size=1, batch_format="pyarrow", num_cpus=cpus)


def execute(plan: Plan, on_progress: Callable[[Report], None] = lambda report: None) -> Report:
    """Runs what is left of a plan on the Ray cluster that is connected. Raises AuditError if the output's ids are not the
    input's."""
    started, done = time.monotonic(), plan.done
    report = Report(rows=plan.found.rows, done=done.rows, resumed=done.rows, reasons=Counter(done.reasons))
    kept = {file_name(start) for start in done.starts}
    for output in plan.pending:
        clear(output.folder, kept.__contains__)
        write_manifest(output.folder, _manifest(plan, output, report, RUNNING))
    on_progress(report)
    left = [block for block in plan.blocks if block.start not in done.starts]
    for receipt in _receipts(plan, left):
        report.done += sum(receipt["rows"].to_pylist())
        for errors in receipt["errors"].to_pylist():
            report.reasons.update(errors)
        report.seconds = time.monotonic() - started
        on_progress(report)
    for output in plan.outputs:
        audit(plan.input_ids, output.folder)
    for output in plan.pending:
        write_manifest(output.folder, _manifest(plan, output, report, "finished"))
    return report


def _receipts(plan: Plan, blocks: list[Block]) -> Iterator[pa.Table]:
    """Computes and writes blocks; yields how many rows each had, and the reasons of its rejects."""
    run = plan.run
    if not blocks:
        return
    on_gpu = run.resources.gpus > 0
    # Beside GPUs, tasks of their own read ahead. Without, reading costs next to nothing and is fused into the actors.
    rows = block_dataset(plan.found, blocks, 0.5 if on_gpu else run.resources.cpus, packed=True)
    receipts = rows.map_batches(
        Worker,
        fn_constructor_args=(run, plan.pending, plan.found.has_latents),
        compute=_pool(min(run.resources.workers, len(blocks))),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=run.resources.cpus,
        num_gpus=run.resources.gpus or None,
    )
    for receipt in receipts.iter_batches(batch_size=None, batch_format="pyarrow"):
        assert isinstance(receipt, pa.Table)
        yield receipt


def _pool(most: int) -> ray.data.ActorPoolStrategy:
    """Actors start together, as far as there is room for them, and idle ones are given back."""
    return ray.data.ActorPoolStrategy(min_size=1, initial_size=most, max_size=most)


def audit(input_ids: np.ndarray, folder: str) -> None:
    """The hard gate: every input id (sorted hashes) stands in the output exactly once. Raises AuditError otherwise."""
    out = find(Source(path=folder))
    written = check_ids(out, plan_blocks(out, 10_000))
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
        "edit": [{**asdict(part), "file": public(part.file)} for part in edit.parts] if edit else None,
        "degree": edit.degree if edit else None,
        "ranges": edit.ranges if edit else None,
        "score_clip": public(run.clip) if edit and run.clip else None,
        "rows": report.rows,
        "resumed_rows": report.resumed,
        "rejected": report.rejected,
        "reasons": dict(report.reasons.most_common(20)),
        "model_calls_per_image": output.model_calls,
        "seconds": round(report.seconds, 2),
        "versions": versions(),
    }
