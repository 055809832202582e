"""The arithmetic of SmoothQuant (Xiao et al., 2023, equation 4) and of symmetric INT8. Pure numpy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from builders.quantize.scales import FACTORS, Floats, Type, representable

_TINY = 1e-5
ALPHAS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class Calibration:
    """What calibration keeps of one activation: absolute maxima per channel [K], and sample rows [R, K]."""

    channel_max: Floats
    rows: Floats


@dataclass(frozen=True)
class QuantizedLinear:
    """`x @ W` as `scale_x * q(x / smooth) @ (q_w * scale_w)`."""

    weight: NDArray[np.int8]  # [K, N]
    weight_scale: Floats  # [N]


def smoothing_factors(channel_max: Floats, weights: list[Floats], alpha: float) -> Floats:
    """One factor a channel, shared by all weights that read the same activation; geometric mean 1, but within FACTORS.

    An activation channel with large values is divided by its factor and the weight row multiplied by it, so that the
    difficulty is shared out: alpha 0 leaves the activations as they are, alpha 1 makes their channels equal.
    """
    weight_max = np.maximum.reduce([np.abs(weight).max(axis=1) for weight in weights])
    factors = np.maximum(channel_max, _TINY) ** alpha / np.maximum(weight_max, _TINY) ** (1 - alpha)
    scaled: Floats = (factors / np.exp(np.log(factors).mean())).astype(np.float32)
    return scaled.clip(*FACTORS)


def activation_scale(channel_max: Floats, factors: Floats, dtype: Type = np.float16) -> float:
    """Symmetric per-tensor scale of the smoothed activation, for a graph of `dtype`."""
    return float(representable((channel_max / factors).max() / 127, dtype))


def quantize_weight(weight: Floats, factors: Floats, dtype: Type = np.float16) -> QuantizedLinear:
    """Symmetric per output channel, for a graph of `dtype`. `weight` is [K, N]."""
    smoothed = weight * factors[:, None]
    scale = representable(np.abs(smoothed).max(axis=0) / 127, dtype)
    quantized = np.clip(np.rint(smoothed / scale), -127, 127).astype(np.int8)
    return QuantizedLinear(quantized, scale)


def best_smoothing(calibration: Calibration, weights: list[Floats]) -> Floats:
    """The smoothing factors, among ALPHAS, with the least error on the sample rows.

    One alpha for a whole model is a poor fit: after a GELU a few channels are huge, and want nearly all of the
    difficulty in the weights (MiniLM: alpha 1.0 has a thirtieth of the error of 0.6 there).
    """
    candidates = [smoothing_factors(calibration.channel_max, weights, alpha) for alpha in ALPHAS]
    return min(candidates, key=lambda factors: _error(calibration, weights, factors))


def _error(calibration: Calibration, weights: list[Floats], factors: Floats) -> float:
    """Noise power over signal power of `rows @ weight` with both sides quantised, added up over the weights."""
    scale = activation_scale(calibration.channel_max, factors)
    rows = calibration.rows
    rounded = np.clip(np.rint(rows / factors / scale), -127, 127) * scale
    total = 0.0
    for weight in weights:
        quantized = quantize_weight(weight, factors)
        exact = rows @ weight
        noise = exact - rounded @ (quantized.weight * quantized.weight_scale)
        total += float(np.square(noise).sum() / max(float(np.square(exact).sum()), 1e-30))
    return total


def thin_out(rows: Floats, limit: int) -> Floats:
    """At most `limit` rows, evenly spread, so that every part of the calibration texts is present."""
    if len(rows) <= limit:
        return rows
    thinned: Floats = rows[np.linspace(0, len(rows) - 1, limit).astype(int)]
    return thinned
