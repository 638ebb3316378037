"""What would be lost: faces upright and of the right size in the square that face models know, or a word why there is none.

``astronaut.jpg`` is a part of NASA's portrait of Eileen Collins (1998, in the public domain).
"""

import io
import subprocess
import sys
from dataclasses import astuple
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny import picture

from jobs.align import NO_FACE, input_problems, output_problems
from models.alignment import MISSING, Landmarks, align, find_landmarks, load_landmarker, square_of
from models.weights import WeightsError
from pipeline import codec, schema
from pipeline.config import Source
from pipeline.sources import find, plan_blocks, read_block

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


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def photographs(file: Path) -> Path:
    """A face at the edge of a wide picture, that picture lying on its side with EXIF to say so, no face, and no picture."""
    wide = Image.new("RGB", (800, 320), (90, 120, 90))
    wide.paste(Image.open(PHOTO), (0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # the viewer has to turn it clockwise
    lying = encoded(wide.rotate(90, expand=True), "JPEG", quality=95, exif=exif)
    images = [encoded(wide), lying, encoded(picture(0, 200)), b"no picture", None]
    names = ["wide", "lying", "blur", "broken", "absent"]
    pq.write_table(pa.table({"id": names, "image": pa.array(images, pa.binary()), "caption": [f"a {n} one" for n in names]}), file)
    return file


def run(*words: str, status: int) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-m", "jobs.cli", "align", *words], capture_output=True, text=True, timeout=200)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def test_the_command_writes_faces_and_keeps_every_row_with_the_reason_why_it_has_none(tmp_path: Path) -> None:
    source, out = photographs(tmp_path / "photos.parquet"), tmp_path / "aligned"
    words = (str(source), str(out), "--size", "128", "--block-rows", "2", "--workers", "1")
    if not EXTRA:
        done = run(*words, status=2)
        assert done.stderr.strip() == f"error: {MISSING}"
        assert list(out.glob("*.parquet")) == []
        return
    done = run(*words, status=3)
    assert "3 of 5 rows were rejected, more than --max-reject-rate 0.1 allows" in done.stderr
    assert "5 rows in, 2 aligned, 3 rejected" in done.stdout

    table = pq.read_table(out)
    assert table.column_names == ["id", "image", "caption", "align_error"]
    rows = {row["id"]: row for row in table.to_pylist()}
    assert {name: row["caption"] for name, row in rows.items()} == {n: f"a {n} one" for n in ("wide", "lying", "blur", "broken", "absent")}
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

    again = find(Source(path=str(out)))
    read = [row for block in plan_blocks(again, 10) for row in read_block(again, block)["image"].to_pylist()]
    _, errors = codec.decode_column(pa.chunked_array([pa.array(read, schema.IMAGE)]), 16, schema.MAX_PIXELS)
    assert sorted(map(str, errors)) == ["None"] * 2 + ["the image is null"] * 3


def test_what_was_aligned_or_inverted_already_is_no_input(tmp_path: Path) -> None:
    latents = schema.latents_schema(pa.schema([]), 16, {})
    rows = [{"id": "a", "image": {"bytes": b"x", "path": None}, "latent": [0.0] * 768, "error": None}]
    pq.write_table(pa.Table.from_pylist(rows, schema=latents), tmp_path / "latents.parquet")
    assert "a table of latents" in input_problems(find(Source(path=str(tmp_path / "latents.parquet"))))[0]
    named = pa.table({"id": ["a"], "image": [b"x"], "align_error": ["mine"]})
    pq.write_table(named, tmp_path / "named.parquet")
    assert "'align_error'" in input_problems(find(Source(path=str(tmp_path / "named.parquet"))))[0]


def test_an_output_that_holds_something_is_not_written_over_unasked(tmp_path: Path) -> None:
    file = photographs(tmp_path / "photos.parquet")
    assert "--overwrite" in output_problems("elsewhere", str(tmp_path), overwrite=False)[0]
    assert output_problems("elsewhere", str(tmp_path), overwrite=True) == []
    assert "lies in the output" in output_problems(str(tmp_path), str(tmp_path), overwrite=True)[0]
    assert "is a file" in output_problems("elsewhere", str(file), overwrite=True)[0]
