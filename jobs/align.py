"""``diffusionclip align``: photographs -> faces cut out as CelebA-HQ and FFHQ were, as an images table."""

from typing import Annotated

import typer

from jobs import options as o

Size = Annotated[int, typer.Option(help="Height and width of the aligned faces: the image size of the domain they are for.")]
LandmarkModel = Annotated[
    str | None,
    typer.Option(help="Another 68-point shape predictor of dlib's than the extra's: a file, s3:// or https://.", show_default=False),
]


def align(
    input: o.Input,
    output: o.Output,
    size: Size = 256,
    landmark_model: LandmarkModel = None,
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
    cpus: o.Cpus = 1.0,
    address: o.Address = None,
    storage_option: o.StorageOptions = None,
    verbose: o.Verbose = False,
) -> None:
    """Cut faces out of photographs, upright, as the pictures were cut that face models were trained on.

    Needs the extra [bold]align[/bold]. A row without a face keeps its id and columns, has no picture, and says why in the
    column align_error; later commands reject it as a null image. A run that was stopped goes on when the same command is given again.

    [bold]Examples[/bold]

    diffusionclip align photos/ out/aligned

    diffusionclip align s3://bucket/photos.parquet s3://bucket/aligned --size 512 --workers 8
    """
    from jobs.running import carry_out
    from jobs.session import command_line
    from pipeline.aligning import make_align_plan
    from pipeline.config import AlignRun, Resources, Source

    source = Source(
        path=input,
        id_column=id_column,
        image_column=image_column,
        limit=limit,
        columns=o.names(columns),
        where=where,
        max_block_bytes=max_block_bytes,
    )
    run = AlignRun(
        source=source,
        output=output,
        size=size,
        landmark_model=landmark_model,
        resources=Resources(workers=workers, cpus=cpus, batch=1, block_rows=block_rows, max_pixels=max_pixels),
        max_reject_rate=max_reject_rate,
        overwrite=overwrite,
        retry_rejects=retry_rejects,
        command=command_line(),
    )
    carry_out(run, make_align_plan, "align", address, verbose)
