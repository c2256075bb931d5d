"""A trained model, ready for new images."""

from __future__ import annotations

import copy
import logging
import tempfile
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from ..data.picture import decode, square
from ..errors import DataError, one_line
from ..machine.cpus import cpus
from ..storage.files import disk_errors
from ..storage.places import place
from .model_files import DESCRIPTION, WEIGHTS, Deployed, Description, read_model

log = logging.getLogger(__name__)

_loading = threading.Lock()
"""Pillow reads an image when its pixels are first asked for, and it may be there twice."""

ImageLike: TypeAlias = str | Path | Image.Image | npt.NDArray[np.uint8]
Probabilities: TypeAlias = npt.NDArray[np.float32]


class Predictor:
    """A classifier with its preprocessing and calibration, on every GPU, or on the CPU where there is none.

    `classes` are the names in the order of the probabilities' columns.
    """

    def __init__(self, model: Deployed, description: Description) -> None:
        self.description = description
        self.classes = tuple(description.classes)
        self.image_size = description.image_size
        names = [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
        self._replicas = [copy.deepcopy(model).to(name) for name in names]

    def predict_proba(self, images: Iterable[ImageLike], batch_size: int = 64) -> Probabilities:
        """(n, classes) float32, rows sum to 1: the calibrated probability of each class for each image.

        Args:
            images: paths of image files, Pillow images, or uint8 arrays of any size: (height, width, 3 or 1) or
                (height, width).
            batch_size: images per step and device.

        Raises:
            DataError: naming the image that cannot be read; one without a name by its place, from 0.
        """
        if isinstance(images, str | Path | Image.Image) or (isinstance(images, np.ndarray) and images.ndim in (2, 3)):
            raise TypeError(f"images: must be a sequence of images, got one {type(images).__name__}")
        parts = list(self.batches(images, batch_size))
        return np.concatenate(parts) if parts else np.empty((0, len(self.classes)), np.float32)

    def predict(self, images: Iterable[ImageLike], batch_size: int = 64) -> list[str]:
        """The name of the likeliest class for each image; the rest as in `predict_proba`."""
        return [self.classes[i] for i in self.predict_proba(images, batch_size).argmax(1)]

    def batches(
        self, images: Iterable[ImageLike], batch_size: int, bad_images: Literal["refuse", "nan"] = "refuse"
    ) -> Iterator[Probabilities]:
        """The probabilities of one batch after another; the next images are decoded while the devices compute.

        An image that cannot be read stops it with a DataError, or has NaN in its row and a warning in the log.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size: must be at least 1, got {batch_size}")
        rest = enumerate(images)
        steps: deque[Future[Probabilities]] = deque()
        with (
            ThreadPoolExecutor(cpus()) as readers,
            ThreadPoolExecutor(len(self._replicas)) as devices,
        ):
            number = 0
            while chunk := list(islice(rest, batch_size)):
                decoding = [readers.submit(self._square, *item) for item in chunk]
                replica = self._replicas[number % len(self._replicas)]
                steps.append(devices.submit(self._step, replica, decoding, bad_images))
                number += 1
                if len(steps) > 2 * len(self._replicas):
                    yield steps.popleft().result()
            while steps:
                yield steps.popleft().result()

    @torch.inference_mode()
    def _step(
        self, model: Deployed, decoding: Sequence[Future[npt.NDArray[np.uint8]]], bad_images: Literal["refuse", "nan"]
    ) -> Probabilities:
        pixels = np.zeros((len(decoding), self.image_size, self.image_size, 3), np.uint8)
        bad = []
        for row, image in enumerate(decoding):
            try:
                pixels[row] = image.result()
            except DataError as error:
                if bad_images == "refuse":
                    raise
                log.warning("%s", error)
                bad.append(row)
        images = torch.from_numpy(pixels).to(next(model.parameters()).device)
        probabilities: Probabilities = model(images).cpu().numpy()
        probabilities[bad] = np.nan
        return probabilities

    def _square(self, place: int, image: ImageLike) -> npt.NDArray[np.uint8]:
        name = str(image) if isinstance(image, str | Path) else f"image {place}"
        try:
            if isinstance(image, str | Path):
                return decode(Path(image), self.image_size)
            if isinstance(image, np.ndarray):
                image = Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image)
            if not isinstance(image, Image.Image):
                raise TypeError(f"it is a {type(image).__name__}, and no path, Pillow image or array")
            with _loading:
                image.load()
            return square(image, self.image_size)
        except (OSError, ValueError, SyntaxError, TypeError, Image.DecompressionBombError) as error:
            raise DataError(f"{one_line(name)}: must be an image: {one_line(str(error))}") from error


def load(location: str | Path) -> Predictor:
    """The classifier of a finished run, ready for new images.

    Args:
        location: of the run's results (`…/results/<name>.json`, what the job prints), of its best model
            (`…/best_models/<name>.pth`) or of the folder `…/best_models/<name>`; a path or an s3:// URI.

    Raises:
        DataError: there is no such model.
        AccessError, StoreError: as the place says.

    Example:
        >>> from crowdlayer import load
        >>> model = load("shapes/results/crowdlayer.json")
        >>> model.classes
        ('blue', 'green', 'red')
        >>> images = ["shapes/test/red/square-2.png", "shapes/test/blue/square-0.png"]
        >>> probabilities = model.predict_proba(images)
        >>> probabilities.shape
        (2, 3)
    """
    name = str(location)
    folder = model_folder(name if name.startswith("s3://") else str(Path(name).absolute()))
    return load_from(folder)


def load_from(folder: str, beside: Path | None = None) -> Predictor:
    """The classifier of a `model_folder`; of a bucket its files lie in the folder `beside` meanwhile, or under TMPDIR.

    Raises:
        DataError, AccessError, StoreError: as `load` says.
    """
    if not folder.startswith("s3://"):
        return Predictor(*read_model(Path(folder)))
    with disk_errors(str(beside or "TMPDIR")), tempfile.TemporaryDirectory(dir=beside) as here:
        source = place(folder)
        for name in (DESCRIPTION, WEIGHTS):
            raw = source.read(name)
            if raw is None:
                raise DataError(f"{folder}: must hold {WEIGHTS} and {DESCRIPTION}, {name} is missing")
            (Path(here) / name).write_bytes(raw)
        return Predictor(*read_model(Path(here), folder))


def model_folder(location: str) -> str:
    """The folder of model.json and model.safetensors that goes with a run's results or best model."""
    folder, _, name = location.rstrip("/").rpartition("/")
    above, slash, kind = folder.rpartition("/")
    of_run = not (name == DESCRIPTION and above.rpartition("/")[2] == "best_models")  # a run may be named results
    if kind == "results" and name.endswith(".json") and of_run:
        return f"{above}{slash}best_models/{name.removesuffix('.json')}"
    if name in (DESCRIPTION, WEIGHTS):
        return folder
    return location.rstrip("/").removesuffix(".pth")
