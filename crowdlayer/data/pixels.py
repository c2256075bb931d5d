"""Bytes → what a network takes: normalised, augmented, on its device."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's training images, per RGB channel in [0, 1]; peerannot's and torchvision's."""


def scaling(device: torch.device) -> tuple[Tensor, Tensor]:
    """Factor and summand that normalise a byte: (byte / 255 − MEAN) / STD in two passes; (1, 3, 1, 1) each."""
    mean, std = (torch.tensor(x, dtype=torch.float64).view(1, 3, 1, 1) for x in (MEAN, STD))
    return (1 / (255 * std)).float().to(device), (-mean / std).float().to(device)


_scaling = cache(scaling)
"""What every batch needs; to send it, a device would have to be waited for."""


def normalise(images: Tensor, device: torch.device) -> Tensor:
    """(n, size, size, 3) uint8 → (n, 3, size, size) float32 on `device`, in the order that its convolutions want."""
    return standardise(sent(images, device), *_scaling(device))


def standardise(images: Tensor, factor: Tensor, summand: Tensor) -> Tensor:
    """The same, where the images are already.

    The order is channels last on CUDA; on a CPU, where resnet18's step takes a quarter longer so, channels first.
    """
    if images.is_cuda:  # in one kernel
        return torch.addcmul(summand, images.permute(0, 3, 1, 2), factor)
    floats = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return floats.mul_(factor).add_(summand)


def sent(part: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, or on its way there: who goes on to use it there need not wait for it here."""
    if part.device.type == device.type:
        return part
    return (part.pin_memory() if device.type == "cuda" else part).to(device, non_blocking=True)


def on_device(rows: Tensor, device: torch.device) -> Tensor:
    """What a network takes: images (n, size, size, 3) uint8 normalised, features (n, …) float32 as they are."""
    return normalise(rows, device) if rows.dtype == torch.uint8 else sent(rows, device)


DRAWS = 23
"""Random numbers per image and epoch that `affine` wants."""


def affine(draws: Tensor, aspect: Tensor) -> Tensor:
    """Peerannot's augmentation: of shear, flip and random resized crop, each image gets one.

    Args:
        draws: (n, DRAWS) uniform in [0, 1): the choice, then its parameters. A shear is horizontal and uniform in
            ±15°; a flip happens to half of those chosen for it; a crop has 8 to 100 % of the area, an aspect ratio
            of 3/4 to 4/3 (log-uniform) and a uniform place, the first of ten draws that fits, else it is the largest
            in the middle (torchvision's RandomAffine, RandomHorizontalFlip, RandomResizedCrop).
        aspect: (n,) width / height of the pictures before they were made square: peerannot augments those.

    Returns:
        (n, 2, 3): from a place in the new image, in [-1, 1], to that in the old one.
    """
    n = len(draws)
    choice = (draws[:, 0] * 3).long()
    theta = draws.new_zeros(n, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1
    angle = torch.deg2rad(draws[:, 1] * 30 - 15)
    theta[:, 0, 1] = torch.where(choice == 0, torch.tan(angle) / aspect, 0)
    theta[:, 0, 0] = torch.where((choice == 1) & (draws[:, 1] < 0.5), -1.0, theta[:, 0, 0])

    area = 0.08 + 0.92 * draws[:, 1:11]
    ratio = torch.exp((2 * draws[:, 11:21] - 1) * math.log(4 / 3)) / aspect.unsqueeze(1)  # of shares, not of pixels
    sides = (area * ratio).sqrt(), (area / ratio).sqrt()
    fits = (sides[0] <= 1) & (sides[1] <= 1)
    first, largest = fits.float().argmax(1, keepdim=True), (4 / 3 / aspect, 4 / 3 * aspect)
    crop, any_fits = choice == 2, fits.any(1)
    for axis, (side, most) in enumerate(zip(sides, largest, strict=True)):
        share = torch.where(any_fits, side.gather(1, first)[:, 0], most.clamp(max=1))
        free = torch.where(any_fits, (1 - share) * (2 * draws[:, 21 + axis] - 1), 0)
        theta[:, axis, axis] = torch.where(crop, share, theta[:, axis, axis])
        theta[:, axis, 2] = torch.where(crop, free, 0)
    return theta


def augment(images: Tensor, theta: Tensor) -> Tensor:
    """(n, 3, size, size) normalised images under their (n, 2, 3) `affine` maps; what comes from outside is black."""
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    _, black = _scaling(images.device)
    return F.grid_sample(images - black, grid, padding_mode="zeros", align_corners=False) + black
