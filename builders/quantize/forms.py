"""What a quantised product looks like in the graph: INT8 with scales of calibration, INT8 with scales of each run, FP8.

Of all three, weights have a scale for each output channel, activations one for the tensor; products are added up in a
wider type, and outputs stay in floating point.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
from onnx_ir import convenience

from builders.quantize.linears import input_of, weight_of
from builders.quantize.scales import Floats, representable
from builders.quantize.smoothquant import QuantizedLinear, activation_scale, quantize_weight
from builders.spec import GraphPrecision
from runtime.session import FP8_ZERO

_E4M3_MAX = 448.0


class QuantizedForm(Protocol):
    """`source`: the precision of the graph that it is written into. `integers`: weights are INT8, which GPTQ can round,
    and SmoothQuant's factors share out what is hard to quantise. FP8 has an exponent in each number, and no use for
    either."""

    precision: GraphPrecision
    source: GraphPrecision
    integers: bool

    def activation(
        self, graph: ir.Graph, before: ir.Node, factors: Floats, channel_max: Floats
    ) -> tuple[ir.Value, ...]:
        """Writes the quantised form of what `before` reads in front of it; what `product` needs of it."""

    def product(
        self,
        graph: ir.Graph,
        before: ir.Node,
        node: ir.Node,
        read: tuple[ir.Value, ...],
        factors: Floats,
        given: QuantizedLinear | None,
    ) -> None:
        """Makes `node` a product of quantised numbers; `given` are its weights where they are rounded already. New
        constants and their nodes stand in front of `before`, the first reader of the activation."""


class StaticInt8:
    """Explicit QuantizeLinear and DequantizeLinear, whose activations' scales are those of the calibration texts."""

    precision: GraphPrecision = "int8"
    source: GraphPrecision = "fp16"
    integers = True

    def activation(
        self, graph: ir.Graph, before: ir.Node, factors: Floats, channel_max: Floats
    ) -> tuple[ir.Value, ...]:
        """activation -> Mul(1 / factors) -> QuantizeLinear -> DequantizeLinear."""
        name, dtype = str(input_of(before, 0).name), _dtype(before)
        smooth = _smoothed(graph, before, factors)
        scale = _constant(graph, f"{name}_scale", np.array(activation_scale(channel_max, factors, dtype), dtype))
        zero = _constant(graph, f"{name}_zero", np.zeros((), np.int8))
        return (_there_and_back(graph, before, name, smooth, scale, zero),)

    def product(
        self,
        graph: ir.Graph,
        before: ir.Node,
        node: ir.Node,
        read: tuple[ir.Value, ...],
        factors: Floats,
        given: QuantizedLinear | None,
    ) -> None:
        """INT8 weight -> DequantizeLinear along the output channels, as the new weight of `node`."""
        dtype = _dtype(node)
        quantized = given or quantize_weight(weight_of(node), factors, dtype)
        weight = _dequantized(graph, before, node, quantized.weight, quantized.weight_scale.astype(dtype), "int8")
        node.replace_input_with(1, weight)
        node.replace_input_with(0, read[0])


