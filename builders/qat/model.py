"""A quantised graph's roundings put into the model that it was made of; and the numbers that training left there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from builders.compress.importance import Forward
from builders.compress.inputs import observed
from builders.compress.texts import Batch
from builders.errors import ParityError
from builders.qat.graph import Array, BlockProduct, Int8Product, PlainProduct, RoundedGraph
from builders.quantize.blocks import compensated
from builders.quantize.scales import Floats, representable

if TYPE_CHECKING:
    import torch

    from builders.qat.layer import BlockLinear, Int8Linear

_SAME = 0.5  # of a weight's mean size: far more than rounding moves it, far less than any other matrix is away
_PREFIX = "model."  # of the model's parameters in the graph's names


class RoundedModel:
    """`model`, changed in place: it computes as the graph does, and is trained in what the graph holds as numbers.

    Raises ParityError where the graph's products are not this model's.
    """

    def __init__(self, model: Any, graph: RoundedGraph) -> None:
        self._graph, self._model = graph, model
        self._int8: list[tuple[Int8Product, Int8Linear, str]] = []  # with the layer's name
        self._blocks: list[tuple[BlockProduct, BlockLinear, str]] = []
        self._plain: list[tuple[PlainProduct, torch.nn.Linear]] = []
        self._place()
        self._named = self._freeze()

    def arrays(self) -> dict[str, Array]:
        """The graph's constants as they are now, by name. What is restored with a scale was rounded with the very
        same, in the type that the graph holds it in."""
        import torch

        found: dict[str, Array] = {}
        with torch.no_grad():
            for product, layer, _ in self._int8:
                integers, scales, activation = product.names
                held = representable(layer.scale()[:, 0].numpy(), self._graph.dtype)
                steps = np.rint(layer.smoothed.numpy().T / held).clip(-127, 127)
                found |= {integers: steps.astype(np.int8), scales: held}
                found[activation] = representable(layer.activation().numpy(), self._graph.dtype)
            for block_product, block_layer, _ in self._blocks:
                found |= self._block_arrays(block_product, block_layer)
            found |= {product.name: linear.weight.numpy().T for product, linear in self._plain}
            found |= {name: parameter.detach().numpy() for name, parameter in self._named.items()}
        return found

    def _block_arrays(self, product: BlockProduct, layer: BlockLinear) -> dict[str, Array]:
        integers, scales = product.names
        held = representable(layer.scale().numpy().T, self._graph.dtype)  # [K / block, N]
        unrounded = layer.unrounded.numpy().transpose(1, 2, 0)  # [K / block, block, N]
        steps = np.rint(unrounded / held[:, None]).clip(*layer.ends)
        return {integers: steps.reshape(product.integers.shape).astype(np.int8), scales: held}

    def round_by_gptq(self, teacher: Any, forward: Forward, batches: Sequence[Batch]) -> None:
        """The weights of `teacher`, the model as it was, rounded with the same scales so that later weights make up for
        earlier ones, on what its layers read."""
        import torch

        readers: dict[str, torch.nn.Linear] = {}
        for product, _, name in self._int8:
            readers.setdefault(product.names[2], teacher.get_submodule(name))
        readers |= {name: teacher.get_submodule(name) for _, _, name in self._blocks}
        with torch.no_grad():
            read = observed(readers, forward, batches)
        for product, layer, name in self._int8:
            inverse = product.inverse
            hessian = (read[product.names[2]].moment.numpy() * np.outer(inverse, inverse)).astype(np.float32)
            smoothed = teacher.get_submodule(name).weight.detach().numpy().T / inverse[:, None]
            layer.set_steps(torch.from_numpy(compensated(smoothed, hessian, product.scales[None], (-127, 127)).T))
        for block_product, block_layer, name in self._blocks:
            weight = teacher.get_submodule(name).weight.detach().numpy().T
            hessian = read[name].moment.numpy().astype(np.float32)
            block_layer.set_steps(
                torch.from_numpy(compensated(weight, hessian, block_product.each_scale, block_layer.ends).T)
            )

    def _place(self) -> None:
        import torch

        from builders.qat.layer import BlockLinear, Int8Linear, LearntScale

        left = {name: module for name, module in self._model.named_modules() if isinstance(module, torch.nn.Linear)}
        shared: dict[str, LearntScale] = {}
        for product in self._graph.products:
            name = _belonging(product.weight, left)
            linear = left.pop(name)
            if isinstance(product, PlainProduct):
                self._plain.append((product, linear))
                continue
            if isinstance(product, BlockProduct):
                scales = torch.from_numpy(product.scales.T.copy())
                steps = torch.from_numpy(product.integers.T.astype(np.float32))
                placed = BlockLinear(steps, linear.bias, scales, product.bits)
                self._put(name, placed)
                self._blocks.append((product, placed, name))
                continue
            scale = torch.tensor(product.activation_scale)
            smoothed = torch.from_numpy((product.integers * product.scales).T.copy())  # as they were rounded
            layer = Int8Linear(
                smoothed,
                linear.bias,
                torch.from_numpy(product.inverse.copy()),
                shared.setdefault(product.names[2], LearntScale(scale)),
                torch.from_numpy(product.scales[:, None].copy()),
            )
            self._put(name, layer)
            self._int8.append((product, layer, name))

    def _put(self, name: str, layer: torch.nn.Linear) -> None:
        parent, _, own = name.rpartition(".")
        setattr(self._model.get_submodule(parent), own, layer)

    def _freeze(self) -> dict[str, torch.nn.Parameter]:
        """Parameters that the graph has by name; all that it has in no way are not trained, so as not to be lost."""
        named = {
            _PREFIX + name: parameter
            for name, parameter in self._model.named_parameters()
            if self._graph.constants.get(_PREFIX + name) == tuple(parameter.shape)
        }
        ways = {id(parameter) for parameter in named.values()}
        ways |= {id(linear.weight) for _, linear in self._plain}
        for _, layer, _ in self._int8:
            ways |= {id(each) for each in (layer.weight, layer.scale.change, layer.activation.change)}
        for _, block_layer, _ in self._blocks:
            ways |= {id(each) for each in (block_layer.weight, block_layer.scale.change)}
        for parameter in self._model.parameters():
            parameter.requires_grad_(id(parameter) in ways)
        return named


def _belonging(weight: Floats, layers: dict[str, torch.nn.Linear]) -> str:
    """The layer that has this weight [K, N], but for rounding."""
    near = {
        name: float(np.abs(layer.weight.detach().numpy().T - weight).mean())
        for name, layer in layers.items()
        if tuple(layer.weight.shape) == weight.shape[::-1]
    }
    best = min(near, key=lambda name: near[name], default=None)
    if best is None or near[best] > _SAME * float(np.abs(weight).mean()):
        raise ParityError(f"the graph has a product {list(weight.shape)} that no layer of the model has")
    return best
