"""What a quantised product looks like in the graph: INT8 with scales of calibration, INT8 with scales of each run, FP8.

Of all three, weights have a scale for each output channel, activations one for the tensor; products are added up in a
wider type, and outputs stay in floating point.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
from onnx_ir import convenience

from builders.graph import add_constant
from builders.quantize.linears import input_of, weight_of
from builders.quantize.scales import Floats, representable
from builders.quantize.smoothquant import QuantizedLinear, activation_scale, quantize_weight
from builders.spec import GraphPrecision
from runtime.session import FP8_ZERO

_E4M3_MAX = 448.0


@dataclass(frozen=True)
class Site:
    """Where new nodes go: in front of `before`, the first reader of an activation."""

    graph: ir.Graph
    before: ir.Node

    @property
    def activation(self) -> ir.Value:
        return input_of(self.before, 0)

    @property
    def dtype(self) -> np.dtype[Any]:
        return _dtype(self.before)

    def constant(self, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
        return add_constant(self.graph, name, array)

    def add(self, node: ir.Node, output: str = "") -> ir.Value:
        """`output`: its name; default: the node's, and `_out`."""
        node.outputs[0].name = output or f"{node.name}_out"
        self.graph.insert_before(self.before, [node])
        return node.outputs[0]

    def smoothed(self, factors: Floats) -> ir.Value:
        """The activation, divided by its factors."""
        inverse = self.constant(f"{self.activation.name}_smooth", (1 / factors).astype(self.dtype))
        return self.add(ir.node("Mul", [self.activation, inverse], name=f"{self.activation.name}_smooth_mul"))

    def there_and_back(self, value: ir.Value, scale: ir.Value, zero: ir.Value) -> ir.Value:
        """`value`, which is the activation or made of it, through QuantizeLinear and DequantizeLinear."""
        name = self.activation.name
        quantized = self.add(ir.node("QuantizeLinear", [value, scale, zero], name=f"{name}_quantize"))
        return self.add(ir.node("DequantizeLinear", [quantized, scale, zero], name=f"{name}_dequantize"))

    def multiply(
        self, node: ir.Node, read: ir.Value, numbers: np.ndarray[Any, Any], scale: np.ndarray[Any, Any], kind: str
    ) -> None:
        """`node` multiplies `read` by a weight [K, N] of these numbers, with a scale for each column."""
        name = str(input_of(node, 1).name)
        inputs = [
            self.constant(f"{name}_{kind}", numbers),
            self.constant(f"{name}_scale", scale),
            self.constant(f"{name}_zero", np.zeros(scale.shape, numbers.dtype)),
        ]
        dequantize = ir.node("DequantizeLinear", inputs, attributes={"axis": 1}, name=f"{name}_dequantize")
        node.replace_input_with(1, self.add(dequantize, f"{name}_dequantized"))
        node.replace_input_with(0, read)


class QuantizedForm(Protocol):
    """`source`: the precision of the graph that it is written into. `integers`: weights are INT8, which GPTQ can round,
    and SmoothQuant's factors share out what is hard to quantise. FP8 has an exponent in each number, and no use for
    either."""

    precision: GraphPrecision
    source: GraphPrecision
    integers: bool

    def activation(self, site: Site, factors: Floats, channel_max: Floats) -> tuple[ir.Value, ...]:
        """Writes the quantised form of the activation; what `product` needs of it."""

    def product(
        self, site: Site, node: ir.Node, read: tuple[ir.Value, ...], factors: Floats, given: QuantizedLinear | None
    ) -> None:
        """Makes `node` a product of quantised numbers; `given` are its weights where they are rounded already."""


class StaticInt8:
    """Explicit QuantizeLinear and DequantizeLinear, whose activations' scales are those of the calibration texts."""

    precision: GraphPrecision = "int8"
    source: GraphPrecision = "fp16"
    integers = True

    def activation(self, site: Site, factors: Floats, channel_max: Floats) -> tuple[ir.Value, ...]:
        """activation -> Mul(1 / factors) -> QuantizeLinear -> DequantizeLinear."""
        name, dtype, smooth = site.activation.name, site.dtype, site.smoothed(factors)
        scale = site.constant(f"{name}_scale", np.array(activation_scale(channel_max, factors, dtype), dtype))
        return (site.there_and_back(smooth, scale, site.constant(f"{name}_zero", np.zeros((), np.int8))),)

    def product(
        self, site: Site, node: ir.Node, read: tuple[ir.Value, ...], factors: Floats, given: QuantizedLinear | None
    ) -> None:
        """INT8 weight -> DequantizeLinear along the output channels, as the new weight of `node`."""
        dtype = _dtype(node)
        quantized = given or quantize_weight(weight_of(node), factors, dtype)
        site.multiply(node, read[0], quantized.weight, quantized.weight_scale.astype(dtype), "int8")


