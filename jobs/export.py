"""``diffusionclip export``: pictures out of tables into files."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs import options as o

if TYPE_CHECKING:
    from pipeline.sources import Input

Table = Annotated[str, typer.Argument(help="A table that align, invert or edit wrote, or a folder with several edits.")]
Out = Annotated[Path, typer.Argument(help="A new folder; several edits get a subfolder each.")]
Column = Annotated[str | None, typer.Option(help="Which pictures.", show_default="edited, else image")]
Limit = Annotated[int | None, typer.Option(help="At most this many rows of each table.", min=1)]


def export(table: Table, out: Out, column: Column = None, limit: Limit = None, storage_option: o.StorageOptions = None) -> None:
    """Write the pictures of a table to files named after the rows' ids; their bytes stay as they are.

    [bold]Examples[/bold]

    diffusionclip export out/edits pictures/

    diffusionclip export out/faces faces/ --column image
    """
    from jobs.progress import console
    from pipeline.config import ConfigError
    from pipeline.export import picture_table
    from pipeline.standing import folders_at, unfinished

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already and is no empty folder; give a new one")
    chosen = [(folder, *picture_table(address, column)) for address, folder in tables(table, out)]
    if problems := unfinished([*folders_at(table), *(record for _, found, _ in chosen for record in found.records)]):
        raise ConfigError(*problems)
    for folder, found, name in chosen:
        written, without = write_all(folder, found, name, limit)
        console.print(f"{folder}: {written} pictures{f', {without} rows without one' if without else ''}", markup=False)


def tables(address: str, out: Path) -> list[tuple[str, Path]]:
    """Address and output folder of each table at an address: of all edits in a folder of edits, or of itself."""
    from pipeline.config import ConfigError
    from pipeline.summary import edit_folders

    try:
        edits = edit_folders(address)
    except ConfigError:  # another kind of table, or none, which is said when it is opened
        return [(address, out)]
    return [(address, out)] if edits == [address] else [(edit, out / edit.rpartition("/")[2]) for edit in edits]


def write_all(folder: Path, found: "Input", column: str, limit: int | None) -> tuple[int, int]:
    """Numbers of pictures written and of rows without one."""
    from itertools import islice

    from jobs.progress import display
    from pipeline.export import pictures, write_picture

    written = without = 0
    taken: set[str] = set()
    total = min(found.rows, limit or found.rows)
    with display(f"export {folder.name}", total) as shown:
        for name, data in islice(pictures(found, column), total):
            file = write_picture(folder, name, data, taken) if data else None
            written, without = written + (file is not None), without + (file is None)
            shown.update(written + without)
    return written, without
