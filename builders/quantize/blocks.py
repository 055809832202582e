"""Weights as integers in blocks that share a scale; and GPTQ, which lets later weights make up for earlier ones.

A weight [K, N] belongs to the product x @ weight. Blocks run along K, the dimension that is summed over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from builders.quantize.scales import Floats, Type, representable

Bits = Literal[4, 8]
BLOCK = 32  # the shortest in use
_SHRINK = np.linspace(0.72, 1.0, 15, dtype=np.float32)  # of a block's range, tried for the smallest error
_DAMPING = 0.01  # of the mean diagonal, added to the Hessian: keeps directions that calibration never saw stable
HESSIAN_BYTES = 1 << 31  # held at a time; calibration runs once for each such share
_CHUNK = 128  # rows of the weight between two updates of all rows behind them


@dataclass(frozen=True)
class Blocks:
    """`values` int8 [K, N] within the range of the bits, `scales` [K / size, N]; values * scales is the weight."""

    values: NDArray[np.int8]
    scales: Floats
    bits: Bits

    @property
    def size(self) -> int:
        return len(self.values) // len(self.scales)

    def restore(self) -> Floats:
        weight: Floats = self.values.astype(np.float32) * self.scales.repeat(self.size, axis=0)
        return weight


def block_size(rows: int, longest: int, ranks: int) -> int:
    """`longest`, halved until it cuts K = `rows` evenly on every rank; 32 at least.

    Long blocks have fewer scales to read, and products that add up integers for longer.
    """
    size = longest
    while size > BLOCK and rows % (size * ranks):
        size //= 2
    return size


def round_to_nearest(weight: Floats, bits: Bits, size: int = BLOCK, dtype: Type = np.float32) -> Blocks:
    """Each weight to the nearest step of its block, for a graph of `dtype`."""
    scales = block_scales(weight, bits, size, dtype)
    return Blocks(_steps(weight, scales.repeat(size, axis=0), bits).astype(np.int8), scales, bits)


def block_scales(weight: Floats, bits: Bits, size: int, dtype: Type) -> Floats:
    """[K / size, N], as a graph of `dtype` holds them. Eight bits take the whole range of a block; four cut off its
    farthest weights where the others gain more than these lose."""
    blocks = weight.reshape(-1, size, weight.shape[1])
    whole = representable(np.abs(blocks).max(axis=1) / (2 ** (bits - 1) - 1), dtype)
    if bits == 8:
        return whole
    best, least = whole, np.full(whole.shape, np.inf, np.float32)
    for shrink in _SHRINK:
        scales = representable(whole * shrink, dtype)
        error = ((_steps(blocks, scales[:, None], bits) * scales[:, None] - blocks) ** 2).sum(axis=1)
        best, least = np.where(error < least, scales, best), np.minimum(error, least)
    return best


def gptq(weight: Floats, hessian: Floats, bits: Bits, dtype: Type = np.float32, size: int = BLOCK) -> Blocks:
    """Row by row along K; what rounding one row loses on the calibration inputs, the rows still to come make up for.

    `hessian` is X^T X [K, K] of the inputs; the graph that gets the blocks is of `dtype`. Rows with the largest inputs
    come first, and blocks keep the scales of the original weights, so that the order is free. Frantar et al., "GPTQ:
    Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022.
    """
    scales, top = block_scales(weight, bits, size, dtype), 2 ** (bits - 1)
    return Blocks(compensated(weight, hessian, scales.repeat(size, axis=0), (-top, top - 1)), scales, bits)


def compensated(weight: Floats, hessian: Floats, scales: Floats, ends: tuple[int, int]) -> NDArray[np.int8]:
    """GPTQ's steps for `weight` [K, N]; `scales` are those of each weight, or of each column, [K or 1, N]."""
    scales = np.broadcast_to(scales, weight.shape)
    order = np.argsort(-np.diag(hessian), kind="stable")
    inverse = _inverse_factor(hessian[np.ix_(order, order)])
    left = weight[order].astype(np.float32)
    values = np.zeros(weight.shape, np.int8)
    for start in range(0, len(left), _CHUNK):
        stop = min(start + _CHUNK, len(left))
        errors = np.zeros((stop - start, weight.shape[1]), np.float32)
        for row in range(start, stop):
            scale = scales[order[row]]
            steps = np.clip(np.rint(left[row] / scale), *ends)
            error = (left[row] - steps * scale) / inverse[row, row]
            left[row + 1 : stop] -= np.outer(inverse[row, row + 1 : stop], error)
            values[order[row]], errors[row - start] = steps, error
        left[stop:] -= inverse[start:stop, stop:].T @ errors
    return values


def _inverse_factor(hessian: Floats) -> Floats:
    """Upper triangular U with U^T U = (damped hessian)^-1. The damping covers directions that no input took."""
    damping = _DAMPING * np.diag(hessian).mean() + 1e-12
    damped = hessian.astype(np.float64) + np.eye(len(hessian)) * damping
    upper: Floats = np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32)
    return upper


def _steps(weight: Floats, scale: Floats, bits: Bits) -> Floats:
    top = 2 ** (bits - 1)
    steps: Floats = np.clip(np.rint(weight / scale), -top, top - 1)
    return steps
