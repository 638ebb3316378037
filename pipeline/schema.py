"""Every column of every table the project writes, and what its metadata says."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

VERSION = 1
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
"""Names of picture files end like this."""
MAX_PIXELS = 16_000_000
"""Larger pictures are not decoded unless it is asked for."""
MAX_PICTURE_BYTES = 128 * 2**20
"""Larger picture files are not even read."""
MAX_BLOCK_BYTES = 2**31
"""What a block of rows may take in memory unless more is asked for."""
ROW, BLOCK, UNREAD = "__row__", "__block__", "__unread__"
"""Position in the whole input of a row and of the first row of its block, which name output files, and why a picture was not read;
never written."""
HIDDEN = (ROW, BLOCK, UNREAD)
WANTED = b"wanted"
"""In the metadata of a block on its way: JSON of the folders of the outputs that lack it, empty if all do."""

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
EDIT = pa.schema([("edited", IMAGE), ("attribute", pa.string()), ("degree", pa.float32())])
_SCORES = (
    ("mae", pa.float32()),  # mean absolute difference of source and edited, pictures in [0, 1]
    ("ssim", pa.float32()),
    ("clip_direction", pa.float32()),  # cosine of the change with the text direction; null for reconstructions
)
IDENTITY = pa.field("identity", pa.float32())
"""Cosine of the face features of source and edited; only where a face recognition network was given."""
_JUDGED = ("factors_before", "factors_after")
ALIGNED, ALIGN_ERROR = "aligned faces", "align_error"
"""Kind of a table of faces that were cut out, and its column that says why a row has none. That has a name of its own, because it passes
through to the latents and edits that are made of the faces."""


def scores_schema(factors: Sequence[str], identity: bool = False) -> pa.Schema:
    """The columns that ``Score`` fills; what the domain's judge reads, a string a factor, only where it has a judge."""
    reading = pa.struct([(name, pa.string()) for name in factors])
    return pa.schema([*_SCORES, *([IDENTITY] if identity else []), *((name, reading) for name in _JUDGED if factors)])


def latent_type(size: int) -> pa.DataType:
    """Plain fixed-size list, because no other tensor type is read by pyarrow and by Hugging Face datasets alike."""
    return pa.list_(pa.float16(), 3 * size * size)


def own_columns(kind: str) -> tuple[str, ...]:
    """The columns a table of this kind adds to ``id``, ``image`` and the user's own."""
    scored = (*EDIT.names, *(name for name, _ in _SCORES), IDENTITY.name, *_JUDGED, "error")
    return {"latents": ("latent", "error"), "edits": scored, ALIGNED: (ALIGN_ERROR,)}[kind]


def error_column(columns: pa.Schema) -> str:
    """The column of a table of the project's that says why a row is a reject."""
    return ALIGN_ERROR if about(columns).get("kind") == ALIGNED else "error"


def aligned_schema(user: pa.Schema, size: int) -> pa.Schema:
    """Of a table of aligned faces: id, image (the face), the user's columns, align_error."""
    return with_metadata([*_leading(user), pa.field(ALIGN_ERROR, pa.string())], user, {"kind": ALIGNED, "size": size})


def latents_schema(user: pa.Schema, size: int, about: Mapping[str, Any]) -> pa.Schema:
    """Of a latents table: id, image, the user's columns, latent, error; ``about`` becomes metadata."""
    columns = [*_leading(user), pa.field("latent", latent_type(size)), pa.field("error", pa.string())]
    return with_metadata(columns, user, {"kind": "latents", "latent_shape": [3, size, size], **about})


def edits_schema(user: pa.Schema, factors: Sequence[str], about: Mapping[str, Any], identity: bool = False) -> pa.Schema:
    """Of an edits table: id, image (the source), edited, attribute, degree, scores, the user's columns, error."""
    columns = [*_leading(user), *EDIT, *scores_schema(factors, identity), pa.field("error", pa.string())]
    return with_metadata(columns, user, {"kind": "edits", **about})


def _leading(user: pa.Schema) -> list[pa.Field]:
    return [pa.field("id", pa.string()), pa.field("image", IMAGE), *(f.remove_metadata() for f in user)]


