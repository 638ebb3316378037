"""What would be lost: tables that plain pyarrow and Hugging Face datasets open as pictures, and that say how they were made."""

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import schema
from pipeline.codec import encode_png, latents_to_arrow
from pipeline.config import Source
from pipeline.sources import find, plan_blocks, read_block

USER = pa.schema(
    [
        ("caption", pa.string()),
        ("tags", pa.list_(pa.string())),
        ("box", pa.struct([("left", pa.int32()), ("score", pa.float64())])),
        ("seen", pa.bool_()),
    ]
)
ABOUT = {"domain": "tiny", "recipe": {"return_step": 300}}


def features(columns: pa.Schema) -> dict[str, Any]:
    return json.loads(columns.metadata[b"huggingface"])["info"]["features"]


def test_a_latents_table_has_the_rows_own_columns_the_users_and_then_ours() -> None:
    columns = schema.latents_schema(USER, 4, ABOUT)
    assert columns.names == ["id", "image", "caption", "tags", "box", "seen", "latent", "error"]
    assert columns.field("latent").type == pa.list_(pa.float16(), 48)
    assert schema.about(columns) == {"version": 1, "kind": "latents", "latent_shape": [3, 4, 4], **ABOUT}


def test_an_edits_table_has_scores_and_what_the_judge_reads_only_where_there_is_one() -> None:
    plain, judged = (schema.edits_schema(USER, factors, ABOUT) for factors in ((), ("hat", "mouth")))
    made = ["edited", "attribute", "degree", "mae", "ssim", "clip_direction"]
    assert plain.names == ["id", "image", *USER.names, *made, "error"]
    assert judged.names == ["id", "image", *USER.names, *made, "factors_before", "factors_after", "error"]
    assert judged.field("factors_after").type == pa.struct([("hat", pa.string()), ("mouth", pa.string())])
    assert schema.about(plain)["kind"] == "edits"
    assert schema.edits_schema(USER, (), ABOUT, identity=True).names == ["id", "image", *USER.names, *made, "identity", "error"]


@pytest.mark.parametrize("kind", ["latents", "edits"])
def test_every_column_we_add_is_a_name_the_user_must_not_have(kind: str) -> None:
    empty = pa.schema([])
    made = schema.latents_schema(empty, 4, {}) if kind == "latents" else schema.edits_schema(empty, ("hat",), {}, identity=True)
    assert set(made.names) - {"id", "image"} == set(schema.own_columns(kind))


def test_pictures_latents_and_nested_columns_have_their_hugging_face_features() -> None:
    got = features(schema.latents_schema(USER, 4, {}))
    assert got == {
        "id": {"_type": "Value", "dtype": "string"},
        "image": {"_type": "Image"},
        "caption": {"_type": "Value", "dtype": "string"},
        "tags": {"_type": "List", "feature": {"_type": "Value", "dtype": "string"}},
        "box": {"left": {"_type": "Value", "dtype": "int32"}, "score": {"_type": "Value", "dtype": "float64"}},
        "seen": {"_type": "Value", "dtype": "bool"},
        "latent": {"_type": "List", "feature": {"_type": "Value", "dtype": "float16"}, "length": 48},
        "error": {"_type": "Value", "dtype": "string"},
    }
    assert features(schema.edits_schema(USER, (), {}))["edited"] == {"_type": "Image"}


@pytest.mark.parametrize(
    "kind", [pa.map_(pa.string(), pa.int8()), pa.list_(pa.date64()), pa.struct([("b", pa.list_(pa.month_day_nano_interval()))])], ids=str
)
def test_a_type_without_a_known_feature_leaves_the_features_to_the_reader(kind: pa.DataType) -> None:
    columns = schema.latents_schema(pa.schema([("odd", kind)]), 4, ABOUT)
    assert b"huggingface" not in columns.metadata
    assert schema.about(columns)["domain"] == "tiny"


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (pa.int64(), "int64"),
        (pa.uint8(), "uint8"),
        (pa.float16(), "float16"),
        (pa.float32(), "float32"),
        (pa.float64(), "float64"),
        (pa.string(), "string"),
        (pa.large_string(), "large_string"),
        (pa.binary(), "binary"),
        (pa.large_binary(), "large_binary"),
        (pa.bool_(), "bool"),
        (pa.null(), "null"),
        (pa.date32(), "date32"),
        (pa.timestamp("us", "UTC"), "timestamp[us, tz=UTC]"),
    ],
)
def test_plain_values_are_named_as_in_datasets(kind: pa.DataType, dtype: str) -> None:
    assert schema.feature(kind) == {"_type": "Value", "dtype": dtype}


