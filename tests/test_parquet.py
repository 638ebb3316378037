"""What would be lost: no file takes more memory than allowed, no byte is fetched in vain, folders named key=value are columns."""

import io
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3fs import S3FileSystem
from servers import ROOT
from test_sources import all_rows, found_at, problems_of, write, write_rows

from pipeline.config import Source
from pipeline.ids import check_ids, ids
from pipeline.parquet import partition_of
from pipeline.sources import block_problems, find, plan_blocks, read_block

# ---- folders named key=value -----------------------------------------------------------------------------------------


def test_partitioned_tables_have_their_folders_names_as_columns(tmp_path: Path) -> None:
    for split, year, names in (("train", "2020", ["a", "b"]), ("a b", "2021", ["c"]), ("__HIVE_DEFAULT_PARTITION__", "2021", ["d"])):
        write_rows(tmp_path / f"split={split.replace(' ', '%20')}" / f"year={year}" / "x.parquet", names)
    rows = {row["id"]: (row["split"], row["year"]) for row in all_rows(tmp_path)}
    assert rows == {"a": ("train", 2020), "b": ("train", 2020), "c": ("a b", 2021), "d": (None, 2021)}
    found = found_at(tmp_path)
    assert (found.user_columns.field("split").type, found.user_columns.field("year").type) == (pa.string(), pa.int64())


def test_what_pyarrow_partitioned_is_read_as_pyarrow_reads_it(tmp_path: Path) -> None:
    table = pa.table({"id": [str(i) for i in range(9)], "image": [b"x"] * 9, "label": [0, 1, 2] * 3, "name": ["a=b", "ü/", "007"] * 3})
    pq.write_to_dataset(table, tmp_path, partition_cols=["name", "label"])
    want = {row["id"]: (row["label"], row["name"]) for row in table.to_pylist()}
    assert {row["id"]: (row["label"], row["name"]) for row in all_rows(tmp_path)} == want


def test_a_column_in_the_files_counts_and_not_the_folders_name(tmp_path: Path) -> None:
    write_rows(tmp_path / "label=9" / "x.parquet", ["a"], label=[1])
    assert [row["label"] for row in all_rows(tmp_path)] == [1]


def test_folders_that_do_not_agree_are_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "split=a" / "x.parquet", ["a"])
    write_rows(tmp_path / "x.parquet", ["b"])
    assert "partitioned in more than one way: some files lie in folders named split=..., others in without a =" in problems_of(tmp_path)


def test_a_file_name_is_no_partition() -> None:
    assert partition_of("a=1/deep/b=x%2Fy/c=3.parquet") == {"a": "1", "b": "x/y"}


# ---- columns and conditions ------------------------------------------------------------------------------------------


def test_only_the_columns_that_were_asked_for_pass_through(tmp_path: Path) -> None:
    write_rows(tmp_path / "split=x" / "a.parquet", ["a"], caption=["c"], tags=[["t"]])
    assert found_at(tmp_path).user_columns.names == ["caption", "tags", "split"]
    for asked, kept in (((), []), (("tags", "id"), ["tags"]), (("split",), ["split"])):
        assert found_at(tmp_path, columns=asked).user_columns.names == kept
        assert list(all_rows(tmp_path, columns=asked)[0])[4:] == kept  # after row, block, id and image
    assert "has no column 'nope' to keep; it has id, image, caption, tags, split" in problems_of(tmp_path, columns=("nope",))


def write_ages(root: Path) -> dict[str, int]:
    """Three files with four row groups of five rows; ages rise through each file. Id -> age."""
    ages = {f"{file}-{i}": i for file in "abc" for i in range(20)}
    for file in "abc":
        write_rows(root / f"split={file}" / "x.parquet", [n for n in ages if n[0] == file], groups=5, age=list(range(20)))
    return ages


@pytest.mark.parametrize("where", ["age >= 13", "split == 'b' and age < 7", "split != 'a' and (age == 3 or age == 19)", "age < 100"])
@pytest.mark.parametrize("limit", [None, 4])
def test_rows_are_those_of_the_condition_whatever_the_blocks(tmp_path: Path, where: str, limit: int | None) -> None:
    ages = write_ages(tmp_path)
    want = [name for name, age in ages.items() if eval(where, {"age": age, "split": name[0]})][:limit]
    for block_rows in (1, 6, 100):
        rows = all_rows(tmp_path, block_rows, where=where, limit=limit, columns=("split",))
        assert [row["id"] for row in rows] == want
        assert all(row["image"]["bytes"] == f"bytes of {row['id']}".encode() and "age" not in row for row in rows)
        assert [row["__row__"] for row in rows] == list(range(len(want)))
    found = found_at(tmp_path, where=where, limit=limit)
    assert (found.rows, [i for names in ids(found) for i in names]) == (len(want), want)
    assert len(check_ids(found)) == len(want)


def test_ids_made_of_file_and_row_do_not_depend_on_the_condition(tmp_path: Path) -> None:
    write(tmp_path / "x.parquet", groups=2, image=[b"%d" % i for i in range(6)], n=list(range(6)))
    assert [row["id"] for row in all_rows(tmp_path, where="n in (1, 4)")] == ["x.parquet#1", "x.parquet#4"]


