"""Noisy answers of many workers in, an image classifier out.

`Crowdlayer` is the class of peerannot, `CrowdLayer` the torch module, `load` gives back a trained classifier. Each is
imported when first asked for, so that `python entrypoint.py --help` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["CrowdLayer", "Crowdlayer", "__version__", "load"]

if TYPE_CHECKING:
    from .deployment.predictor import load as load
    from .learning.crowd_layer import CrowdLayer as CrowdLayer
    from .peerannot import Crowdlayer as Crowdlayer

_HOMES = {"CrowdLayer": ".learning.crowd_layer", "Crowdlayer": ".peerannot", "load": ".deployment.predictor"}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
