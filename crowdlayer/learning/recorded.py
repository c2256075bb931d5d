"""A network as recorded steps run it: the same layers on the same weights, with fewer kernels, several at a time.

What a recorded step costs is the kernels themselves, and the time from one to the next. So weights get their copies in
lower precision in two kernels; the gradient of a layer's weights, for which nothing waits, is found beside all the rest
(`layers`, `beside`), and moves them there (`moving`); a convolution on a shortcut runs at the same time as what it
goes round (`branches`); images come to the first one in an order that it can do (`stem`); batch norm, the sum with a
shortcut and ReLU are one (`kernels`).
"""

from __future__ import annotations

import logging
import operator
from collections import Counter
from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..data.pixels import normalise
from ..errors import one_line
from .beside import Beside
from .branches import Branches
from .kernels import BatchNorm, MaxPool, available, fit, normable, poolable
from .layers import Averaged, Convolution, Linear, Lowered
from .moving import Moving
from .stem import Stem, stemmed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Awaited:
    """A batch norm of `x` whose arithmetic waits for what follows it."""

    norm: nn.BatchNorm2d
    x: Tensor
    residual: Tensor | None = None


class Twice(list[Tensor]):
    """A value for each of the two who use it."""


class Recorded(fx.Interpreter):
    """The classifier in training and under autocast to bfloat16: images (n, 3, size, size) → logits (n, classes)."""

    def __init__(self, classifier: nn.Module, device: torch.device, moving: Moving | None = None) -> None:
        """Trace the classifier, one of torchvision's: a trace knows nothing of a value that changes under two names.

        With `moving` the backward pass moves weights by their gradients, and leaves none of these.

        Raises:
            Exception: of any kind, where its layers cannot be told without running them.
        """
        super().__init__(classifier, graph=_traced(classifier))
        self._beside = Beside(device)
        self._moving = moving
        self._layers: list[nn.Conv2d | nn.Linear] = []
        self._lowered: dict[Tensor, Tensor] = {}
        self._moved: list[Tensor] = []
        modules = {node: self.fetch_attr(str(node.target)) for node in self.graph.nodes if node.op == "call_module"}
        self._ways = self._planned(modules)
        self._branches = Branches(self.graph, modules, device)
        self._stem = self._first(device)
        self._weights = [weight for layer in self._layers for weight in layer.parameters()]

    def __call__(self, images: Tensor) -> Tensor:
        """Of images (n, 3, size, size), or of bytes (n, size, size, 3)."""
        if images.dtype == torch.uint8 and self._stem is None:
            images = normalise(images, images.device)
        self._beside.begin()
        if self._moving is not None:
            self._moving.forget()
        n_first = len(list(self._layers[0].parameters())) if self._layers else 0
        lowered = Lowered.apply(self._beside, self._moving, n_first, *self._weights)
        self._lowered = dict(zip(self._weights, lowered, strict=True))
        self._moved = []
        logits: Tensor = self.run(images)
        if self._moved:
            torch._foreach_add_(self._moved, 1)
        self._lowered, self.env = {}, {}  # what is kept would keep the step's gradients' graph, and its stream
        return logits

    def run_node(self, n: fx.Node) -> Any:
        return self._branches.run(n, partial(self._run_here, n))

    def _run_here(self, n: fx.Node) -> Any:
        if n not in self._ways:
            return super().run_node(n)
        arguments, _ = self.fetch_args_kwargs_from_env(n)
        return self._ways[n](*arguments)

    def map_nodes_to_values(self, args: Any, n: fx.Node) -> Any:
        def value(node: fx.Node) -> Any:
            found = self.env[node]
            return found.pop() if isinstance(found, Twice) else found

        return fx.node.map_arg(args, value)

    # --- which layers run in another way ---

    def _planned(self, modules: dict[fx.Node, nn.Module]) -> dict[fx.Node, Callable[..., Any]]:
        ways: dict[fx.Node, Callable[..., Any]] = {}
        times = Counter(weight for module in modules.values() for weight in module.parameters())
        for node, module in modules.items():
            if len(node.args) != 1 or node.kwargs or module._forward_hooks or module._forward_pre_hooks:
                continue
            if isinstance(module, nn.Conv2d | nn.Linear) and getattr(module, "padding_mode", "zeros") == "zeros":
                # of a weight that is used twice the two gradients would be added up before the second one is there
                once = all(weight.requires_grad and times[weight] == 1 for weight in module.parameters())
                if once and type(module) in (nn.Conv2d, nn.Linear):
                    self._layers.append(module)
                    ways[node] = partial(self._layer, module)
            elif type(module) is nn.BatchNorm2d and normable(module):
                ways |= self._norm_and_what_follows(node, module, modules, ways)
            elif type(module) is nn.AdaptiveAvgPool2d and module.output_size in (1, (1, 1)):
                ways[node] = Averaged.apply
            elif type(module) is nn.MaxPool2d and poolable(module):
                ways[node] = partial(_pooled, module, _has_two(node))
        return ways

    def _norm_and_what_follows(
        self, node: fx.Node, norm: nn.BatchNorm2d, modules: dict[fx.Node, nn.Module], taken: Container[fx.Node]
    ) -> dict[fx.Node, Callable[..., Any]]:
        """The norm, or up to two nodes after it: nothing else sees what is between them."""

        def is_relu(node: fx.Node) -> bool:
            return len(node.args) == 1 and (type(modules.get(node)) is nn.ReLU or node.target is F.relu)

        then = next(iter(node.users)) if len(node.users) == 1 else node
        if then is node.next and is_relu(then):
            return {node: partial(Awaited, norm), then: partial(self._normed, True, _has_two(then))}
        given = node.args[0]
        alone = isinstance(given, fx.Node) and len(given.users) == 1  # what waits must not change meanwhile
        if then in taken or not (alone and _is_sum(then)):
            return {node: lambda x: self._normed(False, _has_two(node), Awaited(norm, x))}
        last = next(iter(then.users)) if len(then.users) == 1 else then
        if last is then.next and is_relu(last):
            return {node: partial(Awaited, norm), then: _summed, last: partial(self._normed, True, _has_two(last))}
        return {node: partial(Awaited, norm), then: lambda a, b: self._normed(False, _has_two(then), _summed(a, b))}

    def _first(self, device: torch.device) -> Stem | None:
        """The layer that the images come to, where they come to no other and it has another way."""
        images = next(iter(self.graph.nodes))
        node, *others = images.users
        layer = self.fetch_attr(str(node.target)) if node in self._ways and not others else None
        return Stem(layer) if type(layer) is nn.Conv2d and stemmed(layer) and available(device) else None

    # --- how they run ---

    def _layer(self, layer: nn.Conv2d | nn.Linear, x: Tensor) -> Tensor:
        if layer is not self._layers[0]:
            self._beside.join()  # the other weights' copies have been made meanwhile
        weight, *biases = (self._lowered[part] for part in layer.parameters())
        bias = biases[0] if biases else None
        if isinstance(layer, nn.Linear):
            x = x.to(weight.dtype)
            if x.dim() != 2:
                return F.linear(x, weight, bias)
            scores: Tensor = Linear.apply(layer, x, weight, bias, self._beside, self._moving)
            return scores
        stem = self._stem if self._stem is not None and layer is self._stem.conv else None
        x = x if stem is not None else x.to(weight.dtype)
        if isinstance(layer.padding, str):
            return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
        y: Tensor = Convolution.apply(layer, stem, x, weight, bias, self._beside, self._moving)
        return y

    def _normed(self, relu: bool, twice: bool, awaited: Awaited) -> Tensor | Twice:
        norm, x, residual = awaited.norm, awaited.x, awaited.residual
        if fit(x) if residual is None else fit(x, residual):
            self._moved += [] if norm.num_batches_tracked is None else [norm.num_batches_tracked]
            y, *again = BatchNorm.apply(x, residual, norm, relu, twice, norm.weight, norm.bias)
        else:
            y = norm(x) if residual is None else norm(x) + residual
            y = F.relu(y) if relu else y
            again = [y]
        return Twice([y, *again]) if twice else y


