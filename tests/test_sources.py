"""What would be lost: every row of the input is read, once, under an id that stays the same, or the request is refused in words."""

import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from servers import Web

from pipeline import schema
from pipeline.codec import latents_to_arrow
from pipeline.config import ConfigError, Source
from pipeline.finding import metadata_at
from pipeline.ids import check_ids, hash_ids, ids
from pipeline.sources import Input, find, plan_blocks, read_block

SavePictures = Callable[..., Path]


def write(file: Path, groups: int | None = None, **columns: Any) -> Path:
    """A Parquet file with row groups of ``groups`` rows."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), file, row_group_size=groups or 1_000_000)
    return file


def write_rows(file: Path, names: Sequence[Any], groups: int | None = None, **more: Any) -> Path:
    return write(file, groups, id=pa.array(names), image=pa.array([f"bytes of {n}".encode() for n in names]), **more)


def found_at(path: Path | str, **options: Any) -> Input:
    return find(Source(path=str(path), **options))


def all_rows(path: Path | str, block_rows: int = 2, **options: Any) -> list[dict[str, Any]]:
    found = found_at(path, **options)
    return [row for block in plan_blocks(found, block_rows) for row in read_block(found, block).to_pylist()]


def problems_of(path: Path | str, **options: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        found_at(path, **options)
    return str(raised.value)


# ---- a folder of pictures --------------------------------------------------------------------------------------------


def test_a_folder_of_pictures_has_their_paths_for_ids_however_deep(save_pictures: SavePictures) -> None:
    root = save_pictures("b.png", "a.JPG", "deep/er/c.webp", "deep/b.png")
    rows = all_rows(root)
    assert [row["id"] for row in rows] == ["a.JPG", "b.png", "deep/b.png", "deep/er/c.webp"]
    assert all(row["image"] == {"bytes": (root / row["id"]).read_bytes(), "path": row["id"]} for row in rows)
    assert found_at(root).user_columns.names == []


def test_what_is_no_picture_or_hidden_is_left_alone(save_pictures: SavePictures) -> None:
    root = save_pictures("a.png", ".hidden.png", "_draft/b.png", ".cache/c.png")
    (root / "notes.txt").write_text("not a picture")
    (root / "_run.json").write_text("{}")
    assert [row["id"] for row in all_rows(root)] == ["a.png"]


@pytest.mark.parametrize("name", ["face.png", "_face.png"])
def test_a_single_picture_is_a_dataset_of_one(save_pictures: SavePictures, name: str) -> None:
    assert [row["id"] for row in all_rows(save_pictures(name) / name)] == [name]


def test_names_with_odd_characters_are_names(save_pictures: SavePictures) -> None:
    names = ["[a]*.png", "a b#1.png", "ü/ß 😀.png"]
    assert [row["id"] for row in all_rows(save_pictures(*names))] == names


@pytest.mark.parametrize("address", ["{root}", "{root}/", "file://{root}", "{root}/../pictures"])
def test_ids_do_not_depend_on_how_the_address_is_spelt(save_pictures: SavePictures, address: str) -> None:
    root = save_pictures("a.png", "deep/b.png")
    assert [row["id"] for row in all_rows(address.format(root=root))] == ["a.png", "deep/b.png"]


def test_a_relative_address_is_meant_from_here(save_pictures: SavePictures, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(save_pictures("a.png", "deep/b.png").parent)
    assert [row["id"] for row in all_rows("pictures")] == ["a.png", "deep/b.png"]


def test_pictures_in_another_file_system_are_read_through_fsspec() -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe({"/bucket/faces/a.png": b"1", "/bucket/faces/deep/b.png": b"2"})
    try:
        assert [(row["id"], row["image"]["bytes"]) for row in all_rows("memory://bucket/faces")] == [("a.png", b"1"), ("deep/b.png", b"2")]
    finally:
        fs.rm("/bucket", recursive=True)


# ---- Parquet ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), schema.IMAGE, pa.struct([("bytes", pa.binary())])], ids=str)
def test_images_come_as_bytes_or_as_structs(tmp_path: Path, kind: pa.DataType) -> None:
    values = [b"1", None, b"3"]
    image = values if not pa.types.is_struct(kind) else [v and {"bytes": v} for v in values]
    write(tmp_path / "x.parquet", id=["a", "b", "c"], image=pa.array(image, kind))
    assert [row["image"] for row in all_rows(tmp_path)] == [{"bytes": b"1", "path": None}, None, {"bytes": b"3", "path": None}]


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    write(tmp_path / "x.parquet", key=["a", "b"], photo=[b"1", b"2"], id_of_owner=[1, 2])
    rows = all_rows(tmp_path, id_column="key", image_column="photo")
    assert [(row["id"], row["image"]["bytes"], row["id_of_owner"]) for row in rows] == [("a", b"1", 1), ("b", b"2", 2)]


def test_without_an_id_column_ids_are_file_and_row_whatever_the_blocks(tmp_path: Path) -> None:
    for name in ("one.parquet", "deep/one.parquet"):
        write(tmp_path / name, groups=2, image=[b"%d" % i for i in range(5)])
    want = [f"{name}#{i}" for name in ("deep/one.parquet", "one.parquet") for i in range(5)]
    for block_rows in (1, 3, 4, 100):
        assert [row["id"] for row in all_rows(tmp_path, block_rows)] == want
    found = found_at(tmp_path)
    assert [i for batch in ids(found) for i in batch] == want


@pytest.mark.parametrize(
    "values",
    [
        [3, 1, 2],
        pa.array([3, 1, 2], pa.uint8()),
        pa.array(["3", "1", "2"], pa.large_string()),
        pa.array(["3", "1", "2"]).dictionary_encode(),
    ],
    ids=["int64", "uint8", "large_string", "dictionary"],
)
def test_ids_become_text_in_the_order_of_the_rows(tmp_path: Path, values: Any) -> None:
    write(tmp_path / "x.parquet", id=values, image=[b"", b"", b""])
    found = found_at(tmp_path)
    assert [row["id"] for row in all_rows(tmp_path)] == ["3", "1", "2"]
    assert np.array_equal(check_ids(found), np.sort(hash_ids(["1", "2", "3"])))


def test_user_columns_pass_through_with_nested_and_null_values(tmp_path: Path) -> None:
    more = {
        "caption": pa.array(["x", None, "z"]),
        "tags": pa.array([["a", None], None, []], pa.list_(pa.string())),
        "box": pa.array([{"left": 1, "deep": {"er": [1.5]}}, None, {"left": None, "deep": None}]),
        "when": pa.array([0, None, 2], pa.timestamp("us", "UTC")),
        "nothing": pa.nulls(3),
    }
    write_rows(tmp_path / "x.parquet", ["a", "b", "c"], groups=2, **more)
    found = found_at(tmp_path)
    assert found.user_columns.names == list(more)
    got = pa.concat_tables(read_block(found, block) for block in plan_blocks(found, 2))
    for name, column in more.items():
        assert got[name].type == column.type
        assert got[name].to_pylist() == column.to_pylist()


def test_metadata_that_differs_between_files_does_not_matter(tmp_path: Path) -> None:
    for i in range(2):
        table = pa.table({"id": [str(i)], "image": [b"x"]}).replace_schema_metadata({"pandas": str(i)})
        pq.write_table(table, tmp_path / f"{i}.parquet")
    assert [row["id"] for row in all_rows(tmp_path, 10)] == ["0", "1"]


def layouts() -> list[list[list[int]]]:
    """Rows of the row groups of the files of many datasets."""
    rng = np.random.default_rng(0)
    some = [[[1]], [[3, 3, 1], [5]], [[10], [10], [10]], [[1] * 7, [2] * 3], [[0], [4], [0, 0]]]
    return some + [[rng.integers(0, 6, rng.integers(1, 5)).tolist() for _ in range(rng.integers(1, 5))] for _ in range(12)]


def write_layout(root: Path, layout: list[list[int]]) -> list[str]:
    names: list[str] = []
    columns = pa.schema([("id", pa.string()), ("image", pa.binary())])
    root.mkdir()
    for number, groups in enumerate(layout):
        with pq.ParquetWriter(root / f"{number}.parquet", columns) as writer:
            for rows in groups:
                new = [f"row {len(names) + i}" for i in range(rows)]
                names += new
                writer.write_table(pa.table({"id": new, "image": [n.encode() for n in new]}, schema=columns), row_group_size=10**6)
    return names


@pytest.mark.parametrize("limit", [None, 1, 7])
def test_blocks_hold_every_row_once_and_in_order_and_open_no_row_group_twice(tmp_path: Path, limit: int | None) -> None:
    for case, layout in enumerate(layouts()):
        root = tmp_path / str(case)
        names = write_layout(root, layout)[:limit]
        if not names:
            continue
        found = found_at(root, limit=limit)
        assert found.rows == len(names)
        for block_rows in (1, 2, 4, 1000):
            blocks = plan_blocks(found, block_rows)
            rows = [row for block in blocks for row in read_block(found, block).to_pylist()]
            assert [row["id"] for row in rows] == names
            assert [row["image"]["bytes"] for row in rows] == [n.encode() for n in names]
            assert [row[schema.ROW] for row in rows] == list(range(len(names)))
            assert [row[schema.BLOCK] for row in rows] == [block.start for block in blocks for _ in range(block.rows)]
            assert all(high.start == low.start + low.rows for low, high in pairwise(blocks))
            assert all(block.rows >= block_rows for block in blocks[:-1])
            opened = Counter((f, g) for b in blocks for f, groups in zip(b.files, b.groups or (), strict=True) for g in groups)
            assert set(opened.values()) == {1}
            assert [i for batch in ids(found) for i in batch] == names


def test_the_limit_keeps_the_first_rows_and_opens_no_file_beyond_them(save_pictures: SavePictures) -> None:
    root = save_pictures(*(f"{i}.png" for i in range(7)))
    found = found_at(root, limit=5)
    blocks = plan_blocks(found, 2)
    assert [row["id"] for row in all_rows(root, limit=5)] == [f"{i}.png" for i in range(5)]
    assert [len(block.files) for block in blocks] == [2, 2, 1]
    assert found_at(root, limit=99).rows == 7


def write_latents(file: Path, names: list[str], **about: Any) -> Path:
    columns = schema.latents_schema(pa.schema([("caption", pa.string())]), 4, about)
    values = [np.full((3, 4, 4), i, np.float16) if i else None for i in range(len(names))]
    images = [{"bytes": b"x", "path": None}] * len(names)
    errors = [None if v is not None else "bad" for v in values]
    arrays = [names, images, ["c"] * len(names), latents_to_arrow(values, 4), errors]
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(arrays, schema=columns), file)
    return file


def test_a_latents_table_is_known_for_one_and_read_with_latents_and_rejects(tmp_path: Path) -> None:
    write_latents(tmp_path / "x.parquet", ["a", "b"], domain="tiny")
    found = found_at(tmp_path)
    assert found.has_latents
    assert found.user_columns.names == ["caption"]
    (table,) = (read_block(found, block) for block in plan_blocks(found, 10))
    assert table["latent"].to_pylist() == [None, [1.0] * 48]
    assert table["error"].to_pylist() == ["bad", None]


def test_a_column_that_happens_to_be_called_latent_is_the_users_own(tmp_path: Path) -> None:
    write_rows(tmp_path / "x.parquet", ["a"], latent=[1], error=["none"])
    found = found_at(tmp_path)
    assert not found.has_latents
    assert found.user_columns.names == ["latent", "error"]


# ---- requests that cannot be met -------------------------------------------------------------------------------------


def test_latents_of_two_runs_are_not_taken_for_one(tmp_path: Path) -> None:
    write_latents(tmp_path / "one" / "x.parquet", ["a"], domain_fingerprint="1")
    write_latents(tmp_path / "two" / "x.parquet", ["b"], domain_fingerprint="2")
    assert "two/x.parquet was made by another run than" in problems_of(tmp_path)


def test_an_address_with_nothing_there_says_so(tmp_path: Path) -> None:
    assert "there is nothing at" in problems_of(tmp_path / "missing")
    assert "give Parquet, tar or picture files, or a folder of one kind of them" in problems_of(tmp_path / "missing")
    assert problems_of(tmp_path).startswith(f"{tmp_path} is empty; expected are .parquet files, .tar files or pictures")
    (tmp_path / "notes.txt").touch()
    assert "holds no input; expected are" in problems_of(tmp_path)
    assert "holds no input; expected are" in problems_of(tmp_path / "notes.txt")
    assert problems_of("") == "the address of the input is empty"
    assert "cannot be opened: Protocol not known: nosuch" in problems_of("nosuch://bucket/faces")


def test_a_folder_of_both_kinds_is_refused(save_pictures: SavePictures) -> None:
    root = save_pictures("a.png", "b.png")
    write_rows(root / "x.parquet", ["a"])
    assert "holds 1 Parquet files and 2 pictures; give a folder with one kind" in problems_of(root)


def test_tables_without_rows_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "x.parquet", id=pa.array([], pa.string()), image=pa.array([], pa.binary()))
    assert problems_of(tmp_path) == f"{tmp_path} has no rows"


def test_a_missing_image_column_is_answered_with_those_there_are(tmp_path: Path) -> None:
    write(tmp_path / "x.parquet", id=["a"], photo=[b"1"], caption=["c"])
    assert problems_of(tmp_path) == f"{tmp_path} has no column 'image'; it has id, photo, caption; image columns are: photo"


def test_a_missing_id_column_that_was_asked_for_is_not_made_up(tmp_path: Path) -> None:
    write_rows(tmp_path / "x.parquet", ["a"])
    assert problems_of(tmp_path, id_column="key") == f"{tmp_path} has no column 'key'; it has id, image"


def test_columns_of_unusable_types_are_refused_all_at_once(tmp_path: Path) -> None:
    write(tmp_path / "x.parquet", id=[["a"]], image=["a.png"])
    assert problems_of(tmp_path).splitlines() == [
        f"column 'id' of {tmp_path} must be text or whole numbers; it is list<element: string>",
        f"column 'image' of {tmp_path} must be binary or struct{{bytes, path}}; it is string",
    ]
    assert "column 'image' of" in problems_of(write(tmp_path / "y.parquet", image=[b"x"]), id_column="image")


@pytest.mark.parametrize("values", [[1.5], [b"a"], [{"a": 1}], [True]], ids=["float", "binary", "struct", "bool"])
def test_ids_that_are_neither_text_nor_numbers_are_refused(tmp_path: Path, values: list[Any]) -> None:
    write(tmp_path / "x.parquet", id=values, image=[b"x"])
    assert "must be text or whole numbers" in problems_of(tmp_path)


def test_a_column_name_that_stands_twice_is_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array([b"1"]), pa.array([1]), pa.array([2])], names=["id", "image", "x", "x"])
    pq.write_table(table, tmp_path / "x.parquet")
    assert "has more than one column named 'x'" in problems_of(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_a_damaged_parquet_file_is_named_and_every_one_of_them(tmp_path: Path, damage: str) -> None:
    write_rows(tmp_path / "good.parquet", ["a"])
    data = (tmp_path / "good.parquet").read_bytes()
    bad = {"truncated": data[: len(data) // 2], "empty": b"", "text": b"id,image\n1,2\n" * 99}[damage]
    for name in ("bad.parquet", "worse.parquet"):
        (tmp_path / name).write_bytes(bad)
    lines = problems_of(tmp_path).splitlines()
    assert [line.split(" is not a readable Parquet file: ")[0] for line in lines] == [
        str(tmp_path / n) for n in ("bad.parquet", "worse.parquet")
    ]


def test_files_with_other_columns_or_types_are_named(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.parquet", ["a"])
    write_rows(tmp_path / "b.parquet", ["b"], caption=["c"])
    write_rows(tmp_path / "c.parquet", [3])
    lines = problems_of(tmp_path).splitlines()
    assert [line.split(" has other columns or types than ")[0] for line in lines] == [str(tmp_path / n) for n in ("b.parquet", "c.parquet")]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_file_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")).touch()
    assert "the names of 1 pictures in" in problems_of(tmp_path)


def test_an_address_in_a_message_has_no_credentials(web: Web) -> None:
    (web.folder / "broken.parquet").write_bytes(b"PAR1 and no more")
    there = web.url.replace("http://", "http://me:hunter2@")
    for name, says in (
        ("none.parquet?X-Amz-Signature=hunter2", "there is nothing at"),
        ("broken.parquet", "is not a readable Parquet file"),
    ):
        told = problems_of(f"{there}/{name}")
        assert says in told
        assert "hunter2" not in told
    with pytest.raises(ConfigError, match=f"{web.url}/broken.parquet cannot be read") as caught:
        metadata_at(f"{there}/broken.parquet")
    assert "hunter2" not in str(caught.value)
