"""A pass over a dataset, checked before anything starts: its blocks, its outputs, and what an earlier run has left. No Ray here."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from fsspec.core import url_to_fs

from models.pixelface.avatars import FACTORS
from models.references import public
from models.weights import fingerprint
from pipeline import schema
from pipeline.checks import absolute_weights, base_problems, card_problems, latent_problems, network_weights_problems, place_problems
from pipeline.config import ConfigError, Edit, Pass, Run
from pipeline.faults import refused
from pipeline.ids import check_ids
from pipeline.inputs import OnFile
from pipeline.manifest import is_finished, read_manifest
from pipeline.resume import Done, Kept, done_by_all, finished, nested, output_problems, request_of
from pipeline.sources import Block, Input, absolute, block_problems, find, plan_blocks
from pipeline.standing import unfinished
from pipeline.worker import Output


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A checked run: nothing has been started or written yet."""

    run: Pass
    found: Input
    blocks: list[Block]
    done: Done
    """What earlier runs of the same request have left: the blocks that all pending outputs have."""
    input_ids: np.ndarray
    """Sorted hashes of all input ids."""
    outputs: tuple[Output, ...]
    pending: tuple[Output, ...]
    """Those that lack rows, or whose run was stopped before its audit; the others are left as they are."""
    kept: tuple[set[int], ...]
    """Of each pending output the first rows of the blocks that it has; these are neither written again nor removed."""
    notes: tuple[str, ...] = ()
    """What a person should know of the request, though it is possible."""

    @property
    def left(self) -> list[Block]:
        """The blocks that a pending output lacks, each with the outputs that do."""
        lacking = [
            (block, tuple(o.folder for o, kept in zip(self.pending, self.kept, strict=True) if block.start not in kept))
            for block in self.blocks
        ]
        return [replace(b, wanted=wanted if len(wanted) < len(self.writing) else ()) for b, wanted in lacking if wanted]

    @cached_property
    def writing(self) -> tuple[Output, ...]:
        """The pending outputs that lack rows: what workers need models for."""
        return tuple(o for o, kept in zip(self.pending, self.kept, strict=True) if len(kept) < len(self.blocks))

    def rows_kept(self, output: Output) -> int:
        """Rows that a pending output has from earlier runs."""
        kept = self.kept[self.pending.index(output)]
        return sum(block.rows for block in self.blocks if block.start in kept)


def make_plan(run: Run, on_files: OnFile = lambda done, total: None, on_ids: OnFile = lambda done, total: None, write: bool = True) -> Plan:
    """Checks everything that can be checked without a model call. Raises ConfigError with every problem found.

    Both functions are called with how much is looked at and how much there is: files, then rows' ids.
    With ``write`` the output is made, and written to once to see that it can be; without, nothing is left anywhere.
    """
    run = absolute_weights(replace(run, source=replace(run.source, path=absolute(run.source.path)), output=absolute(run.output)))
    timesteps, problems = base_problems(run.domain, run.recipe)
    problems += run.problems(timesteps)
    try:
        found = find(run.source, on_files)
    except ConfigError as error:
        raise ConfigError(*problems, *error.problems) from None
    of_cards, notes = card_problems(run)
    problems += latent_problems(run, found) + of_cards + problems_without_weights(run, found, write)
    if problems:
        raise ConfigError(*problems)
    return what_is_left(run, found, _outputs(run, found), on_ids, notes)


def what_is_left(run: Pass, found: Input, outputs: tuple[Output, ...], on_ids: OnFile, notes: Sequence[str] = ()) -> Plan:
    """The plan of a run that nothing else stands against: what its outputs hold decides. Raises ConfigError with every problem found."""
    blocks = plan_blocks(found, run.resources.block_rows)
    problems = block_problems(found, blocks)
    problems += [problem for output in outputs for problem in nested(run.source.path, output.folder)]
    problems += [problem for output in outputs for problem in output_problems(output.folder, output.request, run.overwrite)]
    if problems:
        raise ConfigError(*problems)
    there: list[Kept] = [{} if run.overwrite else finished(blocks, output.folder, run.retry_rejects) for output in outputs]
    settled = [not run.overwrite and len(kept) == len(blocks) and _is_settled(o) for o, kept in zip(outputs, there, strict=True)]
    pending = [(output, kept) for output, kept, at_rest in zip(outputs, there, settled, strict=True) if not at_rest]
    return Plan(
        run=run,
        found=found,
        blocks=blocks,
        done=done_by_all(blocks, [kept for _, kept in pending] or there),
        input_ids=check_ids(found, lambda rows: on_ids(rows, found.rows)),
        outputs=outputs,
        pending=tuple(output for output, _ in pending),
        kept=tuple(set(kept) for _, kept in pending),
        notes=tuple(notes),
    )


