"""What a user decides about one update."""

from __future__ import annotations

from pydantic import Field

from builders.training.optimiser import Optimiser
from runtime.record import Record


class UpdateRecipe(Record):
    """The learning rate rises anew over the first tenth, then falls to zero: a version that was trained to its end
    stands at rate zero, and a full rate at once would throw it far."""

    steps: int = Field(default=30, ge=1)
    rows: int = Field(default=8, ge=1)  # of each batch, replayed ones included
    replay_share: float = Field(default=0.5, ge=0, lt=1)  # of the rows, where the version has a reservoir
    kl: float = Field(default=0.0, ge=0)  # weight of the distance to the previous version on replayed rows
    ewc: float = Field(default=0.0, ge=0, allow_inf_nan=False)  # weight of the distance from weights that matter
    keep_old: bool = True  # rows of what is learnt, for later updates to replay
    temperature: float = Field(default=0.05, gt=0)  # of similarities, where texts are told apart
    learning_rate: float = Field(default=0.0015, gt=0, lt=1)
    rise: float = Field(default=0.1, gt=0, lt=1)
    clip: float = Field(default=1.0, gt=0)
    optimiser: Optimiser = Optimiser()
    lora_rank: int | None = Field(
        default=None, ge=1
    )  # of what is moved beside each matrix; None: all weights are moved
    seed: int = Field(default=0, ge=0)

    def replayed(self, kept: int) -> int:
        """Rows of a batch, of so many that can be replayed; one new row at least."""
        return min(round(self.rows * self.replay_share), self.rows - 1) if kept else 0