def test_hugging_face_datasets_shows_pictures_beside_the_users_columns_of_many_kinds(tmp_path: Path) -> None:
    import datasets

    user = {
        "boxes": pa.array([[{"left": 1}, None], None], pa.list_(pa.struct([("left", pa.int32())]))),
        "kind": pa.array(["a", None]).dictionary_encode(),
        "price": pa.array([Decimal("1.50"), None], pa.decimal128(7, 2)),
        "when": pa.array([0, None], pa.timestamp("us", "UTC")),
        "nothing": pa.nulls(2),
        "story": pa.array(["x", None], pa.large_string()),
    }
    columns = schema.latents_schema(pa.schema([(name, column.type) for name, column in user.items()]), 4, ABOUT)
    image = [{"bytes": encode_png(np.zeros((3, 5, 7), np.uint8)), "path": None}, None]
    latents = latents_to_arrow([np.ones((3, 4, 4)), None], 4)
    pq.write_table(pa.table([["a", "b"], image, *user.values(), latents, [None, "bad"]], schema=columns), tmp_path / "x.parquet")
    rows = datasets.load_dataset("parquet", data_files=str(tmp_path / "x.parquet"), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows[0]["image"].size == (7, 5)
    assert rows[1]["image"] is None
    assert rows[0]["latent"] == [1.0] * 48
    assert rows[0]["boxes"] == [{"left": 1}, None]
    assert (rows[0]["kind"], rows[0]["price"], rows[0]["story"]) == ("a", Decimal("1.50"), "x")


def test_features_that_no_arrow_type_has_pass_through_from_the_input(tmp_path: Path) -> None:
    """Names of classes, sounds, matrices: as ``datasets`` wrote them, through latents and edits, and as it reads them again."""
    import datasets

    kinds = {
        "image": datasets.Image(),
        "split": datasets.ClassLabel(names=["cat", "dog"]),
        "sound": datasets.Audio(decode=False),
        "several": datasets.List(datasets.ClassLabel(names=["x", "y"])),
        "matrix": datasets.Array2D((2, 2), "float32"),
        "told": datasets.Value("string"),
    }
    picture = {"bytes": encode_png(np.zeros((3, 5, 7), np.uint8)), "path": None}
    sound = {"bytes": b"RIFF", "path": "a.wav"}
    row: dict[str, Any] = {"image": picture, "split": 1, "sound": sound, "several": [1, 0], "matrix": [[1.0, 2.0], [3.0, 4.0]], "told": "x"}
    (tmp_path / "in").mkdir()
    given = datasets.Features(kinds).arrow_schema
    pq.write_table(pa.table([pa.array([row[f.name]], f.type) for f in given], schema=given), tmp_path / "in" / "x.parquet")
    found = find(Source(path=str(tmp_path / "in")))
    (block,) = plan_blocks(found, 1)
    table = read_block(found, block)

    latents = schema.latents_schema(found.user_columns, 4, ABOUT)
    made = table.append_column("latent", latents_to_arrow([np.ones((3, 4, 4))], 4)).append_column("error", pa.nulls(1, pa.string()))
    (tmp_path / "latents").mkdir()
    pq.write_table(made.select(latents.names).cast(latents), tmp_path / "latents" / "x.parquet")
    of_latents = find(Source(path=str(tmp_path / "latents"))).user_columns
    assert of_latents.names == ["split", "sound", "several", "matrix", "told"]
    assert features(schema.edits_schema(of_latents, (), {}))["split"] == {"names": ["cat", "dog"], "_type": "ClassLabel"}

    rows = datasets.load_dataset("parquet", data_files=f"{tmp_path}/latents/*", split="train", cache_dir=str(tmp_path / "cache"))
    assert {name: rows.features[name] for name in kinds} == kinds
    assert rows.features["split"].int2str(rows[0]["split"]) == "dog"
    assert (rows[0]["sound"], rows[0]["several"], rows[0]["matrix"]) == (sound, [1, 0], [[1.0, 2.0], [3.0, 4.0]])
    assert rows[0]["image"].size == (7, 5)


@pytest.mark.parametrize("said", ["no JSON", "[]", "{}", '{"info": null}', '{"info": {"features": null}}'])
def test_metadata_that_declare_nothing_leave_the_features_to_the_arrow_types(said: str) -> None:
    user = USER.with_metadata({"huggingface": said})
    assert features(schema.latents_schema(user, 4, {})) == features(schema.latents_schema(USER, 4, {}))


def test_metadata_and_latents_survive_a_parquet_file(tmp_path: Path) -> None:
    columns = schema.latents_schema(pa.schema([]), 4, ABOUT)
    table = pa.table([["a"], [{"bytes": b"x", "path": None}], latents_to_arrow([None], 4), ["bad"]], schema=columns)
    pq.write_table(table, tmp_path / "x.parquet")
    again = pq.read_table(tmp_path / "x.parquet")
    assert again.schema.equals(columns)
    assert schema.about(again.schema) == schema.about(columns)
    assert again.equals(table)


def test_metadata_of_the_users_columns_does_not_travel() -> None:
    field = pa.field("caption", pa.string(), metadata={"ours": "not"})
    assert schema.latents_schema(pa.schema([field]), 4, {}).field("caption").metadata is None


def test_a_table_that_is_not_ours_says_nothing_about_itself() -> None:
    assert schema.about(pa.schema([("id", pa.string())])) == {}
    assert schema.about(pa.schema([], {"huggingface": "{}"})) == {}


@pytest.mark.parametrize(
    ("kind", "usable"),
    [
        (schema.IMAGE, True),
        (pa.binary(), True),
        (pa.large_binary(), True),
        (pa.struct([("bytes", pa.binary())]), True),
        (pa.struct([("path", pa.large_string()), ("bytes", pa.large_binary())]), True),
        (pa.struct([("bytes", pa.binary()), ("path", pa.null())]), True),
        (pa.struct([("path", pa.string())]), False),
        (pa.struct([("bytes", pa.string())]), False),
        (pa.struct([("bytes", pa.binary()), ("path", pa.int64())]), False),
        (pa.string(), False),
        (pa.list_(pa.uint8()), False),
    ],
)
def test_only_a_column_that_holds_encoded_pictures_is_an_image_column(kind: pa.DataType, usable: bool) -> None:
    assert schema.is_image_column(kind) == usable


def image_columns() -> dict[str, pa.Array]:
    return {
        "binary": pa.array([b"x", None, b"y"]),
        "large": pa.array([b"x", None, b"y"], pa.large_binary()),
        "struct": pa.array([{"bytes": b"x", "path": "a.png"}, None, {"bytes": b"y", "path": None}], schema.IMAGE),
        "bytes alone": pa.array([{"bytes": b"x"}, None, {"bytes": b"y"}]),
    }


@pytest.mark.parametrize("name", image_columns())
@pytest.mark.parametrize("chunked", [False, True])
def test_every_image_column_gives_its_bytes_and_becomes_one_type(name: str, chunked: bool) -> None:
    column: Any = image_columns()[name]
    if chunked:
        column = pa.chunked_array([column.slice(0, 1), column.slice(1)])
    assert schema.image_bytes(column) == [b"x", None, b"y"]
    image = schema.image_column(column)
    assert image.type == schema.IMAGE
    assert schema.image_bytes(image) == [b"x", None, b"y"]
    assert image.to_pylist()[0]["path"] == ("a.png" if name == "struct" else None)


def test_a_struct_whose_bytes_are_null_is_a_null_picture() -> None:
    column = pa.array([{"bytes": None, "path": "elsewhere.png"}], schema.IMAGE)
    assert schema.image_bytes(column) == [None]
    assert schema.image_column(column).to_pylist() == [{"bytes": None, "path": "elsewhere.png"}]
