"""Values handed from one process to another by a file: plain ones as JSON, tensors and arrays as their bytes.

No pickle, which would run what it reads: a file is decoded as the type that is asked for, or not at all.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor

from .files import disk_errors

T = TypeVar("T")


def hand(value: object, path: Path) -> None:
    """Write a dataclass of plain values, paths, settings, tensors on the CPU and arrays.

    Raises:
        StoreError: the disk failed.
    """
    arrays: list[np.ndarray] = []

    def plain(part: object) -> object:
        match part:
            case Path():
                return str(part)
            case BaseModel():
                return part.model_dump(mode="json")
            case Tensor() | np.ndarray():
                arrays.append(np.asarray(part))
                return len(arrays) - 1
        raise NotImplementedError(f"{type(part).__name__}: is not to be handed on")

    text = json.dumps(msgspec.to_builtins(value, enc_hook=plain))  # json's own: it writes names that are no UTF-8
    with disk_errors(str(path.parent)):
        np.savez(path, np.frombuffer(text.encode(), dtype=np.uint8), *arrays, allow_pickle=False)


def take(path: Path, kind: type[T]) -> T:
    """The `kind` that was written there."""
    with np.load(path, allow_pickle=False) as parts:
        text, *arrays = parts.values()

    def part(wanted: Any, plain: Any) -> object:
        wanted = getattr(wanted, "__origin__", wanted)  # an array's type says of what
        if issubclass(wanted, Tensor):
            return torch.from_numpy(arrays[plain])
        if issubclass(wanted, np.ndarray):
            return arrays[plain]
        if issubclass(wanted, BaseModel):
            return wanted.model_validate(plain)
        return wanted(plain)

    return msgspec.convert(json.loads(text.tobytes()), kind, dec_hook=part)
