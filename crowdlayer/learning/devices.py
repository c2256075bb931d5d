"""What this process trains on: device, precision, memory, and the processes that train with it."""

from __future__ import annotations

import logging
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from ..errors import DeviceMemoryError, SettingsError
from ..machine.memory import allocations_must_fit, used_memory
from ..machine.processes import Processes
from ..settings import TrainingSettings
from .tensors import out_of_memory

log = logging.getLogger(__name__)


@contextmanager
def enough_memory(settings: TrainingSettings) -> Iterator[None]:
    """Say which settings need less memory when there is too little, or more images per step.

    Raises:
        DeviceMemoryError: out of memory on the device.
        SettingsError: one image alone, of which batch norm makes nothing.
    """
    used = f"MODEL={settings.model}, BATCH_SIZE={settings.batch_size} and IMG_SIZE={settings.img_size}"
    try:
        with memory_for(used, "lower one of them"):
            yield
    except ValueError as error:
        if "more than 1 value per channel" in str(error):
            raise SettingsError(
                f"BATCH_SIZE: at least 2 images per step and process are needed for MODEL={settings.model} with "
                f"IMG_SIZE={settings.img_size}, {settings.batch_size} leaves one alone in a step"
            ) from error
        raise


@contextmanager
def memory_for(what: str, remedy: str) -> Iterator[None]:
    """Say what there was too little memory for, and what helps.

    Raises:
        DeviceMemoryError: out of memory; on the CPU torch says so in a RuntimeError.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if out_of_memory(error):
            raise DeviceMemoryError(f"out of memory with {what}: {remedy}{_wanted(str(error))}") from error
        raise


def bound_to_container() -> None:
    """Compute on the CPUs that are this process's, and have what its container has no memory for fail, and be said.

    GPUs do so anyway; CUDA reserves far more addresses than memory, and could not live with such a bound.
    """
    torch.set_num_threads(_threads())
    if not torch.cuda.is_available():
        allocations_must_fit(_threads())


def _threads() -> int:
    """How many compute on this process's CPUs: torch counts the machine's, not a container's."""
    return min(torch.get_num_threads(), Processes.joined().cpus())


def _wanted(said: str) -> str:
    """What torch says that it could not have: bytes of the CPU's memory, larger units of a GPU's."""
    found = re.search(r"ried to allocate ([\d.]+ \w+)", said)
    return f"; {found[1]} more were asked for" if found else ""


def precision(settings: TrainingSettings) -> str:
    """no, fp16 or bf16: what MIXED_PRECISION names, for the devices at hand.

    Raises:
        SettingsError: no device here has it.
    """
    if settings.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise SettingsError("MIXED_PRECISION: fp16 needs a GPU, there is none")
    if settings.mixed_precision == "auto":
        native = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if native else "no"
    if settings.mixed_precision == "bf16" and not torch.cuda.is_available() and not _cpu_has_bf16():
        log.warning("MIXED_PRECISION=bf16: this CPU emulates it, convolutions take ten times as long: consider no")
    return settings.mixed_precision


def _cpu_has_bf16() -> bool:
    known: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch that will do
    return any(known.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def make_accelerator(settings: TrainingSettings) -> Accelerator:
    """Accelerate for this process's device, in the precision that MIXED_PRECISION names."""
    if Path("/dev/nvidiactl").exists() and not torch.cuda.is_available():
        log.warning(
            "there is an NVIDIA driver, but torch %s (CUDA %s) sees no GPU: training on the CPU",
            torch.__version__, torch.version.cuda,
        )  # fmt: skip
    torch.set_num_threads(_threads())
    compiler_must_be_there(settings)
    if torch.cuda.is_available():
        warnings.filterwarnings("ignore", "Attempting to run cuBLAS")  # torch's first step, of itself
        torch.backends.cudnn.benchmark = True  # the shapes are few: it pays to try all algorithms once
    # Accelerate keeps the first precision of a process for good; a notebook may ask for another.
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=precision(settings), cpu=not torch.cuda.is_available())
    # Accelerate can make lone processes of N, without a word, that then race for the same files.
    assert accelerator.num_processes == Processes.joined().count
    return accelerator


