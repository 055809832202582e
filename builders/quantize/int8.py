"""An encoder's graph -> its matrix products in eight bits, in one of the forms of `forms.py`.

INT8 of calibrated scales is for TensorRT and OpenVINO alike, written into the fp16 graph: weights per output channel,
activations per tensor after SmoothQuant. Only matrix products with a
constant weight are quantised; their outputs stay in floating point. Which of them lose too much is measured, not
guessed: each group that reads one activation is quantised alone, the groups are ordered by the loss per weight, and
as many as the quality budget bears are taken. The search runs on the fp32 graph, which ONNX Runtime computes far
faster on CPU; the choice is then carried out on the graph that is served. INT8 weights are rounded to the nearest step,
or by GPTQ where that comes nearer to fp32 on texts by which it did not round.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import onnx_ir as ir

from builders.artifacts import Checkpoint, OnnxGraph, Quality, RoundingChoice
from builders.errors import ParityError, QualityError, UnsupportedError
from builders.graph import GRAPH_FILE, record_graph, require_standard
from builders.judging.vectors import graph_outputs, measure, require_budget, sample_requests, within_budget
from builders.quantize.forms import FORMS, QuantizedForm, Site
from builders.quantize.linears import BATCH, Group, activations, groups_of, input_of, linears_of, weight_of
from builders.quantize.rounding import JUDGED, gptq_weights, to_round_by
from builders.quantize.scales import Floats
from builders.quantize.smoothquant import (
    Calibration,
    QuantizedLinear,
    best_smoothing,
    thin_out,
)
from builders.spec import PrecisionSlice
from runtime.graph import Tensors

_SENSITIVITY_TEXTS = 32
_ROWS_KEPT = 1024
# Shares of the budget that the search may use up on the calibration texts; held-out texts get the rest. The worst of
# a sample says less about the worst of another than the mean does.
_MEAN_MARGIN = 0.75
_WORST_MARGIN = 0.5
_LOGIT_MARGIN = 0.85  # a root: about that of the mean's margin
_MIN_QUANTISED = 0.5  # below this share of the weights the graph is INT8 in name only
Weights = Mapping[int, QuantizedLinear]  # by position among all linear layers; those that are not there: to the nearest


def quantize_linears(
    graph: OnnxGraph,
    reference: OnnxGraph,
    checkpoint: Checkpoint,
    budget: PrecisionSlice,
    calibration_texts: Sequence[str],
    held_out_texts: Sequence[str],
    out: Path,
    progress: Callable[[str], None] = lambda message: None,
    form: QuantizedForm = FORMS["int8"],
) -> OnnxGraph:
    """Writes a quantised form of `graph` (fp16; of dynamic INT8, fp32) into `out`; quality is measured against
    `reference` (fp32).

    Raises QualityError when fewer than half of the weights could be quantised within the budget, or when the result
    misses it on the held-out texts; UnsupportedError when there is nothing to quantise.
    """
    progress("calibrating")
    requests = sample_requests(checkpoint, calibration_texts)
    calibrations = _calibrate(reference.file_path, requests)
    smoothing = _smoothing(reference.file_path, calibrations, form)
    file = out / GRAPH_FILE

    def rewrite(source: OnnxGraph, groups: Sequence[Group], weights: Weights) -> None:
        members = {member for group in groups for member in group.members}
        _rewrite(source.file_path, members, calibrations, smoothing, file, weights, form)

    def by_gptq(groups: Sequence[Group]) -> Weights:
        seen = to_round_by(requests)
        return gptq_weights(reference.file_path, groups, smoothing, seen, graph.file_path, progress)

    search = _Search(reference, checkpoint, budget, requests, file, rewrite)
    groups = groups_of(ir.load(reference.file_path))
    count = total = len(groups)
    if not search.good_enough(groups, total, progress):
        groups = search.order(groups, progress)
        count = largest_under(
            total, lambda number: search.good_enough(groups[:number], total, progress), _guess(groups, budget)
        )
    chosen = groups[:count]
    _require_most(chosen, groups, checkpoint, budget, form)
    weights, rounding = search.rounding(chosen, by_gptq, progress) if form.integers else ({}, None)
    held_out = sample_requests(checkpoint, held_out_texts)
    expected = graph_outputs(reference.file_path, held_out, checkpoint)

    def written(weights: Weights) -> Quality:
        rewrite(graph, chosen, weights)
        require_standard(file)
        progress("checking on held-out texts")
        return measure(expected, graph_outputs(file, held_out, checkpoint), checkpoint.task, "ONNX Runtime")

    quality = written(weights)
    if weights and rounding is not None and budget.rounding == "auto" and not within_budget(quality, budget):
        quality, rounding = written({}), rounding.model_copy(update={"taken": "nearest"})
    require_budget(quality, budget, f"{form.precision} graph of {checkpoint.source}")
    return record_graph(out, form.precision, quality, graph.digest).model_copy(update={"rounding": rounding})


def _require_most(
    chosen: Sequence[Group],
    groups: Sequence[Group],
    checkpoint: Checkpoint,
    budget: PrecisionSlice,
    form: QuantizedForm,
) -> None:
    share = sum(group.weights for group in chosen) / sum(group.weights for group in groups)
    if share < _MIN_QUANTISED:
        scores = "" if checkpoint.task == "embedding" else f" and max_logit_error={budget.max_logit_error}"
        raise QualityError(
            f"{form.precision} of {checkpoint.source}: only {len(chosen)} of {len(groups)} groups of matrix products "
            f"({share:.0%} of their weights) stay within min_mean_cosine={budget.min_mean_cosine} and "
            f"min_worst_cosine={budget.min_worst_cosine}{scores}; use bf16 or fp16, or lower the budget knowingly"
        )


class _Search:
    """Tries selections of groups on the fp32 graph, in the file that the result will replace."""

    def __init__(
        self,
        reference: OnnxGraph,
        checkpoint: Checkpoint,
        budget: PrecisionSlice,
        requests: Sequence[Tensors],
        file: Path,
        rewrite: Callable[[OnnxGraph, Sequence[Group], Weights], None],
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
            f"{len(groups)} of {total} groups quantised: "
            f"cosine {quality.mean_cosine:.5f}, worst {quality.worst_cosine:.5f}"
        )
        return (
            (quality.logit_error or 0.0) <= _LOGIT_MARGIN * self._budget.max_logit_error
            and 1 - quality.mean_cosine <= _mean_allowed(self._budget)
            and 1 - quality.worst_cosine <= _WORST_MARGIN * (1 - self._budget.min_worst_cosine)
        )  # fmt: skip

    def rounding(
        self,
        groups: Sequence[Group],
        by_gptq: Callable[[Sequence[Group]], Weights],
        progress: Callable[[str], None],
    ) -> tuple[Weights, RoundingChoice]:
        """What the spec asks for; or what is nearer to fp32 on texts by which GPTQ did not round."""
        asked = self._budget.rounding
        if asked == "nearest":
            return {}, RoundingChoice(asked=asked, taken="nearest")
        weights = by_gptq(groups)
        if asked == "gptq":
            return weights, RoundingChoice(asked=asked, taken="gptq")
        nearest, gptq = (self._distance(groups, each) for each in ({}, weights))
        choice = RoundingChoice(
            asked=asked,
            taken="gptq" if gptq < nearest else "nearest",
            nearest=nearest,
            gptq=gptq,
            texts=len(self._requests[::JUDGED]),
        )
        progress(choice.summary)
        return (weights if choice.taken == "gptq" else {}), choice

    def _distance(self, groups: Sequence[Group], weights: Weights) -> float:
        self._rewrite(self._reference, groups, weights)
        outputs = graph_outputs(self._file, self._requests[::JUDGED], self._checkpoint)
        quality = measure(self._expected[::JUDGED], outputs, self._checkpoint.task, "ONNX Runtime")
        return 1 - quality.mean_cosine if quality.logit_error is None else quality.logit_error

    def _quality(self, groups: Sequence[Group], texts: int) -> Quality:
        self._rewrite(self._reference, groups, {})
        outputs = graph_outputs(self._file, self._requests[:texts], self._checkpoint)
        return measure(self._expected[:texts], outputs, self._checkpoint.task, "ONNX Runtime")


def _guess(ordered: Sequence[Group], budget: PrecisionSlice) -> int:
    """How many groups the mean cosine would bear if losses added up."""
    return sum(lost <= _mean_allowed(budget) for lost in accumulate(group.loss for group in ordered))


def _mean_allowed(budget: PrecisionSlice) -> float:
    return _MEAN_MARGIN * (1 - budget.min_mean_cosine)


def largest_under(total: int, good_enough: Callable[[int], bool], guess: int) -> int:
    """The largest count that is good enough: quality falls as more is quantised, and `total` fell. By bisection whose
    steps begin small, at the guess, since each costs a run over all calibration texts."""
    low, high, step = 0, total, 1  # low is good (nothing quantised), high is not
    at = guess
    while high - low > 1:
        at = min(max(at, low + 1), high - 1)
        if good_enough(at):
            low = at
            at = min(low + step, max((low + high) // 2, low + 1))
        else:
            high = at
            at = max(high - step, min((low + high) // 2, high - 1))
        step *= 2
    return low


def _calibrate(file: Path, requests: Sequence[Tensors]) -> list[Calibration]:
    """What each linear layer reads, in graph order."""
    read = [str(input_of(node, 0).name) for node in linears_of(ir.load(file))]
    if not read:
        raise UnsupportedError(
            f"graph {file.name}", got="no MatMul with a constant weight", expected="linear layers to quantise",
            fix="use fp16 for this model",
        )  # fmt: skip
    maxima: dict[str, Floats] = {}
    rows: dict[str, list[Floats]] = {name: [] for name in read}
    for name, tokens in activations(file, rows, requests):
        peak = np.abs(tokens).max(axis=0)
        maxima[name] = np.maximum(maxima.get(name, peak), peak)
        rows[name].append(thin_out(tokens, _ROWS_KEPT * BATCH // len(requests) + 1))
    kept = {name: Calibration(maxima[name], np.concatenate(rows[name])) for name in rows}
    return [kept[name] for name in read]


def _rewrite(
    source: Path,
    chosen: Collection[int],
    calibrations: Sequence[Calibration],
    smoothing: Mapping[int, Floats],
    target: Path,
    weights: Weights,
    form: QuantizedForm = FORMS["int8"],
) -> None:
    """Saves `source` with the chosen linear layers quantised; the others keep reading the activation itself.

    `chosen` and `calibrations` count linear layers in graph order, which the fp32 and fp16 export of one model share.
    `smoothing` holds the factors of each group, by its first member.
    """
    model = ir.load(source)
    linears = linears_of(model)
    if len(linears) != len(calibrations):
        raise ParityError(f"{source}: {len(linears)} linear layers, but {len(calibrations)} were calibrated")
    for group in groups_of(model):
        first = group.members[0]
        if first not in chosen:
            continue
        site, factors = Site(model.graph, linears[first]), smoothing[first]
        read = form.activation(site, factors, calibrations[first].channel_max)
        for index in group.members:
            form.product(site, linears[index], read, factors, weights.get(index))
    for value in [v for v in model.graph.initializers.values() if not v.uses()]:
        del model.graph.initializers[str(value.name)]
    external = f"{target.name}.data" if (source.parent / f"{source.name}.data").exists() else None
    ir.save(model, target, external_data=external)


def _smoothing(
    source: Path, calibrations: Sequence[Calibration], form: QuantizedForm = FORMS["int8"]
) -> dict[int, Floats]:
    """The best factors of every group, by its first member; none where the form has no use for them."""
    if not form.integers:
        return {group.members[0]: np.ones(0, np.float32) for group in groups_of(ir.load(source))}
    model = ir.load(source)
    linears = linears_of(model)
    return {
        group.members[0]: best_smoothing(
            calibrations[group.members[0]], [weight_of(linears[index]) for index in group.members]
        )
        for group in groups_of(model)
    }
