"""What the spec says about a smaller model: steps in their order, and what must remain of the original."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from builders.spec.slices import Fraction, NotNegative, Positive, Slice
from builders.spec.weights import ClusterSlice, Share, SparsifySlice

Part = Literal["heads", "ffn", "layers"]
Importance = Literal["gauss_newton", "taylor", "magnitude"]
MIN_REFIT_TOKENS = 20_000  # with a quarter of them, single texts came out far worse than before the refit


class PruneSlice(Slice):
    """Heads, feed-forward neurons or whole layers, taken out of the matrices for good."""

    what: Annotated[tuple[Part, ...], Field(min_length=1)] = Field(("heads", "ffn"), description="what is taken out")
    amount: Share | None = Field(
        None, description="share of each that goes; what stays is rounded to what parallel.tensor can share out"
    )
    heads: Positive | None = Field(None, description="heads that stay in a layer (global: on average), for amount")
    ffn: Positive | None = Field(None, description="neurons that stay in a layer (global: on average), for amount")
    keep_layers: tuple[NotNegative, ...] | None = Field(
        None, description="numbers of the layers that stay, from 0, for amount and importance"
    )
    importance: Importance = Field(
        "gauss_newton",
        description="gauss_newton: how far the output moves, by random projections; taylor: how far a classifier's "
        "loss on `labels` moves; magnitude: of the weights alone",
    )
    ranking: Literal["global", "uniform"] = Field(
        "global", description="global: layers lose what matters least in the whole model; uniform: each as much"
    )
    labels: Path | None = Field(None, description="taylor: UTF-8 file, a label's number, a tab and a text in each line")
    tokens: Positive = Field(24_000, description="of calibration text that importance is measured on")
    refit: Literal["least_squares"] | None = Field(
        None,
        description="the matrices behind what was pruned are fitted to the outputs before; in part, or not at all, "
        "where the worst text gets worse",
    )
    refit_tokens: Annotated[int, Field(ge=MIN_REFIT_TOKENS)] = Field(
        MIN_REFIT_TOKENS, description="of calibration text that refit is computed from"
    )
    seed: NotNegative = Field(0, description="of the random projections")

    @model_validator(mode="after")
    def _whole(self) -> PruneSlice:
        if len(set(self.what)) != len(self.what):
            raise ValueError(f"what={list(self.what)} names one twice")
        exact = {"heads": self.heads, "ffn": self.ffn, "layers": self.keep_layers}
        for name, value in exact.items():
            key = "keep_layers" if name == "layers" else name
            if value is not None and name not in self.what:
                raise ValueError(f"{key} is given, but what={list(self.what)} does not hold {name}")
            if value is None and name in self.what and self.amount is None:
                raise ValueError(f"amount or {key} is needed to say how many {name} stay")
        if self.amount is not None and all(exact[name] is not None for name in self.what):
            raise ValueError("amount says nothing beside exact numbers for all of `what`; remove it")
        kept = self.keep_layers
        if kept is not None and (not kept or list(kept) != sorted(set(kept))):
            raise ValueError(f"keep_layers={list(kept)} must name at least one layer, in rising order")
        if (self.importance == "taylor") != (self.labels is not None):
            raise ValueError(
                "importance=taylor needs labels: without them the loss is that to the model itself, whose slope is 0"
                if self.labels is None
                else f"labels says nothing to importance={self.importance}; remove it"
            )
        return self


class LowRankSlice(Slice):
    """Each matrix as the product of two thin ones."""

    method: Literal["whitened", "plain"] = Field(
        "whitened", description="whitened: least error of the outputs on calibration text; plain: of the weights, the "
        "baseline"
    )  # fmt: skip
    parts: Literal["ffn", "attention", "all"] = Field("ffn", description="which matrices of each layer")
    rank: Annotated[int, Field(gt=0)] | Literal["auto"] = Field(
        "auto", description="one rank for all of these matrices; auto: shared out among them so that amount goes"
    )
    amount: Share | None = Field(None, description="rank auto: share of the weights of these matrices that goes")
    tokens: Positive = Field(20_000, description="of calibration text, whitened")

    @model_validator(mode="after")
    def _whole(self) -> LowRankSlice:
        if (self.rank == "auto") != (self.amount is not None):
            raise ValueError("rank=auto needs amount, and a number takes none")
        return self


class StepSlice(Slice):
    """One technique. Steps are carried out in their order, each on what the one before left."""

    prune: PruneSlice | None = Field(None, description="heads, neurons and layers that go")
    low_rank: LowRankSlice | None = Field(None, description="matrices as products of thin ones")
    sparsify: SparsifySlice | None = Field(None, description="single weights that become zero")
    cluster: ClusterSlice | None = Field(None, description="weights stored as indices into codebooks; the last step")

    @model_validator(mode="after")
    def _one(self) -> StepSlice:
        if len(self.given) != 1:
            raise ValueError(f"a step is one technique, not {len(self.given)}; write each behind a dash of its own")
        return self

    @property
    def given(self) -> list[str]:
        return [name for name in type(self).model_fields if getattr(self, name) is not None]

    @property
    def name(self) -> str:
        return self.given[0]


class BudgetSlice(Slice):
    """What must remain when all steps of `compress` are done, in fp32, against the original checkpoint."""

    min_mean_cosine: Fraction = Field(
        0.9, description="of the outputs on held-out texts; of scores, the correlation of the worst label"
    )
    min_worst_cosine: Fraction = Field(0.0, description="the same of the worst held-out text or label")
    min_mrr_ratio: Annotated[float, Field(ge=0)] | None = Field(
        None, description="embedding only: mean reciprocal rank of a docstring's body for its first line, of the "
        "original's"
    )  # fmt: skip
    min_speedup: Annotated[float, Field(gt=0)] | None = Field(
        None, description="by CPU time, on the executor that serves on a CPU"
    )
