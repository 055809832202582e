"""How the weights of a graph were rounded, and what else was tried."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from builders.spec import Rounding, WeightRounder
from runtime.record import Record


class RoundingChoice(Record):
    """How the weights of an INT8 graph were rounded. Where both ways were tried, their distances to fp32 on `texts`
    texts by which neither rounded: 1 minus the mean cosine, or the error of logits. The nearer one is taken, and
    `nearest` also where GPTQ's graph misses the budget on the held-out texts."""

    asked: Rounding
    taken: Literal["nearest", "gptq"]
    nearest: float | None = None
    gptq: float | None = None
    texts: int = 0

    @property
    def summary(self) -> str:
        said = "weights rounded to the nearest" if self.taken == "nearest" else "weights rounded by GPTQ"
        tried = self.nearest is not None and self.gptq is not None
        return f"{said} (off by {self.gptq:.5f} by GPTQ, {self.nearest:.5f} to the nearest)" if tried else said


class WeightRounding(Record):
    """How weights alone were rounded to 8 or 4 bits. `losses` by method, where several were tried, on texts by which
    none rounded: the divergence of next tokens from fp32's in nats, or an encoder's distance to fp32 as in
    `RoundingChoice`. The least is taken."""

    asked: Rounding
    taken: WeightRounder
    losses: dict[str, float] = Field(default_factory=dict)

    @property
    def summary(self) -> str:
        tried = ", ".join(f"{name} {loss:.5g}" for name, loss in self.losses.items())
        return f"weights rounded by {self.taken}" + (f" (of {tried})" if tried else "")
