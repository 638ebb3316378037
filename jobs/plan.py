"""``diffusionclip plan``: what a command would read, write, compute and cost, and what stands in its way, before anything is spent."""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs import edit, finetune, invert
from jobs.planning import Planning, planning

if TYPE_CHECKING:  # importing them takes seconds, and --help must not
    from jobs.prospect import Prospect
    from models.speed import Speed

PLAN = "Plan"
MEASURED_SECONDS = 10.0
"""For which calls are measured after the warm-up."""

Measure = Annotated[
    bool, typer.Option("--measure", help="Measure some model calls on this machine, with random weights.", rich_help_panel=PLAN)
]
GpuType = Annotated[str, typer.Option(help="A GPU of the table, where nothing is measured.", rich_help_panel=PLAN)]
Utilisation = Annotated[
    float, typer.Option(min=0.01, max=1, help="Share of that GPU's peak that is assumed to be reached.", rich_help_panel=PLAN)
]
Price = Annotated[float | None, typer.Option("--price-per-gpu-hour", min=0, help="In any currency.", rich_help_panel=PLAN)]
Rows = Annotated[
    int | None, typer.Option(min=1, help="As if the input had so many rows like its own, none of them done.", rich_help_panel=PLAN)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel=PLAN)]

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="rich", help="Say what a command would take, before anything is spent; it starts nothing."
)


def _options(
    measure: Measure = False,
    gpu_type: GpuType = "a100",
    utilisation: Utilisation = 0.35,
    price_per_gpu_hour: Price = None,
    rows: Rows = None,
    as_json: AsJson = False,
) -> None:
    """The options of a plan beside those of the command."""


def planned(command: Callable[..., None]) -> Callable[..., None]:
    """A command with the arguments of another and those of a plan, which plans that other one."""
    theirs, own = inspect.signature(command).parameters, inspect.signature(_options).parameters

    def plan(**asked: Any) -> None:
        with planning() as found:
            command(**{name: asked[name] for name in theirs})
            tell(found, asked)

    parameters = [p for p in theirs.values() if p.name not in own] + list(own.values())
    vars(plan).update(
        __name__=command.__name__,
        __signature__=inspect.Signature(parameters),
        __annotations__={p.name: p.annotation for p in parameters},
        __doc__=f"""Say what `diffusionclip {command.__name__}` would take, given the same options.

    What is left of a run that was stopped is counted. Exit status 2 if something stands in its way.

    [bold]Examples[/bold]

    diffusionclip plan {EXAMPLES[command.__name__]}
    """,
    )
    return plan


EXAMPLES = {
    "invert": "invert faces/ out/latents --measure",
    "edit": "edit s3://bucket/faces s3://bucket/edits -a glasses --workers 8 --gpus 1 --gpu-type h100 --price-per-gpu-hour 2.5",
    "finetune": "finetune out/latents out/models -a smiling -a hat --gpus 1",
}


def tell(found: Planning, asked: Mapping[str, Any]) -> None:
    """Prints what the planned requests come to. Raises ConfigError with all that stands in their way."""
    from jobs.prospect import of_run, of_tuning
    from models.speed import GPUS
    from pipeline import faults
    from pipeline.config import ConfigError, Run, unknown

    if asked["gpu_type"] not in GPUS:
        raise ConfigError(*found.problems, unknown("GPU", asked["gpu_type"], sorted(GPUS)) + "; or --measure on one")
    with faults.explained("the plan cannot be made"):
        if isinstance(found.requests[0], Run):
            prospect = of_run(found.requests[0], found.problems, asked["rows"])
        else:
            prospect = of_tuning(found.requests, asked["parallel"], found.problems)
    speed = speed_of(prospect, asked)
    figures = figures_of(prospect, speed, asked["price_per_gpu_hour"])
    if asked["as_json"]:
        print(json.dumps(figures, indent=2))
    else:
        show(prospect, figures)
    if prospect.problems:
        raise ConfigError(*prospect.problems)


