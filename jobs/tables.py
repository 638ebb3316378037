"""Score tables for the terminal."""

from datetime import UTC, datetime, timedelta

from rich import box
from rich.table import Table

from pipeline.standing import Standing
from pipeline.summary import Summary


def score_table(summaries: list[Summary]) -> Table:
    """One line a dataset of edits: rows in, edited and rejected, mean scores, shares, and model calls an image.

    Identity has a column only where a run scored it.
    """
    identity = any(s.identity is not None for s in summaries)
    names = ("edit", "degree", "in", "edited", "rejected", "MAE", "SSIM", "CLIP", *["identity"] * identity, "success", "kept", "calls")
    table = Table(*names, box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for column in table.columns[1:]:
        column.justify = "right"
    for s in summaries:
        calls = s.record.get("model_calls_per_image")
        scores = [number(v) for v in (s.mae, s.ssim, s.clip_direction, *[s.identity] * identity, s.success, s.kept)]
        table.add_row(s.attribute, f"{s.degree:g}", str(s.rows), str(s.rows - s.rejected), str(s.rejected), *scores, str(calls or "-"))
    return table


def number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def count_table(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(title, "", box=box.SIMPLE, pad_edge=False)
    table.columns[1].justify = "right"
    for name, value in rows:
        table.add_row(name, value)
    return table


def standing_table(standings: list[Standing]) -> Table:
    """One line a dataset: its state, rows done, rejected and left, rows a second, how long it will take, age of its newest file."""
    table = Table(
        "dataset", "state", "rows", "done", "rejected", "left", "rows/s", "time left", "newest file", box=box.SIMPLE, pad_edge=False
    )
    for column in table.columns[2:]:
        column.justify = "right"
    for s in standings:
        left = _duration(s.left / s.rate) if s.rate and s.left else "-"
        age = "-" if s.latest is None else f"{_duration((datetime.now(UTC) - s.latest).total_seconds())} ago"
        counts = [str(n) for n in (s.rows, s.done, s.reasons.total(), s.left)]
        table.add_row(s.folder.rstrip("/").rpartition("/")[2], s.state, *counts, number(s.rate, 1), left, age)
    return table


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=max(0, round(seconds))))
