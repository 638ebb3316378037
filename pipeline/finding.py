"""Looking at an address: which kind of input it is, its columns and counts, and why it cannot be used."""

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from models.references import public
from pipeline import parquet, schema, tars
from pipeline.config import ConfigError, Source
from pipeline.faults import refused
from pipeline.filters import condition
from pipeline.inputs import Input, OnFile, below, side_by_side
from pipeline.manifest import RECORD
from pipeline.schema import MAX_PICTURE_BYTES, SUFFIXES

_STAMPS = ("size", "ETag", "mtime", "LastModified")
"""What stores say of a file that changes with it."""


@dataclass(frozen=True, kw_only=True)
class _Listing:
    fs: AbstractFileSystem
    root: str
    files: dict[str, dict[str, Any]]
    """All that are not hidden, sorted, with what their store says of them."""
    empty: bool
    records: tuple[str, ...]
    """As ``Input`` has them."""

    def ending(self, *suffixes: str) -> tuple[str, ...]:
        return tuple(file for file in self.files if file.lower().endswith(suffixes))

    def digest(self, files: tuple[str, ...]) -> str:
        """Of the names, sizes and versions of files, without asking their store again: a listing of many takes a while."""
        listed = [[file, *(str(self.files[file].get(name)) for name in _STAMPS)] for file in files]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]


def _listing(path: str) -> _Listing:
    if not path:
        raise ConfigError("the address of the input is empty")
    with refused(f"{public(path)} cannot be opened"):
        fs, root = url_to_fs(path)
        try:
            if not fs.exists(root):
                fs.info(root)  # which says what exists() takes for a no: that nobody is let in, or answers
                raise FileNotFoundError(root)
        except FileNotFoundError:
            nothing = f"there is nothing at {public(path)}; give Parquet, tar or picture files, or a folder of one kind of them"
            raise ConfigError(nothing) from None
        everything = fs.find(root, detail=True) if fs.isdir(root) else {root: fs.info(root)}
    visible = [f for f in sorted(everything) if f == root or not _hidden(below(f, root))]
    inside = [below(f, root).removesuffix(RECORD) for f in sorted(everything) if f.rpartition("/")[2] == RECORD and f != root]
    records = tuple(f"{path.rstrip('/')}/{folder}".rstrip("/") for folder in inside if not _hidden(folder))
    return _Listing(fs=fs, root=root, files={file: everything[file] for file in visible}, empty=not everything, records=records)


def _hidden(path: str) -> bool:
    return any(part.startswith(("_", ".")) for part in path.split("/"))


def find(source: Source, on_file: OnFile = lambda done, total: None) -> Input:
    """Looks at an address without reading a picture. Raises ConfigError that says what is there instead."""
    there = _listing(source.path)
    found = _find(source, there, on_file)
    return replace(found, digest=there.digest(found.files))


def _find(source: Source, there: _Listing, on_file: OnFile) -> Input:
    kinds = {"Parquet files": there.ending(".parquet"), "tars": there.ending(".tar"), "pictures": there.ending(*SUFFIXES)}
    if len([files for files in kinds.values() if files]) > 1:
        counted = " and ".join(f"{len(files)} {kind}" for kind, files in kinds.items() if files)
        raise ConfigError(f"{source.path} holds {counted}; give a folder with one kind")
    if kinds["Parquet files"]:
        return _find_tables(source, there, kinds["Parquet files"], on_file)
    if source.where:
        raise ConfigError(f"rows are chosen by --where from Parquet files only, and {source.path} holds none")
    if kinds["tars"]:
        return _find_tars(source, there, kinds["tars"], on_file)
    if kinds["pictures"]:
        return _find_pictures(source, there, kinds["pictures"])
    what = "is empty" if there.empty else "holds no input"
    raise ConfigError(f"{source.path} {what}; expected are .parquet files, .tar files or pictures ({' '.join(SUFFIXES)})")


def metadata_at(path: str) -> dict[str, Any]:
    """What the project wrote into the first Parquet file at an address; empty if it wrote none. Raises ConfigError."""
    there = _listing(path)
    files = there.ending(".parquet")
    with refused(f"{files[0] if files else path} cannot be read"):
        return schema.about(parquet.read_footer(there.fs, files[0], ()).columns) if files else {}


