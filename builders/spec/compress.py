"""What the spec says about a smaller model: steps in their order, and what must remain of the original."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from builders.spec.slices import Fraction, NotNegative, Positive, Slice
from builders.spec.weights import ClusterSlice, GradualSlice, Share, SparsifySlice

NotLess = Annotated[float, Field(ge=0, allow_inf_nan=False)]
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


class LossesSlice(Slice):
    """How much of each is minimised: the sum of these, each times its weight."""

    token_mse: NotLess = Field(0.0, description="squared error of each token's state after the last layer")
    embedding_cosine: NotLess = Field(0.0, description="embedding: 1 - cosine to the teacher's vector of each text")
    similarity: NotLess = Field(
        0.0, description="embedding: squared error of the cosines between all pairs of texts of a batch"
    )
    hidden: NotLess = Field(0.0, description="squared error of each token's state after each of the student's layers")
    attention: NotLess = Field(
        0.0, description="Kullback-Leibler divergence of attention from the teacher's, of each head and token"
    )
    soft_labels: NotLess = Field(
        0.0, description="classification, reranking: the same of the scores' probabilities at `temperature`, times its "
        "square; generation: of those of each next token"
    )  # fmt: skip
    next_tokens: NotLess = Field(0.0, description="generation: cross-entropy of the text's own next tokens")
    hard_labels: NotLess = Field(0.0, description="classification, reranking: cross-entropy to those of `labels`")

    @model_validator(mode="after")
    def _any(self) -> LossesSlice:
        if not self.given:
            raise ValueError("all losses are 0, so nothing would be learnt")
        return self

    @property
    def given(self) -> dict[str, float]:
        """Names and weights of those that count."""
        return {name: weight for name in type(self).model_fields if (weight := getattr(self, name))}


class DistilSlice(Slice):
    """Trained towards the original, the teacher: a student of some of the layers, or, without student_layers, what the
    step before left."""

    student_layers: tuple[NotNegative, ...] | None = Field(
        None, description="numbers of the layers that the student starts from, from 0, of what the step before left"
    )
    student_width: Positive | None = Field(
        None, description="embedding: hidden width that the student starts from, of the teacher's dimensions, a "
        "multiple of a head's; a Dense that is trained with it makes vectors of the teacher's width again"
    )  # fmt: skip
    losses: LossesSlice | None = Field(
        None,
        description="none given: token_mse 1 and embedding_cosine 4 for embeddings, soft_labels 1 for scores and "
        "for next tokens",
    )
    minutes: Annotated[float, Field(gt=0, le=10_000)] | None = Field(
        None, description="of training on all `threads` of this machine, by CPU time: a busy machine takes longer"
    )
    tokens: Positive | None = Field(
        None, description="that the student is trained on, in all passes; with tokens alone, a run can be repeated"
    )
    text_tokens: Positive = Field(
        400_000, description="of text at most, passed over again and again; the teacher's states of it take 2 bytes a "
        "number on disk, 0.8 kB a token at a width of 384"
    )  # fmt: skip
    batch_tokens: Annotated[int, Field(ge=16)] = Field(2048, description="in a batch, of texts of like length")
    optimiser: Literal["adamw", "muon", "sgd"] = Field("muon", description="that moves the weights")
    learning_rate: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="at its height: it rises over a twentieth of the training, then falls to 0. Default: 0.001, or a "
        "quarter or a sixteenth of it where a short trial, a thirtieth of the training, made the model worse",
    )
    weight_decay: NotLess = Field(0.0, description="of matrices")
    clip: Annotated[float, Field(gt=0)] = Field(1.0, description="the longest gradient; a longer one is shortened")
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="decay of an average of the weights, which then is the result"
    )
    words: bool = Field(False, description="the table of words, and of positions, is trained too")
    temperature: Annotated[float, Field(gt=0, le=100)] | None = Field(
        None, description="soft_labels: scores are divided by it, 2 if not given, 1 for generation"
    )
    labels: Path | None = Field(
        None, description="hard_labels: UTF-8 file, a label's number, a tab and a text in each line (reranking: a tab "
        "and a second text); it is then the text of all losses"
    )  # fmt: skip
    match_layers: tuple[NotNegative, ...] | None = Field(
        None, description="hidden, attention: the teacher's layer for each of the student's; if not given, "
        "student_layers, or each layer its own"
    )  # fmt: skip
    sparsity: GradualSlice | None = Field(None, description="zeros that grow in number while it is trained")
    exits: tuple[Positive, ...] | None = Field(
        None, description="embedding: numbers of layers after which the model learns to end, from its own last layer, "
        "which is held to the original; of what the step before left"
    )  # fmt: skip
    exit: Positive | None = Field(None, description="exits: the one that becomes the model, of that many first layers")
    seed: NotNegative = Field(0, description="of the order of the batches")

    @model_validator(mode="after")
    def _whole(self) -> DistilSlice:
        if self.minutes is None and self.tokens is None:
            raise ValueError("minutes or tokens is needed to say how long it is trained")
        for name in ("student_layers", "match_layers"):
            layers = getattr(self, name)
            if layers is not None and (not layers or list(layers) != sorted(set(layers))):
                raise ValueError(f"{name}={list(layers)} must name at least one layer, in rising order")
        given = self.losses.given if self.losses is not None else None
        if given is not None and ("hard_labels" in given) != (self.labels is not None):
            raise ValueError("losses.hard_labels and labels go together: one is given without the other")
        if given is None and self.labels is not None:
            raise ValueError("labels says nothing without losses.hard_labels")
        if self.temperature is not None and given is not None and "soft_labels" not in given:
            raise ValueError("temperature says nothing without losses.soft_labels; remove it")
        if self.match_layers is not None and not {"hidden", "attention"} & set(given or ()):
            raise ValueError("match_layers says nothing without losses.hidden or losses.attention; remove it")
        return self

    @model_validator(mode="after")
    def _one_thing_at_once(self) -> DistilSlice:
        if self.student_width is not None and self.sparsity is not None:
            raise ValueError("student_width and sparsity do not go together: give each a distil step of its own")
        return self

    @model_validator(mode="after")
    def _one_way_out(self) -> DistilSlice:
        if (self.exits is None) != (self.exit is None):
            raise ValueError("exits and exit go together: one is given without the other")
        if self.exits is None:
            return self
        if not self.exits or list(self.exits) != sorted(set(self.exits)):
            raise ValueError(f"exits={list(self.exits)} must name at least one, in rising order")
        if self.exit not in self.exits:
            raise ValueError(f"exit={self.exit} is none of exits={list(self.exits)}")
        for name in ("student_layers", "student_width", "sparsity"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} and exits do not go together: give each a distil step of its own")
        other = [name for name in ("hidden", "attention") if self.losses is not None and name in self.losses.given]
        if other:
            raise ValueError(f"losses.{other[0]} compares layer by layer, and exits learn from the last one; remove it")
        return self


class StepSlice(Slice):
    """One technique. Steps are carried out in their order, each on what the one before left."""

    prune: PruneSlice | None = Field(None, description="heads, neurons and layers that go")
    distil: DistilSlice | None = Field(None, description="training towards the original")
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

    @property
    def labels(self) -> Path | None:
        """The file of labelled texts that the technique reads."""
        technique = self.prune or self.distil
        return None if technique is None else technique.labels


class BudgetSlice(Slice):
    """What must remain when all steps of `compress` are done, in fp32, against the original checkpoint."""

    max_perplexity_ratio: Annotated[float, Field(ge=1)] = Field(
        1.1, description="generation only: perplexity on held-out texts, over the original's"
    )
    min_agreement: Fraction | None = Field(
        None, description="generation only: share of held-out tokens for which both find the same one likeliest"
    )
    min_mean_cosine: Fraction = Field(
        0.9,
        description="not generation: of the outputs on held-out texts; of scores, the correlation of the worst label",
    )
    min_worst_cosine: Fraction = Field(0.0, description="not generation: the same of the worst held-out text or label")
    min_mrr_ratio: Annotated[float, Field(ge=0)] | None = Field(
        None, description="embedding only: mean reciprocal rank of a docstring's body for its first line, of the "
        "original's"
    )  # fmt: skip
    min_speedup: Annotated[float, Field(gt=0)] | None = Field(
        None, description="by CPU time, on the executor that serves on a CPU"
    )