def _is_settled(output: Output) -> bool:
    return is_finished(read_manifest(output.folder))


def problems_without_weights(run: Run, found: Input, write: bool) -> list[str]:
    """Of input, output and scores: what can be told without the weights of any diffusion model."""
    clips = [run.clip] if run.clip and any(edit.parts for edit in run.edits) else []
    problems = network_weights_problems(clips, run.identity) if clips or run.identity else []  # it imports networks
    return unfinished(found.records) + problems + name_problems(run, found) + folder_problems(run, write)


def _outputs(run: Run, found: Input) -> tuple[Output, ...]:
    about = {
        "domain": run.domain.name,
        "family": run.domain.family,
        "domain_fingerprint": fingerprint(run.domain.weights),
        "recipe": run.recipe.to_dict(),
        **of_latents(found),
    }
    if not run.edits:
        columns = schema.latents_schema(found.user_columns, run.domain.image_size, about)
        request = request_of(run, found, None)
        return (
            Output(
                folder=run.output,
                edit=None,
                columns=columns,
                request=request,
                model_calls=run.recipe.calls_up,
                record=_record(run, found, None, run.recipe.calls_up),
            ),
        )
    factors = tuple(FACTORS) if run.domain.judge else ()
    outputs = []
    for edit in run.edits:
        parts = [{"name": p.name, "weight": p.weight, "fingerprint": fingerprint(p.file)} for p in edit.parts]
        columns = schema.edits_schema(
            found.user_columns,
            factors,
            {**about, "edit": parts, "degree": edit.degree, "clip": run.clip and public(run.clip)},
            run.identity is not None,
        )
        calls = _calls_down(run, edit)
        folder, request = f"{run.output.rstrip('/')}/{edit.name}", request_of(run, found, edit)
        record = _record(run, found, edit, calls)
        outputs.append(Output(folder=folder, edit=edit, columns=columns, request=request, model_calls=calls, record=record))
    return tuple(outputs)


def _record(run: Run, found: Input, edit: Edit | None, model_calls: int) -> dict[str, Any]:
    """What the record of one output says of the walk."""
    return {
        "domain": run.domain.name,
        "recipe": run.recipe.to_dict(),
        **of_latents(found),
        "edit": [{**asdict(part), "file": public(part.file)} for part in edit.parts] if edit else None,
        "degree": edit.degree if edit else None,
        "ranges": edit.ranges if edit else None,
        "score_clip": public(run.clip) if edit and run.clip else None,
        "model_calls_per_image": model_calls,
    }


def of_latents(found: Input) -> dict[str, Any]:
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


def name_problems(run: Pass, found: Input) -> list[str]:
    """Columns of the user whose names this run gives to columns of its own, each in a sentence."""
    taken = {"id", "image", *schema.HIDDEN, *schema.own_columns(run.kind)}
    clash = [name for name in found.user_columns.names if name in taken]
    return [f"column {name!r} of {run.source.path} has a name that this run writes; rename it first" for name in clash]


def folder_problems(run: Pass, write: bool) -> list[str]:
    """Why nothing can be written where the output shall be; empty if it can. ``write`` as in ``make_plan``."""
    folder = public(run.output)
    try:
        with refused(f"the output {folder} cannot be used"):
            fs, root = url_to_fs(run.output)
            direct = [f for f in fs.ls(root, detail=False) if str(f).endswith(".parquet")] if fs.isdir(root) else []
            if fs.isfile(root):
                return [f"the output {folder} is a file; give a folder"]
    except ConfigError as error:
        return list(error.problems)
    if root == url_to_fs(run.source.path)[1]:
        return [f"input and output are the same: {folder}; give another output folder"]
    if direct and run.kind == "edits":
        return [f"{folder} is a dataset itself ({len(direct)} Parquet files); edits need a folder for their folders, give another"]
    return place_problems(run.output, write)
