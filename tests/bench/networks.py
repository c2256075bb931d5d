"""Networks small enough to be trained a thousand times; nothing of ours is imported, peers train them too."""

from __future__ import annotations

from torch import Tensor, nn


class SmallNet(nn.Module):
    """Four convolutions, 70,000 weights: an epoch of 600 images of 32 pixels takes a tenth of a second on one core."""

    def __init__(self, n_classes: int, width: int = 16) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, stride in ((3, 1, 2), (1, 2, 2), (2, 4, 2), (4, 4, 1)):
            channels = before if before == 3 else before * width
            layers += [
                nn.Conv2d(channels, after * width, 3, stride, 1, bias=False),
                nn.BatchNorm2d(after * width),
                nn.ReLU(),
            ]
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(4 * width, n_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.features(images))
        return logits
