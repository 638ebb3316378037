"""What would be lost: every row has an id of its own, known before the first model call, or the request is refused with examples."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_sources import found_at, write, write_rows

from pipeline.config import ConfigError
from pipeline.ids import check_ids, hash_ids


def checked(path: Path, **options: Any) -> np.ndarray:
    return check_ids(found_at(path, **options))


def test_ids_that_stand_twice_are_refused_with_examples_across_blocks_and_files(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.parquet", ["a", "b", "c", "a"], groups=1)
    write_rows(tmp_path / "b.parquet", ["d", "a", "c"], groups=1)
    with pytest.raises(ConfigError, match=r"ids must be unique, but column 'id' has 'a' \(3 times\), 'c' \(2 times\)$"):
        checked(tmp_path)


def test_numbers_that_read_alike_are_one_id(tmp_path: Path) -> None:
    write_rows(tmp_path / "x.parquet", [7, 8, 7])
    with pytest.raises(ConfigError, match=r"'7' \(2 times\)"):
        checked(tmp_path)


@pytest.mark.parametrize("names", [["a", None], [None, None, "a"]])
def test_null_ids_are_refused_with_their_number(tmp_path: Path, names: list[str | None]) -> None:
    write(tmp_path / "x.parquet", id=names, image=[b"x"] * len(names))
    with pytest.raises(ConfigError, match=f"column 'id' has {names.count(None)} null ids; every row needs its own"):
        checked(tmp_path)


def test_an_id_beyond_the_limit_is_nobodys_business(tmp_path: Path) -> None:
    write_rows(tmp_path / "x.parquet", ["a", "b", "a"])
    assert len(checked(tmp_path, limit=2)) == 2
    with pytest.raises(ConfigError):
        checked(tmp_path)


def test_the_hashes_of_ids_tell_sets_apart_and_not_orders(tmp_path: Path) -> None:
    one, other, third = (write_rows(tmp_path / name / "x.parquet", ids) for name, ids in (("1", "abc"), ("2", "cab"), ("3", "abd")))
    assert checked(one).dtype == np.uint64
    assert np.array_equal(checked(one), checked(other))
    assert not np.array_equal(checked(one), checked(third))
    assert len(set(hash_ids([None, "None", ""]).tolist())) == 3


def test_how_far_the_check_is_is_told_in_rows(tmp_path: Path) -> None:
    for i in range(3):
        write_rows(tmp_path / f"{i}.parquet", [f"{i}-{k}" for k in range(4)])
    told: list[int] = []
    check_ids(found_at(tmp_path, limit=10), told.append)
    assert told == [4, 8, 10]