def device_name(device: torch.device) -> str:
    """The device trained on, with its make."""
    return f"{device} {torch.cuda.get_device_name(device)}" if device.type == "cuda" else device.type


def driver() -> str:
    """NVIDIA's driver, as its kernel module tells."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split()
    except OSError:
        return ""
    version = next((word for word in words if word[0].isdigit() and "." in word), "of unknown version")
    return f", driver {version}"


def seed_all(seed: int, device: torch.device) -> None:
    """torch.manual_seed for the two devices that draw; of others it would keep a stack trace, which takes time."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def device_memory(device: torch.device) -> tuple[int, int]:
    """The most bytes that this process has used, of the device's or its machine's, and how many there are for it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
    return used_memory()


def processes_here(wanted: int | Literal["auto"]) -> int:
    """How many training processes N_PROCESSES asks for on this node; counting does not wake the GPUs.

    Raises:
        SettingsError: more than there are GPUs, where there is one.
    """
    gpus = torch.cuda.device_count()
    if wanted == "auto":
        return max(gpus, 1)
    if 0 < gpus < wanted:
        raise SettingsError(f"N_PROCESSES: must be at most {gpus}, the number of visible GPUs, got {wanted}")
    return wanted


def laid_out(classifier: nn.Module) -> nn.Module:
    """The classifier with its weights in the order that the device's convolutions want, as `normalise` has images.

    Where there are several processes gradients get the strides of their weights: for a dimension of size 1 a backend
    chooses any, which is the same to all but DDP.
    """
    if torch.cuda.is_available():
        classifier = classifier.to(memory_format=torch.channels_last)
    for weight in classifier.parameters() if Processes.joined().count > 1 else ():
        if weight.requires_grad and 1 in weight.shape:
            weight.register_hook(partial(_like, weight.shape, weight.stride()))  # type: ignore[no-untyped-call]
    return classifier


def _like(shape: Sequence[int], strides: Sequence[int], gradient: Tensor) -> Tensor:
    """The gradient with these strides, where they differ in dimensions of size 1 alone; it stays where it is."""
    same = all(n == 1 or a == b for n, a, b in zip(shape, strides, gradient.stride(), strict=True))
    return gradient.as_strided(shape, strides) if same else gradient


def compiled(classifier: nn.Module, settings: TrainingSettings) -> nn.Module:
    """The classifier, whose steps run in code that torch.compile makes at the first ones, where COMPILE asks for it.

    In place: the weights keep their names, and a copy of the classifier is not compiled. Each of the few shapes of an
    epoch gets code of its own, so that the bits do not depend on which came first: a run that is resumed may meet them
    in another order. Of a frozen network there is little to gain.
    """
    if settings.compile == "true" and settings.freeze:
        log.info("COMPILE=true: nothing to compile with FREEZE=true")
    elif settings.compile == "true":
        torch.compiler.reset()  # what an earlier training has left counts against dynamo's limit
        classifier.compile(dynamic=False)
    return classifier


def compiler_must_be_there(settings: TrainingSettings) -> None:
    """Refuse COMPILE=true before anything is trained where torch.compile would fail at the first step.

    Raises:
        SettingsError: there is no compiler.
    """
    if settings.compile != "true" or settings.freeze:
        return
    if torch.cuda.is_available():
        if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
            raise SettingsError("COMPILE: true needs a C compiler, there is none")
        return
    from torch._inductor.cpp_builder import get_cpp_compiler  # seconds, for those alone who compile

    try:
        get_cpp_compiler()
    except Exception as error:
        raise SettingsError("COMPILE: true needs a C++ compiler, there is none") from error


def synchronised(classifier: nn.Module, settings: TrainingSettings) -> nn.Module:
    """The classifier with batch norm over the whole batch of all processes, where SYNC_BATCHNORM asks for it.

    Raises:
        SettingsError: asked for without GPUs; torch has it for CUDA alone.
    """
    if Processes.joined().count == 1 or settings.sync_batchnorm == "false":
        return classifier
    if torch.cuda.is_available():
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(classifier)  # type: ignore[no-untyped-call]
        return converted
    if settings.sync_batchnorm == "true":
        raise SettingsError("SYNC_BATCHNORM: true needs GPUs, there is none")
    return classifier
