"""A linear layer as a quantised graph has it: its operands rounded, with gradients that go straight through."""

from __future__ import annotations

from typing import Any

import torch

INT8_ACTIVATION, INT8_WEIGHT = (-128, 127), (-127, 127)  # steps
# All parameters have one learning rate, by which Adam moves each at every step. At 0.00003, a bias moves by that, a
# weight by a hundredth of the distance that rounding leaves between two values, and a scale by 0.06 %.
_WEIGHT_PACE = 300.0
_SCALE_PACE = 20.0
_BLOCK_PACE = 100.0  # at a rate of 0.0001, a weight in 4 bits moves by a hundredth of a step, and a scale by 0.2 %


class Rounding(torch.autograd.Function):
    """`values` to the nearest step of `scale`, within `ends`: QuantizeLinear, then DequantizeLinear.

    A value's gradient goes through as if nothing were rounded, and is 0 where it was cut off. The scale's is that of
    Esser et al., "Learned Step Size Quantization", 2019, equation 3. `scale` has one number, or one for
    each row or block.
    """

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, scale: torch.Tensor, ends: tuple[int, int]) -> torch.Tensor:
        steps = values / scale
        whole = steps.round().clamp_(*ends)
        within = (steps >= ends[0]) & (steps <= ends[1])
        ctx.save_for_backward(torch.where(within, whole - steps, whole), within, scale)
        return whole * scale

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        change, within, scale = ctx.saved_tensors
        (gradient,) = gradients
        return gradient * within, (gradient * change).sum_to_size(scale.shape), None


def rounded(values: torch.Tensor, scale: torch.Tensor, ends: tuple[int, int]) -> torch.Tensor:
    found: torch.Tensor = Rounding.apply(values, scale, ends)  # type: ignore[no-untyped-call]
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
        read = rounded(input * inverse, self.activation(), INT8_ACTIVATION)
        return torch.nn.functional.linear(read, rounded(self.smoothed, self.scale(), INT8_WEIGHT), self.bias)


class BlockLinear(torch.nn.Linear):
    """In the place of a linear layer with this bias, whose weights alone are integers. `steps` [outputs, inputs] are
    its weights in steps of `block_scale` [outputs, inputs / block].
    """

    def __init__(
        self, steps: torch.Tensor, bias: torch.nn.Parameter | None, block_scale: torch.Tensor, bits: int
    ) -> None:
        super().__init__(steps.shape[1], steps.shape[0], bias is not None)
        self.ends = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        self.scale = LearntScale(block_scale)
        self.set_steps(steps)
        if bias is not None:
            self.bias = bias

    def set_steps(self, steps: torch.Tensor) -> None:
        """[outputs, inputs]"""
        with torch.no_grad():
            self.weight.copy_(steps / _BLOCK_PACE)

    @property
    def unrounded(self) -> torch.Tensor:
        """[outputs, blocks, block]"""
        start: Any = self.scale.start
        blocks = self.weight.reshape(*start.shape, -1)
        found: torch.Tensor = blocks * (_BLOCK_PACE * start[:, :, None])
        return found

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight = rounded(self.unrounded, self.scale()[:, :, None], self.ends)
        return torch.nn.functional.linear(input, weight.flatten(1), self.bias)
