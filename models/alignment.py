"""Cutting faces out of photographs as CelebA-HQ and FFHQ were cut, so that a model trained on them knows what it sees.

The square is that of Karras et al. 2018 (appendix C): oriented by eyes and mouth, its size from their distances. Landmarks come
from dlib's face detector and its 68-point predictor, both in packages of the extra ``align``; nothing is downloaded.
"""

from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from models.weights import WeightsError, file_of

MISSING = "aligning faces needs dlib and its landmark model; install them with: pip install 'diffusionclip-ray[align]'"
DETECTION_SIDE = 1024
"""Larger photographs are searched at this longest side; a face smaller than 40 pixels of it is not found."""
MARGIN = 0.3
"""Of the square's side: so far outside the photograph its mirrored continuation has faded to one colour."""

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Landmarks:
    """Points (x, y) in pixels of a picture whose upper left corner is (0, 0), so that its first pixel's centre is (0.5, 0.5).

    Left and right are the viewer's. Eyes are the means of their outlines, mouth points its outer corners.
    """

    left_eye: Point
    right_eye: Point
    mouth_left: Point
    mouth_right: Point


@dataclass(frozen=True)
class Landmarker:
    """dlib's detector (gradient histograms) and shape predictor (regression trees, Kazemi and Sullivan 2014)."""

    detector: Any
    predictor: Any
    version: str
    """Of dlib."""


@lru_cache(maxsize=2)
def load_landmarker(model: str | None = None) -> Landmarker:
    """The detector with the predictor of the extra's package, or with ``model``, a reference to another 68-point one of dlib's.

    The package's model was trained on the iBUG 300-W photographs, whose licence excludes commercial use. Raises WeightsError
    if the extra is not installed or the file is not a 68-point predictor.
    """
    try:
        import dlib
    except ImportError:
        raise WeightsError(MISSING) from None
    file = file_of(model) if model else _packaged_model()
    try:
        predictor = dlib.shape_predictor(str(file))
        points = predictor(np.zeros((64, 64, 3), np.uint8), dlib.rectangle(8, 8, 56, 56)).num_parts
    except RuntimeError as error:
        raise WeightsError(f"{file} is not a shape predictor of dlib's: {str(error).splitlines()[0][:160]}") from None
    if points != 68:
        raise WeightsError(f"{file} predicts {points} points; eyes and mouth are taken from a predictor of 68")
    return Landmarker(dlib.get_frontal_face_detector(), predictor, dlib.__version__)


def _packaged_model() -> Path:
    # The package is not imported: it needs pkg_resources, which setuptools no longer has.
    spec = find_spec("face_recognition_models")
    folders = (spec.submodule_search_locations if spec else None) or []
    for folder in folders:
        file = Path(folder, "models", "shape_predictor_68_face_landmarks.dat")
        if file.is_file():
            return file
    raise WeightsError(MISSING)


def find_landmarks(picture: np.ndarray, model: str | None = None) -> Landmarks | None:
    """Eyes and mouth of the face in a uint8 (3, H, W) RGB picture, or None; of several faces the one that is seen best.

    ``model`` and errors: see ``load_landmarker``.
    """
    landmarker = load_landmarker(model)
    import dlib

    pixels = np.ascontiguousarray(picture.transpose(1, 2, 0))
    height, width = pixels.shape[:2]
    scale = min(1.0, DETECTION_SIDE / max(height, width))
    seen = pixels
    if scale < 1:
        shape = (max(1, round(width * scale)), max(1, round(height * scale)))
        seen = np.array(Image.fromarray(pixels).resize(shape, Image.Resampling.LANCZOS))
    box = _surest_face(landmarker.detector, seen)
    if box is None:
        return None
    across, down = width / seen.shape[1], height / seen.shape[0]
    rectangle = dlib.rectangle(*(round(v * s) for v, s in zip(box, (across, down, across, down), strict=True)))
    shape = landmarker.predictor(pixels, rectangle)
    points = np.array([(p.x, p.y) for p in shape.parts()], np.float64) + 0.5  # dlib counts from the first pixel's centre
    return Landmarks(
        left_eye=_point(points[36:42].mean(0)),
        right_eye=_point(points[42:48].mean(0)),
        mouth_left=_point(points[48]),
        mouth_right=_point(points[54]),
    )


