"""Running a planned pass with progress, and saying how it went."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, TypeVar

from jobs.progress import console, display, late_display

if TYPE_CHECKING:  # importing them takes seconds, and --help must not
    from pipeline.config import Pass
    from pipeline.dataset import Report
    from pipeline.inputs import OnFile
    from pipeline.plan import Plan

Asked = TypeVar("Asked", bound="Pass")


class TooManyRejectsError(RuntimeError):
    """The job is done and everything is written, but more rows were rejected than was allowed."""


def carry_out(run: Asked, make_plan: "Callable[[Asked, OnFile, OnFile], Plan]", name: str, address: str | None, verbose: bool) -> None:
    """Plans (before Ray starts), runs, reports. Raises ConfigError, JobError or TooManyRejectsError."""
    from jobs.planning import only_planned
    from jobs.session import ray_session, refuse_too_much
    from models.references import public
    from pipeline.faults import explained

    if only_planned([run]):
        return
    with (
        explained(f"{public(run.source.path)} or {public(run.output)} cannot be used"),
        late_display("look at the input", "files") as on_files,
        late_display("check ids", "rows") as on_ids,
    ):
        plan = make_plan(run, on_files, on_ids)
    with ray_session(address, verbose) if plan.left else nullcontext():
        if plan.left:
            refuse_too_much(address, run.resources.gpus, run.resources.cpus)
        run_plan(plan, name)


def run_plan(plan: "Plan", name: str) -> "Report":
    """Runs a plan on the connected Ray and prints one line a dataset."""
    from models.references import public
    from pipeline.dataset import execute
    from pipeline.resume import alone
    from pipeline.schema import ALIGNED, error_column

    for note in plan.notes:
        console.print(f"note: {note}", markup=False)
    if plan.done.rows:
        rest = "going on with the others" if plan.left else "nothing is left to do"
        console.print(f"{name}: {plan.done.rows} of {plan.found.rows} rows are there from an earlier run; {rest}")
    for output in plan.pending:
        if (rows := plan.rows_kept(output)) > plan.done.rows:
            console.print(f"{output.folder}: {rows} of {plan.found.rows} rows are there and are left as they are")
    with alone(output.folder for output in plan.pending), display(name, plan.found.rows, before=plan.done.rows) as shown:
        report = execute(plan, lambda now: shown.update(now.done, f"{now.rejected} rejected"))
    for output in plan.outputs:
        calls = "" if plan.run.kind == ALIGNED else f", {output.model_calls} model calls an image"
        console.print(
            f"{public(output.folder)}: {report.rows} rows in, {report.rows - report.rejected} written, {report.rejected} rejected{calls}"
        )
    console.print(f"{name} took {report.seconds:.1f} s")
    if report.batch < plan.run.resources.batch:
        console.print(f"memory ran out: some model calls had {report.batch} images instead of --batch {plan.run.resources.batch}")
    for reason, count in report.reasons.most_common(5):
        console.print(f"  {count} x {reason}", markup=False)
    share = report.rejected / max(1, report.rows)
    if share > plan.run.max_reject_rate:
        raise TooManyRejectsError(
            f"{report.rejected} of {report.rows} rows were rejected, more than --max-reject-rate {plan.run.max_reject_rate:g} allows; "
            f"the others are written, the reasons are in the column {error_column(plan.outputs[0].columns)}"
        )
    return report
