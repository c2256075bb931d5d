"""How the kernels come to be, and how they are launched."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import one_line

log = logging.getLogger(__name__)

Grid = tuple[tuple[int, int, int], tuple[int, int, int]]
"""Blocks and threads per block."""

FILES = ("eight", "batch_norm", "pooling", "patches", "crowd")
KERNEL = re.compile(r'extern "C" __global__ void __launch_bounds__\([^)]*\)\s+(\w+)\(')
EACH = 256
"""Threads of a block that does each thing alone; the sources have it, too."""


def source() -> str:
    """All of them."""
    return "\n".join(Path(__file__).with_name(f"{name}.cu").read_text() for name in FILES)


@cache
def kernels(device: torch.device) -> dict[str, Any] | None:
    """The kernels by their names, or None where they cannot be had, which on a GPU the log says."""
    if device.type != "cuda":
        return None
    try:
        from torch.cuda._utils import _cuda_load_module, _nvrtc_compile

        text = source()
        names = KERNEL.findall(text)
        major, minor = torch.cuda.get_device_capability(device)
        binary, *_ = _nvrtc_compile(text, names[0], f"{major}{minor}")
        made: dict[str, Any] = _cuda_load_module(binary, names)  # type: ignore[assignment]
    except Exception as error:  # torch's way to the compiler is not one that it has promised to keep
        log.info("no kernels of our own, torch's do as well: %s", one_line(str(error)))
        return None
    return made


def available(device: torch.device) -> bool:
    """Whether the kernels can be had."""
    return kernels(device) is not None


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def run(name: str, grid: Grid, arguments: Sequence[Any]) -> None:
    """Launch a kernel; its first argument is a tensor."""
    found = kernels(arguments[0].device)
    assert found is not None
    found[name](*grid, list(arguments))


def fit(*tensors: Tensor) -> bool:
    """Whether kernels are made for such activations, (n, channels, height, width), and can be had."""
    one = tensors[0]
    return (
        all(t.dtype == torch.bfloat16 and t.is_contiguous(memory_format=torch.channels_last) for t in tensors)
        and all(t.shape == one.shape for t in tensors)
        and one.shape[1] % 8 == 0
        and one.shape[1] < one.numel() < 2**31
        and available(one.device)
    )


def same(y: Tensor) -> Tensor:
    """The same memory, in a tensor of its own: no view, of which autograd would have to know."""
    return y.new_empty(0).set_(y.untyped_storage(), y.storage_offset(), y.shape, y.stride())
