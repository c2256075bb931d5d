"""The trained model as files that other programs read: weights in safetensors, what it takes to use them in JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .. import __version__
from ..data.pixels import MEAN, STD, scaling, standardise
from ..errors import DataError, StoreError, one_line
from ..learning.classifier import build_classifier, transform_input
from ..storage.files import disk_errors

WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"


@dataclass(frozen=True)
class Preprocessing:
    """What happens to an image before the network, as `picture.decode` and `pixels.normalise` do it."""

    color: str = "RGB, EXIF rotation applied, the upper 8 bits of 16"
    resize: str = "the whole image to a square of image_size pixels, Pillow's bilinear"
    scale: float = 1 / 255
    mean: list[float] = field(default_factory=lambda: list(MEAN))
    std: list[float] = field(default_factory=lambda: list(STD))


@dataclass(frozen=True)
class Description:
    """model.json: all that is needed to use the weights.

    `architecture` is a name of torchvision.models, `small_stem` says that its stem is `classifier._small_stem`'s;
    `transform_input` that the network, googlenet or inception_v3, has this flag of torchvision's set;
    `temperature` divides the logits before the softmax; the rest of the file is for other programs.
    """

    architecture: str
    classes: list[str]
    image_size: int
    small_stem: bool = False
    temperature: float = 1.0
    transform_input: bool = False
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    crowdlayer: str = __version__


class Deployed(nn.Module):
    """(n, image_size, image_size, 3) uint8 RGB → (n, classes) calibrated probabilities, float32.

    Normalisation, classifier, temperature and softmax in one network: who has it cannot prepare images wrongly.
    """

    def __init__(self, classifier: nn.Module, temperature: float) -> None:
        super().__init__()
        self.classifier = classifier
        self.temperature = temperature
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(standardise(images, *scaling(images.device)))
        return (logits / self.temperature).softmax(1)


def rebuilt(description: Description, state: dict[str, Tensor]) -> Deployed:
    """The network that `description` tells of, with the weights `state` of the bare classifier."""
    with torch.random.fork_rng(devices=[]):  # its first weights are random, and replaced at once
        classifier = build_classifier(
            description.architecture,
            len(description.classes),
            description.image_size,
            pretrained=False,
            freeze=False,
            small_images="true" if description.small_stem else "false",
        )
    if description.transform_input:
        transform_input(classifier)
    classifier.load_state_dict(state)
    return Deployed(classifier.requires_grad_(False), description.temperature)


def write_model(folder: Path, description: Description, state: dict[str, Tensor]) -> list[str]:
    """Write model.safetensors and model.json into `folder`; returns their names.

    Raises:
        StoreError: the disk failed.
    """
    with disk_errors(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / WEIGHTS, {"format": "pt"})
        except SafetensorError as error:  # its word for a full disk
            raise StoreError(f"{folder}: the model must be written whole: {one_line(str(error))}") from error
        raw = msgspec.json.format(msgspec.json.encode(asdict(description)), indent=3)
        (folder / DESCRIPTION).write_bytes(raw + b"\n")
    return [WEIGHTS, DESCRIPTION]


def read_model(folder: Path, origin: str = "") -> tuple[Deployed, Description]:
    """The model that `write_model` wrote.

    Args:
        origin: what errors call the folder, where it has come from elsewhere.

    Raises:
        DataError: it is not such a model, or was made with other preprocessing than this version's.
        AccessError, StoreError: the file may not be read, the disk failed.
        SettingsError: its architecture is none that is known here.
    """
    called = one_line(origin or str(folder))
    complaint = f"{called}: must hold {WEIGHTS} and {DESCRIPTION}"
    with disk_errors(called):
        try:
            raw = (folder / DESCRIPTION).read_bytes()
            (folder / WEIGHTS).open("rb").close()  # whatever is wrong with it, safetensors says that it is not there
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise DataError(f"{complaint}: {one_line(str(error.filename))} is missing") from error
        try:
            description = msgspec.json.decode(raw, type=Description)
            if description.preprocessing != Preprocessing():
                raise DataError(
                    f"{DESCRIPTION}: preprocessing must be what crowdlayer {__version__} does, "
                    f"the model is of version {description.crowdlayer}"
                )
            return rebuilt(description, load_file(folder / WEIGHTS)), description
        except (SafetensorError, msgspec.DecodeError, UnicodeDecodeError, RuntimeError) as error:
            raise DataError(f"{complaint}: {one_line(str(error))}") from error
