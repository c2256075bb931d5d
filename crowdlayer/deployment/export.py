"""The trained model in other programs' formats, each compared with the original on the way out."""

from __future__ import annotations

import importlib.util
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import SettingsError, one_line
from ..storage.files import disk_errors
from .model_files import Deployed

log = logging.getLogger(__name__)

Format = Literal["onnx", "torch_export"]
FILES: dict[Format, str] = {"onnx": "model.onnx", "torch_export": "model.pt2"}
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-3
"""Of a probability: other kernels add in another order, in float32 over dozens of layers."""


def check_packages(formats: Sequence[Format]) -> None:
    """Refuse a format whose packages are not here.

    Raises:
        SettingsError: with what to install.
    """
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if "onnx" in formats and missing:
        raise SettingsError(f"EXPORT: onnx needs {', '.join(missing)}: pip install {' '.join(missing)}")


def check_export(classifier: nn.Module, image_size: int, formats: Sequence[Format], above: Path | None = None) -> None:
    """Refuse what could not be exported once it is trained, on weights that are not.

    Args:
        above: the folder in which there is room for it, by default TMPDIR.

    Raises:
        SettingsError, StoreError: as `export` does.
    """
    if formats:
        with disk_errors(f"{above or 'TMPDIR'}"), tempfile.TemporaryDirectory(dir=above) as folder:
            export(Path(folder), Deployed(classifier, 1.0), image_size, formats)


def export(folder: Path, model: Deployed, image_size: int, formats: Sequence[Format]) -> list[str]:
    """Write `model`, on the CPU, into `folder` in each of `formats`; returns the names of all files written.

    What is exported takes "images", (n, image_size, image_size, 3) uint8 RGB for any n, and gives "probabilities",
    (n, classes) float32: preprocessing and temperature are inside.

    Raises:
        SettingsError: the network cannot be written so, or what was written does not compute the same.
        StoreError: the disk failed.
    """
    check_packages(formats)
    before = {path.name for path in folder.iterdir()}
    for name in formats:
        writer: Callable[[Path, torch.export.ExportedProgram], Callable[[Tensor], Tensor]]
        writer = _write_onnx if name == "onnx" else _write_torch_export
        with disk_errors(str(folder)):
            try:
                with warnings.catch_warnings(), torch.inference_mode():
                    warnings.simplefilter("ignore")  # of the exporters' own insides
                    written = writer(folder / FILES[name], _traced(model, image_size))
                    difference = _difference(model, written, image_size)
            except Exception as error:  # the exporters have no error type in common
                if isinstance(error, OSError) and error.errno is not None:
                    raise  # the disk's
                raise SettingsError(f"EXPORT: {name} cannot hold this MODEL: {one_line(str(error))[:200]}") from error
        if not difference <= TOLERANCE:
            raise SettingsError(
                f"EXPORT: {name} must give the model's probabilities within {TOLERANCE}, is off by {difference:.2g}"
            )
        log.info("%s gives the model's probabilities within %.1e", FILES[name], difference)
    return sorted(path.name for path in folder.iterdir() if path.name not in before)


def _traced(model: Deployed, image_size: int) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("n", min=1)
    return torch.export.export(model, (_images(2, image_size),), dynamic_shapes={"images": {0: batch}})


def _images(n: int, size: int) -> Tensor:
    return torch.randint(0, 256, (n, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))


def _write_torch_export(path: Path, program: torch.export.ExportedProgram) -> Callable[[Tensor], Tensor]:
    whole = io.BytesIO()
    torch.export.save(program, whole)
    path.write_bytes(whole.getbuffer())  # where a disk is full torch's own writer aborts the process
    loaded: Callable[[Tensor], Tensor] = torch.export.load(path).module()
    return loaded


def _write_onnx(path: Path, program: torch.export.ExportedProgram) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    made = torch.onnx.export(
        program, dynamo=True, verbose=False, input_names=["images"], output_names=["probabilities"]
    )
    assert made is not None  # with dynamo=True there always is a program
    made.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["probabilities"], {"images": images.numpy()})[0])


def _difference(model: Deployed, written: Callable[[Tensor], Tensor], image_size: int) -> float:
    """The largest difference of a probability, over batches of one and of several images."""
    batches = [_images(n, image_size) for n in (1, 5)]
    return max(float((model(images) - written(images)).abs().max()) for images in batches)