class DynamicInt8:
    """DynamicQuantizeLinear, whose scale is that of the very tensor in each run, and MatMulInteger. In fp32 alone.

    ONNX Runtime makes one product of each. The scale is that of a whole batch: a text's output depends a little on what
    is computed with it.
    """

    precision: GraphPrecision = "dynamic_int8"
    source: GraphPrecision = "fp32"
    integers = True

    def activation(self, site: Site, factors: Floats, channel_max: Floats) -> tuple[ir.Value, ...]:
        """activation -> Mul(1 / factors) -> DynamicQuantizeLinear: (uint8, scale, zero point)."""
        name = site.activation.name
        node = ir.node("DynamicQuantizeLinear", [site.smoothed(factors)], num_outputs=3, name=f"{name}_quantize")
        for value, what in zip(node.outputs, ("uint8", "scale", "zero"), strict=True):
            value.name = f"{name}_{what}"
        site.graph.insert_before(site.before, [node])
        return tuple(node.outputs)

    def product(
        self, site: Site, node: ir.Node, read: tuple[ir.Value, ...], factors: Floats, given: QuantizedLinear | None
    ) -> None:
        """MatMulInteger -> Cast -> Mul(scale of the activation * scales of the weight), in the place of `node`."""
        graph, name, out = site.graph, str(input_of(node, 1).name), node.outputs[0]
        quantized = given or quantize_weight(weight_of(node), factors, np.float32)
        activation, scale, zero = read
        weight = site.constant(f"{name}_int8", quantized.weight)
        weight_zero = site.constant(f"{name}_zero", np.zeros((), np.int8))
        integers = ir.node("MatMulInteger", [activation, weight, zero, weight_zero], name=f"{name}_integer")
        wide = ir.node("Cast", [integers.outputs[0]], {"to": ir.DataType.FLOAT.value}, name=f"{name}_wide")
        scales = ir.node("Mul", [scale, site.constant(f"{name}_scale", quantized.weight_scale)], name=f"{name}_scales")
        scaled = ir.node("Mul", [wide.outputs[0], scales.outputs[0]], name=f"{name}_scaled")
        for made in (integers, wide, scales, scaled):
            made.outputs[0].name = f"{made.name}_out"
        graph.insert_before(node, [integers, wide, scales, scaled])
        result = scaled.outputs[0]
        result.shape, result.type = out.shape, out.type
        convenience.replace_all_uses_with(out, result, replace_graph_outputs=True)
        graph.remove(node, safe=True)


class Fp8:
    """QuantizeLinear and DequantizeLinear to E4M3: four bits of exponent, three of mantissa, largest number 448."""

    precision: GraphPrecision = "fp8"
    source: GraphPrecision = "fp16"
    integers = False

    def activation(self, site: Site, factors: Floats, channel_max: Floats) -> tuple[ir.Value, ...]:
        import ml_dtypes

        name, dtype = site.activation.name, site.dtype
        scale = site.constant(f"{name}_scale", representable(channel_max.max() / _E4M3_MAX, dtype).astype(dtype))
        zero = site.constant(f"{name}_{FP8_ZERO}", np.zeros((), ml_dtypes.float8_e4m3fn))
        return (site.there_and_back(site.activation, scale, zero),)

    def product(
        self, site: Site, node: ir.Node, read: tuple[ir.Value, ...], factors: Floats, given: QuantizedLinear | None
    ) -> None:
        import ml_dtypes

        dtype, weight = _dtype(node), weight_of(node)
        scale = representable(np.abs(weight).max(axis=0) / _E4M3_MAX, dtype)
        numbers = np.clip(weight / scale, -_E4M3_MAX, _E4M3_MAX).astype(ml_dtypes.float8_e4m3fn)
        site.multiply(node, read[0], numbers, scale.astype(dtype), "fp8")


def _dtype(node: ir.Node) -> np.dtype[Any]:
    """Of the weight, which is that of the graph's arithmetic."""
    tensor = input_of(node, 1).const_value
    assert tensor is not None
    dtype: np.dtype[Any] = tensor.numpy().dtype
    return dtype


FORMS: dict[str, QuantizedForm] = {form.precision: form for form in (StaticInt8(), DynamicInt8(), Fp8())}
