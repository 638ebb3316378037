"""The report page: edits datasets as one self-contained HTML file that opens without a network."""

import base64
import hashlib
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from pipeline.codec import FORMATS, MAX_PIXELS, ImageError, decode, encode_png
from pipeline.config import ConfigError
from pipeline.manifest import RECORD
from pipeline.sources import Input
from pipeline.summary import Summary, edit_folders, locate, open_edits, rows_at, spread, summarise

TEMPLATE = "page.html.j2"
LARGEST = 256
"""Pixels a side of a thumbnail."""
MANY = 96
"""From so many pictures on, thumbnails have half the side, so that a page of photos stays a few megabytes."""
SMALL = 64
"""Up to this many pixels a side, every pixel is shown as a crisp square."""
SHOWN = 96
"""About so many CSS pixels a small picture is wide; always a whole multiple of its own."""
PHOTO = 128
"""CSS pixels a large picture is wide."""
STRIP_ROWS = 6


@dataclass(frozen=True)
class Picture:
    """One cell: a thumbnail, or, where ``uri`` is empty, the words that stand in its place."""

    text: str
    """Alternative text, or the reason why there is no picture."""
    uri: str = ""
    side: int = SHOWN
    """CSS pixels."""
    crisp: bool = False


@dataclass(frozen=True)
class Column:
    """One dataset among the pictures."""

    summary: Summary
    found: Input
    title: str
    note: str = ""


@dataclass(frozen=True)
class Strip:
    """One attribute at rising degrees; ``rows`` pairs an id with a picture for each column."""

    title: str
    columns: list[Column]
    rows: list[tuple[str, list[Picture]]]


Cells = dict[tuple[str, str], dict[str, Any]]
"""(folder, id) -> what that dataset holds of the row."""


def make_page(folders: list[str], out: Path, rows: int = 24, title: str | None = None) -> Path:
    """Writes the page about edits datasets, or folders of them, and returns its path.

    ``rows`` rows have their pictures shown, evenly spaced over the first dataset. Raises ConfigError, before anything is
    written, with a sentence for each problem: no such folder, no edits dataset, ``rows`` below 1, ``out`` not writable.
    """
    datasets = _check(folders, out, rows)
    columns = _columns([summarise(folder) for folder in datasets])
    page = _render(columns, rows, title or "Edited pictures")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(page.encode("utf-8", "replace"))
    except OSError as error:
        raise ConfigError(_unwritable(out, error)) from None
    return out


def _check(folders: list[str], out: Path, rows: int) -> list[str]:
    """All datasets at the addresses, each once. Raises ConfigError with every problem."""
    problems, datasets = [], []
    if not folders:
        problems.append("no folder was given; give one or more that an edit run wrote")
    if rows < 1:
        problems.append(f"the number of rows with pictures must be at least 1; got {rows}")
    for folder in folders:
        try:
            datasets += edit_folders(folder)
        except ConfigError as error:
            problems += error.problems
    nearest = next(p for p in out.absolute().parents if p.exists())
    if out.is_dir():
        problems.append(_unwritable(out, "it is a folder; give the name of a file"))
    elif not nearest.is_dir() or not os.access(out if out.exists() else nearest, os.W_OK):
        problems.append(_unwritable(out, f"{nearest} is no folder that can be written to"))
    if problems:
        raise ConfigError(*problems)
    return list(dict.fromkeys(datasets))


def _unwritable(out: Path, why: object) -> str:
    return f"the page {out} cannot be written: {why}"


def _columns(summaries: list[Summary]) -> list[Column]:
    """Reconstructions first, then attributes, then mixes, each by rising degree; folders tell equal ones apart."""
    ordered = sorted(summaries, key=lambda s: (len(s.parts), s.attribute, s.degree, s.folder))
    twins = [(s.domain, s.attribute, s.degree) for s in ordered]
    columns = []
    for summary, kind in zip(ordered, twins, strict=True):
        title = _short(" + ".join(summary.parts).replace("_", " "), 60) or "reconstruction"
        columns.append(Column(summary, open_edits(summary.folder), title, summary.folder if twins.count(kind) > 1 else ""))
    return columns