def _find_pictures(source: Source, there: _Listing, files: tuple[str, ...]) -> Input:
    if odd := [f for f in files if not _is_text(f)]:
        raise ConfigError(f"the names of {len(odd)} pictures in {source.path} are not UTF-8, e.g. {odd[0]!r}; rename them first")
    sizes = (int(there.files[file].get("size") or 0) for file in files)
    columns = pa.schema([(source.image_column, schema.IMAGE)])
    _check_kept(source, columns)
    return Input(
        source=source,
        kind="pictures",
        files=files,
        counts=((1,),) * len(files),
        sizes=tuple((size if size <= MAX_PICTURE_BYTES else 0,) for size in sizes),
        columns=columns,
        records=there.records,
    )


def _find_tars(source: Source, there: _Listing, files: tuple[str, ...], on_file: OnFile) -> Input:
    def look(file: str) -> tars.Contents | str:
        try:
            return tars.look(there.fs, file)
        except tars.TarError as error:
            return str(error)

    looked = side_by_side(look, files, on_file)
    problems = [found for found in looked if isinstance(found, str)]
    contents = [found for found in looked if not isinstance(found, str)]
    pictures = {extension: name for found in contents for extension, name in found.pictures.items()}
    asked = source.image_column != Source.image_column
    if not problems and not any(found.keys for found in contents):
        problems.append(f"{source.path} has no rows: its tars hold no files with a name and an extension, as 0001.jpg")
    elif not problems and asked and source.image_column not in pictures:
        problems.append(
            f"the tars of {source.path} have no pictures .{source.image_column}; they have {', '.join(sorted(pictures)) or 'none'}"
        )
    elif not asked and (several := next((found.several for found in contents if found.several), None)):
        problems.append(f"{several!r} in {source.path} has several pictures; say which with --image-column: {', '.join(sorted(pictures))}")
    if odd := [key for found in contents for key in found.keys if not _is_text(key)]:
        problems.append(f"{len(odd)} names in the tars of {source.path} are not UTF-8, e.g. {odd[0]!r}; rename them first")
    if problems:
        raise ConfigError(*problems)
    texts = sorted({text for found in contents for text in found.texts})
    columns = pa.schema([(source.image_column, schema.IMAGE), *((text, pa.string()) for text in texts)])
    _check_kept(source, columns)
    return Input(
        source=source,
        kind="tars",
        files=files,
        counts=tuple(tuple(found.counts) for found in contents),
        sizes=tuple(tuple(found.sizes) for found in contents),
        columns=columns,
        keys=tuple(tuple(found.keys) for found in contents),
        spans=tuple(tuple(found.spans) for found in contents),
        records=there.records,
    )


def _find_tables(source: Source, there: _Listing, files: tuple[str, ...], on_file: OnFile) -> Input:
    """Footers are read side by side; of files that the filter leaves out by their folders' names, none."""
    first_file, first = _first_columns(there.fs, files)
    partitions = _partitions(source, there, files, first)
    columns = pa.schema([*first, *partitions], first.metadata)
    if problems := _column_problems(source, columns):
        raise ConfigError(*problems)
    _check_kept(source, columns)
    chosen = condition(source.where, columns) if source.where else None
    constants = {file: parquet.constants_of(below(file, there.root), partitions) for file in files}
    if chosen and len(partitions):
        files = tuple(parquet.files_that_may_match(files, [constants[file] for file in files], chosen, columns))
    empty = Input(
        source=source, kind="parquet", files=(), counts=(), sizes=(), columns=columns, partitions=partitions, records=there.records
    )
    wanted = [name for name in (*empty.read_columns, *(chosen.columns if chosen else ())) if name in first.names]

    def look(file: str) -> parquet.Footer | str:
        try:
            footer = parquet.read_footer(there.fs, file, wanted)
            problems = _other_columns(file, footer.columns, first_file, first) or parquet.size_problems(
                file, footer, source.max_block_bytes
            )
            if chosen and not problems:
                counts = parquet.matching(there.fs, file, constants[file], columns, empty.reading)
                footer = parquet.Footer(columns=first, counts=counts, sizes=footer.sizes)
            return problems[0] if problems else footer
        except (pa.ArrowException, OSError, parquet.TooLargeError) as error:
            return _unreadable(file, error)

    looked = dict(zip(files, side_by_side(look, files, on_file), strict=True))
    problems = [found for found in looked.values() if isinstance(found, str)]
    footers = {file: found for file, found in looked.items() if not isinstance(found, str) and (any(found.counts) or not chosen)}
    if not problems and not any(any(footer.counts) for footer in footers.values()):
        problems = [f"{source.path} has no rows" + (f" with {source.where}" if source.where else "")]
    if problems:
        raise ConfigError(*problems)
    counts, sizes = tuple(f.counts for f in footers.values()), tuple(f.sizes for f in footers.values())
    return replace(empty, files=tuple(footers), counts=counts, sizes=sizes)


