"""What would be lost: --where keeps exactly the rows that it says, and is never a way to run code."""

from decimal import Decimal

import pyarrow as pa
import pytest

from pipeline.config import ConfigError
from pipeline.filters import condition

ROWS = pa.table(
    {
        "row": [0, 1, 2, 3],
        "age": [1, 2, None, 40],
        "split": pa.array(["a", "b", "a", None]).dictionary_encode(),
        "ok": [True, False, None, True],
        "box": [{"left": 1.5}, {"left": 2.0}, None, {"left": 9.0}],
        "when": pa.array([0, 1, 2, 3], pa.timestamp("us", "UTC")),
        "odd name": [1, 2, 3, 4],
        "price": pa.array([Decimal("1.50"), Decimal("2.00"), None, Decimal("3.00")], pa.decimal128(5, 2)),
        "day": pa.array([0, 1, 2, 3], pa.date32()),
        "share": pa.array([0.25, 0.5, 0.75, 1.0], pa.float32()),
    }
)


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("age >= 2", [1, 3]),
        ("age > 1.5", [1, 3]),
        ("age == -1", []),
        ("2 == age", [1]),
        ("1 < age < 40", [1]),
        ("not age >= 2", [0]),
        ("age != 1", [1, 3]),
        ("age is None", [2]),
        ("age is not None and ok", [0, 3]),
        ("not ok", [1]),
        ("split in ('a', 'c')", [0, 2]),
        ("split not in ['a']", [1]),
        ("split == 'b' or age == 40", [1, 3]),
        ("box.left >= 2", [1, 3]),
        ("when > '1970-01-01T00:00:00.000001Z'", [2, 3]),
        ("day == '1970-01-03'", [2]),
        ("price == 2", [1]),
        ("price > 1.5", [1, 3]),
        ("share < 0.5", [0]),
        ("col('odd name') == 4", [3]),
        ("row == age", []),
        ("row in (1, 2) and (age == 2 or age is None)", [1, 2]),
    ],
)
def test_the_rows_that_a_condition_names_are_kept_and_where_it_is_unknown_they_are_not(text: str, rows: list[int]) -> None:
    assert ROWS.filter(condition(text, ROWS.schema).expression)["row"].to_pylist() == rows


def test_the_columns_that_must_be_read_are_named_once() -> None:
    assert condition("age > 1 and box.left < 3 and age < 9", ROWS.schema).columns == ("age", "box")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("age = 3", "invalid syntax"),
        ("", "invalid syntax"),
        ("nope > 1", "there is no column 'nope'; there are row, age"),
        ("box.right > 1", "there is no 'right' in column 'box'"),
        ("age", "'age' alone is no condition, because it is int64"),
        ("age == 'x'", "'x' cannot be compared with int64"),
        ("when > 'yesterday'", "'yesterday' cannot be compared with timestamp"),
        ("age == None", "is no value to compare with"),
        ("age is 3", "after 'is' stands None"),
        ("age in row", "after 'in' stands a list"),
        ("1 == 1", "are both no columns"),
        ("age + 1 == 2", "'age + 1' is no column"),
        ("age > 99999999999999999999999", "cannot be used"),
        ("box == 1", "cannot be"),
        ("x" * 20_000, "has 20000 characters"),
        ("(" * 5000, "cannot be used"),
        ("not " * 5000 + "ok", "cannot be used"),
    ],
)
def test_what_is_no_condition_is_refused_with_what_is_allowed(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        condition(text, ROWS.schema)
    assert says in str(refused.value)
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true') == 0",
        "age == (lambda: 1)()",
        "[x for x in (1,)] == age",
        "age.__class__ == 1",
        "split > f'{age}'",
        "(age := 3) == 3",
        "col('age').cast == 1",
        "open('/etc/passwd')",
    ],
)
def test_nothing_in_a_condition_is_run(text: str) -> None:
    with pytest.raises(ConfigError):
        condition(text, ROWS.schema)