def with_metadata(columns: Sequence[pa.Field], user: pa.Schema, about: Mapping[str, Any]) -> pa.Schema:
    """``columns`` with ``about`` and the Hugging Face features of all: of the ``user``'s columns as the input declared them, because
    names of classes and kinds of media are in no Arrow type."""
    declared = declared_features(user)
    features = {f.name: declared.get(f.name) or feature(f.type) for f in columns}
    metadata: dict[str, str] = {"diffusionclip": json.dumps({"version": VERSION, **about})}
    if all(features.values()):  # a type that Hugging Face datasets has no name for: let it infer all
        metadata["huggingface"] = json.dumps({"info": {"features": features}})
    return pa.schema(columns, metadata)


def declared_features(columns: pa.Schema) -> dict[str, Any]:
    """The Hugging Face features of columns as their metadata has them; none where it is missing or no such metadata."""
    try:
        features = json.loads((columns.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {name: features[name] for name in columns.names if name in features}
    except (ValueError, KeyError, TypeError):
        return {}


_DTYPES = {
    pa.float16(): "float16",
    pa.float32(): "float32",
    pa.float64(): "float64",
    pa.bool_(): "bool",
    pa.string(): "string",
    pa.large_string(): "large_string",
    pa.binary(): "binary",
    pa.large_binary(): "large_binary",
    pa.date32(): "date32",
    pa.null(): "null",
}
"""Names that Hugging Face datasets has for Arrow types, beside those that it calls as Arrow does."""
_NAMED_ALIKE = (pa.types.is_integer, pa.types.is_timestamp, pa.types.is_decimal, pa.types.is_time, pa.types.is_duration)


def feature(kind: pa.DataType) -> dict[str, Any] | None:
    """The Hugging Face feature of an Arrow type, so that ``datasets`` and the Hub viewer show pictures."""
    if kind == IMAGE:
        return {"_type": "Image"}
    if pa.types.is_fixed_size_list(kind):
        item = feature(kind.value_type)
        return item and {"_type": "List", "feature": item, "length": kind.list_size}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        item = feature(kind.value_type)
        return item and {"_type": "List", "feature": item}
    if pa.types.is_struct(kind):
        parts = {f.name: feature(f.type) for f in kind}
        return parts if all(parts.values()) else None
    if pa.types.is_dictionary(kind):
        return feature(kind.value_type)
    if kind in _DTYPES or any(is_kind(kind) for is_kind in _NAMED_ALIKE):
        return {"_type": "Value", "dtype": _DTYPES.get(kind, str(kind))}
    return None


def about(schema: pa.Schema) -> dict[str, Any]:
    """What the project wrote into a table's metadata; empty for a table that it did not write."""
    raw = (schema.metadata or {}).get(b"diffusionclip")
    return json.loads(raw) if raw else {}


def is_image_column(kind: pa.DataType) -> bool:
    """True for binary columns and for structs that hold ``bytes``, and perhaps a textual ``path``."""
    if not pa.types.is_struct(kind):
        return _is_binary(kind)
    parts = {f.name: f.type for f in kind}
    path = parts.get("path", pa.null())
    is_path = pa.types.is_string(path) or pa.types.is_large_string(path) or pa.types.is_null(path)
    return "bytes" in parts and _is_binary(parts["bytes"]) and is_path


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def image_bytes(column: pa.ChunkedArray | pa.Array) -> list[bytes | None]:
    """The encoded pictures of an image column, one a row, None where the column or its bytes are null."""
    if pa.types.is_struct(column.type):
        return [None if v is None else v["bytes"] for v in column.to_pylist()]
    return column.to_pylist()


def image_column(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """Any image column as struct{bytes, path}."""
    rows = column.to_pylist()
    if pa.types.is_struct(column.type):
        return pa.array([v if v is None else {"bytes": v["bytes"], "path": v.get("path")} for v in rows], IMAGE)
    return pa.array([v if v is None else {"bytes": v, "path": None} for v in rows], IMAGE)
