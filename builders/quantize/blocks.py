"""Weights as integers in blocks that share a scale; and GPTQ, which lets later weights make up for earlier ones.

A weight [K, N] belongs to the product x @ weight. Blocks run along K, the dimension that is summed over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from builders.quantize.scales import Floats, Type, representable

Bits = Literal[4, 8]
Ranges = Literal["auto", "minmax", "mse"]
BLOCK = 32  # the shortest in use
_SHRINK = np.linspace(0.72, 1.0, 15, dtype=np.float32)  # of a block's range, tried for the smallest error
_DAMPING = 0.01  # of the mean diagonal, added to the Hessian: keeps directions that calibration never saw stable
HESSIAN_BYTES = 1 << 31  # held at a time; calibration runs once for each such share
_CHUNK = 128  # rows of the weight between two updates of all rows behind them


@dataclass(frozen=True)
class BlockForm:
    """`asymmetric`: a block reaches from its least to its greatest weight, and has a zero point. `ranges`: minmax keeps
    all of its weights; mse cuts off the farthest where the others gain more than these lose; auto: mse in four bits."""

    asymmetric: bool = False
    ranges: Ranges = "auto"

    def shrinks(self, bits: Bits) -> Floats:
        """Of a block's range, to be tried."""
        return _SHRINK if self.ranges == "mse" or (self.ranges == "auto" and bits == 4) else _SHRINK[-1:]


SYMMETRIC = BlockForm()


@dataclass(frozen=True)
class Grid:
    """What a block's weights are rounded to: (integers - zeros) * scales, both [K / size, N]. Integers of the bits are
    signed where there are no zeros, else from 0."""

    scales: Floats
    zeros: NDArray[np.uint8] | None

    def ends(self, bits: Bits, size: int) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
        """The least and the greatest number of steps from 0, of all weights [1, 1] or of each [K, N]."""
        top = 2 ** (bits - 1)
        if self.zeros is None:
            return np.full((1, 1), -top, np.int16), np.full((1, 1), top - 1, np.int16)
        zeros = self.zeros.astype(np.int16).repeat(size, axis=0)
        return -zeros, 2 * top - 1 - zeros


@dataclass(frozen=True)
class Blocks:
    """`values` [K, N] within the range of the bits, int8, or uint8 where there are `zeros` [K / size, N];
    (values - zeros) * scales is the weight, `scales` [K / size, N]."""

    values: NDArray[Any]
    scales: Floats
    bits: Bits
    zeros: NDArray[np.uint8] | None = None

    @property
    def size(self) -> int:
        return len(self.values) // len(self.scales)

    def restore(self) -> Floats:
        steps = self.values.astype(np.float32)
        if self.zeros is not None:
            steps -= self.zeros.repeat(self.size, axis=0)
        weight: Floats = steps * self.scales.repeat(self.size, axis=0)
        return weight


def block_size(rows: int, longest: int, ranks: int) -> int:
    """`longest`, halved until it cuts K = `rows` evenly on every rank; 32 at least.

    Long blocks have fewer scales to read, and products that add up integers for longer.
    """
    size = longest
    while size > BLOCK and rows % (size * ranks):
        size //= 2
    return size


def round_to_nearest(
    weight: Floats, bits: Bits, size: int = BLOCK, dtype: Type = np.float32, form: BlockForm = SYMMETRIC
) -> Blocks:  # fmt: skip
    """Each weight to the nearest step of its block, for a graph of `dtype`."""
    grid = block_grid(weight, bits, size, dtype, form)
    steps = np.clip(np.rint(weight / grid.scales.repeat(size, axis=0)), *grid.ends(bits, size))
    return _as_blocks(steps, grid, bits, size)


