"""What would be lost: faces upright and of the right size in the square that face models know, or a word why there is none; and the rest
of them when a run was stopped.

``astronaut.jpg`` is a part of NASA's portrait of Eileen Collins (1998, in the public domain).
"""

import io
import shutil
import sys
from collections.abc import Callable
from dataclasses import astuple, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from conftest import TinyDomain
from PIL import Image
from test_end_to_end import run
from tiny import picture

from jobs.cli import main
from models.alignment import MISSING, Landmarks, align, find_landmarks, load_landmarker, square_of
from models.weights import WeightsError
from pipeline import codec, schema
from pipeline.aligning import NO_FACE, Aligner, made_problems, make_align_plan
from pipeline.config import AlignRun, ConfigError, Resources, Run, Source
from pipeline.manifest import FINISHED, RUNNING, read_manifest, write_manifest
from pipeline.plan import make_plan, name_problems
from pipeline.resume import alignment_request, differences, file_name
from pipeline.sources import find, plan_blocks, read_block
from pipeline.standing import standings
from pipeline.worker import read

EXTRA = find_spec("dlib") is not None and find_spec("face_recognition_models") is not None
"""Whether the extra ``align`` is installed; without it, what is said is tested instead of what is found."""
PHOTO = Path(__file__).with_name("astronaut.jpg")

UPRIGHT = Landmarks(left_eye=(40, 50), right_eye=(60, 50), mouth_left=(42, 70), mouth_right=(58, 70))
"""Eyes 20 apart and 20 above the mouth: the square is 80 wide, centred two below the eyes."""


