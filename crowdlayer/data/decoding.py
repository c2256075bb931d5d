"""Image files → bytes, decoded once and held for every epoch, for every process of the node and for the next start."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
import PIL
import torch
from filelock import FileLock
from torch import Tensor

from ..errors import one_line
from ..logs import track
from ..machine.processes import Processes
from ..storage.durable import whole
from ..storage.files import SPARE, disk_errors
from .held import Held, mapped, room
from .picture import BrokenImageError, decode_with_aspect

log = logging.getLogger(__name__)

Files = list[str | float]
"""Of each file why it is broken, or its picture's width / height."""


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
