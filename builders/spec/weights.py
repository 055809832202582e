"""What the spec says about weights that keep their places: stored in fewer bits, or set to zero."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from builders.spec.slices import Positive, Slice

Share = Annotated[float, Field(gt=0, lt=1)]


class ClusterSlice(Slice):
    """Weights stored as indices into codebooks of k-means, a codec for files: they are expanded when the checkpoint is
    loaded, and what is served is as large and as fast as it was. It must be the last step."""

    bits: Annotated[int, Field(ge=1, le=8)] = Field(4, description="of an index; a codebook has 2^bits values")
    per: Literal["row", "block", "tensor"] = Field("row", description="what shares a codebook")
    block: Positive | None = Field(None, description="per block: weights of a row that share one")
    weighted: Literal["hessian", "none"] = Field(
        "hessian",
        description="hessian: an error counts as the mean square of the input that it is multiplied with, over "
        "calibration text; none: all alike",
    )
    what: Annotated[tuple[Literal["matrices", "words"], ...], Field(min_length=1)] = Field(
        ("matrices", "words"), description="matrices of the layers, and the table of words"
    )
    tokens: Positive = Field(20_000, description="of calibration text, weighted by hessian")

    @model_validator(mode="after")
    def _whole(self) -> ClusterSlice:
        if (self.per == "block") != (self.block is not None):
            raise ValueError("per=block needs block, and other values take none")
        if len(set(self.what)) != len(self.what):
            raise ValueError(f"what={list(self.what)} names one twice")
        return self


class SparsifySlice(Slice):
    """Single weights set to zero. Nothing here skips a zero, on a CPU or in TensorRT for RTX: it makes no file smaller
    and no answer faster, and is there to be compared with."""

    pattern: Literal["2:4", "unstructured"] = Field(
        "2:4", description="2:4: two of each four in a row; unstructured: amount of each row, anywhere"
    )
    amount: Share | None = Field(None, description="unstructured: share of each row that becomes zero")
    method: Literal["magnitude", "wanda", "sparsegpt"] = Field(
        "sparsegpt",
        description="magnitude: the smallest; wanda: the smallest times the norm of their input; sparsegpt: those "
        "whose loss the rest of the row makes good best, which it then does",
    )
    tokens: Positive = Field(20_000, description="of calibration text, wanda and sparsegpt")

    @model_validator(mode="after")
    def _whole(self) -> SparsifySlice:
        if (self.pattern == "unstructured") != (self.amount is not None):
            raise ValueError("pattern=unstructured needs amount, and 2:4 takes none")
        return self


class GradualSlice(Slice):
    """Single weights of the layers that become zero while they are trained: more and more of them, as 1 - (1 - t)^3,
    the smallest of each row, chosen anew again and again; then these stay."""

    amount: Share = Field(description="share of each row that is zero in the end")
    every: Positive = Field(5, description="steps of training between two choices; until the last, a weight may return")
    until: Annotated[float, Field(gt=0, le=0.95)] = Field(
        0.7, description="share of the training after which the zeros are all there, and stay"
    )
