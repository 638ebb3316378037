"""What would be lost: figures of a run that are right, and a look at its rows that does not read all of them."""

import json
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import schema, summary, worker
from pipeline.config import ConfigError
from pipeline.manifest import RECORD
from pipeline.summary import edit_folders, locate, open_edits, rows_at, spread, summarise, wanted_values

FACTORS = ("glasses", "hat", "skin")


def reading(glasses: str, hat: str, skin: str = "pale") -> dict[str, str]:
    return dict(zip(FACTORS, (glasses, hat, skin), strict=True))


def write_edits(
    folder: Path, rows: list[dict[str, Any]], parts: tuple[str, ...] = ("glasses",), degree: float = 1.0, per_file: int = 64
) -> Path:
    """An edits dataset as a run writes it; rows give what differs from a good row without pictures."""
    about = {"domain": "pixelface", "family": "pixelface", "edit": [{"name": p, "weight": 1 / len(parts)} for p in parts], "degree": degree}
    columns = schema.edits_schema(pa.schema([("note", pa.string())]), FACTORS, about)
    named = {"attribute": "_and_".join(parts) or "none", "degree": degree}
    table = pa.Table.from_pylist([{"id": f"row-{i}", **named, **row} for i, row in enumerate(rows)], columns)
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, max(1, len(rows)), per_file):
        worker.write_file(str(folder), f"part-{start:012d}.parquet", table.slice(start, per_file))
    return folder


def test_figures_are_those_worked_out_by_hand(tmp_path: Path) -> None:
    rows = [
        {"mae": 0.1, "ssim": 0.5, "clip_direction": 0.2, "factors_before": reading("no", "no"), "factors_after": reading("yes", "no")},
        {"mae": 0.3, "ssim": 0.7, "clip_direction": 0.4, "factors_before": reading("no", "yes"), "factors_after": reading("no", "no")},
        {
            "mae": 0.2,
            "ssim": 0.6,
            "clip_direction": 0.0,
            "factors_before": reading("yes", "no"),
            "factors_after": reading("yes", "no", "dark"),
        },
        {"error": "the image is null"},
    ]
    folder = write_edits(tmp_path / "glasses", rows, per_file=2)
    (folder / RECORD).write_text(json.dumps({"model_calls_per_image": 20, "seconds": 7.5}))
    found = summarise(str(folder))
    assert (found.rows, found.edited, found.rejected) == (4, 3, 1)
    assert (found.mae, found.ssim, found.clip_direction) == pytest.approx((0.2, 0.6, 0.2))
    assert (found.changeable, found.success) == (2, 0.5)  # the third row had glasses before
    assert found.kept == pytest.approx(4 / 6)  # one hat lost, one skin changed
    assert (found.model_calls, found.seconds) == (20, 7.5)
    assert found.reasons == {"the image is null": 1}
    assert found.rejects == (("row-3", "the image is null"),)


def test_a_mix_succeeds_only_where_all_that_was_asked_for_is_there(tmp_path: Path) -> None:
    befores = [reading("no", "no"), reading("no", "yes"), reading("yes", "yes"), reading("no", "no")]
    afters = [reading("yes", "no"), reading("yes", "yes"), reading("no", "no"), reading("yes", "yes")]
    rows = [{"factors_before": b, "factors_after": a} for b, a in zip(befores, afters, strict=True)]
    found = summarise(str(write_edits(tmp_path / "mix", rows, parts=("glasses", "hat"))))
    assert (found.attribute, found.parts) == ("glasses_and_hat", ("glasses", "hat"))
    assert (found.changeable, found.success) == (3, pytest.approx(2 / 3))
    assert found.kept == 1.0  # skin alone


def test_a_reconstruction_has_nothing_to_succeed_in_but_all_to_keep(tmp_path: Path) -> None:
    rows = [{"mae": 0.0, "factors_before": reading("no", "no"), "factors_after": reading("yes", "no")}]
    found = summarise(str(write_edits(tmp_path / "none", rows, parts=())))
    assert (found.attribute, found.success, found.clip_direction) == ("none", None, None)
    assert found.kept == pytest.approx(2 / 3)


def test_a_dataset_of_rejects_alone_has_no_means(tmp_path: Path) -> None:
    found = summarise(str(write_edits(tmp_path / "bad", [{"error": "broken"}] * 3)))
    assert (found.edited, found.mae, found.success, found.kept) == (0, None, None, None)