def speed_of(prospect: "Prospect", asked: Mapping[str, Any]) -> "Speed | None":
    """Measured or assumed as it was asked for; None for CPUs that were not measured. Raises ConfigError."""
    from models.speed import assumed
    from pipeline.config import ConfigError

    if asked["measure"]:
        return measure(prospect, bool(asked["as_json"]))
    if not prospect.gpus:
        return None
    try:
        return assumed(asked["gpu_type"], prospect.precision, asked["utilisation"])
    except ValueError as error:
        raise ConfigError(*prospect.problems, str(error)) from None


def measure(prospect: "Prospect", quiet: bool) -> "Speed":
    """Some calls of the domain's network on this machine, with progress. Raises ConfigError if it lacks the GPU that is asked for."""
    import torch

    from jobs.progress import display
    from models.flops import network_config
    from models.speed import measured
    from pipeline.config import ConfigError

    if prospect.gpus and not torch.cuda.is_available():
        raise ConfigError(*prospect.problems, "--measure measures on this machine, which has no GPU; leave it out, or measure where one is")
    torch.set_num_threads(max(1, round(prospect.cpus)))
    work = (network_config(prospect.domain), "cuda" if prospect.gpus else "cpu", prospect.precision, prospect.batch, MEASURED_SECONDS)
    if quiet:
        return measured(*work)
    with display("measure", round(MEASURED_SECONDS), "seconds") as shown:
        return measured(*work, lambda calls, spent: shown.update(min(round(MEASURED_SECONDS), round(spent)), f"{calls} model calls"))


# ---- figures ---------------------------------------------------------------------------------------------------------


def figures_of(prospect: "Prospect", speed: "Speed | None", price: float | None) -> dict[str, Any]:
    """Everything that is known, for machines: bytes, seconds and counts, ranges as [least, likely, most]."""
    work = prospect.work
    wall = _range(prospect, speed)
    hours = [prospect.gpus * seconds / 3600 for seconds in wall] if wall and prospect.gpus else None
    return {
        "command": prospect.name,
        "domain": prospect.domain.name,
        "rows": {"input": prospect.rows, "done": prospect.done, "left": work.rows},
        "model_calls": {"an_image": prospect.calls, "images": work.images, "all": work.calls},
        "flops": {"a_call": prospect.call_flops, "all": work.flops},
        "bytes": {
            "read": _rounded(prospect.read),
            "written": {place: [round(low), round(likely)] for place, (low, likely) in prospect.written.items()},
            "latents": prospect.latents,
            "checkpoints_meanwhile": round(prospect.meanwhile),
        },
        "cpu_seconds": round(work.cpu_seconds, 2),
        "speed": asdict(speed) if speed else None,
        "workers": prospect.workers,
        "gpus": prospect.gpus,
        "wall_seconds": wall,
        "gpu_hours": hours,
        "price": [h * price for h in hours] if hours and price is not None else None,
        "price_per_gpu_hour": price,
        "sampled_rows": prospect.sample.rows if prospect.sample else None,
        "sampled_rejects": list(prospect.sample.reasons) if prospect.sample else None,
        "problems": list(prospect.problems),
        "notes": list(prospect.notes),
    }


def _range(prospect: "Prospect", speed: "Speed | None") -> list[float] | None:
    """Seconds from the first row to the last: least, likely, most."""
    from pipeline.estimate import seconds

    if speed is None:
        return None
    return [seconds(prospect.work, flops, prospect.workers, prospect.share) for flops in (speed.fastest, speed.flops, speed.slowest)]


def _rounded(value: float | None) -> int | None:
    return None if value is None else round(value)


# ---- for people ------------------------------------------------------------------------------------------------------


def show(prospect: "Prospect", figures: Mapping[str, Any]) -> None:
    from jobs.progress import console
    from jobs.tables import count_table

    console.print(count_table(f"plan: {prospect.name}", lines(prospect, figures)))
    for note in explained(prospect, figures):
        console.print(f"- {note}", markup=False, soft_wrap=True)