def test_files_and_row_groups_that_cannot_match_are_not_read(tmp_path: Path) -> None:
    write_ages(tmp_path)
    found = found_at(tmp_path, where="split == 'b' and age >= 17")
    assert [Path(file).parent.name for file in found.files] == ["split=b"]
    assert found.counts == ((0, 0, 0, 3),)
    assert [block.groups for block in plan_blocks(found, 100)] == [((3,),)]
    (tmp_path / "split=c" / "x.parquet").write_bytes(b"not even Parquet")
    assert found_at(tmp_path, where="split == 'b'").rows == 20


def test_a_condition_that_no_row_meets_or_that_is_none_is_refused(tmp_path: Path) -> None:
    write_ages(tmp_path)
    assert problems_of(tmp_path, where="age > 99").endswith("has no rows with age > 99")
    assert problems_of(tmp_path, where="split == 'z'").endswith("has no rows with split == 'z'")
    assert "there is no column 'old'" in problems_of(tmp_path, where="old > 3")


# ---- bombs -----------------------------------------------------------------------------------------------------------


BOMB = """
import resource, sys
from pipeline.config import Source
from pipeline.parquet import TooLargeError
from pipeline.ids import check_ids
from pipeline.sources import find, plan_blocks, read_block

found = find(Source(path=sys.argv[1], max_block_bytes=2**26))
(block,) = plan_blocks(found, 64)
check_ids(found)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_block(found, block)
except TooLargeError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_a_small_file_that_decodes_to_gigabytes_is_refused_within_the_memory_allowed(tmp_path: Path) -> None:
    columns = pa.schema([("id", pa.int32()), ("image", pa.dictionary(pa.int32(), pa.binary()))])
    file, rows = tmp_path / "bomb.parquet", 3000
    image = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array([b"\0" * 2**20]))
    table = pa.table([pa.array(np.arange(rows, dtype=np.int32)), image], schema=columns)
    pq.write_table(table, file, compression="zstd", store_schema=False)
    assert file.stat().st_size < 30_000
    done = subprocess.run([sys.executable, "-c", BOMB, str(file)], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    message, grown = done.stdout.splitlines()
    assert message.startswith("rows of the input decode to more than 64 MiB, though their file says less")
    assert int(grown) < 400  # MiB; the whole is 3000


def test_what_the_footer_says_is_too_large_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    write_rows(tmp_path / "x.parquet", ["a", "b"], big=pa.array([[0] * 3_000_000, []], pa.list_(pa.int64())))
    assert (tmp_path / "x.parquet").stat().st_size < 20_000  # so many equal numbers are written as one
    said = problems_of(tmp_path, max_block_bytes=2**24)
    assert "row group 0 of" in said
    assert "decodes to 22.89 MiB; --max-block-bytes allows 16 MiB: write smaller row groups, leave columns out with --columns" in said
    assert found_at(tmp_path, max_block_bytes=2**24, columns=()).rows == 2


def test_row_groups_with_absurdly_many_rows_are_refused(tmp_path: Path) -> None:
    rows = 2**20 + 1
    table = pa.table({"image": pa.nulls(rows, pa.binary())})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=rows)
    assert "has 1048577 rows; at most 1048576 are read together: write smaller row groups" in problems_of(tmp_path)


def test_blocks_of_many_row_groups_that_are_too_large_together_are_counted(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    write(tmp_path / "x.parquet", groups=1, image=[rng.bytes(400_000) for _ in range(8)])
    found = found_at(tmp_path, max_block_bytes=2**20)
    assert block_problems(found, plan_blocks(found, 2)) == []
    (said,) = block_problems(found, plan_blocks(found, 4))
    assert "2 of 2 blocks of" in said
    assert "the first, of 4 rows from row 0, 1.526 MiB; lower --block-rows, or allow more with --max-block-bytes" in said


# ---- requests to a store ---------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the client of the store asked for what, and ``bytes`` that it got: the real client, counted."""
    counts, real = Counter[str](), S3FileSystem._call_s3

    async def counted(self: Any, method: str, *arguments: Any, **options: Any) -> Any:
        counts[method] += 1
        answer = await real(self, method, *arguments, **options)
        counts["bytes"] += answer.get("ContentLength", 0) if method == "get_object" else 0
        return answer

    monkeypatch.setattr(S3FileSystem, "_call_s3", counted)
    return counts


def test_a_bucket_is_asked_once_a_file_for_its_footer_and_once_a_row_group_for_its_ids(s3: str, asked: Counter[str]) -> None:
    rng, store, files, groups = np.random.default_rng(0), fsspec.filesystem("s3"), 6, 3
    for i in range(files):
        stream = io.BytesIO()
        table = pa.table({"id": [f"{i}-{k}" for k in range(12)], "image": [rng.bytes(100_000) for _ in range(12)]})
        pq.write_table(table, stream, row_group_size=4)
        store.pipe_file(f"{s3}/requests/{i}.parquet", stream.getvalue())
    store.invalidate_cache()
    asked.clear()
    found = find(Source(path=f"{s3}/requests"))
    assert asked["get_object"] <= files + 1
    assert asked.total() - asked["bytes"] <= files + 6
    asked.clear()
    assert len(check_ids(found)) == 12 * files
    assert asked["get_object"] <= files * (1 + groups)
    assert asked["head_object"] == 0
    assert asked["bytes"] < files * 70_000  # of 1.2 MB each
    asked.clear()
    read_block(found, plan_blocks(found, 4)[2])
    assert asked["get_object"] <= 2
    assert asked["bytes"] < 600_000
