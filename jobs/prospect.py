"""From a request to what it comes to: what is left of it, what it reads, writes and computes, and what stands in its way."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from models.references import public
from pipeline.config import ConfigError, Edit, Run, TuneRun
from pipeline.estimate import Networks, Sample, Work

if TYPE_CHECKING:  # importing it takes seconds, and --help must not
    from models.domains import Domain
    from pipeline.plan import Plan
    from pipeline.sources import Input


@dataclass(frozen=True, kw_only=True)
class Prospect:
    """Of one request, or of several attributes that are trained in one command. Sizes are in bytes."""

    name: str
    domain: "Domain"
    precision: str
    batch: int
    rows: int
    """Of the input, what is done included."""
    done: int = 0
    calls: int
    """Of the networks, an image."""
    call_flops: float
    work: Work
    read: float | None = None
    written: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Of each output, at least and likely."""
    latents: int | None = None
    """The numbers of the latents alone, to the byte."""
    meanwhile: float = 0.0
    """Taken by checkpoints until the run is over."""
    sample: Sample | None = None
    workers: int
    gpus: float
    """All that are occupied; 0 on CPUs."""
    share: float = 1.0
    """Of a device that each worker has; of several that train together, all of them."""
    cpus: float = 1.0
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


# ---- datasets --------------------------------------------------------------------------------------------------------


def of_run(run: Run, known: Sequence[str] = (), rows: int | None = None) -> Prospect:
    """Of a pass over a dataset; ``rows``: as if the input had so many rows like its own, and nothing were done. ``known`` are problems
    that were found before. Raises ConfigError with every problem if the input or the network cannot be told anything of."""
    from pipeline.estimate import devices, pass_work, sample
    from pipeline.resume import Done
    from pipeline.sources import plan_blocks

    problems, notes = list(known), list[str]()
    found, plan = _look(run, problems, notes)
    clips = [run.clip] if run.clip and any(edit.parts for edit in run.edits) else []
    networks = _networks(run.domain, problems, clips=clips, identity=run.identity is not None)
    blocks = plan.blocks if plan else plan_blocks(found, run.resources.block_rows)
    done = plan.done if plan and rows is None else Done()
    if plan and rows is None:
        left, of_edits = [block.rows for block in plan.left], _left_of_edits(plan)
    else:
        left = [block.rows for block in blocks] if rows is None else _cut(rows, max(run.resources.block_rows, blocks[0].rows))
        of_edits = [(edit, left) for edit in run.edits]
    seen = sample(found, blocks, run.domain.image_size, _factors(run.domain), run.resources.max_pixels)
    up, batch = 0 if found.has_latents else run.recipe.calls_up, run.resources.batch
    calls = [_calls_down(run, edit, plan) for edit, _ in of_edits]
    work = pass_work(left, batch, up, networks, (0, 0))
    down = [pass_work(of, batch, n, networks, (int(bool(e.parts)), 1)) for (e, of), n in zip(of_edits, calls, strict=True)]
    scoring = (seen.encoding + seen.decoding + seen.scoring) * sum(part.rows for part in down)
    work = replace(
        work,
        calls=work.calls + sum(part.calls for part in down),
        flops=work.flops + sum(part.flops for part in down),
        cpu_seconds=scoring + (0 if found.has_latents else seen.decoding * work.rows),
    )
    return Prospect(
        name="edit" if run.edits else "invert",
        domain=run.domain,
        precision=run.recipe.precision,
        batch=run.resources.batch,
        rows=rows or found.rows,
        done=done.rows,
        calls=up + sum(calls),
        call_flops=networks.call,
        work=work,
        read=seen.read * work.rows,
        written=_written(run, of_edits, seen, work.rows),
        latents=None if run.edits else work.rows * 3 * run.domain.image_size**2 * 2,
        sample=seen,
        workers=run.resources.workers,
        gpus=devices(run.resources, work.parts) if run.resources.gpus else 0.0,
        share=min(1.0, run.resources.gpus or 1.0),
        cpus=run.resources.cpus,
        problems=tuple(dict.fromkeys(problems)),
        notes=tuple(notes),
    )


