"""Image files → bytes, decoded once and held for every epoch, for every process of the node and for the next start."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import IO

import numpy as np
import PIL
import torch
from filelock import FileLock
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from ..errors import DeviceMemoryError, one_line, short
from ..logs import track
from ..machine.memory import free_memory
from ..machine.processes import Processes
from ..storage.durable import whole
from ..storage.files import SPARE, disk_errors
from .held import Held, mapped, room

log = logging.getLogger(__name__)

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

Files = list[str | float]
"""Of each file why it is broken, or its picture's width / height."""


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


class Decoded:
    """Images by their row: the first ones are held, the others are decoded whenever they are asked for."""

    def __init__(
        self, held: Held, rows: Tensor, decode_row: Callable[[int], np.ndarray], threads: int, aspect: Tensor
    ) -> None:
        """`held`: m of them; `rows`: (n,) which images these are; `decode_row` gives those from m on.

        `aspect` (n,): width / height of the pictures in their files.
        """
        self._held = held
        self._rows = rows
        self._decode_row = decode_row
        self._threads = threads
        self.aspect = aspect
        self.all_held = bool((rows < len(held)).all())

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, wanted: Tensor | slice) -> Tensor:
        """(k, size, size, 3) uint8."""
        rows = self._rows[wanted]
        if self.all_held:
            return self._held[rows]
        there = rows < len(self._held)
        images = torch.empty(len(rows), *self._held.rows.shape[1:], dtype=torch.uint8)
        images[there] = self._held[rows[there]]
        with ThreadPoolExecutor(self._threads) as pool:
            for to, pixels in zip(
                (~there).nonzero()[:, 0].tolist(), pool.map(self._decode_row, rows[~there].tolist()), strict=True
            ):
                images[to] = torch.from_numpy(pixels.copy())
        return images

    def chosen(self, rows: Tensor) -> Decoded:
        """The images at these places (k,), which are no copies."""
        return Decoded(self._held, self._rows[rows], self._decode_row, self._threads, self.aspect[rows])


def decode_all(
    root: Path,
    names: Sequence[str],
    size: int,
    threads: int,
    folder: Path | None,
    kept: tuple[str, Sequence[str]] | None = None,
    at_most: float = math.inf,
    spare: int = SPARE,
) -> tuple[Decoded, dict[str, str]]:
    """Each file decoded once; and the broken ones, which are not among the images: {name: reason}.

    The bytes lie in a file that is mapped, so the page cache holds what memory allows. Images beyond the room on the
    disk, beyond half of the free memory where the folder lies in it, or beyond `at_most`, are decoded when asked for.

    Args:
        folder: by default TMPDIR, where the file is nameless.
        kept: the split and the SHA-256 of each file: the bytes are kept in `folder`/cache under a name made from
            these, decoded by the first process of the node that comes, and found by the others and by the next start.
        at_most: bytes.
        spare: bytes that stay free on the disk.

    Raises:
        StoreError: the disk failed.
    """

    def decode_row(row: int) -> tuple[np.ndarray, float]:
        with disk_errors(one_line(names[row])):
            return decode_with_aspect(root / names[row], size)

    def fill(file: IO[bytes]) -> Files:
        """Write the images that there is room for."""
        n_held = min(len(names), int(min(_room(place, spare), at_most)) // (3 * size**2))
        with disk_errors(f"{place}: {n_held * 3 * size**2 / 1e9:.1f} GB for decoded images"):
            # a hole that cannot be filled would end a process by SIGBUS
            os.posix_fallocate(file.fileno(), 0, max(n_held, 1) * 3 * size**2)
        held = np.memmap(file, dtype=np.uint8, mode="r+", shape=(max(n_held, 1), size, size, 3))

        def one(row: int) -> str | float:
            try:
                pixels, aspect = decode_row(row)
            except BrokenImageError as error:
                return str(error)
            if row < n_held:
                held[row] = pixels
            return aspect

        with warnings.catch_warnings(), ThreadPoolExecutor(max(threads, 1)) as pool:
            warnings.simplefilter("ignore")  # damage that could be put up with
            files = list(track(pool.map(one, range(len(names))), "decode", len(names), "images"))
        held.flush()
        file.truncate(n_held * 3 * size**2)
        return files

    place = folder or Path(tempfile.gettempdir())
    if kept is None:
        with tempfile.TemporaryFile(dir=folder) as file:
            files = fill(file)
            held = mapped(file, torch.uint8, (size, size, 3))
    else:
        path = place / "cache" / _name(*kept, size)
        with disk_errors(str(path)):
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.parent / ".images.lock"):
                files = _found(path, fill, len(names) * 3 * size**2, at_most, spare)
            with path.open("rb") as written:
                held = mapped(written, torch.uint8, (size, size, 3))
    if len(held) < len(names) and Processes.joined().count == 1:
        log.warning(
            "%d of %d decoded images of %d bytes are held; the others are decoded in every epoch",
            len(held), len(names), 3 * size**2,
        )  # fmt: skip
    whole_ones = {row: found for row, found in enumerate(files) if isinstance(found, float)}
    rows, aspect = torch.tensor(list(whole_ones), dtype=torch.int64), torch.tensor(list(whole_ones.values()))
    images = Decoded(held, rows, lambda row: decode_row(row)[0], max(threads, 1), aspect)
    return images, {name: found for name, found in zip(names, files, strict=True) if isinstance(found, str)}


def _room(folder: Path, spare: int) -> int:
    """Bytes that decoded images may take there beside those of other splits."""
    return room(folder, spare, sum(file.stat().st_size for file in (folder / "cache").glob("images-*")))


def _name(split: str, digests: Sequence[str], size: int) -> str:
    """Made from all that the bytes depend on: the files, the size and the decoder."""
    said = "\n".join([f"3 {PIL.__version__} {size}", *digests])
    return f"images-{split}-{hashlib.sha256(said.encode()).hexdigest()[:32]}"


def _found(path: Path, fill: Callable[[IO[bytes]], Files], n_bytes: int, at_most: float, spare: int) -> Files:
    """What `fill` says of the file, now or when it was filled: a note beside it is written when it is whole.

    One that had no room for all `n_bytes` is filled again when there is. The files of the same split that were made of
    other images are removed.
    """
    note = path.with_suffix(".json")
    alone = Processes.joined().count == 1  # several find what their node's first has just decoded
    try:
        said = json.loads(note.read_bytes())
        held, files = int(said["size"]), Files(said["files"])
        fits = held < n_bytes and min(_room(path.parents[1], spare) + held, at_most) >= n_bytes
        if path.stat().st_size == held and not (alone and fits):
            if alone:
                log.info("decoded images found in %s", path.name)
            return files
    except (FileNotFoundError, ValueError, KeyError):
        pass
    for older in path.parent.glob(f"{path.name.rpartition('-')[0]}-*"):
        older.unlink(missing_ok=True)
    with path.open("w+b") as file:
        files = fill(file)
        os.fsync(file.fileno())
    with whole(note) as file:
        file.write(json.dumps({"size": path.stat().st_size, "files": files}).encode())
    return files
