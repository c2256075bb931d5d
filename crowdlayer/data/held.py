"""Arrays in files that are mapped: the page cache holds what memory allows."""

from __future__ import annotations

import math
import mmap
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from ..machine.memory import free_memory, in_memory


@dataclass(frozen=True)
class Held:
    """Rows (n, …) of a file that is mapped; its pages are shared with whoever maps it too."""

    rows: Tensor
    mapping: mmap.mmap | None = None
    """The file, where memory cannot hold all of it."""

    def __len__(self) -> int:
        return len(self.rows)

    def __deepcopy__(self, memo: object) -> Held:
        """Itself: nobody writes to the rows, and there may be no memory for a second lot."""
        return self

    def __getitem__(self, wanted: Tensor | slice) -> Tensor:
        """These rows, (k, …).

        Of what memory cannot hold they are asked for together, and nothing around them: a disk's own reading ahead can
        be megabytes for each, and without any it would wait for page after page.
        """
        if self.mapping is not None:
            size = self.rows[0].nbytes
            for row in range(len(self))[wanted] if isinstance(wanted, slice) else wanted.tolist():
                start = row * size // mmap.PAGESIZE * mmap.PAGESIZE
                self.mapping.madvise(mmap.MADV_WILLNEED, start, (row + 1) * size - start)
        return self.rows[wanted]


def mapped(file: IO[bytes], dtype: torch.dtype, shape: tuple[int, ...]) -> Held:
    """All whole rows of `shape` that the file has."""
    size = dtype.itemsize * math.prod(shape)
    n = os.fstat(file.fileno()).st_size // size
    if n == 0:
        return Held(torch.empty(0, *shape, dtype=dtype))
    mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    rows = torch.frombuffer(mapping, dtype=dtype, count=n * math.prod(shape)).view(n, *shape)
    if rows.nbytes <= free_memory():
        return Held(rows)
    mapping.madvise(mmap.MADV_RANDOM)
    return Held(rows, mapping)


def room(folder: Path, spare: int, held: int = 0) -> int:
    """Bytes that files to be mapped may take there, and leave `spare`.

    Where the folder lies in memory, half of what was free there before such files took the first `held` bytes: the rest
    is the training's.
    """
    free = shutil.disk_usage(folder).free - spare
    if in_memory(folder):
        free = min(free, (free_memory() + held) // 2 - held)
    return max(free, 0)
