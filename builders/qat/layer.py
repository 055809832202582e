"""A linear layer as the INT8 graph has it: both operands rounded, with gradients that go straight through."""

from __future__ import annotations

from typing import Any

import torch

LOWEST, HIGHEST = -128, 127  # steps of an activation; those of a weight are symmetric
# All parameters have one learning rate, by which Adam moves each at every step. At 0.00003, a bias moves by that, a
# weight by a hundredth of the distance that rounding leaves between two values, and a scale by 0.06 %.
_WEIGHT_PACE = 300.0
_SCALE_PACE = 20.0


class Rounding(torch.autograd.Function):
    """`values` to the nearest step of `scale`, from `lowest` to 127 steps: QuantizeLinear, then DequantizeLinear.

    A value's gradient goes through as if nothing were rounded, and is 0 where it was cut off. The scale's is that of
    Esser et al., "Learned Step Size Quantization", 2019, equation 3. `scale` has one number, or one for each row.
    """

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, scale: torch.Tensor, lowest: int) -> torch.Tensor:
        steps = values / scale
        whole = steps.round().clamp_(lowest, HIGHEST)
        within = (steps >= lowest) & (steps <= HIGHEST)
        ctx.save_for_backward(torch.where(within, whole - steps, whole), within, scale)
        return whole * scale

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        change, within, scale = ctx.saved_tensors
        (gradient,) = gradients
        return gradient * within, (gradient * change).sum_to_size(scale.shape), None


def rounded(values: torch.Tensor, scale: torch.Tensor, lowest: int) -> torch.Tensor:
    found: torch.Tensor = Rounding.apply(values, scale, lowest)  # type: ignore[no-untyped-call]
    return found


class LearntScale(torch.nn.Module):
    """Positive, and as it was at first until it is trained."""

    def __init__(self, start: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("start", start)
        self.change = torch.nn.Parameter(torch.zeros_like(start))

    def forward(self) -> torch.Tensor:
        start: Any = self.start
        scale: torch.Tensor = start * (_SCALE_PACE * self.change).exp()
        return scale


class Int8Linear(torch.nn.Linear):
    """In the place of a linear layer with this bias. `smoothed` [outputs, inputs] is its weight, where column k is
    multiplied by what its input is divided by; `inverse` [inputs] is that divisor's inverse.

    `weight_scale` is [outputs, 1]. All that read one activation share `activation`, its scale. The parameter `weight`
    counts steps of `weight_scale`, in `_WEIGHT_PACE`s.
    """

    def __init__(
        self,
        smoothed: torch.Tensor,
        bias: torch.nn.Parameter | None,
        inverse: torch.Tensor,
        activation: LearntScale,
        weight_scale: torch.Tensor,
    ) -> None:
        super().__init__(smoothed.shape[1], smoothed.shape[0], bias is not None)
        self.register_buffer("inverse", inverse)
        self.activation, self.scale = activation, LearntScale(weight_scale)
        with torch.no_grad():
            self.weight.copy_(smoothed / weight_scale / _WEIGHT_PACE)
        if bias is not None:
            self.bias = bias

    def set_steps(self, steps: torch.Tensor) -> None:
        """[outputs, inputs]"""
        with torch.no_grad():
            self.weight.copy_(steps / _WEIGHT_PACE)

    @property
    def smoothed(self) -> torch.Tensor:
        start: Any = self.scale.start
        found: torch.Tensor = self.weight * (_WEIGHT_PACE * start)
        return found

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        inverse: Any = self.inverse
        read = rounded(input * inverse, self.activation(), LOWEST)
        return torch.nn.functional.linear(read, rounded(self.smoothed, self.scale(), -HIGHEST), self.bias)
