"""``diffusionclip status``: how far a run is, from its output folder."""

from typing import Annotated

import typer

from jobs import options as o

Output = Annotated[str, typer.Argument(help="The output of align, invert or edit; any fsspec address.")]
MOST = 5
"""Reasons that are told."""


def status(output: Output, storage_option: o.StorageOptions = None) -> None:
    """Say what is done, rejected and left of a run, how fast it is and when it will be over; it may be running or stopped.

    [bold]Examples[/bold]

    diffusionclip status out/edits

    diffusionclip status s3://bucket/edits
    """
    from collections import Counter

    from jobs.progress import console
    from jobs.tables import standing_table
    from pipeline.standing import standings

    with console.status("reading"):
        found = standings(output)
    console.print(standing_table(found))
    for reason, count in sum((s.reasons for s in found), Counter[str]()).most_common(MOST):
        console.print(f"  {count} x {reason}", markup=False)
    if any(s.state != "finished" for s in found):
        console.print("If it is not running any more, the same command goes on where it stopped.")
