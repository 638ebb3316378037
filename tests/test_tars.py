"""What would be lost: each sample of a tar is one row under its key, a hostile tar is a message, and nothing lands on the disk."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import webdataset
from test_codec import encoded
from tiny import picture

from pipeline import schema, tars
from pipeline.config import ConfigError, Source
from pipeline.ids import check_ids
from pipeline.sources import find, plan_blocks, read_block

Members = list[tuple[str, bytes]]


def write_tar(file: Path, members: Members, change: Callable[[tarfile.TarInfo], None] = lambda info: None) -> Path:
    with tarfile.open(file, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            change(info)
            tar.addfile(info, io.BytesIO(data))
    return file


def rows_of(path: Path | str, block_rows: int = 4, **options: Any) -> list[dict[str, Any]]:
    found = find(Source(path=str(path), **options))
    assert len(check_ids(found)) == found.rows
    rows = [row for block in plan_blocks(found, block_rows) for row in read_block(found, block).to_pylist()]
    assert [row[schema.ROW] for row in rows] == list(range(found.rows))
    return rows


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(ConfigError) as refused:
        check_ids(find(Source(path=str(path), **options)))
    return str(refused.value)


@pytest.mark.parametrize("block_rows", [1, 20, 1000])
def test_tars_that_webdataset_wrote_are_read_as_webdataset_reads_them(tmp_path: Path, block_rows: int) -> None:
    for shard in range(2):
        with webdataset.TarWriter(str(tmp_path / f"faces-{shard}.tar")) as out:
            for i in range(21):
                name = f"{shard}/face{i:03}"
                out.write({"__key__": name, "png": encoded(picture(i)), "json": {"age": i}, "cls": i % 3, "txt": f"ä {i}", "npy": b"\x93N"})
    theirs = webdataset.WebDataset([str(tmp_path / f"faces-{i}.tar") for i in range(2)], shardshuffle=False)
    want = [(s["__key__"], s["png"], json.loads(s["json"]), s["txt"].decode(), s["cls"].decode(), f"{s['__key__']}.png") for s in theirs]
    rows = rows_of(tmp_path, block_rows)
    assert [(r["id"], r["image"]["bytes"], json.loads(r["json"]), r["txt"], r["cls"], r["image"]["path"]) for r in rows] == want
    assert "npy" not in rows[0]


def test_a_tar_in_a_bucket_is_read_in_place(s3: str, tmp_path: Path) -> None:
    file = write_tar(tmp_path / "x.tar", [(f"{i}.jpg", b"picture %d" % i) for i in range(40)])
    fsspec.filesystem("s3").put(str(file), f"{s3}/tars/x.tar")
    assert [row["image"]["bytes"] for row in rows_of(f"{s3}/tars")] == [b"picture %d" % i for i in range(40)]


def test_samples_without_some_members_have_nulls_and_the_limit_cuts(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("a.JPG", b"1"), ("a.txt", b"one"), ("b.txt", b"two \xff"), ("c.jpg", b"3")])
    rows = rows_of(tmp_path)
    assert [(r["id"], r["image"] and r["image"]["bytes"], r["txt"]) for r in rows] == [
        ("a", b"1", "one"),
        ("b", None, "two �"),
        ("c", b"3", None),
    ]
    assert [r["id"] for r in rows_of(tmp_path, limit=2)] == ["a", "b"]
    assert "txt" not in rows_of(tmp_path, columns=())[0]


def test_of_several_pictures_one_must_be_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("a.jpg", b"photo"), ("a.mask.png", b"mask")])
    assert "'a' in" in refusal(tmp_path)
    assert "has several pictures; say which with --image-column: jpg, mask.png" in refusal(tmp_path)
    assert [row["image"]["bytes"] for row in rows_of(tmp_path, image_column="mask.png")] == [b"mask"]
    assert "have no pictures .gif; they have jpg, mask.png" in refusal(tmp_path, image_column="gif")


def test_keys_that_stand_twice_are_refused_with_examples(tmp_path: Path) -> None:
    for name in ("1.tar", "2.tar"):
        write_tar(tmp_path / name, [("a.jpg", b"1")])
    assert "the names of files in the tars have 'a' (2 times)" in refusal(tmp_path)


def test_hostile_names_are_names_and_nothing_is_extracted(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    names = ["../../up.jpg", "/etc/passwd.jpg", "a/../../b.jpg", "x" * 300 + ".jpg", "line\nbreak.jpg"]
    write_tar(folder / "x.tar", [(name, b"1") for name in [*names, ".hidden.jpg", "._a.jpg", "none"]])
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    assert [row["id"] + ".jpg" for row in rows_of(folder)] == names
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, tarfile.GNUTYPE_SPARSE]
)
def test_links_devices_and_holes_are_left_out(tmp_path: Path, kind: bytes) -> None:
    def change(info: tarfile.TarInfo) -> None:
        if info.name == "b.jpg":
            info.type, info.linkname = kind, "/etc/passwd"

    write_tar(tmp_path / "x.tar", [("a.jpg", b"1"), ("b.jpg", b""), ("c.jpg", b"3")], change)
    assert [row["id"] for row in rows_of(tmp_path)] == ["a", "c"]


def test_a_member_that_is_too_large_is_a_reject_and_its_neighbours_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "MAX_PICTURE_BYTES", 1000)
    write_tar(tmp_path / "x.tar", [("a.jpg", b"1"), ("b.jpg", bytes(1001)), ("c.jpg", b"3")])
    rows = rows_of(tmp_path)
    assert [row["image"] and row["image"]["bytes"] for row in rows] == [b"1", None, b"3"]
    assert [row[schema.UNREAD] for row in rows] == [None, "the member .jpg has 1001 bytes; at most 1000 are read", None]


def number(info: tarfile.TarInfo, **pax: str) -> None:
    info.pax_headers = pax


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: data[:1800], "is not a readable tar"),
        (lambda data: data[:1100], "is not a readable tar"),
        (lambda data: data[:1024] + b"garbage!" * 64 + data[1536:], "what stands at byte 1024 is no header"),
        (lambda data: b"these are words" * 200, "is not a readable tar"),
        (lambda data: b"", "is not a readable tar"),
    ],
    ids=["cut in a member", "cut in a header", "garbage between", "text", "empty"],
)
def test_damage_is_named_and_never_taken_for_the_end(tmp_path: Path, damage: Callable[[bytes], bytes], says: str) -> None:
    file = write_tar(tmp_path / "x.tar", [(f"{i}.jpg", bytes([i]) * 500) for i in range(3)])
    file.write_bytes(damage(file.read_bytes()))
    assert says in refusal(tmp_path)


@pytest.mark.parametrize("size", ["-1536", "99999999999"])
def test_sizes_that_lie_neither_loop_nor_fill_the_memory(tmp_path: Path, size: str) -> None:
    write_tar(
        tmp_path / "x.tar", [("a.jpg", b"1"), ("b.jpg", b"2")], lambda info: number(info, size=size) if info.name == "b.jpg" else None
    )
    assert "is not a readable tar" in refusal(tmp_path)


def test_a_header_may_not_ask_for_much_memory(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("a.jpg", b"1")], lambda info: number(info, comment="x" * 2**21))
    assert "a header asks for too much memory" in refusal(tmp_path)


def test_an_empty_tar_has_no_rows(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [])
    assert "has no rows" in refusal(tmp_path)
    assert "chosen by --where from Parquet files only" in refusal(tmp_path, where="a == 1")
