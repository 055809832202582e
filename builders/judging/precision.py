"""Which precision the CPU serves: which are worth a try, and which of those measured is taken. Arithmetic alone.

Which are tried follows from what the CPU says of itself; which is taken, from figures alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from builders.artifacts import PrecisionCandidate, Processor
from builders.errors import QualityError
from builders.spec import CpuPrecision

WIDEST_FIRST: tuple[CpuPrecision, ...] = ("fp32", "bf16", "dynamic_int8", "int8", "w8", "w4")
# Two runs of one graph differ by a few per cent on a machine that others use. Within this share the wider one is taken.
AS_FAST = 0.05
Executor = Literal["openvino", "onnxruntime"]


def candidates(
    generates: bool, executor: Executor, processor: Processor
) -> tuple[list[CpuPrecision], list[PrecisionCandidate]]:
    """(to try, the likeliest first; left out, with the reason). fp32 is always tried: it is what speed is measured by.

    For ranks, `executor` is that of their pieces, ONNX Runtime.
    """
    if generates:  # a decoder reads every weight for each token, so fewer bytes pay on any CPU
        return ["w8", "w4", "fp32"], []
    reasons: dict[CpuPrecision, str] = {}
    if executor == "onnxruntime":
        reasons["int8"] = "ONNX Runtime computes INT8 graphs no faster than fp32 on a CPU"
        reasons["bf16"] = "ONNX Runtime computes in fp32 on a CPU"
        reasons["dynamic_int8"] = "what a text is answered would depend on its batch; it is taken by name alone"
    else:
        if not processor.multiplies_bytes:
            reasons["int8"] = "this CPU has no VNNI, and its INT8 products saturate and take longer than fp32"
        if not processor.has_bfloat16:
            reasons["bf16"] = "this CPU has no bf16"
    own: tuple[CpuPrecision, ...] = ("dynamic_int8",) if executor == "onnxruntime" else ()
    order: tuple[CpuPrecision, ...] = (*own, "int8", "bf16", "fp32")
    return (
        [name for name in order if name not in reasons],
        [PrecisionCandidate(precision=name, reason=f"not tried: {reasons[name]}") for name in order if name in reasons],
    )


def decide(measured: Sequence[PrecisionCandidate], what: str) -> tuple[CpuPrecision, tuple[PrecisionCandidate, ...]]:
    """The fastest within the budget, the widest of those as fast; and all candidates with their reasons.

    A candidate that was refused, or not tried, has a reason already. Raises QualityError with the figures of all when
    none is left.
    """
    fit = [item for item in measured if not item.reason and item.speed is not None]
    if not fit:
        raise QualityError(f"no precision of {what} is within the budget: " + "; ".join(map(describe, measured)))
    best = max(item.speed or 0.0 for item in fit)
    near = [item for item in fit if (item.speed or 0.0) >= best * (1 - AS_FAST)]
    taken = min(near, key=lambda item: WIDEST_FIRST.index(item.precision))

    def judged(item: PrecisionCandidate) -> PrecisionCandidate:
        if item.reason:
            return item
        if item is taken:
            reason = "taken: the fastest within the budget"
        elif item in near:
            reason = f"as fast as {taken.precision} within {AS_FAST:.0%}, and less exact"
        else:
            reason = f"slower than {taken.precision}"
        return item.model_copy(update={"reason": reason})

    return taken.precision, tuple(map(judged, measured))


def warning(named: PrecisionCandidate, processor: Processor) -> str | None:
    """What to say of a precision that was asked for by name, where it does not pay."""
    if named.precision == "bf16" and not processor.has_bfloat16:
        return f"precision.cpu=bf16: {processor.name} has no bf16, and OpenVINO computes in fp32 there; use auto"
    if named.speed is None or named.speed >= 1 - AS_FAST:
        return None
    return (
        f"precision.cpu={named.precision} is slower than fp32 on {processor.name}: {named.speed:.2f} of its speed; "
        "use auto, or fp32"
    )


def describe(item: PrecisionCandidate) -> str:
    """One line: precision, speed, quality, reason."""
    speed = "" if item.speed is None else f"{item.speed:.2f} of fp32's speed, "
    quality = "" if item.quality is None else f"{item.quality.summary}, "
    return f"{item.precision}: {speed}{quality}{item.reason}"
