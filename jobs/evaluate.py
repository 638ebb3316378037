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
Rows = Annotated[int, typer.Option(help="Held-out images to edit.", min=1)]
Work = Annotated[Path, typer.Option("--work", help="Where the domain's edits are written.")]


def evaluate(
    edits: Edits = None,
    domain: o.DomainName = "pixelface",
    rows: Rows = 256,
    out: Json = None,
    work: Work = Path("out/evaluate"),
    workers: o.Workers = 2,
    gpus: o.Gpus = 0.0,
    address: o.Address = None,
    storage_option: o.StorageOptions = None,
    verbose: o.Verbose = False,
) -> None:
    """Print the scores of edits; or check a domain: round trip, CLIP, judge and every ready-made edit on held-out images.

    [bold]Examples[/bold]

    diffusionclip evaluate out/edits

    diffusionclip evaluate --domain pixelface --rows 256 --out benchmarks/results/pixelface.json
    """
    from jobs.progress import console
    from jobs.session import ray_session
    from jobs.tables import score_table
    from pipeline.config import Resources
    from pipeline.summary import edit_folders, summarise

    if edits:
        folders = [folder for address in edits for folder in edit_folders(address)]
        figures: dict[str, Any] = {}
    else:
        run, name = held_out_run(domain, rows, work, Resources(workers=workers, gpus=gpus)), str(work)
        with ray_session(address, verbose):
            edit_held_out(run)
        folders = edit_folders(name)
        figures = domain_figures(domain, rows)
    summaries = [summarise(folder) for folder in folders]
    console.print(score_table(summaries))
    figures["edits"] = [edit_figures(s) for s in summaries]
    figures |= overall(figures["edits"])
    say(figures)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"machine": machine(), **figures}, indent=2) + "\n")
        console.print(f"written to {out}")


def held_out_run(domain: str, rows: int, work: Path, resources: Any) -> Any:
    """Every ready-made attribute and the reconstruction on the held-out images. Raises ConfigError if there are none."""
    from jobs.requests import domain_named, edit_models, make_edits
    from jobs.session import command_line
    from pipeline.config import ConfigError, Run, Source

    chosen = domain_named(domain)
    if chosen.held_out is None:
        raise ConfigError(f"domain {domain} has no held-out images; give folders with edits")
    return Run(
        source=Source(path=str(chosen.held_out), limit=rows),
        output=str(work),
        domain=chosen,
        recipe=chosen.recipe,
        edits=make_edits(chosen, ["none", *edit_models(chosen, [])], [], [1.0], []),
        resources=resources,
        overwrite=True,
        command=command_line(),
    )


def edit_held_out(run: Any) -> None:
    from jobs.running import run_plan
    from pipeline.plan import make_plan

    run_plan(make_plan(run), "edit held-out images")


def domain_figures(domain: str, rows: int) -> dict[str, Any]:
    """Round-trip error, CLIP's zero-shot accuracy and the judge's accuracy, by factor, on held-out images."""
    from jobs.progress import display
    from jobs.requests import domain_named
    from pipeline.quality import held_out_pictures, judge_accuracy, round_trip_error, zero_shot_accuracy

    chosen = domain_named(domain)
    pictures, truth = held_out_pictures(chosen)
    with display("round trip", min(rows, len(pictures))) as shown:
        error = round_trip_error(chosen, pictures[:rows], lambda done, mean: shown.update(done, f"mean error {mean:.5f}"))
    recipe = chosen.recipe
    return {
        "domain": domain,
        "recipe": recipe.to_dict(),
        "round_trip": {"error": error, "images": min(rows, len(pictures)), "model_calls": recipe.calls_up + recipe.calls_down},
        "zero_shot": zero_shot_accuracy(chosen, pictures, truth),
        "judge": judge_accuracy(chosen, pictures, truth),
        "held_out_images": len(pictures),
    }


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
    return {"mean_success": sum(success) / len(success), "least_success": min(success), "mean_kept": sum(kept) / len(kept)}


def say(figures: dict[str, Any]) -> None:
    from jobs.progress import console
    from jobs.tables import count_table

    lines = []
    if "round_trip" in figures:
        trip = figures["round_trip"]
        lines.append((f"round-trip error, {trip['images']} images, {trip['model_calls']} model calls", f"{trip['error']:.5f}"))
    lines += [(f"CLIP zero-shot: {name}", f"{value:.3f}") for name, value in figures.get("zero_shot", {}).items()]
    lines += [(f"judge on renders: {name}", f"{value:.3f}") for name, value in figures.get("judge", {}).items()]
    lines += [
        (name.replace("_", " "), f"{figures[name]:.3f}") for name in ("mean_success", "least_success", "mean_kept") if name in figures
    ]
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
