"""``diffusionclip report``: edits -> one page with pictures."""

from pathlib import Path
from typing import Annotated

import typer

from jobs import options as o

Edits = Annotated[list[str], typer.Argument(help="Folders that `diffusionclip edit` wrote.")]
Out = Annotated[Path, typer.Option(help="The HTML file to write.")]
Rows = Annotated[int, typer.Option(help="Images to show, spread over the dataset.")]
Title = Annotated[str | None, typer.Option(help="Heading of the page.")]


def report(
    edits: Edits, out: Out = Path("page.html"), rows: Rows = 24, title: Title = None, storage_option: o.StorageOptions = None
) -> None:
    """Write one self-contained HTML page: pictures side by side, scores, rejects, and the command that made them.

    [bold]Examples[/bold]

    diffusionclip report out/edits --out page.html

    diffusionclip report out/edits/none out/edits/glasses --rows 12 --title "Glasses"
    """
    from jobs.progress import console
    from jobs.report import make_page

    console.print(f"{make_page(edits, out, rows, title).resolve()}", markup=False)
