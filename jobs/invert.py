"""``diffusionclip invert``: images -> latents."""

from jobs import options as o


def invert(
    input: o.Input,
    output: o.Output,
    domain: o.DomainName = "pixelface",
    return_step: o.ReturnStep = None,
    steps_up: o.StepsUp = None,
    solver: o.Solver = None,
    spacing: o.Spacing = None,
    precision: o.Precision = None,
    inversion: o.Inversion = None,
    project: o.Projections = None,
    project_step: o.ProjectionStep = None,
    project_steps: o.ProjectionSteps = None,
    class_label: o.ClassLabel = None,
    seed: o.NoiseSeed = None,
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
    """Walk images up to their latents, once; every attribute starts from them.

    [bold]Examples[/bold]

    diffusionclip invert faces/ out/latents

    diffusionclip invert s3://bucket/faces.parquet s3://bucket/latents --return-step 500 --workers 8 --gpus 1 --batch 64

    diffusionclip invert strokes/ out/latents --project 10
    """
    from jobs.requests import domain_named, recipe_for
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
        solver=solver,
        spacing=spacing,
        precision=precision,
        inversion=inversion,
        projections=project,
        projection_step=project_step,
        projection_steps=project_steps,
        class_label=class_label,
        seed=seed,
    )
    run = Run(
        source=source,
        output=output,
        domain=chosen,
        recipe=recipe_for(source, chosen, given),
        resources=Resources(workers=workers, gpus=gpus, cpus=cpus, batch=batch, block_rows=block_rows, max_pixels=max_pixels),
        max_reject_rate=max_reject_rate,
        overwrite=overwrite,
        retry_rejects=retry_rejects,
        command=command_line(),
    )
    carry_out(run, make_plan, "invert", address, verbose)