def _look(run: Run, problems: list[str], notes: list[str]) -> "tuple[Input, Plan | None]":
    """The input, and the checked plan where nothing stands in its way; what does is added to ``problems``."""
    from pipeline.checks import base_problems
    from pipeline.ids import check_ids
    from pipeline.plan import make_plan, problems_without_weights
    from pipeline.sources import absolute, find

    run = replace(run, source=replace(run.source, path=absolute(run.source.path)), output=absolute(run.output))
    if missing := missing_weights(run.domain):
        notes.append(f"{missing}; whether they fit, and what an earlier run has left, was not looked at")
    elif not problems:
        try:
            plan = make_plan(run, write=False)
            return plan.found, plan
        except ConfigError as error:
            problems += error.problems
    timesteps = 1000 if missing else base_problems(run.domain, run.recipe)[0]
    problems += run.problems(timesteps)
    found = None
    try:
        found = find(run.source)
        problems += problems_without_weights(run, found, write=False)
        if not run.resources.problems():
            check_ids(found)
    except ConfigError as error:
        problems += error.problems
    if found is None or run.problems(timesteps):  # numbers that cannot be counted with
        raise ConfigError(*dict.fromkeys(problems))
    return found, None


def _left_of_edits(plan: "Plan") -> "list[tuple[Edit, list[int]]]":
    """The edits that lack rows, each with the rows of the blocks that it lacks."""
    lacking = [(o.edit, [b.rows for b in plan.blocks if b.start not in kept]) for o, kept in zip(plan.pending, plan.kept, strict=True)]
    return [(edit, left) for edit, left in lacking if edit and left]


def _cut(rows: int, block: int) -> list[int]:
    return [min(block, rows - start) for start in range(0, rows, block)]


def _factors(domain: "Domain") -> tuple[str, ...]:
    """What the domain's judge reads."""
    if not domain.judge:
        return ()
    from models.pixelface.avatars import FACTORS

    return tuple(FACTORS)


def _calls_down(run: Run, edit: Edit, plan: "Plan | None") -> int:
    """Of an edit; where its ranges of timesteps cannot be placed for want of weights, as if all of it were like its dearest range."""
    for output in plan.outputs if plan else ():
        if output.edit == edit:
            return output.model_calls
    return run.recipe.calls_down * max(sum(weight != 0 for weight in row) for row in edit.weights.values())


def _written(run: Run, edits: Sequence[tuple[Edit, list[int]]], seen: Sample, rows: int) -> dict[str, tuple[float, float]]:
    folder = public(run.output)
    if not run.edits:
        return {folder: (seen.latents * rows, seen.latents * rows)}
    least, likely = seen.edits
    return {f"{folder.rstrip('/')}/{edit.name}": (least * sum(left), likely * sum(left)) for edit, left in edits}


# ---- fine-tuning -----------------------------------------------------------------------------------------------------


def of_tuning(runs: Sequence[TuneRun], parallel: int, known: Sequence[str] = ()) -> Prospect:
    """Of the attributes of one command, trained to the end. Raises ConfigError as ``of_run``."""
    from jobs.finetune import rates
    from models.weights import edit_model_file
    from pipeline.estimate import tuning_work

    run, problems, notes = runs[0], list(known), list[str]()
    rows, left = _latent_rows(runs, problems, notes)
    notes += rates(left)
    networks = _networks(run.domain, problems, clips=run.loss_clips, identity=bool(run.tuning.id_weight), tuning=run)
    work, size = tuning_work(rows, run.tuning, networks), networks.trained
    copies = 3 + bool(run.tuning.ema) + bool(run.tuning.patience)  # weights, two moments, average, best
    count, at_once = len(left), max(1, min(parallel, len(left)))
    total = replace(work, calls=work.calls * count, flops=work.flops * count, parts=count)
    return Prospect(
        name=f"finetune {', '.join(run.attribute for run in runs)}",
        domain=run.domain,
        precision=run.recipe.precision,
        batch=run.tuning.batch,
        rows=work.rows,
        calls=work.calls,
        call_flops=networks.call,
        work=total,
        written={edit_model_file(r.output, r.attribute): (2.0 * size, 2.0 * size) for r in left},
        meanwhile=4.0 * size * copies * at_once,
        workers=parallel,
        gpus=at_once * run.workers * run.gpus,
        share=run.workers * min(1.0, run.gpus or 1.0),
        cpus=run.cpus,
        problems=tuple(dict.fromkeys(problems)),
        notes=tuple(notes),
    )