def test_wanted_values_are_unknown_for_own_attributes_and_unclear_for_contradictions() -> None:
    assert wanted_values("pixelface", [], 1) == {}
    assert wanted_values("pixelface", [{"name": "my_own"}], 1) is None
    assert wanted_values("pixelface", [{"name": "sad"}, {"name": "smiling"}], 1) == {"mouth": None}
    assert wanted_values("pixelface", [{"name": "hat", "weight": 1}], -1) == {"hat": None}
    assert wanted_values("pixelface", [{"name": "hat", "weight": 1}], 0.5) == {"hat": "yes"}


def test_endlessly_different_reasons_do_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summary, "MAX_REASONS", 10)
    found = summarise(str(write_edits(tmp_path / "bad", [{"error": f"broken at byte {i}"} for i in range(120)])))
    assert found.rejected == 120
    assert found.reasons[summary.OTHER] == 110
    assert len(found.rejects) == summary.MAX_REJECTS


def test_figures_are_taken_without_reading_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_edits(tmp_path / "glasses", [{"mae": 0.5, "image": {"bytes": b"x" * 100}}] * 10)
    asked: list[str] = []
    stream = summary.batches
    monkeypatch.setattr(summary, "batches", lambda found, columns: asked.extend(columns) or stream(found, columns))
    assert summarise(str(folder)).mae == 0.5
    assert "mae" in asked
    assert not {"image", "edited"} & set(asked)


@pytest.mark.parametrize(("total", "count"), [(1_000_000, 24), (7, 3), (3, 24), (1, 1), (0, 5)])
def test_sampled_positions_are_spread_over_all_rows(total: int, count: int) -> None:
    places = spread(total, count)
    assert places == spread(total, count)
    assert len(set(places)) == len(places) == min(total, count)
    gaps = [b - a for a, b in zip([0, *places], [*places, total], strict=True)]
    assert max(gaps) <= max(1, 2 * total // max(1, count))


def test_rows_are_found_by_position_and_by_id_reading_only_their_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = open_edits(str(write_edits(tmp_path / "glasses", [{"note": str(i)} for i in range(700)], per_file=250)))
    read: list[int] = []
    plain = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda self, g, **kw: read.append(g) or plain(self, g, **kw))
    rows = rows_at(found, [699, 0, 249, 250], ["id", "note"])
    assert rows == {i: {"id": f"row-{i}", "note": str(i)} for i in (0, 249, 250, 699)}
    assert read == [0, 2, 0, 1]  # of 8 row groups
    assert locate(found, ["row-500", "row-1", "elsewhere"]) == {"row-500": 500, "row-1": 1}


def test_a_folder_of_a_run_holds_one_dataset_an_edit(tmp_path: Path) -> None:
    for name in ("none", "glasses", "_hidden"):
        write_edits(tmp_path / "run" / name, [{}])
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "run" / "glasses" / "_other.parquet")
    (tmp_path / "run" / "foreign").mkdir()
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "run" / "foreign" / "part.parquet")
    assert edit_folders(f"{tmp_path}/run/") == [f"{tmp_path}/run/glasses", f"{tmp_path}/run/none"]
    assert edit_folders(f"{tmp_path}/run/none") == [f"{tmp_path}/run/none"]


def test_what_is_no_edits_dataset_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no folder"):
        edit_folders(f"{tmp_path}/nowhere")
    with pytest.raises(ConfigError, match="holds no edits dataset"):
        edit_folders(str(tmp_path))
    (tmp_path / "part.parquet").write_bytes(b"not parquet")
    with pytest.raises(ConfigError, match="not a readable Parquet file"):
        edit_folders(str(tmp_path))
    with pytest.raises(ConfigError, match="is a file"):
        edit_folders(f"{tmp_path}/part.parquet")
    with pytest.raises(ConfigError, match="cannot be opened"):
        edit_folders("nosuchstore://bucket/x")


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    folder = write_edits(tmp_path / "none", [{}])
    (folder / RECORD).write_text("{")
    with pytest.raises(ConfigError, match=r"_run\.json is damaged"):
        summarise(str(folder))


def test_the_record_of_a_run_that_has_not_finished_is_none(tmp_path: Path) -> None:
    folder = write_edits(tmp_path / "none", [{}])
    (folder / RECORD).write_text(json.dumps({"state": "running", "seconds": 1.0}))
    assert summarise(str(folder)).record == {}
    assert summarise(str(folder)).seconds is None


def test_a_dataset_in_an_object_store_is_read_like_one_on_disk(tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    store.put(str(write_edits(tmp_path / "hat", [{"mae": 0.25}] * 3, parts=("hat",))), "/bucket/run/hat", recursive=True)
    (folder,) = edit_folders("memory://bucket/run")
    assert summarise(folder).mae == 0.25
    assert rows_at(open_edits(folder), [2], ["id"]) == {2: {"id": "row-2"}}
