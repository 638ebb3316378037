"""Command line options that several commands share, and what they are turned into."""

from typing import Annotated, Any

import typer

from jobs import storage

WALK, ROWS, MACHINES = "Walk", "Rows", "Machines"

Input = Annotated[str, typer.Argument(help="Pictures, Parquet files or webdataset tars: one, or a folder of one kind; any fsspec address.")]
Output = Annotated[str, typer.Argument(help="The folder to write Parquet files to.")]
DomainName = Annotated[
    str,
    typer.Option("--domain", help="The base model: a name of `diffusionclip domains`, a diffusers folder, a hub name, or a domain file."),
]
Attributes = Annotated[list[str] | None, typer.Option("--attribute", "-a", help="An attribute; may be given several times.")]
ReturnStep = Annotated[int | None, typer.Option(help="How far up to walk; larger changes more.", rich_help_panel=WALK)]
StepsUp = Annotated[int | None, typer.Option(help="Rungs on the way up.", rich_help_panel=WALK)]
StepsDown = Annotated[int | None, typer.Option(help="Rungs on the way down.", rich_help_panel=WALK)]
Solver = Annotated[str | None, typer.Option(help="ddim (the paper's) or ab2 (second order).", rich_help_panel=WALK)]
Spacing = Annotated[str | None, typer.Option(help="Of the rungs: linspace (the official code's) or sigma.", rich_help_panel=WALK)]
Inversion = Annotated[
    str | None, typer.Option(help="deterministic, or stochastic: fresh noise instead of a walk up.", rich_help_panel=WALK)
]
Eta = Annotated[float | None, typer.Option(help="Fresh noise on the way down: 0 none, 1 DDPM.", rich_help_panel=WALK)]
Projections = Annotated[
    int | None,
    typer.Option("--project", help="For strokes and other unseen domains: so often into the trained domain first.", rich_help_panel=WALK),
]
ProjectionStep = Annotated[int | None, typer.Option("--project-step", help="Return step of these projections.", rich_help_panel=WALK)]
ProjectionSteps = Annotated[int | None, typer.Option("--project-steps", help="Rungs of each projection.", rich_help_panel=WALK)]
Trim = Annotated[
    float | None,
    typer.Option(help="Undo changes fainter than this share of an edit's strength; 0 keeps all.", rich_help_panel=WALK),
]
ClassLabel = Annotated[int | None, typer.Option(help="For class-conditional base models.", rich_help_panel=WALK)]
NoiseSeed = Annotated[int | None, typer.Option("--seed", help="Of fresh noise.", rich_help_panel=WALK)]
Identity = Annotated[
    str | None, typer.Option(help="Face recognition weights (IR-SE50, model_ir_se50.pth): a file, s3:// or https://.", show_default=False)
]
Precision = Annotated[str | None, typer.Option(help="float32, tf32 (faster on newer GPUs), bfloat16 or float16.", rich_help_panel=WALK)]
IdColumn = Annotated[str, typer.Option(help="Column of unique ids; made from file and row if there is none.", rich_help_panel=ROWS)]
ImageColumn = Annotated[str, typer.Option(help="Column of pictures: binary or struct{bytes, path}.", rich_help_panel=ROWS)]
Limit = Annotated[int | None, typer.Option(help="Only the first so many rows.", rich_help_panel=ROWS)]
Columns = Annotated[
    str | None,
    typer.Option(
        help="Of the input's own columns only these pass through, as caption,split; id and image always do.", rich_help_panel=ROWS
    ),
]
Where = Annotated[
    str | None,
    typer.Option(help="Only rows of Parquet files like: age >= 18 and split == 'train' (Python's way to write it).", rich_help_panel=ROWS),
]
BlockRows = Annotated[
    int,
    typer.Option(
        help="At least so many rows, in whole row groups of the input, make one output file: what a crash costs.", rich_help_panel=ROWS
    ),
]
MaxBlockBytes = Annotated[int, typer.Option(help="What such rows may take in memory.", rich_help_panel=ROWS)]
MaxPixels = Annotated[
    int, typer.Option(help="Larger pictures become rejects; JPEGs that shrink may have four times as many.", rich_help_panel=ROWS)
]
RejectRate = Annotated[float, typer.Option(help="A greater share of rejects ends with exit status 3.", rich_help_panel=ROWS)]
RetryRejects = Annotated[
    bool, typer.Option("--retry-rejects", help="When going on, compute blocks with rejects again.", rich_help_panel=ROWS)
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Start from nothing and replace what the output holds; else the same request goes on where it stopped.",
        rich_help_panel=ROWS,
    ),
]
Workers = Annotated[int, typer.Option(help="At most this many actors, each with its own model.", rich_help_panel=MACHINES)]
Gpus = Annotated[float, typer.Option(help="GPUs an actor; 0 runs on the CPU.", rich_help_panel=MACHINES)]
Cpus = Annotated[float, typer.Option(help="CPUs an actor.", rich_help_panel=MACHINES)]
Batch = Annotated[int, typer.Option(help="Images in one model call.", rich_help_panel=MACHINES)]
Address = Annotated[str | None, typer.Option(help="Of a running Ray cluster; without it a local one.", rich_help_panel=MACHINES)]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Let Ray say what it does.", rich_help_panel=MACHINES)]
StorageOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--storage-option",
        help="For s3://, repeated: endpoint_url=, region=, profile=, anon=true, requester_pays=true. Secrets come from the environment.",
        callback=storage.use,
    ),
]
EditModels = Annotated[
    list[str] | None,
    typer.Option("--models", help="Edit models: a folder, s3:// or a hub name; looked into before the ready-made ones; may be repeated."),
]


def names(text: str | None) -> tuple[str, ...] | None:
    """``caption, split`` as names; None for None."""
    return None if text is None else tuple(filter(None, (name.strip() for name in text.split(","))))


def given(**values: Any) -> dict[str, Any]:
    """The options that were given on the command line."""
    return {name: value for name, value in values.items() if value is not None}