def _latent_rows(runs: Sequence[TuneRun], problems: list[str], notes: list[str]) -> tuple[int, list[TuneRun]]:
    """Latents that there are to train on, as many as are asked for where there are none yet; and what is not trained already."""
    from pipeline.config import Source
    from pipeline.sources import absolute, find
    from pipeline.standing import unfinished
    from pipeline.tuning import make_tune_plan

    tuning, missing, left = runs[0].tuning, missing_weights(runs[0].domain), list(runs)
    if missing:
        notes.append(f"{missing}; whether they fit was not looked at")
    for run in runs:
        try:
            if missing:
                problems += run.problems()
            elif make_tune_plan(run, write=False).done:
                left.remove(run)
        except ConfigError as error:
            problems += error.problems
    if len(left) < len(runs):
        notes.append(f"{len(runs) - len(left)} of {len(runs)} edit models are there from the same request")
    try:
        found = find(Source(path=absolute(runs[0].latents)))
        problems += unfinished(found.records)
        return found.rows, left
    except ConfigError as error:
        problems += error.problems
        return tuning.images + tuning.held_out, left


# ---- both ------------------------------------------------------------------------------------------------------------


def _networks(domain: "Domain", problems: list[str], clips: Sequence[str], identity: bool, tuning: TuneRun | None = None) -> Networks:
    """Counted from shapes. Raises ConfigError with ``problems`` and why, if the shapes cannot be had."""
    from models.flops import call_flops, identity_flops, network_config, network_of, training_flops
    from models.references import WeightsError

    try:
        config = network_config(domain)
        training, trained = training_flops(network_of(config), tuning.tuning.rank) if tuning else (0, 0)
        return Networks(
            call=call_flops(network_of(config)),
            training=training,
            trained=trained,
            clip=sum(_clip_flops(clip, problems) for clip in clips),
            identity=identity_flops() if identity else 0.0,
        )
    except WeightsError as error:
        raise ConfigError(*problems, str(error)) from None


def _clip_flops(clip: str, problems: list[str]) -> int:
    """0 for a CLIP that cannot be had, which is added to ``problems``."""
    from models.flops import clip_flops
    from models.references import WeightsError

    try:
        return clip_flops(clip)
    except WeightsError as error:
        problems.append(str(error))
        return 0


def missing_weights(domain: "Domain") -> str | None:
    """Why the domain's weights cannot be looked at on this machine as it is; nothing is fetched for that. None if they can."""
    from models.references import WeightsError
    from models.weights import fingerprint

    if not domain.weights:
        return f"the weights of {domain.name} must be imported first"
    with _offline():
        try:
            fingerprint(domain.weights)
        except WeightsError:
            return f"the weights of {domain.name} ({domain.weights}) are not on this machine"
    return None


@contextmanager
def _offline() -> Iterator[None]:
    before: Any = os.environ.get("DIFFUSIONCLIP_OFFLINE")
    os.environ["DIFFUSIONCLIP_OFFLINE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DIFFUSIONCLIP_OFFLINE"]
        else:
            os.environ["DIFFUSIONCLIP_OFFLINE"] = before
