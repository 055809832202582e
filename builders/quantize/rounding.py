"""The weights of an INT8 graph, rounded so that later rows make up for what earlier ones lose: GPTQ.

The graph stays what it is, node for node and scale for scale; integers alone are others. Whether they are better is
measured by who asks for them: on few texts, or on unlike ones, rounding to the nearest is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from builders.quantize.blocks import HESSIAN_BYTES, compensated
from builders.quantize.linears import Group, activations, input_of, linears_of, weight_of
from builders.quantize.scales import Floats
from builders.quantize.smoothquant import QuantizedLinear, quantize_weight
from runtime.graph import Tensors

JUDGED = 4  # every fourth calibration text judges, and is not rounded by
_TOKENS = 24_000  # to round by, at most: a MiniLM loses little less by more


def to_round_by(requests: Sequence[Tensors]) -> list[Tensors]:
    count, taken = 0, list[Tensors]()
    for index, request in enumerate(requests):
        if index % JUDGED and count < _TOKENS:
            taken.append(request)
            count += request["input_ids"].size
    return taken


def gptq_weights(
    reference: Path,
    groups: Sequence[Group],
    smoothing: Mapping[int, Floats],
    requests: Sequence[Tensors],
    target: Path,
    progress: Callable[[str], None] = lambda message: None,
) -> dict[int, QuantizedLinear]:
    """Of all members of `groups`, by their position among the linear layers of the fp32 graph `reference`; their
    scales are those of rounding to the nearest, in the types that the graph `target` has.

    `smoothing` holds the factors of each group, by its first member.
    """
    linears, held = (linears_of(ir.load(file)) for file in (reference, target))
    done: dict[int, QuantizedLinear] = {}
    for share in _shares(linears, groups):
        hessians = _hessians(reference, [_reads(linears, group) for group in share], requests)
        for group in share:
            progress(f"GPTQ of weight {len(done) + 1} of {sum(len(each.members) for each in groups)}")
            factors = smoothing[group.members[0]]
            hessian = hessians[_reads(linears, group)] / np.outer(factors, factors)
            weights = [weight_of(linears[index]) for index in group.members]
            dtypes = [input_of(held[index], 1).const_value.numpy().dtype for index in group.members]  # type: ignore[union-attr]
            nearest = [
                quantize_weight(weight_of(held[index]), factors, dtype)
                for index, dtype in zip(group.members, dtypes, strict=True)
            ]
            smoothed = np.concatenate(weights, axis=1) * factors[:, None]
            # Columns are rounded each by itself, so that weights side by side share the work on their Hessian.
            scales = np.concatenate([each.weight_scale for each in nearest])
            integers = compensated(smoothed, hessian, scales[None], (-127, 127)).astype(np.int8)
            ends = np.cumsum([each.weight.shape[1] for each in nearest])[:-1]
            for index, each, found in zip(group.members, nearest, np.split(integers, ends, axis=1), strict=True):
                done[index] = QuantizedLinear(np.ascontiguousarray(found), each.weight_scale)
    return done


def _reads(linears: Sequence[ir.Node], group: Group) -> str:
    return str(input_of(linears[group.members[0]], 0).name)


def _shares(linears: Sequence[ir.Node], groups: Sequence[Group]) -> Iterator[list[Group]]:
    """Cut where the Hessians of one share would take too much memory; the graph runs once for each."""
    share, held = list[Group](), 0
    for group in groups:
        size = 4 * len(weight_of(linears[group.members[0]])) ** 2
        if share and held + size > HESSIAN_BYTES:
            yield share
            share, held = [], 0
        share.append(group)
        held += size
    if share:
        yield share


def _hessians(file: Path, names: Sequence[str], requests: Sequence[Tensors]) -> dict[str, Floats]:
    """X^T X [K, K] of the named activations over all tokens."""
    found: dict[str, Floats] = {}
    for name, tokens in activations(file, names, requests):
        product: Floats = tokens.T @ tokens
        found[name] = found[name] + product if name in found else product
    return found
