"""What a coordinator decides of federated rounds."""

from __future__ import annotations

from pydantic import Field

from runtime.record import Record


class FederatedPlan(Record):
    """`rounds` times `local_steps` are the steps of the recipe. Keys as `online.federated` of the spec has them."""

    rounds: int = Field(default=30, ge=1)
    local_steps: int = Field(default=3, ge=1)
    min_clients: int = Field(default=2, ge=1)
    clients: int | None = Field(default=None, ge=1)
    gather_s: float = Field(default=60.0, ge=0)
    deadline_s: float = Field(default=600.0, gt=0)
    attempts: int = Field(default=3, ge=1)
    share_moments: bool = True
    prox: float = Field(default=0.0, ge=0)
    outer_momentum: float = Field(default=0.0, ge=0, lt=1)
    outer_rate: float = Field(default=1.0, gt=0)
    trim: float = Field(default=0.0, ge=0, lt=0.5)
    max_share: float = Field(default=0.5, gt=0, le=1)
    max_samples: int = Field(default=1_000_000, ge=1)
    max_norm: float = Field(default=1.0, gt=0)
    outlier: float = Field(default=5.0, gt=1)
    most_clients: int = Field(default=64, ge=1)
