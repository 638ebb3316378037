"""``diffusionclip edit``: images or latents -> edited images."""

from typing import Annotated

import typer

from jobs import options as o

Mixes = Annotated[list[str] | None, typer.Option("--mix", "-m", help="Several in one walk, like glasses=0.6,hat=0.4; or by timesteps.")]
ScoreClip = Annotated[
    str | None, typer.Option(help="The CLIP that scores edits: MODEL/PRETRAINED, a folder, or none.", show_default="the domain's")
]
Degrees = Annotated[list[float] | None, typer.Option("--degree", "-d", help="0 = reconstruction, 1 = full, also beyond; may be repeated.")]


def edit(
    input: o.Input,
    output: o.Output,
    attribute: o.Attributes = None,
    mix: Mixes = None,
    degree: Degrees = None,
    domain: o.DomainName = "pixelface",
    models: o.EditModels = None,
    return_step: o.ReturnStep = None,
    steps_up: o.StepsUp = None,
    steps_down: o.StepsDown = None,
    solver: o.Solver = None,
    spacing: o.Spacing = None,
    precision: o.Precision = None,
    eta: o.Eta = None,
    inversion: o.Inversion = None,
    project: o.Projections = None,
    project_step: o.ProjectionStep = None,
    project_steps: o.ProjectionSteps = None,
    trim: o.Trim = None,
    class_label: o.ClassLabel = None,
    seed: o.NoiseSeed = None,
    score_clip: ScoreClip = None,
    identity: o.Identity = None,
    id_column: o.IdColumn = "id",
    image_column: o.ImageColumn = "image",
    limit: o.Limit = None,
    columns: o.Columns = None,
    where: o.Where = None,
    block_rows: o.BlockRows = 64,
    max_block_bytes: o.MaxBlockBytes = 2**31,
    max_pixels: o.MaxPixels = 16_000_000,
    max_reject_rate: o.RejectRate = 0.1,
    overwrite: o.Overwrite = False,
    retry_rejects: o.RetryRejects = False,
    workers: o.Workers = 2,
    gpus: o.Gpus = 0.0,
    cpus: o.Cpus = 1.0,
    batch: o.Batch = 16,
    address: o.Address = None,
    storage_option: o.StorageOptions = None,
    verbose: o.Verbose = False,
) -> None:
    """Edit images, or latents made before, with one or more attributes; each gets a folder of its own, with scores.

    The attribute `none` is the plain reconstruction.

    [bold]Examples[/bold]

    diffusionclip edit faces/ out/edits --attribute glasses

    diffusionclip edit out/latents out/edits -a none -a hat -a red_hair

    diffusionclip edit out/latents out/sweep -a glasses -d 0.5 -d 1 -d 1.5

    diffusionclip edit out/latents out/mix --mix glasses=1,smiling=1 --mix "0:glasses=0.3,base=0.7;300:glasses=1"

    diffusionclip edit strokes/ out/strokes -a none -a smiling --project 10
    """
    from jobs.requests import domain_named, make_edits, recipe_for
    from jobs.running import carry_out
    from jobs.session import command_line
    from pipeline.config import Resources, Run, Source
    from pipeline.plan import make_plan

    chosen = domain_named(domain)
    source = Source(
        path=input,
        id_column=id_column,
        image_column=image_column,
        limit=limit,
        columns=o.names(columns),
        where=where,
        max_block_bytes=max_block_bytes,
    )
    given = o.given(
        return_step=return_step,
        steps_up=steps_up,
        steps_down=steps_down,
        solver=solver,
        spacing=spacing,
        precision=precision,
        eta=eta,
        inversion=inversion,
        projections=project,
        projection_step=project_step,
        projection_steps=project_steps,
        trim=trim,
        class_label=class_label,
        seed=seed,
    )
    edits = make_edits(chosen, attribute or [], mix or [], degree or [], models or [])
    run = Run(
        source=source,
        output=output,
        domain=chosen,
        recipe=recipe_for(source, chosen, given, edits),
        edits=edits,
        score_clip=score_clip,
        identity=identity,
        resources=Resources(workers=workers, gpus=gpus, cpus=cpus, batch=batch, block_rows=block_rows, max_pixels=max_pixels),
        max_reject_rate=max_reject_rate,
        overwrite=overwrite,
        retry_rejects=retry_rejects,
        command=command_line(),
    )
    carry_out(run, make_plan, "edit", address, verbose)
