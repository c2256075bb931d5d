"""The first convolution of a network, whose images have three channels, as one that a GPU's matrix units can do.

Those want channels by eights. So what a small kernel sees of a place becomes the channels of one pixel, for a kernel of
one pixel. For a large one with a stride of 2 each block of 2 × 2 pixels becomes one, with four channels for each of
them: resnet's 7 × 7 kernel, with a row and a column of zeros, is then one of 4 × 4 with a stride of 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..data.pixels import scaling
from .kernels import Window, patches, taken

WHOLE, BLOCK = 32, 16
"""Channels of all that a kernel sees, where it is no more than that, and of a block."""


class Stem:
    """A convolution of images as one of patches: `patches` of the images, and `weight` of the weights."""

    def __init__(self, conv: nn.Conv2d) -> None:
        """`conv`: one that `stemmed` admits, on a device that has our kernels."""
        self.conv = conv
        self._scaling = scaling(conv.weight.device)
        side, stride, padding = conv.kernel_size[0], conv.stride[0], int(conv.padding[0])
        self._side, self._stride, self._padding = side, stride, padding
        whole = _whole(conv)
        seen = (side, conv.in_channels, WHOLE) if whole else (2, 4, BLOCK)
        self._window = Window(*seen, stride, padding)
        self._across = 1 if whole else -(-side // 2)  # patches that a kernel sees
        n, c = conv.weight.shape[:2]
        places = torch.arange(n * self._across**2 * self._window.width, device=conv.weight.device)
        own = self._taken_apart(places.view(n, self._across, self._across, -1))[..., :c].reshape(-1)
        self._own, self._spread = own.int(), torch.full_like(places, -1, dtype=torch.int32)
        self._spread[own] = torch.arange(len(own), dtype=torch.int32, device=own.device)
        self._shape = n, side, side, c

    def patches(self, images: Tensor) -> Tensor:
        """Images (n, 3, height, width), or bytes (n, height, width, 3) → (n, channels, down, across) in bfloat16."""
        height, width = images.shape[1:3] if images.dtype == torch.uint8 else images.shape[2:]
        down, across = (
            (edge + 2 * self._padding - self._side) // self._stride + self._across for edge in (height, width)
        )
        return patches(images, self._window, down, across, *self._scaling)

    def weight(self, weight: Tensor) -> Tensor:
        """(out, 3, side, side) → (out, channels, across, across), in bfloat16."""
        spread = taken(weight.permute(0, 2, 3, 1), self._spread)
        return spread.view(len(weight), self._across, self._across, -1).permute(0, 3, 1, 2)

    def gradient(self, gradient: Tensor) -> Tensor:
        """Back: of what `weight` has made."""
        return taken(gradient.permute(0, 2, 3, 1), self._own).view(self._shape).permute(0, 3, 1, 2)

    def _taken_apart(self, spread: Tensor) -> Tensor:
        """(out, across, across, channels of a patch) → (out, side, side, channels of a pixel)."""
        n, across, (side, channels) = len(spread), self._across, self._window[:2]
        pixels = spread[..., : side * side * channels].reshape(n, across, across, side, side, channels)
        pixels = pixels.transpose(2, 3).reshape(n, across * side, across * side, channels)
        return pixels[:, : self._side, : self._side]


def _whole(conv: nn.Conv2d) -> bool:
    return conv.weight[0].numel() <= WHOLE


def stemmed(conv: nn.Conv2d) -> bool:
    """Whether it is a convolution for `Stem`: of images, by a square kernel that is small or has a stride of 2."""
    shape = (conv.kernel_size, conv.stride, conv.padding)
    square = all(not isinstance(pair, str) and pair[0] == pair[1] for pair in shape)
    alone = conv.in_channels == 3 and conv.groups == 1 and conv.dilation == (1, 1)
    return square and alone and (_whole(conv) or conv.stride[0] == 2)
