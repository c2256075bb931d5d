"""Hostile images by the thousand, from a seed: real files of every kind, damaged, and more than they seem."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
from PIL import Image, PngImagePlugin

from tests.catalogue.images import saved

FOREIGN = {
    "ico": "ICO", "tga": "TGA", "pcx": "PCX", "sgi": "SGI", "dds": "DDS", "eps": "EPS", "pdf": "PDF",
    "jp2": "JPEG2000", "icns": "ICNS", "xbm": "XBM", "spider": "SPIDER", "msp": "MSP",
}  # fmt: skip
"""Kinds that Pillow knows and the job must not read."""


def picture(mode: str = "RGB", size: int = 24) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@cache
def whole() -> dict[str, bytes]:
    """A small image of every kind and mode that is read, by name."""
    frames = [picture(size=n) for n in (24, 24, 24)]
    return {
        **{f"{mode}.png": saved(picture(mode), "PNG") for mode in ("RGB", "L", "RGBA", "P", "1", "LA", "I;16")},
        "text.png": saved(picture(), "PNG", pnginfo=texts()),
        "animated.png": saved(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        **{f"{mode}.jpg": saved(picture(mode), "JPEG") for mode in ("RGB", "L", "CMYK")},
        "progressive.jpg": saved(picture(size=64), "JPEG", progressive=True, exif=rotated()),
        "still.gif": saved(picture("P"), "GIF"),
        "animated.gif": saved(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        **{f"{packed}.tif": saved(picture(), "TIFF", compression=packed)
           for packed in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")},
        "pages.tif": saved(frames[0], "TIFF", save_all=True, append_images=frames[1:]),
        "floats.tif": saved(picture("F"), "TIFF"),
        "I.tif": saved(picture("I"), "TIFF"),
        "lossy.webp": saved(picture(), "WEBP"),
        "lossless.webp": saved(picture("RGBA"), "WEBP", lossless=True),
        "animated.webp": saved(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        **{f"{mode}.bmp": saved(picture(mode), "BMP") for mode in ("RGB", "L", "P", "1")},
        **{f"{mode}.ppm": saved(picture(mode), "PPM") for mode in ("RGB", "L", "1")},
        "text.ppm": b"P3 2 2 255 " + b"1 " * 12,
    }  # fmt: skip


def texts() -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("a", "b" * 99, zip=True)
    info.add_itxt("c", "d" * 99, zip=True)
    return info


def rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


# --- damage ----------------------------------------------------------------------------------------------------------

NUMBERS = (b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x80\0\0\0", bytes(4), b"\0\1\0\0", b"\0\0\1\0")


def truncated(body: bytes, draw: random.Random) -> bytes:
    return body[: draw.randrange(len(body))]


def flipped(body: bytes, draw: random.Random) -> bytes:
    out = bytearray(body)
    for _ in range(draw.choice((1, 1, 4, 32))):
        at = draw.randrange(len(out))
        out[at] ^= 1 << draw.randrange(8)
    return bytes(out)


def renumbered(body: bytes, draw: random.Random) -> bytes:
    """A number, mostly of the header, is another: sizes, offsets, counts."""
    at, number = draw.randrange(min(len(body), 200)), draw.choice(NUMBERS)
    return body[:at] + number + body[at + 4 :]


def renumbered_and_signed(body: bytes, draw: random.Random) -> bytes:
    """The same for PNG, whose parts have checksums: these fit again."""
    if not body.startswith(b"\x89PNG"):
        return renumbered(body, draw)
    parts = list(chunks(body))
    which = draw.randrange(len(parts))
    kind, data = parts[which]
    at = draw.randrange(len(data)) if data else 0
    parts[which] = kind, data[:at] + draw.choice(NUMBERS) + data[at + 4 :]
    return body[:8] + b"".join(chunk(*part) for part in parts)


def chunks(png: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        yield png[at + 4 : at + 8], png[at + 8 : at + 8 + length]
        at += 12 + length


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def spliced(body: bytes, draw: random.Random) -> bytes:
    """The first part of one kind, the second of another."""
    other = draw.choice(list(whole().values()))
    return body[: draw.randrange(len(body))] + other[draw.randrange(len(other)) :]


def repeated(body: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(body))
    part = body[at : at + draw.choice((1, 8, 64))]
    return body[:at] + part * draw.choice((2, 100, 10_000)) + body[at:]


DAMAGE = (truncated, flipped, renumbered, renumbered_and_signed, spliced, repeated)


# --- more than they seem ---------------------------------------------------------------------------------------------


def png_of(width: int, height: int, depth: int, colour: int, data: bytes, *more: tuple[bytes, bytes]) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", head), *more, (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def zeros(n: int) -> bytes:
    """`n` zeros, packed."""
    packer = zlib.compressobj(1)
    part = bytes(2**20)
    return b"".join(packer.compress(part[: min(2**20, n - at)]) for at in range(0, n, 2**20)) + packer.flush()


def frames_of(kind: str, n: int) -> bytes:
    one, others = picture("P", 4), [picture("P", 4).rotate(90 * (i % 4)) for i in range(n)]
    return saved(one, kind, save_all=True, append_images=others, duration=20)


@cache
def bombs() -> dict[str, bytes]:
    """Small files that declare, or unpack to, very much."""
    small = saved(picture(), "TIFF")
    at = struct.unpack("<I", small[4:8])[0]
    loop = bytearray(small)
    entries = struct.unpack("<H", small[at : at + 2])[0]
    loop[at + 2 + 12 * entries : at + 6 + 12 * entries] = struct.pack("<I", at)
    gif_head = b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0) + bytes(6)
    return {
        "the largest that is read.png": png_of(13_300, 13_300, 8, 2, zeros(13_300 * 39_901)),
        "the largest with 16 bits.png": png_of(13_300, 13_300, 16, 0, zeros(13_300 * 26_601)),
        "too large.png": png_of(14_000, 14_000, 8, 2, zeros(2**20)),
        "2 billion by 2 billion.png": png_of(2**31 - 1, 2**31 - 1, 8, 2, zeros(99)),
        "a line.png": png_of(2**31 - 1, 1, 8, 2, zeros(99)),
        "no data for its size.png": png_of(9_000, 9_000, 8, 6, zeros(99)),
        "a text of 128 MB.png": png_of(1, 1, 8, 0, zeros(2), (b"zTXt", b"a\0\0" + zeros(2**27))),
        "many texts.png": png_of(1, 1, 8, 0, zeros(2), *[(b"zTXt", b"a\0\0" + zeros(2**20 - 9))] * 200),
        "a profile of 128 MB.png": png_of(1, 1, 8, 0, zeros(2), (b"iCCP", b"a\0\0" + zeros(2**27))),
        "frames.gif": frames_of("GIF", 500),
        "frames.png": frames_of("PNG", 200),
        "frames.webp": frames_of("WEBP", 200),
        "a large frame.gif": gif_head + b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\2\2\x4c\1\0;",
        "pages in a loop.tif": bytes(loop),
        "huge.bmp": b"BM" + struct.pack("<IHHIIiiHHIIIIII", 99, 0, 0, 54, 40, 2**31 - 1, -(2**31), 1, 24, *[0] * 6),
        "huge.ppm": b"P6 999999999 999999999 255\n" + bytes(99),
        "large.ppm": b"P6 13000 13000 255\n" + bytes(99),
        "digits.ppm": b"P6 " + b"9" * 100_000 + b" 1 255\n",
        "comments.ppm": b"P6 " + b"#x\n" * 300_000,
        "huge.webp": b"RIFF\x1a\0\0\0WEBPVP8L\x0d\0\0\0\x2f" + b"\xff" * 12,
    }  # fmt: skip


@cache
def foreign() -> dict[str, bytes]:
    """Images and programs that are none of the kinds that are read, under names of those that are."""
    others = {
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
        "page": b"<html><script>alert(1)</script>",
        "program": b"#!/bin/sh\ntouch /tmp/owned\n",
        "elf": b"\x7fELF" + bytes(60),
        "zip": b"PK\5\6" + bytes(18),
        "mvg": b"push graphic-context\nimage over 0,0 0,0 'https://host/x.png\"|touch /tmp/owned'\n",
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch /tmp/owned) (w) file\n",
        "psd": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 9, 9, 8, 3) + bytes(99),
        "fits": b"".join(line.ljust(80) for line in (b"SIMPLE  =                    T", b"NAXIS   =  0", b"END")),
        "empty": b"",
        "newline": b"\n",
    }  # fmt: skip
    for name, kind in FOREIGN.items():
        mode = {"eps": "RGB", "xbm": "1", "msp": "1", "spider": "F"}.get(name, "RGB")
        others[name] = saved(picture(mode, 32), kind)
    return {f"{name}.{ending}": body for name, body in others.items() for ending in ("png", "jpg")}


def images(n: int, seed: int = 0) -> Iterator[tuple[str, bytes, bool]]:
    """`n` of them: name, content, and whether it must be refused. Every bomb and stranger, the rest damaged."""
    draw = random.Random(seed)
    special = [(name, body, False) for name, body in bombs().items()]
    special += [(name, body, True) for name, body in foreign().items()]
    yield from special[:n]
    kinds = list(whole().items())
    for number in range(n - len(special)):
        name, body = kinds[number % len(kinds)]
        damage: Callable[[bytes, random.Random], bytes] = draw.choice(DAMAGE)
        ending = draw.choice((name.rpartition(".")[2], "png", "JPG", "tiff"))
        yield f"{number}-{name}-{damage.__name__}.{ending}", damage(body, draw), False
