"""How the kernels come to be, and how they are launched."""

from __future__ import annotations

import ctypes
import logging
import re
import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import one_line

log = logging.getLogger(__name__)

Grid = tuple[tuple[int, int, int], tuple[int, int, int]]
"""Blocks and threads per block."""
Argument = Tensor | int | float
"""Of a kernel: a pointer, an int, a double."""

FILES = ("eight", "batch_norm", "pooling", "patches", "crowd", "sgd")
KERNEL = re.compile(r'extern "C" __global__ void __launch_bounds__\([^)]*\)\s+(\w+)\(')
_thread = threading.local()
"""Whose context a thread has: the driver wants one, which torch's first kernel brings; autograd has its own threads."""
HOPPER = 9
"""The first compute capability where one kernel may begin while another ends."""
EACH = 256
"""Threads of a block that does each thing alone; the sources have it, too."""


class Kernel:
    """A kernel of a module that torch has loaded, which itself launches none early."""

    def __init__(self, loaded: Any, launch: Callable[..., int], may_be_early: bool) -> None:
        """`launch` is the driver's cuLaunchKernelEx."""
        self._loaded = loaded
        self._launch = launch
        self._may_be_early = may_be_early

    def __call__(
        self, blocks: tuple[int, int, int], threads: tuple[int, int, int], arguments: Sequence[Argument], early: bool
    ) -> None:
        """On the current stream.

        Raises:
            RuntimeError: the driver does not launch it.
        """
        values = [_value(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        how = _Attribute(SERIALIZATION, 0, 1)
        n = int(early and self._may_be_early)
        config = _Config(blocks, threads, 0, torch.cuda.current_stream().cuda_stream, ctypes.pointer(how), n)
        error = self._launch(ctypes.byref(config), self._loaded.func, pointers, None)
        if error:
            raise RuntimeError(f"a kernel cannot be launched: CUDA error {error}")


SERIALIZATION = 6
"""CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION"""


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute, whose value is a number here."""

    _fields_ = (("kind", ctypes.c_int), ("_", ctypes.c_int), ("value", ctypes.c_int), ("__", ctypes.c_int * 15))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("blocks", ctypes.c_uint * 3),
        ("threads", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("n", ctypes.c_uint),
    )


def _value(argument: Argument) -> ctypes.c_void_p | ctypes.c_int | ctypes.c_double:
    match argument:
        case Tensor():
            return ctypes.c_void_p(argument.data_ptr())
        case int():
            return ctypes.c_int(argument)
        case float():
            return ctypes.c_double(argument)


def source() -> str:
    """All of them."""
    return "\n".join(Path(__file__).with_name(f"{name}.cu").read_text() for name in FILES)


@cache
def kernels(device: torch.device) -> dict[str, Kernel] | None:
    """The kernels by their names, or None where they cannot be had, which on a GPU the log says."""
    if device.type != "cuda":
        return None
    try:
        from torch.cuda._utils import _cuda_load_module, _nvrtc_compile

        text = source()
        names = KERNEL.findall(text)
        major, minor = torch.cuda.get_device_capability(device)
        launch = ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
        binary, *_ = _nvrtc_compile(text, names[0], f"{major}{minor}")
        loaded: dict[str, Any] = _cuda_load_module(binary, names)  # type: ignore[assignment]
    except Exception as error:  # torch's way to the compiler is not one that it has promised to keep
        log.info("no kernels of our own, torch's do as well: %s", one_line(str(error)))
        return None
    return {name: Kernel(kernel, launch, major >= HOPPER) for name, kernel in loaded.items()}


def available(device: torch.device) -> bool:
    """Whether the kernels can be had."""
    return kernels(device) is not None


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def run(name: str, grid: Grid, arguments: Sequence[Any], early: bool = False) -> None:
    """Launch a kernel; its first argument is a tensor.

    With `early` it is on its way while the one before it on the stream ends: it waits for that one by itself.
    """
    first: Tensor = arguments[0]
    found = kernels(first.device)
    assert found is not None
    if getattr(_thread, "device", None) != first.device:
        first.new_empty(1).zero_()
        _thread.device = first.device
    found[name](*grid, arguments, early)


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