def block_grid(weight: Floats, bits: Bits, size: int, dtype: Type, form: BlockForm = SYMMETRIC) -> Grid:
    """Scales as a graph of `dtype` holds them. A range is shrunk where that makes the block's squared error smaller."""
    blocks = weight.reshape(-1, size, weight.shape[1])
    low, high = np.minimum(blocks.min(axis=1), 0), np.maximum(blocks.max(axis=1), 0)
    best, least = None, np.full(low.shape, np.inf, np.float32)
    for shrink in form.shrinks(bits)[::-1]:
        grid = _grid(low * shrink, high * shrink, bits, dtype, form.asymmetric)
        first, last = (end[::size][:, None] for end in grid.ends(bits, size))
        steps = np.clip(np.rint(blocks / grid.scales[:, None]), first, last)
        error = ((steps * grid.scales[:, None] - blocks) ** 2).sum(axis=1)
        better = error < least
        best, least = grid if best is None else _chosen(better, grid, best), np.minimum(error, least)
    assert best is not None
    return best


def _grid(low: Floats, high: Floats, bits: Bits, dtype: Type, asymmetric: bool) -> Grid:
    if not asymmetric:
        return Grid(representable(np.maximum(-low, high) / (2 ** (bits - 1) - 1), dtype), None)
    scales = representable((high - low) / (2**bits - 1), dtype)
    return Grid(scales, np.clip(np.rint(-low / scales), 0, 2**bits - 1).astype(np.uint8))


def _chosen(better: NDArray[np.bool_], grid: Grid, other: Grid) -> Grid:
    zeros = None if grid.zeros is None or other.zeros is None else np.where(better, grid.zeros, other.zeros)
    return Grid(np.where(better, grid.scales, other.scales), zeros)


def _as_blocks(steps: NDArray[Any], grid: Grid, bits: Bits, size: int) -> Blocks:
    """`steps` from 0, [K, N]."""
    if grid.zeros is None:
        return Blocks(steps.astype(np.int8), grid.scales, bits)
    return Blocks((steps + grid.zeros.repeat(size, axis=0)).astype(np.uint8), grid.scales, bits, grid.zeros)


def gptq(
    weight: Floats, hessian: Floats, bits: Bits, dtype: Type = np.float32, size: int = BLOCK,
    form: BlockForm = SYMMETRIC,
) -> Blocks:  # fmt: skip
    """Row by row along K; what rounding one row loses on the calibration inputs, the rows still to come make up for.

    `hessian` is X^T X [K, K] of the inputs; the graph that gets the blocks is of `dtype`. Rows with the largest inputs
    come first, and blocks keep the scales of the original weights, so that the order is free. Frantar et al., "GPTQ:
    Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022.
    """
    grid = block_grid(weight, bits, size, dtype, form)
    steps = compensated(weight, hessian, grid.scales.repeat(size, axis=0), grid.ends(bits, size))
    return _as_blocks(steps, grid, bits, size)


def compensated(weight: Floats, hessian: Floats, scales: Floats, ends: tuple[Any, Any]) -> NDArray[np.int16]:
    """GPTQ's steps from 0 for `weight` [K, N]; `scales` and `ends`, the least and the greatest of these, are those of
    each weight, or of each column, [K or 1, N]; `ends` may be numbers."""
    scales = np.broadcast_to(scales, weight.shape)
    low, high = (np.broadcast_to(end, weight.shape) for end in ends)
    order = np.argsort(-np.diag(hessian), kind="stable")
    inverse = _inverse_factor(hessian[np.ix_(order, order)])
    left = weight[order].astype(np.float32)
    values = np.zeros(weight.shape, np.int16)
    for start in range(0, len(left), _CHUNK):
        stop = min(start + _CHUNK, len(left))
        errors = np.zeros((stop - start, weight.shape[1]), np.float32)
        for row in range(start, stop):
            place = order[row]
            scale = scales[place]
            steps = np.clip(np.rint(left[row] / scale), low[place], high[place])
            error = (left[row] - steps * scale) / inverse[row, row]
            left[row + 1 : stop] -= np.outer(inverse[row, row + 1 : stop], error)
            values[place], errors[row - start] = steps, error
        left[stop:] -= inverse[start:stop, stop:].T @ errors
    return values


def _inverse_factor(hessian: Floats) -> Floats:
    """Upper triangular U with U^T U = (damped hessian)^-1. The damping covers directions that no input took."""
    damping = _DAMPING * np.diag(hessian).mean() + 1e-12
    damped = hessian.astype(np.float64) + np.eye(len(hessian)) * damping
    upper: Floats = np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32)
    return upper