def _first_columns(fs: AbstractFileSystem, files: tuple[str, ...]) -> tuple[str, pa.Schema]:
    """The first readable file and its columns. Raises ConfigError, which names all files, if there is none."""
    problems = []
    for file in files:
        try:
            return file, parquet.read_footer(fs, file, ()).columns
        except (pa.ArrowException, OSError) as error:
            problems.append(_unreadable(file, error))
    raise ConfigError(*problems)


def _partitions(source: Source, there: _Listing, files: tuple[str, ...], first: pa.Schema) -> pa.Schema:
    """The columns that are in the names of folders; one that the files have as well is the files'."""
    try:
        found = parquet.partition_columns([parquet.partition_of(below(file, there.root)) for file in files])
    except ValueError as error:
        raise ConfigError(f"{source.path} is partitioned in more than one way: {error}") from None
    return pa.schema([f for f in found if f.name not in first.names])


def _unreadable(file: str, error: Exception) -> str:
    said = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
    return f"{file}: {said}" if isinstance(error, parquet.TooLargeError) else f"{file} is not a readable Parquet file: {said}"


def _other_columns(file: str, found: pa.Schema, first_file: str, first: pa.Schema) -> list[str]:
    if not found.equals(first):
        return [f"{file} has other columns or types than {first_file}; all files of one input must agree"]
    if schema.about(found) != schema.about(first):
        return [f"{file} was made by another run than {first_file} (model, recipe or edit differ); give them one by one"]
    return []


def _check_kept(source: Source, columns: pa.Schema) -> None:
    known = {*columns.names, source.id_column}
    if unknown := [name for name in source.columns or () if name not in known]:
        raise ConfigError(f"{source.path} has no column {', '.join(map(repr, unknown))} to keep; it has {', '.join(columns.names)}")


# ---- what makes columns unusable -------------------------------------------------------------------------------------


def _is_text(name: str) -> bool:
    """False for a file name whose bytes are not UTF-8, as ids must be."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _column_problems(source: Source, columns: pa.Schema) -> list[str]:
    twice = sorted({name for name in columns.names if columns.names.count(name) > 1})
    if twice:
        return [f"{source.path} has more than one column named {', '.join(map(repr, twice))}; rename them first"]
    return _id_problems(source, columns) + _image_problems(source, columns)


def _id_problems(source: Source, columns: pa.Schema) -> list[str]:
    if source.id_column not in columns.names:
        asked = source.id_column != Source.id_column  # the usual name may be missing: then ids are made
        return [f"{source.path} has no column {source.id_column!r}; it has {', '.join(columns.names)}"] if asked else []
    kind = columns.field(source.id_column).type
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    if any(is_kind(plain) for is_kind in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_integer)):
        return []
    return [f"column {source.id_column!r} of {source.path} must be text or whole numbers; it is {kind}"]


def _image_problems(source: Source, columns: pa.Schema) -> list[str]:
    if source.image_column not in columns.names:
        usable = [f.name for f in columns if schema.is_image_column(f.type)]
        hint = f"; image columns are: {', '.join(usable)}" if usable else ""
        return [f"{source.path} has no column {source.image_column!r}; it has {', '.join(columns.names)}{hint}"]
    kind = columns.field(source.image_column).type
    if not schema.is_image_column(kind):
        return [f"column {source.image_column!r} of {source.path} must be binary or struct{{bytes, path}}; it is {kind}"]
    return []
