"""Patches of images."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .making import EACH, run


class Window(NamedTuple):
    """What a patch of an image is: side × side pixels of `channels` each, in all filled up to `width` channels.

    It begins at a multiple of `stride` less `offset`.
    """

    side: int
    channels: int
    width: int
    stride: int
    offset: int


def patches(images: Tensor, window: Window, down: int, across: int, factor: Tensor, summand: Tensor) -> Tensor:
    """Of images (n, 3, height, width), or of bytes (n, height, width, 3) · factor + summand, in each place a patch.

    Returns:
        (n, window.width, down, across) in bfloat16, channels last, for a device that has `kernels`.
    """
    is_bytes = images.dtype == torch.uint8
    pixels = (images if is_bytes else images.float().permute(0, 2, 3, 1)).contiguous()
    n, height, width, _ = pixels.shape
    to = torch.empty(n, down, across, window.width, dtype=torch.bfloat16, device=images.device)
    eights = to.numel() // 8
    how = [eights, window.width // 8, height, width, down, across, window.side, window.channels]
    given = [pixels, factor, summand, *how, window.stride, window.offset, to]
    run("patches_of_bytes" if is_bytes else "patches_of_floats", ((-(-eights // EACH), 1, 1), (EACH, 1, 1)), given)
    return to.permute(0, 3, 1, 2)


def taken(numbers: Tensor, places: Tensor) -> Tensor:
    """Of bfloat16 numbers, in the order of their shape, those at these places (n,) int32 → (n,); 0 for one below 0."""
    numbers = numbers.contiguous()
    to = numbers.new_empty(len(places))
    run("taken", ((-(-len(places) // EACH), 1, 1), (EACH, 1, 1)), [numbers, places, len(places), to])
    return to
