"""Tensors from files that others may have written."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from ..errors import one_line


def read_tensors(file: Path | IO[bytes]) -> Any:
    """The tensors and plain values of a file that torch.save wrote; nothing in it is run.

    torch packs nothing in its archives. One that is packed could unpack to more than there is memory.

    Raises:
        ValueError: it is no such file.
    """
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
            if any(m.compress_type != zipfile.ZIP_STORED for m in members):
                raise ValueError("its parts must not be packed")
            if sum(m.file_size for m in members) > _size(file):
                raise ValueError("its parts must not be larger than the file")
        if not isinstance(file, Path):
            file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no error type of its own for "this is no such file"
        raise ValueError(one_line(str(error))[:200] or type(error).__name__) from error


def _size(file: Path | IO[bytes]) -> int:
    return file.stat().st_size if isinstance(file, Path) else file.seek(0, os.SEEK_END)
