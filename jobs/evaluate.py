"""``diffusionclip evaluate``: scores of edits, or of a whole domain on its held-out images."""

import json
import os
import platform
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs import options as o

Edits = Annotated[list[str] | None, typer.Argument(help="Folders that `diffusionclip edit` wrote; without them the domain is evaluated.")]
Json = Annotated[Path | None, typer.Option("--out", help="Also write the figures to this JSON file.")]
Rows = Annotated[int, typer.Option(help="Held-out images, from the first on.", min=1)]
Each = Annotated[int, typer.Option(help="Of the images that lack an attribute, so many are edited, spread over all.", min=1)]
SweepRows = Annotated[
    int, typer.Option(help="Of the images that lack an attribute, so many for the sweep of its degree, and for mixes.", min=1)
]
Samples = Annotated[int, typer.Option(help="Pictures to make from noise alone.", min=1)]


def evaluate(
    context: typer.Context,
    edits: Edits = None,
    domain: o.DomainName = "pixelface",
    rows: Rows = 1024,
    each: Each = 256,
    sweep_rows: SweepRows = 32,
    samples: Samples = 200,
    out: Json = None,
    storage_option: o.StorageOptions = None,
) -> None:
    """Print the scores of edits; or check a domain: round trips, samples, CLIPs, judge, every ready-made edit against the truth.

    [bold]Examples[/bold]

    diffusionclip evaluate out/edits

    diffusionclip evaluate --domain pixelface --rows 1024 --out benchmarks/results/pixelface.json
    """
    from jobs.progress import console
    from jobs.tables import score_table
    from pipeline.config import ConfigError
    from pipeline.standing import folders_at, unfinished
    from pipeline.summary import edit_folders, summarise

    refuse_idle(context, bool(edits))
    if edits:
        folders = [folder for address in edits for folder in edit_folders(address)]
        if problems := unfinished(folder for address in edits for folder in folders_at(address)):
            raise ConfigError(*problems)
        summaries = [summarise(folder) for folder in folders]
        console.print(score_table(summaries))
        found = [edit_figures(s) for s in summaries]
        figures: dict[str, Any] = {"edits": found, **overall(found)}
    else:
        from jobs.requests import domain_named
        from jobs.showpiece import domain_figures, say_base, say_edits

        figures = domain_figures(domain_named(domain), rows, each, sweep_rows, samples)
        figures |= overall(figures["edits"])
        say_base(figures)
        say_edits(figures)
    say(figures)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"machine": machine(), **figures}, indent=2) + "\n")
        console.print(f"written to {out}")


OF_DOMAINS = ("domain", "rows", "each", "sweep_rows", "samples")


def refuse_idle(context: typer.Context, of_edits: bool) -> None:
    """Raises ConfigError if options were given that the other use of the command has."""
    from pipeline.config import ConfigError

    given = [p for p in context.command.params if (source := context.get_parameter_source(p.name or "")) and source.name == "COMMANDLINE"]
    idle = [p.opts[0] for p in given if (of_edits and p.name in OF_DOMAINS) or (not of_edits and p.name == "storage_option")]
    if idle:
        uses = "that check a domain; leave out the folders, or them" if of_edits else "of folders with edits, and there are none"
        raise ConfigError(f"{', '.join(idle)}: options {uses}")


def edit_figures(summary: Any) -> dict[str, Any]:
    names = ("attribute", "degree", "rows", "rejected", "mae", "ssim", "clip_direction", "identity", "changeable", "success", "kept")
    values = {name: getattr(summary, name) for name in names}
    return {k: round(v, 5) if isinstance(v, float) else v for k, v in values.items()}


def overall(edits: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the edits that change a known factor, and the least success."""
    judged = [e for e in edits if e["success"] is not None]
    if not judged:
        return {}
    success, kept = [e["success"] for e in judged], [e["kept"] for e in judged]
    means = {"mean_success": sum(success) / len(success), "least_success": min(success), "mean_kept": sum(kept) / len(kept)}
    outside = [e["outside"] for e in judged if "outside" in e]
    return means | ({"mean_outside": sum(outside) / len(outside)} if outside else {})


def say(figures: dict[str, Any]) -> None:
    from jobs.progress import console
    from jobs.tables import count_table

    names = ("mean_success", "least_success", "mean_kept", "mean_outside")
    lines = [(name.replace("_", " "), f"{figures[name]:.3f}") for name in names if name in figures]
    if lines:
        console.print(count_table("figure", lines))


def machine() -> dict[str, Any]:
    """What the figures were made on."""
    from pipeline.config import versions

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = next((line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")), model)
    return {"cpu": model, "cores": os.cpu_count(), "python": platform.python_version(), "system": platform.system(), **versions()}