# ---- what is on the page ---------------------------------------------------------------------------------------------


def _render(columns: list[Column], rows: int, title: str) -> str:
    beside, lines = _beside(columns), _degree_lines(columns)
    first = columns[0].found
    positions = spread(first.rows, rows)
    sources = {row["id"]: row for row in rows_at(first, positions, ["id", "image", "error"]).values()}
    shown = {column.summary.folder: column for column in [*beside, *(c for line in lines for c in line)]}
    cells = _cells(shown.values(), list(sources))
    count = len(sources) * (1 + len(beside))
    thumbs = _Thumbs(sources, cells, LARGEST if count < MANY else LARGEST // 2)
    few = [list(sources)[i] for i in spread(len(sources), STRIP_ROWS)]
    pictures = [(name, [thumbs.source(name), *(thumbs.edited(name, c) for c in beside)]) for name in sources]
    strips = [Strip(_title(s), s, [(name, [thumbs.edited(name, c) for c in s]) for name in few]) for s in lines]
    return _environment().get_template(TEMPLATE).render(
        title=title,
        columns=columns,
        finished=_finished([column.summary for column in columns]),
        identity=any(column.summary.identity is not None for column in columns),
        sampled=len(sources),
        total=first.rows,
        beside=beside,
        pictures=pictures,
        strips=strips,
        absent=[c for c in beside if not any((c.summary.folder, name) in cells for name in sources)],
        widest=max(_width(line) for _, line in [*pictures, *(row for strip in strips for row in strip.rows)] or [("", [])]),
        rejects=_rejects(columns),
        runs=_runs(columns),
    )  # fmt: skip


def _beside(columns: list[Column]) -> list[Column]:
    """Side by side with the source: of each attribute the degree nearest to 1, and the reconstruction."""
    kinds: dict[tuple[str, str], list[Column]] = {}
    for column in columns:
        kinds.setdefault((column.summary.domain, column.summary.attribute), []).append(column)
    chosen = []
    for members in kinds.values():
        nearest = min((c.summary.degree for c in members), key=lambda degree: abs(degree - 1))
        chosen += [c for c in members if c.summary.degree == nearest]
    known = {c.summary.domain for c in chosen if not c.summary.parts}
    spare = [c for c in columns if c.summary.degree == 0 and c.summary.parts and c.summary.domain not in known and c not in chosen]
    return [*spare[:1], *chosen]


def _degree_lines(columns: list[Column]) -> list[list[Column]]:
    """For each attribute with two degrees or more its columns by rising degree; a reconstruction stands in for degree 0."""
    strips = []
    for domain, attribute in dict.fromkeys((c.summary.domain, c.summary.attribute) for c in columns if c.summary.parts):
        own = {c.summary.degree: c for c in columns if (c.summary.domain, c.summary.attribute) == (domain, attribute)}
        if len(own) < 2:
            continue
        plain = [c for c in columns if not c.summary.parts and c.summary.domain == domain and 0 not in own]
        strips.append(sorted([*plain[:1], *own.values()], key=_degree))
    return strips


def _title(line: list[Column]) -> str:
    return next(c.title for c in line if c.summary.parts)


def _degree(column: Column) -> float:
    """A reconstruction uses the base model alone: degree 0, whatever its own record says."""
    return column.summary.degree if column.summary.parts else 0.0


def _cells(columns: Iterable[Column], ids: Sequence[str]) -> Cells:
    """The edited pictures of ``ids`` in each dataset that has them, wherever they stand in it."""
    cells: Cells = {}
    for column in columns:
        places = locate(column.found, ids)
        rows = rows_at(column.found, list(places.values()), ["edited", "error"])
        cells |= {(column.summary.folder, name): rows[place] for name, place in places.items()}
    return cells


def _rejects(columns: list[Column]) -> list[dict[str, Any]]:
    """One entry for each set of rejects: the edits of a run usually share theirs."""
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for column in columns:
        summary = column.summary
        key = (tuple(summary.reasons.items()), summary.rejects)
        if summary.rejected:
            groups.setdefault(key, {"summary": summary, "of": []})["of"].append(column)
    return list(groups.values())


def _runs(columns: list[Column]) -> list[dict[str, Any]]:
    """One entry for each command, with the edits it wrote; datasets without a record stand alone."""
    runs: dict[str, dict[str, Any]] = {}
    for column in columns:
        record, folder = column.summary.record, column.summary.folder
        key = f"{record.get('command')} {record.get('input')} {folder.rsplit('/', 1)[0]}" if record else folder
        run = runs.setdefault(key, {"record": record, "of": [], "edits": {}})
        run["of"].append(column)
        if record.get("edit"):
            run["edits"][column.title] = record["edit"]  # every degree of an attribute has the same parts
    return list(runs.values())


def _finished(summaries: list[Summary]) -> str:
    """The day of the newest record, in UTC; empty where the store does not tell."""
    days = []
    for summary in summaries:
        fs, root = url_to_fs(summary.folder)
        try:
            days.append(fs.modified(f"{root}/{RECORD}").astimezone(UTC))
        except (OSError, NotImplementedError, AttributeError):
            continue
    return f"{max(days):%-d %B %Y}" if days else ""


# ---- pictures --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Thumbs:
    """Makes cells from encoded pictures; ``largest`` is the most pixels a side."""

    sources: dict[str, dict[str, Any]]
    cells: Cells
    largest: int

    def source(self, name: str) -> Picture:
        """The source as the model saw it: cut to a square, no finer than its edits."""
        edits = [row["edited"] for (_, of), row in self.cells.items() if of == name and row["edited"]]
        sides = [side for side in (_side(edit["bytes"]) for edit in edits[:1]) if side]
        return self._picture(self.sources[name]["image"], f"{name}: source", min([self.largest, *sides]))

    def edited(self, name: str, column: Column) -> Picture:
        row = self.cells.get((column.summary.folder, name))
        if row is None:
            return Picture("not in this dataset")
        if row["error"] is not None:
            return Picture(f"rejected: {row['error']}")
        return self._picture(row["edited"], f"{name}: {column.title}, degree {_degree(column):g}", self.largest)

    def _picture(self, image: dict[str, Any] | None, text: str, largest: int) -> Picture:
        data = image["bytes"] if image else None
        side = min(largest, _side(data) or largest)
        try:
            pixels = decode(data, side, MAX_PIXELS)
        except ImageError as error:
            return Picture(str(error))
        uri = "data:image/png;base64," + base64.b64encode(encode_png(pixels)).decode()
        crisp = side <= SMALL
        return Picture(text, uri, side * max(1, round(SHOWN / side)) if crisp else PHOTO, crisp)


def _width(line: list[Picture]) -> int:
    """CSS pixels of a row of cells with its id, as the style sheet has them."""
    return 140 + sum(max(132, picture.side + 16) for picture in line)


def _side(data: bytes | None) -> int | None:
    """The shorter side of an encoded picture, read from its header; None where there is no picture: ``decode`` says why."""
    try:
        with Image.open(io.BytesIO(data or b""), formats=FORMATS) as picture:
            return min(picture.size)
    except Exception:  # decoders raise nearly anything
        return None


# ---- how it is written -----------------------------------------------------------------------------------------------


def _environment() -> Environment:
    env = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    env.filters |= {
        "number": _number,
        "percent": _percent,
        "short": _short,
        "csp_hash": _csp_hash,
        "degree": _degree,
        "plain": "{:g}".format,
    }
    return env


def _number(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{value:,.{digits}f}".replace("-", "−")  # noqa: RUF001


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"  # noqa: RUF001


def _short(text: object, most: int = 160) -> str:
    """A text from data, cut where it would fill the page."""
    return str(text) if len(str(text)) <= most else f"{str(text)[: most - 1]}…"


def _csp_hash(style: Markup) -> str:
    """What the page's security policy must say to allow this one style sheet and no other."""
    return "sha256-" + base64.b64encode(hashlib.sha256(str(style).encode()).digest()).decode()
