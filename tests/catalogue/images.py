"""Images that are broken, or unusual."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.catalogue.case import Case, Spoil, both


def image(body: bytes, name: str = "square-2.png") -> Spoil:
    """An image of train/red with these bytes."""

    def spoil(data: Path) -> None:
        (data / "train/red/square-2.png").unlink()
        (data / "train/red" / name).write_bytes(body)

    return spoil


def saved(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def red(mode: str = "RGB", size: int = 16) -> Image.Image:
    return Image.new("RGB", (size, size), (230, 40, 40)).convert(mode)


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(red(), "JPEG", exif=exif)


def png_bomb(width: int, height: int) -> bytes:
    """A PNG of kilobytes that says it has so many pixels, and has them."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    packer = zlib.compressobj(9)
    row = bytes(1 + width // 8)
    packed = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


WHOLE = saved(red(size=64), "PNG")


NOT_AN_IMAGE = "train/red/square-2.png: must be an image: "


TOO_MANY = "1 of 42 images are broken, more than MAX_BAD_IMAGES=0.01 allows: "


IMAGES = [
    *(Case(f"an image: {name}", 65, TOO_MANY + NOT_AN_IMAGE + told, spoil=image(body)) for name, body, told in [
        ("zero bytes", b"", "it is of no known format"),
        ("a page named as one", b"<!DOCTYPE html><html>404</html>", "it is of no known format"),
        ("random bytes", np.random.default_rng(0).bytes(5000), "it is of no known format"),
        ("cut in half", WHOLE[: len(WHOLE) // 2], ""),
        ("cut in its header", WHOLE[:20], ""),
        ("flipped bits", WHOLE[:60] + bytes(b ^ 255 for b in WHOLE[60:100]) + WHOLE[100:], ""),
        ("a cut jpeg", saved(red(size=64), "JPEG")[:500], ""),
        ("30,000 × 30,000 pixels", png_bomb(30_000, 30_000), "Image size (900000000 pixels) exceeds limit"),
        ("PostScript", saved(red(), "EPS"), "it is of no known format"),
        ("an ICO", saved(red(), "ICO"), "it is of no known format"),
        ("a zip", b"PK\x03\x04" + bytes(500), "it is of no known format"),
        ("0 × 0 pixels", b"P6\n0 0\n255\n", ""),
        ("numbers without an end", b"P6\n" + b"9" * 100_000 + b" 1\n255\n", ""),
    ]),
    *(Case(f"an image: {name}", 0, "best epoch 1 of 1", spoil=image(body, file)) for name, body, file in [
        ("1 × 1", saved(red(size=1), "PNG"), "square-2.png"),
        ("1 × 5,000", saved(red().resize((1, 5000)), "PNG"), "square-2.png"),
        ("animated", saved(red(), "GIF", save_all=True, append_images=[red().rotate(90)]), "square-2.png"),
        ("animated webp", saved(red(), "WEBP", save_all=True, append_images=[red("L")]), "square-2.webp"),
        ("CMYK", saved(red("CMYK"), "JPEG"), "square-2.jpg"),
        ("16 bit", saved(Image.fromarray(np.full((16, 16), 40_000, np.uint16)), "PNG"), "square-2.png"),
        ("16-bit TIFF", saved(Image.fromarray(np.full((16, 16), 40_000, np.uint16)), "TIFF"), "square-2.tif"),
        ("floats", saved(Image.fromarray(np.full((16, 16), 0.5, np.float32)), "TIFF"), "square-2.tiff"),
        ("NaN pixels", saved(Image.fromarray(np.full((16, 16), np.nan, np.float32)), "TIFF"), "square-2.tiff"),
        ("grey with alpha", saved(red("LA"), "PNG"), "square-2.png"),
        ("one bit", saved(red("1"), "PNG"), "square-2.png"),
        ("a palette with transparency", saved(red("P"), "PNG", transparency=b"\x00\x80"), "square-2.png"),
        ("rotated by EXIF", rotated(), "square-2.jpg"),
        ("a jpeg named .png", saved(red(), "JPEG"), "square-2.png"),
        ("a png named .jpg", WHOLE, "square-2.jpg"),
        ("in capitals", WHOLE, "SQUARE-2.PNG"),
        ("12,000 × 12,000 pixels", png_bomb(12_000, 12_000), "square-2.png"),
    ]),
    Case("a broken image within the limit", 0, f"left out: 1 broken images: {NOT_AN_IMAGE}", {"MAX_BAD_IMAGES": "1"},
         image(b"")),
    Case("a broken image within 5 %", 0, "left out: 1 broken images", {"MAX_BAD_IMAGES": "5 %"}, image(b"")),
    Case("two broken images where one may be", 65, "2 of 42 images are broken, more than MAX_BAD_IMAGES=1 allows",
         {"MAX_BAD_IMAGES": "1"}, both(image(b""), lambda data: (data / "val/red/square-2.png").write_bytes(b""))),
    Case("a broken image where none may be", 65, "more than MAX_BAD_IMAGES=0 allows", {"MAX_BAD_IMAGES": "0"},
         image(b"")),
    Case("every image of val/ is broken", 65, "val/: at least one image must be whole, none is",
         {"MAX_BAD_IMAGES": "20"}, lambda data: [p.write_bytes(b"") for p in data.glob("val/*/*")]),
    Case("many broken images", 65, "and 4 more",
         spoil=lambda data: [p.write_bytes(b"") for p in data.glob("train/*/*")]),
]  # fmt: skip
