"""Any classification model of torchvision, with a head for our classes."""

from __future__ import annotations

import logging
import urllib.error
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torchvision import models

from ..data.pixels import MEAN, STD
from ..errors import SettingsError, StoreError, one_line, short
from .tensors import read_tensors

log = logging.getLogger(__name__)

SMALL_BELOW = 64
"""SMALL_IMAGES=auto: a resnet halves its input five times, which leaves less than 2×2 of an image below this side."""

TRANSFORMING = frozenset({"googlenet", "inception_v3"})
"""With torchvision's weights these turn ImageNet's normalisation into mean and deviation 0.5 (`transform_input`)."""


def build_classifier(
    name: str, n_classes: int, size: int, pretrained: bool | Path, freeze: bool, small_images: str
) -> nn.Module:
    """A network from (n, 3, size, size) images to (n, n_classes) logits.

    Args:
        name: of a classification model of torchvision.models.
        pretrained: True for torchvision's default weights (from the network, or TORCH_HOME), or a state dict's file;
            a head of another number of classes stays as initialised.
        freeze: train the head only.
        small_images: auto, true or false: a stem that keeps the resolution.

    Raises:
        SettingsError: the model is not known, cannot take such images, or does not fit the weights.
        StoreError: torchvision's weights cannot be had.
    """
    _known(name)
    model = _make_for(name, n_classes, size)
    if wants_small_stem(model, size, pretrained is True, small_images):
        _small_stem(model)
    elif small_images == "true":
        raise SettingsError(f"SMALL_IMAGES: true needs a resnet-like MODEL (conv1 and maxpool), got {name}")
    if pretrained is not False:
        state = _default_weights(name) if pretrained is True else _read_state(pretrained)
        if transforms_input(name, pretrained is True):
            transform_input(model)
        elif name in TRANSFORMING:
            log.warning(
                "PRETRAINED: of %s, torchvision's own weights want PRETRAINED=true, with their file in TORCH_HOME; "
                "below weights of any other file images are not transformed", name
            )  # fmt: skip
        _load(model, state, "PRETRAINED" if pretrained is True else f"PRETRAINED {pretrained.name}")
    if freeze:
        model.requires_grad_(False)
        head(model).requires_grad_(True)
    return model.float()  # whatever the program's default is


def n_weights(name: str) -> int:
    """How many weights the network has for the thousand classes of ImageNet, as torchvision's notes on them say.

    Raises:
        SettingsError: the model is not known.
    """
    _known(name)
    noted: int = next(iter(models.get_model_weights(name))).meta["num_params"]
    return noted


def _known(name: str) -> None:
    if name not in models.list_models(module=models):
        raise SettingsError(f"MODEL: must be a classification model of torchvision.models, got {name!r}")


def head(model: nn.Module) -> nn.Module:
    """The last layer: the linear layer or convolution that was registered last."""
    return [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1]


def wants_small_stem(model: nn.Module, size: int, default_weights: bool, small_images: str) -> bool:
    """Whether the network gets the stem for small images.

    auto: below `SMALL_BELOW` pixels, where the network has such a stem and torchvision's weights need not fit it.
    """
    wanted = size < SMALL_BELOW and not default_weights if small_images == "auto" else small_images == "true"
    return wanted and _stem(model) is not None


def transforms_input(name: str, default_weights: bool) -> bool:
    """Whether `build_classifier` makes a network that transforms its input: no state dict says so."""
    return default_weights and name in TRANSFORMING


def transform_input(model: nn.Module) -> None:
    """Let a network of `TRANSFORMING` do it."""
    vars(model)["transform_input"] = True  # torchvision's flag, which the network's types do not know


def _make(name: str, n_classes: int, shape: dict[str, Any]) -> nn.Module:
    """The bare network, without auxiliary outputs (googlenet, inception), which have no place in our loss."""
    try:
        model = models.get_model(
            name, weights=None, num_classes=n_classes, aux_logits=False, init_weights=True, **shape
        )
    except TypeError:  # no such argument
        model = models.get_model(name, weights=None, num_classes=n_classes, **shape)
    made: nn.Module = model
    return made


