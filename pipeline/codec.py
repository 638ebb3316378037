"""Bytes of pictures and latents <-> tensors: the only place where a bad image can fail."""

import io
import warnings

import numpy as np
import pyarrow as pa
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from pipeline import schema
from pipeline.schema import MAX_PIXELS

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats that are decoded; others (EPS, PDF ...) may start programs or fetch files."""
SHRUNK = 4
"""A JPEG that is decoded at a fraction of its size may have so many times the limit of pixels."""
BACKGROUND = (255, 255, 255)
"""What shows through transparent pixels."""


class ImageError(ValueError):
    """A picture that cannot be used; the message is the reason that its row keeps."""


def decode(data: bytes | None, size: int, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """uint8 (3, size, size) RGB from an encoded picture. Raises ImageError with the reason, and nothing else.

    As ``decode_whole``; any aspect is cut to the centre square and resized with antialiasing (Lanczos).
    """
    fitted = ImageOps.fit(_decode(data, max_pixels, (size, size)), (size, size), Image.Resampling.LANCZOS)
    return np.asarray(fitted, np.uint8).transpose(2, 0, 1)


def decode_whole(data: bytes | None, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """uint8 (3, H, W) RGB from an encoded picture, uncut. Raises ImageError with the reason, and nothing else.

    EXIF rotation is applied, transparency is laid on white, of an animation the first frame counts, 16 bits become 8.
    """
    return np.asarray(_decode(data, max_pixels), np.uint8).transpose(2, 0, 1)


def _decode(data: bytes | None, max_pixels: int, at_least: tuple[int, int] | None = None) -> Image.Image:
    """``at_least``: decoders may give any smaller version that is no smaller than this."""
    if data is None:
        raise ImageError("the image is null")
    if not data:
        raise ImageError("the image has no bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                width, height = picture.size
                if at_least:
                    picture.draft("RGB", at_least)  # JPEG, decoded at a half, a quarter or an eighth of its size
                most = max_pixels if picture.size == (width, height) else SHRUNK * max_pixels
                if width * height > most:
                    raise ImageError(f"the image has {width}x{height} pixels; at most {most} are decoded")
                picture.load()
                return _to_rgb(_upright(picture))
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"not an image in one of the formats {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError:  # Pillow's own limit, before the size is known here
        most = min(max_pixels, 2 * (Image.MAX_IMAGE_PIXELS or max_pixels))
        raise ImageError(f"the image has too many pixels; at most {most} are decoded") from None
    except Exception as error:  # decoders raise nearly anything (struct.error, SyntaxError, zlib.error ...)
        raise ImageError(f"the image is damaged: {str(error) or type(error).__name__}"[:200]) from None


def _upright(picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # a picture whose EXIF is damaged is still a picture
        return picture


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I") or picture.mode == "F":  # 16-bit grey, or floats from 0 to 1; Pillow's conversion clips them
        values = np.asarray(picture, np.float64)
        top = 65535.0 if picture.mode.startswith("I") else max(1.0, float(np.nanmax(values)))
        return Image.fromarray(np.clip(np.nan_to_num(values) / top * 255, 0, 255).astype(np.uint8)).convert("RGB")
    if "transparency" in picture.info or picture.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        rgba = picture.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, (*BACKGROUND, 255))
        return Image.alpha_composite(canvas, rgba).convert("RGB")
    return picture.convert("RGB")


def encode_png(pixels: np.ndarray) -> bytes:
    """PNG bytes of a uint8 (3, H, W) RGB picture."""
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(out, "PNG")
    return out.getvalue()


def to_tensor(pictures: list[np.ndarray]) -> Tensor:
    """uint8 (3, H, W) pictures -> float32 (B, 3, H, W) in [-1, 1], contiguous whatever the pictures' own layout.

    Convolutions round differently in another memory layout, and a row must not depend on how its batch came about.
    """
    return torch.from_numpy(np.ascontiguousarray(np.stack(pictures))).float() / 127.5 - 1


def to_pictures(images: Tensor) -> list[np.ndarray]:
    """float32 (B, 3, H, W) in [-1, 1] (clipped) -> uint8 pictures, rounded to nearest."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return list(pixels.cpu().numpy())


def latents_to_arrow(latents: list[np.ndarray | None], size: int) -> pa.Array:
    """float (3, size, size) latents or None -> fixed-size list of float16, C order; the shape goes into the metadata."""
    length = 3 * size * size
    flat = np.zeros((len(latents), length), np.float16)
    missing = np.ones(len(latents), bool)
    for row, latent in enumerate(latents):
        if latent is not None:
            flat[row], missing[row] = latent.reshape(-1), False
    values = pa.array(flat.reshape(-1), pa.float16())
    return pa.FixedSizeListArray.from_arrays(values, length, mask=pa.array(missing))


def latents_from_arrow(column: pa.ChunkedArray | pa.Array, size: int) -> Tensor:
    """float32 (B, 3, size, size) from a latent column without nulls."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    flat = array.flatten().to_numpy(zero_copy_only=False)
    return torch.from_numpy(flat.astype(np.float32)).view(len(array), 3, size, size)


def unread_reasons(table: pa.Table) -> list[str | None]:
    """Why the picture of each row was not even read, where that is so: it was too large."""
    return table[schema.UNREAD].to_pylist() if schema.UNREAD in table.column_names else [None] * len(table)


def decode_column(column: pa.ChunkedArray, size: int, max_pixels: int) -> tuple[list[np.ndarray | None], list[str | None]]:
    """Pictures (uint8 (3, size, size) or None) and errors (None or the reason), one of the two a row."""
    pictures: list[np.ndarray | None] = []
    errors: list[str | None] = []
    for data in schema.image_bytes(column):
        try:
            pictures.append(decode(data, size, max_pixels))
            errors.append(None)
        except ImageError as error:
            pictures.append(None)
            errors.append(str(error))
    return pictures, errors
