"""Tensors in files: written whole, and read though others may have written them."""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from ..errors import StoreError, one_line


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
        if out_of_memory(error):
            raise
        if type(error).__name__ == "UnpicklingError":  # torch's words are of how to read it nevertheless
            raise ValueError("it has other things in it than tensors and plain values, or is something else") from error
        raise ValueError(one_line(str(error))[:200] or type(error).__name__) from error


def write_tensors(content: object, path: Path) -> None:
    """torch.save.

    Raises:
        StoreError: the disk is full.
    """
    try:
        torch.save(content, path)
    except RuntimeError as error:  # torch's word for it
        free = shutil.disk_usage(path.parent).free / 1e6
        said = f"{path.parent}: {path.name} must be written whole, with {free:.0f} MB of disk free it is not"
        raise StoreError(f"{said}: {one_line(str(error))}") from error


def _size(file: Path | IO[bytes]) -> int:
    return file.stat().st_size if isinstance(file, Path) else file.seek(0, os.SEEK_END)


def out_of_memory(error: Exception) -> bool:
    """Whether it says so; on the CPU torch has no type for that."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