def _traced(network: nn.Module) -> fx.Graph:
    """Its layers, but for those that do nothing: they would hide who uses what."""
    graph = fx.Tracer().trace(network)
    for node in list(graph.nodes):
        if node.op == "call_module" and type(network.get_submodule(node.target)) is nn.Identity:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    return graph


def _pooled(pool: nn.MaxPool2d, twice: bool, x: Tensor) -> Tensor | Twice:
    y, *again = MaxPool.apply(x, pool, twice) if fit(x) else [pool(x)]
    return Twice([y, *(again or [y])]) if twice else y


def _has_two(node: fx.Node) -> bool:
    """Whether two nodes use this one, each of them once."""
    return len(node.users) == 2 and all(user.args.count(node) == 1 and not user.kwargs for user in node.users)


def _is_sum(node: fx.Node) -> bool:
    """Whether the node is one value + another; += is traced as that, too."""
    return (
        node.op == "call_function"
        and node.target in (operator.add, torch.add)
        and len(node.args) == 2
        and not node.kwargs
        and all(isinstance(part, fx.Node) for part in node.args)
        and node.args[0] is not node.args[1]
    )


def _summed(a: Awaited | Tensor, b: Awaited | Tensor) -> Awaited:
    awaited, residual = (a, b) if isinstance(a, Awaited) else (b, a)
    assert isinstance(awaited, Awaited)
    assert isinstance(residual, Tensor)
    return replace(awaited, residual=residual)


def recorded(classifier: nn.Module, device: torch.device, moving: Moving | None = None) -> Recorded | None:
    """The classifier as recorded steps run it; None where its layers cannot be told, which the log says."""
    try:
        return Recorded(classifier, device, moving)
    except Exception as error:  # whatever a network does with what is no tensor
        log.info("the network is recorded as it is, its layers cannot be told: %s", one_line(str(error)))
        return None
