"""What would be lost: any picture in the world becomes the right pixels or a reason, never a crash of the run."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image, ImageOps
from tiny import picture

from pipeline.codec import (
    FORMATS,
    ImageError,
    decode,
    encode_png,
    latents_from_arrow,
    latents_to_arrow,
    to_pictures,
    to_tensor,
)

COLOUR = (200, 30, 10)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def flat(mode: str = "RGB", colour: Any = COLOUR, size: tuple[int, int] = (20, 20)) -> Image.Image:
    return Image.new(mode, size, colour)


def shown(data: bytes, size: int = 8) -> tuple[int, ...]:
    """The colour of a picture of one colour."""
    pixels = decode(data, size)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (3, size, size)
    assert (np.ptp(pixels.astype(int), axis=(1, 2)) <= 4).all(), "the picture is not of one colour"
    return tuple(int(v) for v in np.round(pixels.mean((1, 2))))


def png_header(width: int, height: int) -> bytes:
    """A PNG of some hundred bytes that claims to be this large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


# ---- what is no picture ----------------------------------------------------------------------------------------------

NO_FORMAT = f"not an image in one of the formats {', '.join(FORMATS)}"
BAD: dict[str, tuple[bytes | None, str]] = {
    "null": (None, "the image is null"),
    "no bytes": (b"", "the image has no bytes"),
    "one byte": (b"\x89", NO_FORMAT),
    "text": ("these are words, not pixels: ä".encode() * 9, NO_FORMAT),
    "a PNG's first bytes": (encoded(picture(0))[:20], ""),
    "half a PNG": (encoded(picture(0, 64))[: len(encoded(picture(0, 64))) // 2], "the image is damaged: "),
    "half a JPEG": (encoded(picture(0, 64), "JPEG")[:900], "the image is damaged: image file is truncated"),
    "half a GIF": (encoded(picture(0, 64), "GIF")[:1200], "the image is damaged: "),
    "half a WEBP": (encoded(picture(0, 64), "WEBP")[:100], ""),
    "half a TIFF": (encoded(picture(0, 64), "TIFF")[:5000], ""),
    "half a BMP": (encoded(picture(0, 64), "BMP")[:5000], "the image is damaged: "),
    "SVG": (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', NO_FORMAT),
    "HTML": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", NO_FORMAT),
    "EPS": (encoded(flat(), "EPS"), NO_FORMAT),
    "PDF": (encoded(flat(), "PDF"), NO_FORMAT),
    "ICO": (encoded(flat(), "ICO"), NO_FORMAT),
    "a bomb": (png_header(60_000, 60_000), "the image has too many pixels; at most 16000000 are decoded"),
    "a large picture": (png_header(9000, 9000), "the image has 9000x9000 pixels; at most 16000000 are decoded"),
    "no width": (png_header(0, 9), NO_FORMAT),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_picture_has_a_reason(name: str) -> None:
    data, reason = BAD[name]
    with pytest.raises(ImageError) as raised:
        decode(data, 16)
    assert str(raised.value).startswith(reason)
    assert 5 < len(str(raised.value)) <= 200


def test_the_limit_of_pixels_is_the_one_that_was_given_and_is_checked_before_decoding() -> None:
    data = encoded(flat(size=(30, 20)))
    assert decode(data, 8, max_pixels=600).shape == (3, 8, 8)
    with pytest.raises(ImageError, match="the image has 30x20 pixels; at most 599 are decoded"):
        decode(data, 8, max_pixels=599)
    with pytest.raises(ImageError, match="too many pixels; at most 178956970 are decoded"):  # Pillow's limit is below ours
        decode(png_header(16_000, 16_000), 8, max_pixels=10**9)


def test_a_jpeg_that_is_decoded_at_a_fraction_of_its_size_may_have_more_pixels_and_no_other_picture_may() -> None:
    large = picture(0, 64)
    assert decode(encoded(large, "JPEG"), 8, max_pixels=1024).shape == (3, 8, 8)
    with pytest.raises(ImageError, match="the image has 64x64 pixels; at most 1023 are decoded"):
        decode(encoded(large, "JPEG"), 64, max_pixels=1023)  # nothing to shrink
    with pytest.raises(ImageError, match="the image has 64x64 pixels; at most 4092 are decoded"):
        decode(encoded(large, "JPEG"), 8, max_pixels=1023)
    with pytest.raises(ImageError, match="the image has 64x64 pixels; at most 1024 are decoded"):
        decode(encoded(large), 8, max_pixels=1024)


def test_no_mutilation_of_a_picture_raises_anything_but_a_reason() -> None:
    rng = np.random.default_rng(0)
    reasons = []
    originals = [encoded(picture(1, 24), kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")]
    originals += [encoded(picture(1, 24), "TIFF", compression="tiff_lzw"), encoded(picture(1, 24).convert("P"), "PNG", transparency=3)]
    for case in range(400):
        data = bytearray(originals[case % len(originals)])
        reach = len(data) if rng.random() < 0.5 else min(len(data), 100)  # headers break in more ways than pixels
        for _ in range(rng.integers(1, 8)):
            data[rng.integers(reach)] = rng.integers(256)
        if rng.random() < 0.2:
            del data[rng.integers(len(data)) :]
        try:
            assert decode(bytes(data), 8).shape == (3, 8, 8), case
        except ImageError as error:
            reasons.append(str(error))
    assert all(reasons)
    assert 50 < len(reasons) < 350, "the mutilations are too mild or too harsh to mean anything"


# ---- what is one, in any mode ----------------------------------------------------------------------------------------


def with_alpha(alpha: int) -> Image.Image:
    return flat("RGBA", (*COLOUR, alpha))


MODES: dict[str, tuple[bytes, tuple[int, int, int]]] = {
    "RGB PNG": (encoded(flat()), COLOUR),
    "JPEG": (encoded(flat(), "JPEG", quality=95), COLOUR),
    "lossless WEBP": (encoded(flat(), "WEBP", lossless=True), COLOUR),
    "GIF": (encoded(flat(), "GIF"), COLOUR),
    "BMP": (encoded(flat(), "BMP"), COLOUR),
    "TIFF": (encoded(flat(), "TIFF"), COLOUR),
    "CMYK JPEG": (encoded(flat().convert("CMYK"), "JPEG", quality=95), COLOUR),
    "CMYK TIFF": (encoded(flat().convert("CMYK"), "TIFF"), COLOUR),
    "MPO of a phone": (encoded(flat(), "MPO", save_all=True, append_images=[flat(colour=(0, 0, 0))]), COLOUR),
    "grey JPEG": (encoded(flat("L", 77), "JPEG", quality=95), (77, 77, 77)),
    "palette": (encoded(flat().quantize(2)), COLOUR),
    "opaque RGBA": (encoded(with_alpha(255)), COLOUR),
    "transparent RGBA": (encoded(with_alpha(0)), (255, 255, 255)),
    "half transparent RGBA": (encoded(with_alpha(128)), (227, 142, 132)),
    "transparent LA": (encoded(flat("LA", (9, 0))), (255, 255, 255)),
    "opaque LA": (encoded(flat("LA", (9, 255))), (9, 9, 9)),
    "transparent palette": (encoded(flat("P", 0), transparency=0), (255, 255, 255)),
    "transparent colour": (encoded(flat(), transparency=COLOUR), (255, 255, 255)),
    "transparent grey": (encoded(flat("L", 9), transparency=9), (255, 255, 255)),
    "black and white": (encoded(flat("1", 1)), (255, 255, 255)),
    "transparent WEBP": (encoded(with_alpha(0), "WEBP", lossless=True), (255, 255, 255)),
    "16-bit grey PNG": (encoded(Image.fromarray(np.full((9, 9), 40_000, np.uint16))), (155, 155, 155)),
    "dark 16-bit grey PNG": (encoded(Image.fromarray(np.full((9, 9), 1000, np.uint16))), (3, 3, 3)),
    "16-bit grey TIFF": (encoded(Image.fromarray(np.full((9, 9), 65_535, np.uint16)), "TIFF"), (255, 255, 255)),
    "float TIFF": (encoded(Image.fromarray(np.full((9, 9), 0.25, np.float32)), "TIFF"), (63, 63, 63)),
    "one pixel": (encoded(flat(size=(1, 1))), COLOUR),
    "10000x10": (encoded(flat(size=(10_000, 10))), COLOUR),
    "1x3000": (encoded(flat(size=(1, 3000))), COLOUR),
}


@pytest.mark.parametrize("name", MODES)
def test_a_picture_of_any_mode_shows_its_colour(name: str) -> None:
    data, colour = MODES[name]
    assert np.abs(np.subtract(shown(data), colour)).max() <= 2


def test_sixteen_bit_grey_keeps_its_gradient_instead_of_clipping() -> None:
    ramp = np.linspace(0, 65_535, 16).astype(np.uint16)
    pixels = decode(encoded(Image.fromarray(np.tile(ramp, (16, 1)))), 16)
    assert np.array_equal(pixels[0, 0], ramp // 257)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_counts(kind: str) -> None:
    later = [flat(colour=(0, 0, 255)), flat(colour=(0, 255, 0))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(flat(), kind, save_all=True, append_images=later, **options)
    assert np.abs(np.subtract(shown(data), COLOUR)).max() <= 2


def corners() -> Image.Image:
    """Four quarters of four colours, so that every turn and every mirror image is another picture."""
    image = Image.new("RGB", (32, 32), (255, 255, 0))
    image.paste((255, 0, 0), (0, 0, 16, 16))
    image.paste((0, 255, 0), (16, 0, 32, 16))
    image.paste((0, 0, 255), (0, 16, 16, 32))
    return image


UNDO = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""How a camera that writes an orientation has stored the upright picture."""


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", UNDO)
def test_a_picture_taken_with_the_camera_turned_stands_upright(orientation: int, kind: str) -> None:
    how = UNDO[orientation]
    stored = corners() if how is None else corners().transpose(how)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    turned, upright = (decode(encoded(i, kind, **extra, **options), 16) for i, extra in ((stored, {"exif": exif}), (corners(), {})))
    assert np.abs(turned.astype(int) - upright).max() <= (4 if kind == "JPEG" else 0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_picture_with_damaged_exif_is_still_a_picture(kind: str) -> None:
    assert np.abs(np.subtract(shown(encoded(flat(), kind, exif=b"Exif\0\0garbage")), COLOUR)).max() <= 3


def test_of_a_wide_picture_the_middle_square_is_kept() -> None:
    image = Image.new("RGB", (60, 20), (0, 0, 0))
    image.paste(COLOUR, (20, 0, 40, 20))
    assert shown(encoded(image.crop((20, 0, 40, 20)))) == COLOUR
    middle = decode(encoded(image), 20)
    assert np.array_equal(middle[:, 10, 10], COLOUR)
    assert np.array_equal(middle, decode(encoded(image.crop((20, 0, 40, 20))), 20))


def test_a_picture_of_the_right_size_is_not_resampled() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    assert np.array_equal(decode(encoded(image), 16), np.asarray(image).transpose(2, 0, 1))


def test_a_large_picture_is_shrunk_with_antialiasing() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 254
    assert np.abs(decode(encoded(Image.fromarray(stripes)), 8).astype(int) - 127).max() <= 6  # every second pixel gives 0 or 254


def test_a_jpeg_decoded_at_a_smaller_scale_is_the_same_picture() -> None:
    image = picture(0, 256)
    want = np.asarray(ImageOps.fit(image, (16, 16), Image.Resampling.LANCZOS)).transpose(2, 0, 1)
    assert np.abs(decode(encoded(image, "JPEG", quality=95), 16).astype(int) - want).mean() < 3


# ---- pictures and latents through bytes ------------------------------------------------------------------------------


def test_a_png_gives_back_every_pixel() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16), np.uint8)
    assert np.array_equal(decode(encode_png(pixels), 16), pixels)
    assert Image.open(io.BytesIO(encode_png(pixels))).mode == "RGB"


def test_every_byte_survives_the_way_to_a_tensor_and_back() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16).repeat(3, 0)
    tensor = to_tensor([pixels, 255 - pixels])
    assert (tensor.min().item(), tensor.max().item()) == (-1.0, 1.0)
    assert tensor.shape == (2, 3, 16, 16)
    first, second = to_pictures(tensor)
    assert np.array_equal(first, pixels)
    assert np.array_equal(second, 255 - pixels)


def test_decoded_pictures_become_a_tensor_of_one_layout() -> None:
    """Convolutions round differently in another layout: pixels would depend on how a batch came about."""
    assert to_tensor([decode(encoded(picture(seed)), 16) for seed in range(3)]).is_contiguous()


def test_what_lies_beyond_white_and_black_is_cut_and_the_rest_rounded() -> None:
    values = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0, 0.0039]).expand(1, 3, 1, 6)
    assert to_pictures(values)[0][0, 0].tolist() == [0, 0, 128, 255, 255, 128]


def latents(count: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 3, 4, 4)).astype(np.float32)


def test_latents_come_back_in_float16_and_rejects_stay_null() -> None:
    values = latents(3)
    column = latents_to_arrow([values[0], None, values[1], None, values[2]], 4)
    assert column.type == pa.list_(pa.float16(), 48)
    assert column.is_null().to_pylist() == [False, True, False, True, False]
    back = latents_from_arrow(column.take(pa.array([0, 2, 4])), 4)
    assert back.dtype == torch.float32
    assert np.array_equal(back.numpy(), values.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("chunked", [False, True])
def test_a_slice_of_latents_is_that_slice(chunked: bool) -> None:
    values = latents(6)
    column = latents_to_arrow(list(values), 4)
    part: Any = pa.chunked_array([column.slice(1, 2), column.slice(3, 1), column.slice(4, 0)]) if chunked else column.slice(1, 3)
    want = values[1:4].astype(np.float16).astype(np.float32)
    assert np.array_equal(latents_from_arrow(part, 4).numpy(), want)


def test_latents_without_rejects_next_to_sliced_ones_with_rejects() -> None:
    values = latents(2)
    column = latents_to_arrow([None, None, values[0], values[1]], 4)
    assert np.array_equal(latents_from_arrow(column.slice(2), 4).numpy(), values.astype(np.float16).astype(np.float32))
    assert latents_to_arrow([None, None], 4).null_count == 2
    assert len(latents_from_arrow(column.slice(0, 0), 4)) == 0