def lines(prospect: "Prospect", figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is told, line by line."""
    work, sizes = prospect.work, figures["bytes"]
    done = f" of {prospect.rows:,}; {prospect.done:,} are done" if prospect.done else ""
    table = [
        ("rows", f"{work.rows:,}{done}"),
        ("model calls an image", f"{prospect.calls:,}"),
        ("model calls", f"{work.calls:,}"),
    ]
    if sizes["read"] is not None:
        table.append(("read", size(sizes["read"])))
    table += [(f"written to {place}", between(written, size)) for place, written in sizes["written"].items()]
    if sizes["latents"] is not None:
        table.append(("of that, latents (float16)", f"{sizes['latents']:,} bytes"))
    if sizes["checkpoints_meanwhile"]:
        table.append(("checkpoints meanwhile", size(sizes["checkpoints_meanwhile"])))
    table.append(("computing", unit(work.flops, FLOP)))
    if work.cpu_seconds:
        table.append(("beside it, one CPU core", duration(work.cpu_seconds)))
    if figures["wall_seconds"]:
        machines = counted(prospect.gpus, "GPU") if prospect.gpus else counted(min(prospect.workers, max(1, work.parts)), "actor")
        table.append((f"wall time, {machines}", ranged(figures["wall_seconds"], duration)))
    if figures["gpu_hours"]:
        table.append(("GPU-hours", ranged(figures["gpu_hours"], about)))
    if figures["price"]:
        table.append((f"price at {figures['price_per_gpu_hour']:g} a GPU-hour", ranged(figures["price"], about)))
    return table


def explained(prospect: "Prospect", figures: Mapping[str, Any]) -> list[str]:
    """What the figures rest on."""
    notes = [f"a model call of one image is {unit(prospect.call_flops, FLOP)}, counted from the network's shapes"]
    if speed := figures["speed"]:
        low, likely, high = (unit(speed[name], FLOP) for name in ("slowest", "flops", "fastest"))
        notes.append(f"{likely}/s, {speed['about']}; the ranges are of {low}/s to {high}/s and of nothing else")
        notes.append("starting machines and loading networks come on top")
    else:
        notes.append("how long it takes is unknown: the table has only GPUs (--gpus 1); --measure measures this machine's CPU")
    if prospect.sample:
        notes.append(
            f"sizes and the CPU's work are of {prospect.sample.rows} sampled rows; an edit is taken to be as large as its source as PNG, "
            "or as that with noise of one step in 255"
        )
        if rejects := prospect.sample.reasons:
            notes.append(f"{len(rejects)} of {prospect.sample.rows} sampled rows would be rejected, e.g.: {rejects[0]}")
    return notes + list(prospect.notes)


def counted(number: float, thing: str) -> str:
    return f"{number:g} {thing}" if number == 1 else f"{number:g} {thing}s"


def ranged(values: list[float], word: Callable[[float], str]) -> str:
    """``32 (22 to 56)`` of least, likely and most."""
    least, likely, most = map(word, values)
    return f"{likely} ({least} to {most})" if least != most else likely


def between(values: list[float], word: Callable[[float], str]) -> str:
    least, most = map(word, values)
    return f"{least} to {most}" if least != most else most


def about(value: float) -> str:
    """Two digits below 10, else whole: 0.12, 497, 40,000,000."""
    return f"{value:.2g}" if value < 9.95 else f"{value:,.0f}"


BYTES = ("B", "kB", "MB", "GB", "TB", "PB")
FLOP = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP", "ZFLOP")


def unit(value: float, names: Sequence[str]) -> str:
    """Three digits and the name of the power of 1000."""
    power = 0
    while value >= 999.5 and power < len(names) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.3g} {names[power]}"


def size(value: float) -> str:
    return unit(value, BYTES)


def duration(seconds: float) -> str:
    for unit, length in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length or (unit != "days" and seconds >= length):
            return f"{seconds / length:.2g} {unit}" if seconds < 10 * length else f"{seconds / length:.0f} {unit}"
    return f"{seconds:.2g} s"


for _command in (invert.invert, edit.edit, finetune.finetune):
    app.command(_command.__name__)(planned(_command))