def ramp(height: int, width: int) -> np.ndarray:
    """Red says the column, green the row."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns, rows, np.zeros_like(rows)]).astype(np.uint8)


def photo(angle: float = 0.0, side: int | None = None) -> np.ndarray:
    with Image.open(PHOTO) as opened:
        image = opened.convert("RGB").rotate(angle, Image.Resampling.BICUBIC, fillcolor=(200, 200, 200))
    if side:
        image = image.resize((side, side), Image.Resampling.LANCZOS)
    return np.asarray(image).transpose(2, 0, 1)


def turned(landmarks: Landmarks, degrees: float, centre: tuple[float, float]) -> Landmarks:
    angle = np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = [tuple((turn @ (np.array(p) - centre) + centre).tolist()) for p in astuple(landmarks)]
    return Landmarks(**dict(zip(Landmarks.__dataclass_fields__, points, strict=True)))


# ---- the square ------------------------------------------------------------------------------------------------------


def test_an_upright_face_has_the_square_of_the_published_description() -> None:
    np.testing.assert_allclose(square_of(UPRIGHT), [(10, 12), (10, 92), (90, 92), (90, 12)])


def test_a_long_face_decides_the_size_where_the_eyes_are_close() -> None:
    """The greater of 4 times the distance of the eyes and 3.6 times that of eyes and mouth."""
    long = Landmarks(left_eye=(45, 50), right_eye=(55, 50), mouth_left=(46, 80), mouth_right=(54, 80))
    np.testing.assert_allclose(square_of(long), [(-4, -1), (-4, 107), (104, 107), (104, -1)])


@pytest.mark.parametrize("degrees", [-150, -30, 45, 90])
def test_the_square_turns_with_the_face(degrees: float) -> None:
    got = square_of(turned(UPRIGHT, degrees, (50, 60)))
    angle = np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    np.testing.assert_allclose(got, (square_of(UPRIGHT) - (50, 60)) @ turn.T + (50, 60))


def test_a_skewed_face_is_turned_by_eyes_and_mouth_together() -> None:
    """x is the direction of eye line minus the quarter turn of the line from mouth to eyes (Karras et al. 2018, appendix C)."""
    skewed = Landmarks(left_eye=(40, 50), right_eye=(60, 50), mouth_left=(52, 70), mouth_right=(68, 70))
    upper_left, lower_left, _, upper_right = square_of(skewed)
    np.testing.assert_allclose((upper_right - upper_left)[1] / (upper_right - upper_left)[0], -10 / (20 + 20))
    np.testing.assert_allclose(lower_left - upper_left, (10 / 40 * (upper_right - upper_left)[0], (upper_right - upper_left)[0]))


def test_landmarks_in_one_place_are_no_face() -> None:
    with pytest.raises(ValueError, match="one place"):
        square_of(Landmarks(left_eye=(1, 1), right_eye=(1, 1), mouth_left=(1, 1), mouth_right=(1, 1)))


# ---- the cut ---------------------------------------------------------------------------------------------------------


def test_a_square_on_the_pixel_grid_is_cut_without_resampling() -> None:
    source = ramp(120, 100)
    np.testing.assert_array_equal(align(source, UPRIGHT, 80), source[:, 12:92, 10:90])


@pytest.mark.parametrize("size", [16, 40, 128, 256])
def test_a_resized_face_lies_where_it_lay(size: int) -> None:
    """Pixel i of the face shows column 10 + 80 (i + 1/2) / size of the photograph, whose pixel centres lie at halves."""
    got = align(ramp(120, 100), UPRIGHT, size).astype(float)
    middle = slice(size // 8, -size // 8)
    want = 80 * (np.arange(size) + 0.5) / size - 0.5
    np.testing.assert_allclose(got[0].mean(0)[middle], (want + 10)[middle], atol=0.6)
    np.testing.assert_allclose(got[1].mean(1)[middle], (want + 12)[middle], atol=0.6)
    assert got.shape == (3, size, size)


def test_a_turned_photograph_gives_the_same_face() -> None:
    source = np.asarray(picture(3, 120))
    quarter = np.rot90(source, -1)  # clockwise: (x, y) -> (120 - y, x)
    moved = Landmarks(**{name: (120 - y, x) for name, (x, y) in zip(Landmarks.__dataclass_fields__, astuple(UPRIGHT), strict=True)})
    want, got = (align(p.transpose(2, 0, 1), m, 40).astype(int) for p, m in ((source, UPRIGHT), (quarter, moved)))
    assert np.abs(got - want).max() <= 1


def test_fine_stripes_become_grey_and_no_pattern() -> None:
    stripes = np.zeros((3, 1200, 1000), np.uint8)
    stripes[:, :, ::2] = 255
    face = align(stripes, Landmarks(**{n: (10 * x, 10 * y) for n, (x, y) in UPRIGHT.__dict__.items()}), 64)
    assert np.abs(face.astype(int) - 128).max() < 8


def test_beyond_the_edge_the_photograph_goes_on_as_in_a_mirror_and_fades() -> None:
    source = np.random.default_rng(0).integers(0, 256, (3, 120, 100), np.uint8)
    near_the_corner = Landmarks(**{name: (x - 30, y - 30) for name, (x, y) in UPRIGHT.__dict__.items()})  # its square starts at (-20, -18)
    face = align(source, near_the_corner, 80).astype(float)
    np.testing.assert_array_equal(face[:, 18:, 20:], source[:, :62, :60])
    beside, mirror = face[:, 18:, 19].ravel(), face[:, 18:, 21].ravel()
    assert np.corrcoef(beside, mirror)[0, 1] > 0.9
    assert face[:, :, :3].std() < 0.1 * source.std()
    assert abs(face[:, :, :3].mean() - source.mean()) < 10


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (30, 1)])
def test_tiny_photographs_are_no_accident(shape: tuple[int, int]) -> None:
    face = align(np.full((3, *shape), 77, np.uint8), UPRIGHT, 24)
    assert face.shape == (3, 24, 24)
    assert (face == 77).all()


# ---- finding faces ---------------------------------------------------------------------------------------------------


def test_without_the_extra_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    load_landmarker.cache_clear()
    monkeypatch.setitem(sys.modules, "dlib", None)  # as Python itself marks what must not be found
    with pytest.raises(WeightsError) as raised:
        find_landmarks(photo())
    assert str(raised.value) == MISSING
    assert "pip install 'diffusionclip-ray[align]'" in MISSING
    assert "\n" not in MISSING


def found(pixels: np.ndarray) -> Landmarks | None:
    """What is found, if the extra is installed; otherwise it must say so, and there is nothing more to see."""
    if EXTRA:
        return find_landmarks(pixels)
    with pytest.raises(WeightsError, match="diffusionclip-ray"):
        find_landmarks(pixels)
    return None


def eyes_and_mouth(landmarks: Landmarks) -> np.ndarray:
    """Middle of the eyes, middle of the mouth, and the vector from eye to eye."""
    left, right, *mouth = np.array(astuple(landmarks))
    return np.stack([(left + right) / 2, np.mean(mouth, 0), right - left])


def test_eyes_and_mouth_of_a_photograph_are_where_a_person_sees_them() -> None:
    landmarks = found(photo())
    if landmarks is not None:
        want = [(144, 102), (187, 104), (142, 141), (186, 141)]
        np.testing.assert_allclose(astuple(landmarks), want, atol=4)
    else:
        assert not EXTRA


@pytest.mark.parametrize(("angle", "side"), [(0, None), (25, None), (-20, 2000), (0, 160)])
def test_an_aligned_face_stands_level_in_the_middle_whatever_the_photograph(angle: float, side: int | None) -> None:
    pixels = photo(angle, side)
    landmarks = found(pixels)
    again = None if landmarks is None else find_landmarks(align(pixels, landmarks, 256))
    if again is None:
        assert not EXTRA
        return
    eyes, mouth, between = eyes_and_mouth(again)
    assert abs(np.rad2deg(np.arctan2(between[1], between[0]))) < 5
    np.testing.assert_allclose(eyes[0], 128, atol=8)
    assert 105 < eyes[1] < 130
    assert 165 < mouth[1] < 195


def test_a_picture_without_a_face_has_no_landmarks() -> None:
    assert found(np.asarray(picture(0, 200)).transpose(2, 0, 1)) is None


@pytest.mark.parametrize("data", [b"", b"no predictor", b"\x00" * 100])
def test_a_file_that_is_no_predictor_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "points.dat").write_bytes(data)
    with pytest.raises(WeightsError, match="points.dat is not a shape predictor" if EXTRA else "diffusionclip-ray"):
        find_landmarks(photo(), str(tmp_path / "points.dat"))


def test_a_predictor_of_other_points_is_refused() -> None:
    spec = find_spec("face_recognition_models")
    folder = Path(spec.submodule_search_locations[0], "models") if spec and spec.submodule_search_locations else Path()
    with pytest.raises(WeightsError, match="predicts 5 points" if EXTRA else "diffusionclip-ray"):
        find_landmarks(photo(), str(folder / "shape_predictor_5_face_landmarks.dat"))


# ---- the command -----------------------------------------------------------------------------------------------------

NAMES = ("wide", "lying", "blur", "broken", "absent")


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def photographs(file: Path) -> Path:
    """A face at the edge of a wide picture, that picture lying on its side with EXIF to say so, no face, and no picture; by twos."""
    wide = Image.new("RGB", (800, 320), (90, 120, 90))
    wide.paste(Image.open(PHOTO), (0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # the viewer has to turn it clockwise
    lying = encoded(wide.rotate(90, expand=True), "JPEG", quality=95, exif=exif)
    images = [encoded(wide), lying, encoded(picture(0, 200)), b"no picture", None]
    table = pa.table({"id": NAMES, "image": pa.array(images, pa.binary()), "caption": [f"a {n} one" for n in NAMES]})
    pq.write_table(table, file, row_group_size=2)
    return file


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photographs(tmp_path_factory.mktemp("source") / "photos.parquet")


Said = Callable[..., tuple[str, str]]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Said:
    """``said("status", ..., status=0)``: the words that a command prints, and its errors, where it starts no Ray."""

    def typed(*words: str, status: int = 0) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["diffusionclip", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        out, errors = capsys.readouterr()
        assert ended.value.code == status, out + errors
        return " ".join(out.split()), errors

    return typed


def command(source: Path, out: Path, *more: str) -> list[str]:
    return ["align", str(source), str(out), "--size", "128", "--block-rows", "2", "--workers", "1", *more]


def asked(source: Path, out: Path, **changes: Any) -> AlignRun:
    """What ``command`` asks for."""
    resources = Resources(batch=1, block_rows=2, workers=1)
    return replace(AlignRun(source=Source(path=str(source)), output=str(out), size=128, resources=resources), **changes)


@pytest.fixture(scope="module")
def aligned(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """The faces of a run that was not stopped; without the extra there are none, which the command must say."""
    out = tmp_path_factory.mktemp("whole") / "aligned"
    done = run(*command(source, out), status=3 if EXTRA else 2)
    if not EXTRA:
        assert done.stderr.strip() == f"error: {MISSING}"
        assert list(out.glob("*")) == []
        return None
    assert "3 of 5 rows were rejected, more than --max-reject-rate 0.1 allows" in done.stderr
    assert "the reasons are in the column align_error" in done.stderr
    assert "5 rows in, 2 written, 3 rejected align took" in " ".join(done.stdout.split())
    return out


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    rows = pq.read_table(folder).to_pylist()
    assert [row["id"] for row in rows] == list(NAMES), "each row once"
    return {row["id"]: row for row in rows}


def test_the_command_writes_faces_and_keeps_every_row_with_the_reason_why_it_has_none(aligned: Path | None) -> None:
    if aligned is None:
        return
    assert pq.read_table(aligned).column_names == ["id", "image", "caption", "align_error"]
    rows = rows_of(aligned)
    assert {name: row["caption"] for name, row in rows.items()} == {name: f"a {name} one" for name in NAMES}
    assert {name for name, row in rows.items() if row["align_error"] is None} == {"wide", "lying"}
    assert rows["blur"]["align_error"] == NO_FACE
    assert rows["broken"]["align_error"].startswith("not an image")
    assert rows["absent"]["align_error"] == "the image is null"

    wide, lying = (codec.decode(rows[name]["image"]["bytes"], 128).astype(int) for name in ("wide", "lying"))
    assert rows["wide"]["image"]["bytes"].startswith(b"\x89PNG")
    assert np.abs(wide - lying).mean() < 3
    landmarks = find_landmarks(wide.astype(np.uint8))
    assert landmarks is not None
    np.testing.assert_allclose(eyes_and_mouth(landmarks)[0], (64, 59), atol=5)

    again = find(Source(path=str(aligned)))
    images = [row for block in plan_blocks(again, 10) for row in read_block(again, block)["image"].to_pylist()]
    _, errors = codec.decode_column(pa.chunked_array([pa.array(images, schema.IMAGE)]), 16, schema.MAX_PIXELS)
    assert sorted(map(str, errors)) == ["None"] * 2 + ["the image is null"] * 3


def test_a_row_that_must_not_be_touched_becomes_a_reject_and_the_others_are_as_they_would_be(
    source: Path, aligned: Path | None, tmp_path: Path
) -> None:
    if aligned is None:
        return
    plan = make_align_plan(asked(source, tmp_path / "aligned"))
    assert isinstance(plan.run, AlignRun)
    ((_, done),) = Aligner(plan.run, plan.writing).compute(read(plan.found, plan.blocks[0]), {0: "it kills"})
    whole = rows_of(aligned)
    assert done.to_pylist() == [whole["wide"] | {"image": None, "align_error": "it kills"}, whole["lying"]]


# ---- going on --------------------------------------------------------------------------------------------------------


def times(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}


def test_a_run_that_was_stopped_goes_on_with_the_files_that_are_missing(source: Path, aligned: Path | None, tmp_path: Path) -> None:
    if aligned is None:
        return
    out = tmp_path / "cut"
    shutil.copytree(aligned, out)
    (out / file_name(2)).unlink()
    record = read_manifest(str(out))
    assert (record["state"], record["rows"], record["rejected"], record["resumed_rows"]) == (FINISHED, 5, 3, 0)
    assert (record["kind"], record["size"], record["reasons"][NO_FACE]) == ("aligned faces", 128, 1)
    assert record["command"].startswith("diffusionclip align ")
    assert {"dlib", "versions", "updated"} <= record.keys()
    write_manifest(str(out), record | {"state": RUNNING, "seconds": 1000.0})  # as if it had been killed
    (half,) = standings(str(out))
    assert (half.state, half.rows, half.done, dict(half.reasons)) == (RUNNING, 5, 3, {"the image is null": 1})

    there = {name: time for name, time in times(out).items() if name.startswith("part-")}
    done = run(*command(source, out), status=3)
    assert "3 of 5 rows are there from an earlier run; going on with the others" in done.stdout
    assert {name: times(out)[name] for name in there} == there
    assert rows_of(out) == rows_of(aligned)
    after = read_manifest(str(out))
    assert (after["state"], after["rejected"], after["resumed_rows"], after["reasons"]) == (FINISHED, 3, 3, record["reasons"])
    assert after["seconds"] > 1000


def test_a_finished_run_asked_for_again_does_nothing_and_another_one_is_refused_by_name(
    source: Path, aligned: Path | None, said: Said
) -> None:
    if aligned is None:
        return
    before = times(aligned)
    told, _ = said(*command(source, aligned, "--max-reject-rate", "0.6"))
    assert "5 of 5 rows are there from an earlier run; nothing is left to do" in told
    assert "5 rows in, 2 written, 3 rejected align took" in told
    assert not ray.is_initialized()
    _, errors = said(*command(source, aligned), "--size", "64", status=2)
    assert errors == f"error: {aligned} was made by another request (size was 128, now 64); give another folder, or --overwrite\n"
    assert times(aligned) == before


def test_rejects_and_everything_are_computed_again_only_if_asked_for(source: Path, aligned: Path | None) -> None:
    if aligned is None:
        return
    before = times(aligned)
    left = {
        name: [block.start for block in make_align_plan(asked(source, aligned, **{name: True} if name else {})).left]
        for name in ("", "retry_rejects", "overwrite")
    }
    assert left == {"": [], "retry_rejects": [2, 4], "overwrite": [0, 2, 4]}
    assert times(aligned) == before


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"size": 64}, "size was 128, now 64"),
        ({"landmark_model": "https://me:secret@host/points.dat"}, "landmark model was nothing, now https://host/points.dat"),
        ({"limit": 3}, "limit was nothing, now 3"),
        ({"columns": ()}, "columns was nothing, now []"),
        ({"where": "caption != 'x'"}, "where was nothing, now caption != 'x'"),
        ({"id_column": "caption"}, "id column was id, now caption"),
        ({"image_column": "photo"}, "image column was image, now photo"),
        ({"block_rows": 4}, "block rows was 2, now 4"),
        ({"max_pixels": 9}, "pixel limit was 16000000, now 9"),
        ({"workers": 4, "cpus": 2.0, "max_block_bytes": 2**20, "retry_rejects": True, "command": "x", "output": "elsewhere"}, None),
    ],
)
def test_what_decides_the_rows_makes_another_request_and_what_decides_the_speed_does_not(
    changes: dict[str, Any], says: str | None, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFUSIONCLIP_OFFLINE", "1")
    usual, found = asked(source, Path("out")), find(Source(path=str(source)))

    def changed(of: Any) -> Any:
        return replace(of, **{name: value for name, value in changes.items() if name in of.__dataclass_fields__})

    other = replace(changed(usual), source=changed(usual.source), resources=changed(usual.resources))
    before, now = alignment_request(usual, found), alignment_request(other, replace(found, source=other.source))
    assert differences(before, now) == ([says] if says else [])


def test_another_predictor_at_the_same_place_and_other_photographs_are_another_request(source: Path, tmp_path: Path) -> None:
    model, photos = tmp_path / "points.dat", tmp_path / "photos.parquet"
    shutil.copy(source, photos)
    model.write_bytes(b"one")
    of = asked(photos, tmp_path / "out", landmark_model=str(model))
    before = alignment_request(of, find(of.source))
    model.write_bytes(b"other")
    pq.write_table(pq.read_table(photos).slice(1), photos)
    names = [change.split(" was ")[0] for change in differences(before, alignment_request(of, find(of.source)))]
    assert names == ["input files", f"weights of {model}"]


def stopped(out: Path) -> Path:
    """Two of five rows, one of them a reject, and the record of a run that goes on or was killed."""
    rows = [
        {"id": "a", "image": {"bytes": encoded(picture(0, 16)), "path": None}, "align_error": None},
        {"id": "b", "image": None, "align_error": NO_FACE},
    ]
    out.mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema.aligned_schema(pa.schema([]), 16)), out / file_name(0))
    write_manifest(str(out), {"state": RUNNING, "updated": "2026-01-01T00:00:00+00:00", "rows": 5, "command": "align x"})
    return out


def test_status_reads_the_record_of_aligned_faces(tmp_path: Path, said: Said) -> None:
    told, _ = said("status", str(stopped(tmp_path / "aligned")))
    assert "aligned running 5 2 1 3 " in told
    assert f"1 x {NO_FACE}" in told
    assert "the same command goes on where it stopped" in told


def test_faces_of_which_rows_are_missing_are_not_inverted(tiny_domain: TinyDomain, tmp_path: Path) -> None:
    folder, domain = str(stopped(tmp_path / "aligned")), tiny_domain()
    invert = Run(source=Source(path=folder), output=str(tmp_path / "latents"), domain=domain, recipe=domain.recipe)
    with pytest.raises(ConfigError) as refused:
        make_plan(invert)
    (problem,) = refused.value.problems
    assert problem.startswith(f"{folder} is not finished, 3 of 5 rows are left; wait for its run")
    assert problem.endswith("give the same command again first: align x")
    write_manifest(folder, {"state": FINISHED, "rows": 2})
    plan = make_plan(invert)
    assert (plan.found.rows, plan.found.user_columns.names) == (2, ["align_error"])


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_what_was_aligned_or_inverted_already_is_no_input(tmp_path: Path) -> None:
    latents = schema.latents_schema(pa.schema([]), 16, {})
    rows = [{"id": "a", "image": {"bytes": b"x", "path": None}, "latent": [0.0] * 768, "error": None}]
    pq.write_table(pa.Table.from_pylist(rows, schema=latents), tmp_path / "latents.parquet")
    assert "a table of latents" in made_problems(find(Source(path=str(tmp_path / "latents.parquet"))))[0]
    assert "a table of aligned faces" in made_problems(find(Source(path=str(stopped(tmp_path / "aligned")))))[0]
    named = pa.table({"id": ["a"], "image": [b"x"], "align_error": ["mine"]})
    pq.write_table(named, tmp_path / "named.parquet")
    found = find(Source(path=str(tmp_path / "named.parquet")))
    assert made_problems(found) == []
    assert "'align_error'" in name_problems(asked(tmp_path, tmp_path), found)[0]


def test_every_problem_is_told_at_once_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    bad = asked(source, tmp_path / "out", size=8, max_reject_rate=2.0, landmark_model=str(tmp_path / "none.dat"))
    (tmp_path / "out").touch()
    with pytest.raises(ConfigError) as refused:
        make_align_plan(bad)
    assert len(refused.value.problems) == 4
    for words in ("none.dat does not exist" if EXTRA else MISSING, "size of aligned faces", "share of rejects", "is a file"):
        assert words in str(refused.value)


def test_an_output_that_holds_something_is_not_written_over_unasked(source: Path, tmp_path: Path) -> None:
    if not EXTRA:
        return
    out = stopped(tmp_path / "out")
    (out / "_run.json").unlink()
    there = times(out)
    with pytest.raises(ConfigError, match="1 Parquet files of something else already; give another folder, or --overwrite"):
        make_align_plan(asked(source, out))
    with pytest.raises(ConfigError, match="lies in the output"):
        make_align_plan(asked(source, source.parent, overwrite=True))
    assert len(make_align_plan(asked(source, out, overwrite=True)).left) == 3
    assert times(out) == there
