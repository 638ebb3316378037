"""``diffusionclip demo``: the whole chain on the shipped images and weights."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs import options as o

LIVE = "smiling"
"""The attribute that the demo fine-tunes before your eyes; the others come ready-made."""
LIVE_IMAGES = 64
LIVE_TUNING = {"images": 32, "choose_from": LIVE_IMAGES, "batch": 4, "warmup": 16}
"""Fewer images than the ready-made edit models had, to be done within a minute; smaller batches, so that there are steps enough."""
Folder = Annotated[Path, typer.Option("--out", help="Where everything goes; an earlier demo there is replaced.")]
Rows = Annotated[int, typer.Option(help="Held-out images to edit.", min=1, max=1000)]


def demo(out: Folder = Path("out/demo"), rows: Rows = 24, verbose: o.Verbose = False) -> None:
    """Show the whole chain in a few minutes on two cores: invert, fine-tune, edit, score, page.

    Works on the embedded domain `pixelface`; downloads nothing.

    [bold]Example[/bold]

    diffusionclip demo --out out/demo --rows 24
    """
    from jobs.progress import console
    from jobs.session import ray_session

    seconds: dict[str, float] = {}
    pictures = write_input(out, rows)
    console.print(f"Editing {rows} held-out images and two broken ones; fine-tuning {LIVE!r} live. Results go to {out}/")
    started = time.monotonic()
    with ray_session(None, verbose):
        seconds["start Ray"] = time.monotonic() - started
        run_chain(out, pictures, seconds)
    with timed(seconds, "page"):
        from jobs.report import make_page

        page = make_page([str(out / "edits")], out / "page.html", rows=12, title="DiffusionCLIP on pixelface")
    say_results(out, seconds)
    console.print(f"\nOpen the page: {page.resolve()}")


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[name] = time.monotonic() - started


def write_input(out: Path, rows: int) -> Path:
    """A Parquet file with held-out images and two rows that nobody can edit, so that rejects can be seen."""
    import shutil

    import pyarrow as pa
    import pyarrow.parquet as pq

    from models.domains import DOMAINS

    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    table = pq.read_table(DOMAINS["pixelface"].held_out).slice(0, rows)
    whole = table["image"][0]["bytes"].as_py()
    broken = [{"bytes": whole[: len(whole) // 2], "path": None}, {"bytes": b"a text file, renamed to .png", "path": None}]
    bad: dict[str, Any] = {"id": ["truncated-png", "not-an-image"], "image": pa.array(broken, table.schema.field("image").type)}
    extra = pa.table({f.name: bad.get(f.name, pa.nulls(2, f.type)) for f in table.schema}, schema=table.schema)
    pq.write_table(pa.concat_tables([table, extra]), out / "input.parquet", row_group_size=-(-(rows + 2) // 2))
    return out / "input.parquet"


def run_chain(out: Path, pictures: Path, seconds: dict[str, float]) -> None:
    """Inverts, fine-tunes and edits on the connected Ray."""
    from jobs.finetune import train, tune_run
    from jobs.requests import attribute_named, make_edits
    from jobs.running import run_plan
    from models.domains import DOMAINS
    from pipeline.config import Resources, Run, Source
    from pipeline.plan import make_plan
    from pipeline.tuning import make_tune_plan

    domain = DOMAINS["pixelface"]
    resources = Resources(workers=1, cpus=2.0, batch=13, block_rows=13)
    shared: dict[str, Any] = {"max_reject_rate": 1.0, "domain": domain, "recipe": domain.recipe, "resources": resources}
    with timed(seconds, "invert"):
        latents = Run(
            source=Source(path=str(domain.tuning_images), limit=LIVE_IMAGES),
            output=str(out / "latents"),
            command="diffusionclip demo",
            **shared,
        )
        run_plan(make_plan(latents), "invert")
    with timed(seconds, "fine-tune"):
        live = attribute_named(domain, LIVE)
        run = tune_run(str(out / "latents"), str(out / "models"), domain.name, live, LIVE_TUNING, {}, {"cpus": 2.0})
        train([make_tune_plan(run)], parallel=1)
    with timed(seconds, "edit and score"):
        models = [str(out / "models")]
        edits = make_edits(domain, ["none", LIVE, "glasses", "red_hair"], ["glasses=1,smiling=1"], [1.0], models)
        sweep = make_edits(domain, ["glasses"], [], [0.5, 1.5], models)
        editing = Run(
            source=Source(path=str(pictures)), output=str(out / "edits"), edits=edits + sweep, command="diffusionclip demo", **shared
        )
        run_plan(make_plan(editing), "edit")


def say_results(out: Path, seconds: dict[str, float]) -> None:
    from jobs.progress import console
    from jobs.tables import count_table, score_table
    from pipeline.summary import edit_folders, summarise

    summaries = [summarise(folder) for folder in edit_folders(str(out / "edits"))]
    console.print()
    console.print(score_table(summaries))
    console.print(count_table("stage", [(name, f"{value:.1f} s") for name, value in seconds.items()]))