class DynamicInt8:
    """DynamicQuantizeLinear, whose scale is that of the very tensor in each run, and MatMulInteger. In fp32 alone.

    ONNX Runtime makes one product of each. The scale is that of a whole batch: a text's output depends a little on what
    is computed with it.
    """

    precision: GraphPrecision = "dynamic_int8"
    source: GraphPrecision = "fp32"
    integers = True

    def activation(
        self, graph: ir.Graph, before: ir.Node, factors: Floats, channel_max: Floats
    ) -> tuple[ir.Value, ...]:
        """activation -> Mul(1 / factors) -> DynamicQuantizeLinear: (uint8, scale, zero point)."""
        name = str(input_of(before, 0).name)
        node = ir.node(
            "DynamicQuantizeLinear", [_smoothed(graph, before, factors)], num_outputs=3, name=f"{name}_quantize"
        )
        for value, what in zip(node.outputs, ("uint8", "scale", "zero"), strict=True):
            value.name = f"{name}_{what}"
        graph.insert_before(before, [node])
        return tuple(node.outputs)

    def product(
        self,
        graph: ir.Graph,
        before: ir.Node,
        node: ir.Node,
        read: tuple[ir.Value, ...],
        factors: Floats,
        given: QuantizedLinear | None,
    ) -> None:
        """MatMulInteger -> Cast -> Mul(scale of the activation * scales of the weight), in the place of `node`."""
        name, out = str(input_of(node, 1).name), node.outputs[0]
        quantized = given or quantize_weight(weight_of(node), factors, np.float32)
        activation, scale, zero = read
        weight = _constant(graph, f"{name}_int8", quantized.weight)
        weight_zero = _constant(graph, f"{name}_zero", np.zeros((), np.int8))
        integers = ir.node("MatMulInteger", [activation, weight, zero, weight_zero], name=f"{name}_integer")
        wide = ir.node("Cast", [integers.outputs[0]], {"to": ir.DataType.FLOAT.value}, name=f"{name}_wide")
        scales = ir.node(
            "Mul", [scale, _constant(graph, f"{name}_scale", quantized.weight_scale)], name=f"{name}_scales"
        )
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

    def activation(
        self, graph: ir.Graph, before: ir.Node, factors: Floats, channel_max: Floats
    ) -> tuple[ir.Value, ...]:
        import ml_dtypes

        name, dtype = str(input_of(before, 0).name), _dtype(before)
        scale = _constant(graph, f"{name}_scale", representable(channel_max.max() / _E4M3_MAX, dtype).astype(dtype))
        zero = _constant(graph, f"{name}_{FP8_ZERO}", np.zeros((), ml_dtypes.float8_e4m3fn))
        return (_there_and_back(graph, before, name, input_of(before, 0), scale, zero),)

    def product(
        self,
        graph: ir.Graph,
        before: ir.Node,
        node: ir.Node,
        read: tuple[ir.Value, ...],
        factors: Floats,
        given: QuantizedLinear | None,
    ) -> None:
        import ml_dtypes

        dtype, weight = _dtype(node), weight_of(node)
        scale = representable(np.abs(weight).max(axis=0) / _E4M3_MAX, dtype)
        numbers = np.clip(weight / scale, -_E4M3_MAX, _E4M3_MAX).astype(ml_dtypes.float8_e4m3fn)
        node.replace_input_with(1, _dequantized(graph, before, node, numbers, scale.astype(dtype), "fp8"))
        node.replace_input_with(0, read[0])


def _dtype(node: ir.Node) -> np.dtype[Any]:
    """Of the weight, which is that of the graph's arithmetic."""
    tensor = input_of(node, 1).const_value
    assert tensor is not None
    dtype: np.dtype[Any] = tensor.numpy().dtype
    return dtype


def _smoothed(graph: ir.Graph, before: ir.Node, factors: Floats) -> ir.Value:
    activation = input_of(before, 0)
    inverse = _constant(graph, f"{activation.name}_smooth", (1 / factors).astype(_dtype(before)))
    return _added(graph, before, ir.node("Mul", [activation, inverse], name=f"{activation.name}_smooth_mul"))


def _there_and_back(
    graph: ir.Graph, before: ir.Node, name: str, value: ir.Value, scale: ir.Value, zero: ir.Value
) -> ir.Value:
    quantized = _added(graph, before, ir.node("QuantizeLinear", [value, scale, zero], name=f"{name}_quantize"))
    return _added(graph, before, ir.node("DequantizeLinear", [quantized, scale, zero], name=f"{name}_dequantize"))


def _added(graph: ir.Graph, before: ir.Node, node: ir.Node) -> ir.Value:
    node.outputs[0].name = f"{node.name}_out"
    graph.insert_before(before, [node])
    return node.outputs[0]


def _dequantized(
    graph: ir.Graph,
    before: ir.Node,
    node: ir.Node,
    numbers: np.ndarray[Any, Any],
    scale: np.ndarray[Any, Any],
    kind: str,
) -> ir.Value:
    """The weight of `node` [K, N] from its numbers, with a scale for each column."""
    name = str(input_of(node, 1).name)
    inputs = [
        _constant(graph, f"{name}_{kind}", numbers),
        _constant(graph, f"{name}_scale", scale),
        _constant(graph, f"{name}_zero", np.zeros(scale.shape, numbers.dtype)),
    ]
    dequantize = ir.node("DequantizeLinear", inputs, attributes={"axis": 1}, name=f"{name}_dequantize")
    dequantize.outputs[0].name = f"{name}_dequantized"
    graph.insert_before(before, [dequantize])
    return dequantize.outputs[0]


def _constant(graph: ir.Graph, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
    graph.register_initializer(value)
    return value


FORMS: dict[str, QuantizedForm] = {form.precision: form for form in (StaticInt8(), DynamicInt8(), Fp8())}
