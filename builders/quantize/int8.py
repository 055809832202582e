"""fp16 graph -> INT8 graph with explicit QuantizeLinear/DequantizeLinear, for TensorRT and OpenVINO alike.

Weights are INT8 per output channel, activations INT8 per tensor after SmoothQuant. Only matrix products with a
constant weight are quantised; their outputs stay in floating point. Which of them lose too much is measured, not
guessed: each group that reads one activation is quantised alone, the groups are ordered by the loss per weight, and
as many as the quality budget bears are taken. The search runs on the fp32 graph, which ONNX Runtime computes far
faster on CPU; the choice is then carried out on the fp16 graph.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from builders.artifacts import Checkpoint, OnnxGraph, Quality
from builders.errors import ParityError, QualityError, UnsupportedError
from builders.graph import GRAPH_FILE, record_graph, require_standard
from builders.judging.vectors import graph_outputs, measure, require_budget, sample_requests
from builders.quantize.scales import Floats
from builders.quantize.smoothquant import (
    Calibration,
    activation_scale,
    best_smoothing,
    quantize_weight,
    thin_out,
)
from builders.spec import PrecisionSlice
from runtime.graph import Tensors
from runtime.session import open_session

_SENSITIVITY_TEXTS = 32
_ROWS_KEPT = 1024
_BATCH = 16
# Shares of the budget that the search may use up on the calibration texts; held-out texts get the rest. The worst of
# a sample says less about the worst of another than the mean does.
_MEAN_MARGIN = 0.75
_WORST_MARGIN = 0.5
_LOGIT_MARGIN = 0.85  # a root: about that of the mean's margin
_MIN_QUANTISED = 0.5  # below this share of the weights the graph is INT8 in name only


@dataclass(frozen=True)
class Group:
    """The linear layers that read one activation, by their position among all linear layers of the graph."""

    members: tuple[int, ...]
    weights: int
    loss: float = 0.0


def quantize_int8(
    graph: OnnxGraph,
    reference: OnnxGraph,
    checkpoint: Checkpoint,
    budget: PrecisionSlice,
    calibration_texts: Sequence[str],
    held_out_texts: Sequence[str],
    out: Path,
    progress: Callable[[str], None] = lambda message: None,
) -> OnnxGraph:
    """Writes the INT8 form of `graph` (fp16) into `out`; quality is measured against `reference` (fp32).

    Raises QualityError when fewer than half of the weights could be quantised within the budget, or when the result
    misses it on the held-out texts; UnsupportedError when there is nothing to quantise.
    """
    progress("calibrating")
    requests = sample_requests(checkpoint, calibration_texts)
    calibrations = _calibrate(reference.file_path, requests)
    smoothing = _smoothing(reference.file_path, calibrations)
    file = out / GRAPH_FILE

    def rewrite(source: OnnxGraph, groups: Sequence[Group]) -> None:
        members = {member for group in groups for member in group.members}
        _rewrite(source.file_path, members, calibrations, smoothing, file)

    search = _Search(reference, checkpoint, budget, requests, file, rewrite)
    groups = _groups(ir.load(reference.file_path))
    count = total = len(groups)
    if not search.good_enough(groups, total, progress):
        groups = search.order(groups, progress)
        count = _largest_under(total, lambda number: search.good_enough(groups[:number], total, progress))
    share = sum(group.weights for group in groups[:count]) / sum(group.weights for group in groups)
    if share < _MIN_QUANTISED:
        scores = "" if checkpoint.task == "embedding" else f" and max_logit_error={budget.max_logit_error}"
        raise QualityError(
            f"INT8 of {checkpoint.source}: only {count} of {len(groups)} groups of matrix products ({share:.0%} of "
            f"their weights) stay within min_mean_cosine={budget.min_mean_cosine} and "
            f"min_worst_cosine={budget.min_worst_cosine}{scores}; use bf16 or fp16, or lower the budget knowingly"
        )
    rewrite(graph, groups[:count])
    require_standard(file)
    progress("checking on held-out texts")
    held_out = sample_requests(checkpoint, held_out_texts)
    quality = measure(
        graph_outputs(reference.file_path, held_out, checkpoint),
        graph_outputs(file, held_out, checkpoint),
        checkpoint.task,
        "ONNX Runtime",
    )
    require_budget(quality, budget, f"INT8 graph of {checkpoint.source}")
    return record_graph(out, "int8", quality, graph.digest)


class _Search:
    """Tries selections of groups on the fp32 graph, in the file that the result will replace."""

    def __init__(
        self,
        reference: OnnxGraph,
        checkpoint: Checkpoint,
        budget: PrecisionSlice,
        requests: Sequence[Tensors],
        file: Path,
        rewrite: Callable[[OnnxGraph, Sequence[Group]], None],
    ) -> None:
        self._reference, self._checkpoint, self._budget = reference, checkpoint, budget
        self._requests, self._file, self._rewrite = requests, file, rewrite
        self._expected = graph_outputs(reference.file_path, requests, checkpoint)

    def order(self, groups: Sequence[Group], progress: Callable[[str], None]) -> list[Group]:
        """The smallest loss per weight first."""
        measured = []
        for index, group in enumerate(groups):
            progress(f"measuring group {index + 1} of {len(groups)}")
            loss = 1 - self._quality([group], _SENSITIVITY_TEXTS).mean_cosine
            measured.append(replace(group, loss=max(loss, 0.0)))
        return sorted(measured, key=lambda group: group.loss / group.weights)

    def good_enough(self, groups: Sequence[Group], total: int, progress: Callable[[str], None]) -> bool:
        quality = self._quality(groups, len(self._requests))
        progress(
            f"{len(groups)} of {total} groups in INT8: "
            f"cosine {quality.mean_cosine:.5f}, worst {quality.worst_cosine:.5f}"
        )
        return (
            (quality.logit_error or 0.0) <= _LOGIT_MARGIN * self._budget.max_logit_error
            and 1 - quality.mean_cosine <= _MEAN_MARGIN * (1 - self._budget.min_mean_cosine)
            and 1 - quality.worst_cosine <= _WORST_MARGIN * (1 - self._budget.min_worst_cosine)
        )  # fmt: skip

    def _quality(self, groups: Sequence[Group], texts: int) -> Quality:
        self._rewrite(self._reference, groups)
        outputs = graph_outputs(self._file, self._requests[:texts], self._checkpoint)
        return measure(self._expected[:texts], outputs, self._checkpoint.task, "ONNX Runtime")


def _largest_under(total: int, good_enough: Callable[[int], bool]) -> int:
    """The largest count that is good enough, by bisection: quality falls as more is quantised, and `total` fell."""
    low, high = 0, total  # low is good (nothing quantised), high is not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if good_enough(middle) else (low, middle)
    return low


def _linears(model: ir.Model) -> list[ir.Node]:
    return [
        node
        for node in model.graph
        if node.op_type == "MatMul"
        and (weight := node.inputs[1]) is not None
        and weight.is_initializer()
        and weight.shape is not None
        and len(weight.shape) == 2
    ]


def _calibrate(file: Path, requests: Sequence[Tensors]) -> list[Calibration]:
    """What each linear layer reads, in graph order: a run with every such activation as an extra output."""
    model = ir.load(file)
    read = [_input(node, 0) for node in _linears(model)]
    if not read:
        raise UnsupportedError(
            f"graph {file.name}", got="no MatMul with a constant weight", expected="linear layers to quantise",
            fix="use fp16 for this model",
        )  # fmt: skip
    wanted = {str(value.name): value for value in read}
    by_token = {name for name, value in wanted.items() if _is_by_token(model, value)}
    model.graph.outputs.extend(value for value in wanted.values() if value not in model.graph.outputs)
    names = list(wanted)
    maxima: dict[str, Floats] = {}
    rows: dict[str, list[Floats]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory(prefix="trireme-calibration-") as folder:
        probe = Path(folder) / "probe.onnx"
        ir.save(model, probe, external_data="probe.onnx.data")
        session = open_session(probe)
        for feeds in _stack(requests):
            real = feeds["attention_mask"].astype(bool)
            for name, array in zip(names, session.run(names, feeds), strict=True):
                # A layer on pooled vectors is [batch, K]; one on tokens is [batch, length, K], padding left out.
                tokens = array[real] if name in by_token else array.reshape(-1, array.shape[-1])
                peak = np.abs(tokens).max(axis=0).astype(np.float32)
                maxima[name] = np.maximum(maxima.get(name, peak), peak)
                rows[name].append(thin_out(tokens.astype(np.float32), _ROWS_KEPT * _BATCH // len(requests) + 1))
    kept = {name: Calibration(maxima[name], np.concatenate(rows[name])) for name in names}
    return [kept[str(value.name)] for value in read]


def _is_by_token(model: ir.Model, value: ir.Value) -> bool:
    """Whether `value` begins with the batch and the length of the ids: by the names of the dimensions, since sizes may
    be the same by chance."""
    ids = next(given for given in model.graph.inputs if given.name == "input_ids")
    if value.shape is None or ids.shape is None:
        raise ParityError(f"activation {value.name} has no shape in the graph, so its tokens cannot be told")
    return len(value.shape) > 2 and list(value.shape[:2]) == list(ids.shape)


def _stack(requests: Sequence[Tensors]) -> list[dict[str, np.ndarray]]:  # type: ignore[type-arg]
    """Requests of one row each in batches of alike lengths, padded with zeros."""
    ordered = sorted(requests, key=lambda feeds: feeds["input_ids"].shape[1])
    batches = []
    for start in range(0, len(ordered), _BATCH):
        group = ordered[start : start + _BATCH]
        longest = group[-1]["input_ids"].shape[1]
        batches.append(
            {
                name: np.concatenate([np.pad(f[name], ((0, 0), (0, longest - f[name].shape[1]))) for f in group])
                for name in group[0]
            }
        )
    return batches


def _groups(model: ir.Model) -> list[Group]:
    """Linear layers that read the same activation share its smoothing factors and its quantised form."""
    readers: dict[str, list[int]] = {}
    sizes = []
    for index, node in enumerate(_linears(model)):
        readers.setdefault(str(_input(node, 0).name), []).append(index)
        sizes.append(_weight(node).size)
    return [Group(tuple(members), sum(sizes[i] for i in members)) for members in readers.values()]


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _weight(node: ir.Node) -> Floats:
    tensor = _input(node, 1).const_value
    assert tensor is not None
    return tensor.numpy().astype(np.float32)


def _rewrite(
    source: Path,
    chosen: Collection[int],
    calibrations: Sequence[Calibration],
    smoothing: Mapping[int, Floats],
    target: Path,
) -> None:
    """Saves `source` with the chosen linear layers quantised; the others keep reading the activation itself.

    `chosen` and `calibrations` count linear layers in graph order, which the fp32 and fp16 export of one model share.
    `smoothing` holds the factors of each group, by its first member.
    """
    model = ir.load(source)
    linears = _linears(model)
    if len(linears) != len(calibrations):
        raise ParityError(f"{source}: {len(linears)} linear layers, but {len(calibrations)} were calibrated")
    for group in _groups(model):
        first = group.members[0]
        if first not in chosen:
            continue
        smoothed = _insert_activation(model.graph, linears[first], smoothing[first], calibrations[first].channel_max)
        for index in group.members:
            _insert_weight(model.graph, linears[first], linears[index], smoothing[first])
            linears[index].replace_input_with(0, smoothed)
    for value in [v for v in model.graph.initializers.values() if not v.uses()]:
        del model.graph.initializers[str(value.name)]
    external = f"{target.name}.data" if (source.parent / f"{source.name}.data").exists() else None
    ir.save(model, target, external_data=external)


def _smoothing(source: Path, calibrations: Sequence[Calibration]) -> dict[int, Floats]:
    """The best factors of every group, by its first member."""
    model = ir.load(source)
    linears = _linears(model)
    return {
        group.members[0]: best_smoothing(
            calibrations[group.members[0]], [_weight(linears[index]) for index in group.members]
        )
        for group in _groups(model)
    }


def _insert_activation(graph: ir.Graph, before: ir.Node, factors: Floats, channel_max: Floats) -> ir.Value:
    """activation -> Mul(1 / factors) -> QuantizeLinear -> DequantizeLinear."""
    activation = _input(before, 0)
    name, dtype = str(activation.name), _input(before, 1).const_value.numpy().dtype  # type: ignore[union-attr]
    inverse = _constant(graph, f"{name}_smooth", (1 / factors).astype(dtype))
    scale_value = _constant(graph, f"{name}_scale", np.array(activation_scale(channel_max, factors, dtype), dtype))
    zero = _constant(graph, f"{name}_zero", np.zeros((), np.int8))
    smooth = ir.node("Mul", [activation, inverse], name=f"{name}_smooth_mul")
    quantize = ir.node("QuantizeLinear", [smooth.outputs[0], scale_value, zero], name=f"{name}_quantize")
    dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], scale_value, zero], name=f"{name}_dequantize")
    for node in (smooth, quantize, dequantize):
        node.outputs[0].name = f"{node.name}_out"
    graph.insert_before(before, [smooth, quantize, dequantize])
    return dequantize.outputs[0]


def _insert_weight(graph: ir.Graph, before: ir.Node, node: ir.Node, factors: Floats) -> None:
    """INT8 weight -> DequantizeLinear along the output channels, as the new weight of `node`."""
    old = _input(node, 1)
    name, dtype = str(old.name), old.const_value.numpy().dtype  # type: ignore[union-attr]
    quantized = quantize_weight(_weight(node), factors, dtype)
    inputs = [
        _constant(graph, f"{name}_int8", quantized.weight),
        _constant(graph, f"{name}_scale", quantized.weight_scale.astype(dtype)),
        _constant(graph, f"{name}_zero", np.zeros(quantized.weight_scale.shape, np.int8)),
    ]
    dequantize = ir.node("DequantizeLinear", inputs, attributes={"axis": 1}, name=f"{name}_dequantize")
    dequantize.outputs[0].name = f"{name}_dequantized"
    graph.insert_before(before, [dequantize])
    node.replace_input_with(1, dequantize.outputs[0])


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:  # type: ignore[type-arg]
    value = ir.Value(
        name=name,
        const_value=ir.tensor(array, name=name),
        shape=ir.Shape(array.shape),
        type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
    )
    graph.register_initializer(value)
    return value
