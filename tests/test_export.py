"""What would be lost: edits become files that any program opens, and no id from the data leads out of the folder."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_end_to_end import run
from tiny import picture

from pipeline import schema
from pipeline.export import safe_name, write_picture

HOSTILE = [
    "../../up.png",
    "/etc/passwd",
    ".hidden",
    "a/../../b",
    "-rf",
    "con$(id).png",
    "line\nbreak",
    "",
    "..",
    "x" * 300,
    "nul\0byte.png",
    "a/" * 3000 + "deep",
    "x" * 5000 + "/" + "y" * 5000,
    "CON",
    "ü/ñ.jpg",
    "\\\\host\\x",
]


def encoded(seed: int, kind: str = "png") -> bytes:
    import io

    stream = io.BytesIO()
    picture(seed, 16).save(stream, kind)
    return stream.getvalue()


def table(file: Path, rows: dict[str, bytes | None]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    images = pa.array([{"bytes": data, "path": None} if data else None for data in rows.values()], schema.IMAGE)
    pq.write_table(pa.table({"id": list(rows), "image": images}), file, row_group_size=2)


@pytest.mark.parametrize("name", HOSTILE)
def test_no_id_leads_out_of_the_folder_or_hides_a_file(name: str, tmp_path: Path) -> None:
    inside = tmp_path / "deep" / "inside"
    file = write_picture(inside, name, encoded(0), set())
    assert file is not None
    assert file.resolve().is_relative_to(inside.resolve())
    assert not any(part.startswith((".", "-")) for part in file.relative_to(inside).parts)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [file]


def test_different_ids_never_share_a_file_and_plain_ones_keep_their_name() -> None:
    names = [*HOSTILE, "face/001", "face/002.png", "face:001", "face?001", "x" * 301]
    assert len({safe_name(name, ".png") for name in names}) == len(names)
    assert safe_name("face/001", ".png") == Path("face/001.png")
    assert safe_name("face/002.png", ".png") == Path("face/002.png")


def test_ids_that_differ_in_case_only_are_two_files_even_where_the_file_system_takes_them_for_one(tmp_path: Path) -> None:
    taken: set[str] = set()
    files = [write_picture(tmp_path, name, encoded(i), taken) for i, name in enumerate(["Face", "face", "FACE"])]
    assert len({str(file).lower() for file in files}) == 3
    assert [file.read_bytes() for file in files if file] == [encoded(0), encoded(1), encoded(2)]


def test_two_ids_for_one_name_are_both_written(tmp_path: Path) -> None:
    taken: set[str] = set()
    files = [write_picture(tmp_path, name, encoded(i), taken) for i, name in enumerate(["a", "a.png"])]
    assert [file.read_bytes() for file in files if file] == [encoded(0), encoded(1)]
    with pytest.raises(FileExistsError, match="two rows with the id 'a'"):
        write_picture(tmp_path, "a", encoded(2), taken) and write_picture(tmp_path, "a", encoded(3), taken)


def test_files_hold_the_very_bytes_and_rows_without_a_picture_are_counted(tmp_path: Path) -> None:
    rows = {"one": encoded(1), "two.jpg": encoded(2, "jpeg"), "none": None, "text": b"hello"}
    table(tmp_path / "in" / "part.parquet", rows)
    done = run("export", str(tmp_path / "in"), str(tmp_path / "out"))
    assert "2 pictures, 2 rows without one" in done.stdout
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == {"one.png": rows["one"], "two.jpg": rows["two.jpg"]}
    again = run("export", str(tmp_path / "in"), str(tmp_path / "out"), status=2)
    assert "is there already and is no empty folder" in again.stderr
    assert (
        "no pictures in a column 'edited'"
        in run("export", str(tmp_path / "in"), str(tmp_path / "x"), "--column", "edited", status=2).stderr
    )