def _make_for(name: str, n_classes: int, size: int) -> nn.Module:
    """The network told the image size in the way it accepts; what it accepts is tried without any arithmetic."""
    reasons = []
    for shape in ({}, {"image_size": size}, {"input_size": (size, size)}):
        try:
            model = _make(name, n_classes, shape)
            _outputs(model, size)
        except TypeError:  # no such argument
            continue
        except (RuntimeError, ValueError, AssertionError) as error:
            reasons.append(one_line(str(error)))
            continue
        return model
    raise SettingsError(f"IMG_SIZE: MODEL={name} must be able to take images of this side, got {size}: {reasons[0]}")


def _outputs(model: nn.Module, size: int) -> torch.Size:
    """The shape of the output for two images, on tensors that have no data."""
    state = {name: tensor.to("meta") for name, tensor in model.state_dict(keep_vars=True).items()}
    output: Tensor = functional_call(model.eval(), state, torch.empty(2, 3, size, size, device="meta"))
    model.train()
    return output.shape


def _stem(model: nn.Module) -> tuple[nn.Conv2d, nn.MaxPool2d] | None:
    conv, pool = getattr(model, "conv1", None), getattr(model, "maxpool", None)
    return (conv, pool) if isinstance(conv, nn.Conv2d) and isinstance(pool, nn.MaxPool2d) else None


def _small_stem(model: nn.Module) -> None:
    """A 3×3 convolution without stride and no pooling, as He et al. (2016) use for CIFAR.

    Peerannot has this where the path says "cifar", with padding=3, which adds two dark pixels on every side.
    """
    stem = _stem(model)
    if stem is not None:
        conv = nn.Conv2d(3, stem[0].out_channels, kernel_size=3, stride=1, padding=1, bias=stem[0].bias is not None)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        model.conv1, model.maxpool = conv, nn.Identity()


def has_small_stem(model: nn.Module) -> bool:
    """Whether `build_classifier` gave the network the stem for small images."""
    return isinstance(getattr(model, "maxpool", None), nn.Identity)


def _default_weights(name: str) -> dict[str, Tensor]:
    weights = models.get_model_weights(name).DEFAULT
    wanted = weights.transforms()
    if (tuple(wanted.mean), tuple(wanted.std)) != (MEAN, STD):
        log.warning(
            "PRETRAINED: torchvision's weights of %s want images of mean %s and deviation %s, and get ImageNet's",
            name, wanted.mean, wanted.std,
        )  # fmt: skip
    try:
        state: dict[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True)
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        raise StoreError(
            f"PRETRAINED: {weights.url} must be reachable, or its file in TORCH_HOME or named by PRETRAINED: "
            f"{one_line(str(error))}"
        ) from error
    return state


def _read_state(path: Path) -> dict[str, Tensor]:
    """A state dict, or the "classifier" of one of our best models."""
    try:
        state = read_tensors(path)
    except ValueError as error:
        raise SettingsError(
            f"PRETRAINED: {path.name} must be a state dict that torch.load(weights_only=True) reads, "
            f"as torch.save(model.state_dict(), …) writes it: {error}"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("classifier"), dict):
        state = state["classifier"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise SettingsError(f"PRETRAINED: {path.name} must be a state dict: names and tensors")
    for name, value in state.items():
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise SettingsError(
                f"PRETRAINED: {path.name} must be of plain tensors, {short(str(name))} is sparse, quantised or empty"
            )
    return state


def _load(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load `state`, the head only where it fits, auxiliary outputs never."""
    own = model.state_dict()
    of_head = {name for name, module in model.named_modules() if module is head(model)}.pop()
    wrong = []
    for name, tensor in own.items():
        given = state.get(name)
        if given is not None and given.shape == tensor.shape:
            own[name] = given
        elif not name.startswith(of_head + "."):
            wrong.append(
                f"{name} must have shape {list(tensor.shape)}, has {given if given is None else list(given.shape)}"
            )
    if wrong:
        rest = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise SettingsError(f"{source}: must be weights of the MODEL: {wrong[0]}{rest}")
    model.load_state_dict(own)
    log.info("weights loaded from %s", source)
