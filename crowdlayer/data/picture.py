"""An image file → bytes: what an image may be, and how it is read whatever is odd about it."""

from __future__ import annotations

import errno
import threading
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from ..errors import DeviceMemoryError, one_line, short
from ..machine.memory import free_memory

FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
"""What an image may be, whatever its name ends with. Pillow knows many more, and some start other programs."""
LARGE = 2**24
"""Images of more pixels are decoded one at a time; those above Pillow's limit, 2**27.4, not at all."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What puts a picture upright, by EXIF's orientation. ImageOps.exif_transpose writes the other tags anew, too,
and fails where one of them is odd."""
NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
"""What the system says of a link that leads nowhere, through a file, or to itself."""
BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2}
"""Of a pixel, as Pillow has it in memory; of all other modes four."""
_large = threading.Lock()


def _one_at_a_time(large: bool) -> AbstractContextManager[object]:
    return _large if large else nullcontext()


class BrokenImageError(ValueError):
    """The file is no image that can be used; the text is the reason."""


def decode(path: Path, size: int) -> np.ndarray:
    """(size, size, 3) uint8 RGB, the whole image resized as peerannot does (bilinear, aspect ratio not kept).

    16-bit images keep their upper 8 bits; EXIF rotation is applied; of an animation it is the first picture. A JPEG of
    four times the size and more is decoded at a half, a quarter or an eighth of its own, which JPEG has for the asking,
    still at least twice the size: two to six times as fast, and less than one level of 256 off on average.

    Raises:
        BrokenImageError: Pillow cannot read it, whatever its reason: decoders meet damage in many ways.
        DeviceMemoryError: it is too large for this machine.
        OSError: the disk failed.
    """
    return decode_with_aspect(path, size)[0]


def decode_with_aspect(path: Path, size: int) -> tuple[np.ndarray, float]:
    """What `decode` gives, and the whole image's width / height when it is upright, to four digits."""
    try:
        with Image.open(path, formats=FORMATS) as opened, _one_at_a_time(opened.width * opened.height > LARGE):
            width, height = opened.size  # a draft's are rounded
            opened.draft(None, (2 * size, 2 * size))
            if width * height > LARGE:
                _must_fit(opened, path.name)
            pixels = square(opened, size)
            turned = _orientation(opened) >= 5
            return pixels, float(f"{height / width if turned else width / height:.4g}")
    except UnidentifiedImageError as error:
        raise BrokenImageError("it is of no known format") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in NOWHERE and path.is_symlink():
            raise BrokenImageError("it is a link to nowhere") from error
        if isinstance(error, MemoryError | DeviceMemoryError) or (
            isinstance(error, OSError) and error.errno is not None
        ):
            raise
        raise BrokenImageError(one_line(str(error)) or type(error).__name__) from error


def _must_fit(opened: Image.Image, name: str) -> None:
    """Refuse a picture that there is no memory for: the kernel would kill the process without a word.

    There is a copy of what is turned, and one of four bytes of what is converted.
    """
    pixel = BYTES.get(opened.mode, 4)
    pixel += pixel * ("exif" in opened.info)  # to ask what it says would decode a PNG
    pixel += 4 * (opened.mode not in ("RGB", "L"))
    need, free = pixel * opened.width * opened.height, free_memory()
    if need > free:
        size = f"{opened.width} × {opened.height} pixels"
        raise DeviceMemoryError(
            f"out of memory: {short(name, 300)}: {size} take up to {need / 1e6:.0f} MB, {free / 1e6:.0f} are free; "
            "give the job more memory, or the image fewer pixels"
        )


def square(opened: Image.Image, size: int) -> np.ndarray:
    """(size, size, 3) uint8 RGB of an open image, which stays as it is, as `decode` says."""
    opened.load()
    if not all(opened.size):
        raise BrokenImageError("it has no pixels")
    image: Image.Image = opened
    if (turn := TURNS.get(_orientation(opened))) is not None:
        image = opened.transpose(turn)  # a copy of what may be very large
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode == "I":
        integers = np.asarray(image)
        for value in (integers.min(), integers.max()):
            if not 0 <= value <= 0xFFFF:  # black or white, and nothing would say so
                raise BrokenImageError(f"integer pixels must be from 0 to 65535, one is {value}")
        image = Image.fromarray((integers >> 8).astype(np.uint8))
    elif image.mode == "F":
        floats = np.nan_to_num(np.asarray(image))
        for value in (floats.min(), floats.max()):
            if not 0 <= value <= 1:
                raise BrokenImageError(f"pixels that are no integers must be from 0 to 1, one is {value:g}")
        image = Image.fromarray((floats * 255).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode not in ("RGB", "L"):  # a grey picture is as grey when it is small
        image = image.convert("RGB")
    small = image.resize((size, size), Image.Resampling.BILINEAR)
    # converting what needs none would copy it, and let no other thread pass meanwhile
    return np.asarray(small if small.mode == "RGB" else small.convert("RGB"))


def _orientation(loaded: Image.Image) -> int:
    """As EXIF says it: 1 is upright, from 5 on width and height are exchanged. Where it says nothing sensible, 1."""
    try:
        orientation = loaded.getexif().get(ExifTags.Base.Orientation, 1)
    except (MemoryError, OSError):
        raise
    except Exception:  # damaged, which Pillow meets in many ways; the picture is none the worse
        return 1
    return orientation if isinstance(orientation, int) and orientation in TURNS else 1