def _surest_face(detector: Any, pixels: np.ndarray) -> tuple[int, int, int, int] | None:
    """Left, top, right, bottom. Faces below 80 pixels are looked for, in the doubled picture, only if there is no larger one."""
    for doublings in (0, 1):
        boxes, scores, _ = detector.run(pixels, doublings, 0.0)
        if scores:
            box = boxes[int(np.argmax(scores))]
            return box.left(), box.top(), box.right(), box.bottom()
    return None


def _point(xy: np.ndarray) -> Point:
    return float(xy[0]), float(xy[1])


def square_of(landmarks: Landmarks) -> np.ndarray:
    """float64 (4, 2): the square's corners (x, y), in the order upper left, lower left, lower right, upper right of the face.

    Karras et al. 2018, appendix C. Raises ValueError if the landmarks coincide.
    """
    left, right = np.array(landmarks.left_eye), np.array(landmarks.right_eye)
    eyes = (left + right) / 2
    mouth = (np.array(landmarks.mouth_left) + np.array(landmarks.mouth_right)) / 2
    across, down = right - left, mouth - eyes
    # Both say which way is right: the line of the eyes, and a quarter turn of the way from them to the mouth.
    rightwards = across + np.array((down[1], -down[0]))
    length = np.hypot(*rightwards)
    if not length > 0:
        raise ValueError("the landmarks of a face must not all lie in one place")
    half = max(2.0 * np.hypot(*across), 1.8 * np.hypot(*down))
    x = rightwards / length * half
    y = np.array((-x[1], x[0]))
    centre = eyes + 0.1 * down
    return np.stack([centre - x - y, centre - x + y, centre + x + y, centre + x - y])


def align(picture: np.ndarray, landmarks: Landmarks, size: int) -> np.ndarray:
    """uint8 (3, H, W) RGB -> uint8 (3, size, size): the face's square, upright, resampled with antialiasing.

    Where the square reaches out of the picture this goes on as in a mirror, blurred and fading to its middle colour.
    """
    square = square_of(landmarks)
    side = float(np.hypot(*(square[3] - square[0])))
    border = 3  # what resampling looks at beyond the square
    left, top = (int(v) for v in np.floor(square.min(0)) - border)
    right, bottom = (int(v) for v in np.ceil(square.max(0)) + border)
    region = _region(picture, np.arange(top, bottom), np.arange(left, right), side)
    corners = tuple((square - (left, top)).flatten())
    fine = size * max(1, int(np.ceil(side / size)))  # never coarser than the picture, and then averaged down
    face = []
    for channel in region:  # as floats: Pillow's transform cuts whole numbers off, which darkens
        cut = Image.fromarray(channel).transform((fine, fine), Image.Transform.QUAD, corners, Image.Resampling.BICUBIC)
        face.append(np.asarray(cut.resize((size, size), Image.Resampling.LANCZOS)))
    return np.clip(np.rint(np.stack(face)), 0, 255).astype(np.uint8)


def _region(picture: np.ndarray, rows: np.ndarray, columns: np.ndarray, side: float) -> np.ndarray:
    """float32 (3, rows, columns) of a picture; those that it does not have are mirrored, blurred and faded."""
    _, height, width = picture.shape
    pixels = np.ascontiguousarray(picture[:, _mirrored(rows, height)][:, :, _mirrored(columns, width)])
    region = pixels.astype(np.float32)
    outside = np.maximum(_outside(rows, height)[:, None], _outside(columns, width)[None, :]) / (MARGIN * side)
    if not outside.any():
        return region
    share = np.minimum(outside, 1).astype(np.float32)
    blur = ImageFilter.GaussianBlur(0.02 * side)
    blurred = np.stack([np.asarray(Image.fromarray(channel).filter(blur), np.float32) for channel in pixels])
    region += (blurred - region) * np.minimum(3 * share, 1)
    region += (np.median(region, axis=(1, 2), keepdims=True) - region) * share
    return region


def _mirrored(positions: np.ndarray, count: int) -> np.ndarray:
    """Any whole positions as ones from 0 to count - 1, reflected at the first and the last."""
    period = max(1, 2 * count - 2)
    inside = np.abs(positions) % period
    return np.minimum(inside, period - inside) if count > 1 else np.zeros_like(positions)


def _outside(positions: np.ndarray, count: int) -> np.ndarray:
    """How far positions lie beyond the first or last."""
    return np.maximum(0, np.maximum(-positions, positions - (count - 1)))
