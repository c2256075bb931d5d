"""Branches of a network that run on another stream of a GPU, at the same time as the way that they go round.

Resnet's first block of a size has a convolution and its norm on the shortcut. They begin when the fork is there, and
are waited for at the sum; the backward pass runs on the streams of the forward one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn


class Branches:
    """Of a graph whose nodes come in this order; on another device than a GPU there are none."""

    def __init__(self, graph: fx.Graph, modules: dict[fx.Node, nn.Module], device: torch.device) -> None:
        """`modules` are those of the nodes that are layers."""
        self._stream: torch.cuda.Stream | None = None
        self._begins: dict[fx.Node, fx.Node] = {}
        """The first node of a branch, and the fork that it begins at."""
        self._on: set[fx.Node] = set()
        self._sums: set[fx.Node] = set()
        self._events: dict[fx.Node, torch.cuda.Event] = {}
        if device.type != "cuda":
            return
        self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        for node in graph.nodes:
            if branch := branch_to(node, modules):
                (fork,) = branch[0].all_input_nodes
                self._begins[branch[0]] = fork
                self._on |= set(branch)
                self._sums.add(node)

    def run(self, node: fx.Node, work: Callable[[], Any]) -> Any:
        """Do the node's work where it belongs."""
        if self._stream is None:
            return work()
        main = torch.cuda.current_stream(self._stream.device)
        if node in self._begins:
            self._stream.wait_event(self._events.pop(self._begins[node]))
        if node in self._sums:
            main.wait_stream(self._stream)
        with torch.cuda.stream(self._stream if node in self._on else main):
            done = work()
        if node in self._begins.values():
            self._events[node] = main.record_event()
        return done


def branch_to(node: fx.Node, modules: dict[fx.Node, nn.Module]) -> list[fx.Node]:
    """Of a sum one of two ways, from a fork to it: convolutions and norms in their order; none where it has none."""
    parts = node.all_input_nodes
    for part in parts if len(parts) == 2 else ():
        way: list[fx.Node] = []
        while len(part.users) == 1 and isinstance(modules.get(part), nn.Conv2d | nn.BatchNorm2d):
            way.insert(0, part)
            (part,) = part.all_input_nodes
        if len(part.users) == 2 and any(isinstance(modules[layer], nn.Conv2d) for layer in way):
            return way
    return []
