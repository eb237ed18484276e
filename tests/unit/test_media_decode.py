"""Images: what is read, how it is normalised, and what is refused before it costs anything."""

from __future__ import annotations

import io
import os
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mm_core.errors import MediaDecodeError, MediaError, MediaTooLargeError, UnsupportedMediaError
from mm_core.media import MediaLimits, array_to_image, decode_image, smart_resize, to_rgb
from mm_core.media.sniff import image_format, image_size

RNG = np.random.default_rng(0)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int = 20, height: int = 12, mode: str = "RGB") -> Image.Image:
    channels = {"RGB": 3, "RGBA": 4, "L": 1, "LA": 2, "CMYK": 4}[mode]
    shape = (height, width) if channels == 1 else (height, width, channels)
    pixels = RNG.integers(0, 256, shape, dtype=np.uint8)
    return (
        Image.fromarray(pixels)
        if mode in ("RGB", "RGBA", "L", "LA")
        else Image.frombytes(mode, (width, height), pixels.tobytes())
    )


def png_header(width: int, height: int) -> bytes:
    """A valid PNG of that size with next to no data."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP", "GIF", "JPEG"])
def test_formats_are_told_by_content(kind: str, tmp_path) -> None:
    data = encoded(noise(), kind, **({"lossless": True} if kind == "WEBP" else {}))
    assert image_format(data) == kind
    assert image_size(data, kind) == (20, 12)
    wanted = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(np.asarray(decode_image(data)), wanted)
    path = tmp_path / "picture.txt"  # the name says nothing
    path.write_bytes(data)
    assert np.array_equal(np.asarray(decode_image(path)), wanted)


def test_sizes_of_other_headers() -> None:
    lossy, alpha = encoded(noise(33, 17), "WEBP"), encoded(noise(33, 17, "RGBA"), "WEBP")
    assert image_size(lossy, "WEBP") == image_size(alpha, "WEBP") == (33, 17)
    progressive = encoded(noise(33, 17), "JPEG", progressive=True, exif=b"Exif\0\0" + b"x" * 300)
    assert image_size(progressive, "JPEG") == (33, 17)
    assert all(image_size(b"", kind) is None for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP"))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_composited_on_white(mode: str) -> None:
    image = noise(mode=mode)
    rgba = np.asarray(image.convert("RGBA")).astype(np.float64)
    wanted = rgba[..., :3] * rgba[..., 3:] / 255 + 255 - rgba[..., 3:]
    got = np.asarray(decode_image(encoded(image))).astype(np.float64)
    assert np.abs(got - wanted).max() <= 1.0


def test_trns_is_composited() -> None:
    grey = noise(mode="L")
    grey.putpixel((0, 0), 7)
    got = np.asarray(decode_image(encoded(grey, transparency=7)))
    assert np.array_equal(got[..., 0], np.where(np.asarray(grey) == 7, 255, np.asarray(grey)))
    rgb = noise()
    rgb.putpixel((3, 2), (1, 2, 3))
    got = np.asarray(decode_image(encoded(rgb, transparency=(1, 2, 3))))
    assert got[2, 3].tolist() == [255, 255, 255]
    assert np.array_equal(np.delete(got.reshape(-1, 3), 43, 0), np.delete(np.asarray(rgb).reshape(-1, 3), 43, 0))
    palette = rgb.quantize(8)
    data = encoded(palette, transparency=0)
    got = np.asarray(decode_image(data))
    assert (got[np.asarray(palette) == 0] == 255).all()


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    values = np.linspace(0, 65535, 240).astype(np.uint16).reshape(12, 20)
    got = np.asarray(decode_image(encoded(Image.fromarray(values))))
    assert np.array_equal(got[..., 0], values >> 8)
    assert np.array_equal(got[..., 0], got[..., 2])


def test_one_bit_cmyk_and_float() -> None:
    assert decode_image(encoded(noise(mode="L").convert("1"))).mode == "RGB"
    cmyk = encoded(noise(mode="CMYK"), "JPEG")
    assert np.array_equal(np.asarray(decode_image(cmyk)), np.asarray(Image.open(io.BytesIO(cmyk)).convert("RGB")))
    with pytest.raises(UnsupportedMediaError):
        decode_image(encoded(Image.fromarray(RNG.random((4, 4)).astype(np.float32)), "TIFF"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(noise(24, 16), kind, exif=exif)
    wanted = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    got = decode_image(data)
    assert got.size == ((24, 16) if orientation < 5 else (16, 24))
    assert np.array_equal(np.asarray(got), np.asarray(wanted))


def test_damaged_metadata_is_ignored() -> None:
    image = noise()
    data = encoded(image, "PNG", exif=b"Exif\0\0MM\0*\0\0\xff\xff garbage", icc_profile=b"nonsense")
    assert np.array_equal(np.asarray(decode_image(data)), np.asarray(image))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_animations_give_their_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "lime", "blue")]
    data = encoded(
        frames[0],
        kind,
        save_all=True,
        append_images=frames[1:],
        duration=10,
        **({"lossless": True} if kind == "WEBP" else {}),
    )
    assert decode_image(data).getpixel((5, 5)) == (255, 0, 0)


BAD = {
    "empty": b"",
    "magic only": b"\x89PNG\r\n\x1a\n" + b"random body" * 9,
    "jpeg magic": b"\xff\xd8\xff" + bytes(100),
    "truncated jpeg": encoded(noise(64, 64), "JPEG")[:-128],
    "truncated png": encoded(noise(64, 64))[:-200],
    "truncated webp": encoded(noise(64, 64), "WEBP")[:-100],
    "bmp magic": b"BM" + bytes(8),
    "gif magic": b"GIF89a" + bytes(3),
}


@pytest.mark.parametrize("name", BAD)
def test_damaged_bytes(name: str) -> None:
    with pytest.raises(MediaDecodeError) as caught:
        decode_image(BAD[name])
    assert caught.value.code == "invalid_image"
    assert not re.search(r"0x[0-9a-f]{4,}|Traceback|BytesIO|/", str(caught.value))


@pytest.mark.parametrize(
    "data", [b"<html>", b"<svg xmlns=''/>", b"%PDF-1.7", b"PK\3\4", b"II*\0", b"SIMPLE  =", b"8BPS", b"\0\0\0\x0cjP  "]
)
def test_other_contents_are_unsupported(data: bytes) -> None:
    with pytest.raises(UnsupportedMediaError, match="Convert"):
        decode_image(data + bytes(64))


def test_ceiling_is_checked_on_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "open", lambda *a, **k: pytest.fail("a decoder was asked"))
    for size in ((14000, 14000), (13300, 13300), (4_000_000_000, 4_000_000_000)):
        with pytest.raises(MediaTooLargeError, match="max_image_pixels"):
            decode_image(png_header(*size))
    with pytest.raises(MediaTooLargeError):
        decode_image(encoded(noise(20, 12)), MediaLimits(max_image_pixels=239))


def test_encoded_bytes_have_a_ceiling(tmp_path) -> None:
    data = encoded(noise())
    (tmp_path / "a.png").write_bytes(data)
    for source in (data, tmp_path / "a.png"):
        with pytest.raises(MediaTooLargeError, match="bytes"):
            decode_image(source, MediaLimits(max_encoded_bytes=len(data) - 1))


def test_only_regular_files_are_read(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero", "/dev/null", tmp_path / "absent", "a\0b"):
        with pytest.raises(MediaError):
            decode_image(path)


def test_loaded_images_are_taken_as_they_are() -> None:
    image = noise(mode="RGBA")
    assert np.array_equal(np.asarray(to_rgb(image)), np.asarray(image)[..., :3])
    with pytest.raises(MediaDecodeError, match="no pixels"):
        to_rgb(Image.new("RGB", (0, 4)))
    with pytest.raises(MediaTooLargeError):
        to_rgb(Image.new("1", (9000, 9000)))
    lazy = Image.open(io.BytesIO(BAD["truncated png"]))
    with pytest.raises(MediaDecodeError, match="damaged"):
        to_rgb(lazy)


def test_arrays() -> None:
    import torch

    pixels = RNG.integers(0, 256, (6, 4, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(array_to_image(pixels)), pixels)
    assert np.array_equal(np.asarray(array_to_image(torch.from_numpy(pixels))), pixels)
    assert np.array_equal(np.asarray(array_to_image(pixels / 255.0)), pixels)
    assert np.array_equal(
        np.asarray(array_to_image(torch.from_numpy(pixels / 255.0).bfloat16().float())).shape, (6, 4, 3)
    )
    assert np.array_equal(np.asarray(array_to_image(pixels[..., 0]))[..., 1], pixels[..., 0])
    assert np.array_equal(np.asarray(array_to_image(pixels[::-1, ::2])), pixels[::-1, ::2])
    with pytest.raises(UnsupportedMediaError, match="permute"):
        array_to_image(torch.zeros(3, 6, 4))
    for bad in (
        pixels.astype(np.int64),
        pixels * 1.0,
        pixels / 255.0 - 1,
        np.full((2, 2, 3), np.nan),
        np.zeros((2, 2, 4), np.uint8),
        np.zeros(3, np.uint8),
    ):
        with pytest.raises(UnsupportedMediaError):
            array_to_image(bad)
    with pytest.raises(MediaDecodeError):
        array_to_image(np.zeros((0, 4, 3), np.uint8))


def test_smart_resize() -> None:
    assert smart_resize(561, 278, 28, 56 * 56, 28 * 28 * 1280) == (560, 280)
    assert smart_resize(1, 1, 28, 56 * 56, 28 * 28 * 1280) == (56, 56)
    assert smart_resize(1, 200, 28, 56 * 56, 28 * 28 * 1280)[0] == 28
    with pytest.raises(MediaDecodeError) as caught:
        smart_resize(1, 201, 28, 56 * 56, 28 * 28 * 1280)
    assert caught.value.code == "image_aspect"
