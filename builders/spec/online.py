"""What the spec says about online learning: when a deployed model learns, how, and what its next version must show."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from builders.spec.slices import Fraction, NotNegative, Positive, Slice

Over = Annotated[float, Field(gt=0)]
Margin = Annotated[float, Field(gt=0, lt=1)]


class WhenSlice(Slice):
    """When an update begins: whichever of these comes first, and only with enough new text to hold some out."""

    samples: Positive = Field(200, description="of new feedback that the model can learn from")
    minutes: Over | None = Field(None, description="since the last update, with one new sample at least")
    drift: bool = Field(
        False,
        description="what comes is less usual to the champion (Page-Hinkley): by its losses, or by the distance of an "
        "embedding from the mean of those that it learnt last; a sign that the data moved, whatever samples says",
    )


class LearnerSlice(Slice):
    """How an update is trained, and how much of it is taken."""

    optimiser: Literal["adamw", "muon", "sgd"] = Field(
        "adamw", description="sgd has momentum; muon moves matrices, and Adam the rest"
    )
    learning_rate: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="the highest: it rises over the first tenth of the steps, then falls to zero; default: 0.0015 for "
        "a language model, 0.00003 for an encoder",
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="of sgd")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="of matrices")
    clip: Over = Field(1.0, description="the longest gradient")
    lora_rank: Positive | None = Field(
        None,
        description="learns low-rank matrices of so many rows beside each matrix of the layers (LoRA), and merges them "
        "when the training ends; default: all weights are moved",
    )
    steps: Positive = Field(90, description="of one update")
    rows: Positive = Field(16, description="of a batch, replayed ones among them")
    window: Annotated[int, Field(ge=8)] = Field(
        128,
        description="tokens of a row of text, or of each text of an encoder, which is cut behind them; a version's "
        "memory keeps rows of this length, so it cannot change later",
    )
    replay_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.5, description="of each batch: rows of what the version learnt before"
    )
    kl: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="weight of the distance to the champion on replayed rows: the KL divergence from its own words or "
        "labels; of an embedding, one minus the cosine to the champion's vectors",
    )
    ewc: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="elastic weight consolidation, for where old rows may not be kept: weight of the squared distance "
        "from the champion's weights, each as it matters to what was learnt before; 1 is little, 100 is much",
    )
    keep_old: bool = Field(
        True,
        description="whether a version keeps some of the rows that it learnt, for later ones to replay; with false, "
        "replay_share and kl must be 0, and ewc is what keeps the old; what is held out stays, to judge by",
    )
    temperature: Over | None = Field(
        None, description="embedding only: of similarities while a pair is told from the others; default: 0.05"
    )
    held_out_share: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.2, description="of new samples: they judge, and are never trained on"
    )
    min_rating: Fraction = Field(
        0.8,
        description="generation only: an answer that was rated so or better, and whose texts are kept, is learnt as it "
        "stands",
    )
    seed: NotNegative = Field(0, description="of batches")

    @model_validator(mode="after")
    def _makes_sense(self) -> LearnerSlice:
        if not self.keep_old and (self.replay_share or self.kl):
            raise ValueError(
                f"keep_old=false keeps no rows for replay_share={self.replay_share:g} and kl={self.kl:g}; set both to 0"
            )
        if self.ewc and self.lora_rank is not None:
            raise ValueError(
                f"ewc={self.ewc:g} holds weights that lora_rank={self.lora_rank} does not move; leave one of them out"
            )
        return self


class GateSlice(Slice):
    """What a candidate must show before it is rolled out, by bounds at 95 % on what nobody trained on. Perplexity is of
    the next token, of the right text among those of a hold-out, or of the right label."""

    max_forgetting: Fraction = Field(
        0.03, description="by which the perplexity of each earlier domain may rise; the update goes back until it holds"
    )
    max_fall: Fraction | None = Field(
        None,
        description="embedding: by which the mean cosine of its vectors to the champion's may lie under 1, in each "
        "earlier domain; classification: by which its accuracy may fall there; default: 0.05",
    )
    min_gain: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="by which the perplexity of the new domain must fall, as a share"
    )
    min_speed: Fraction = Field(
        0.8,
        description="of the champion's speed that a built candidate must have: rounds by turns, by CPU time, on the "
        "executor that serves; refused where the whole interval of the rounds lies below; 0: not measured",
    )


class CanarySlice(Slice):
    """How a new version gets the traffic. `alpha` bounds false rollbacks and false promotions alike."""

    shares: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        (0.01, 0.1, 0.5), description="of the traffic, step by step; then it gets all of it"
    )
    alpha: Annotated[float, Field(gt=0, lt=0.5)] = Field(0.05, description="chance of a wrong decision of each kind")
    margin_errors: Margin | None = Field(
        0.01, description="by which the share of failed requests may be worse, at most; empty: not watched"
    )
    margin_slow: Margin | None = Field(0.02, description="the same, of requests over slow_ms")
    margin_quality: Margin | None = Field(None, description="the same, of ratings that were missed (1 - rating)")
    slow_ms: Over = Field(2000.0, description="a request that takes longer is slow")
    mirrored_requests: Positive = Field(200, description="copies that it answers before it gets requests of its own")
    step_requests: Positive = Field(50, description="at the new version, before its share grows")
    soak_requests: Positive = Field(500, description="with all of the traffic, before it is promoted")
    most_requests: Positive = Field(200_000, description="of both versions; then it goes back for want of evidence")
    most_minutes: Over = Field(1440.0, description="the same in time")

    @model_validator(mode="after")
    def _makes_sense(self) -> CanarySlice:
        if not self.shares or any(later <= earlier for earlier, later in pairwise(self.shares)):
            raise ValueError(
                f"shares={list(self.shares)} must grow from step to step; the last, all of it, is not named"
            )
        if (self.margin_errors, self.margin_slow, self.margin_quality) == (None, None, None):
            raise ValueError("margin_errors, margin_slow and margin_quality are all empty: nothing would be watched")
        return self


class FederatedSlice(Slice):
    """How clients learn together, on text that stays with them: `trireme online federate`. The coordinator's spec
    decides; steps, batches and learning rate are those of the learner."""

    rounds: Positive = Field(30, description="each has its share of learner.steps, which this must divide")
    min_clients: Positive = Field(
        2, description="a round with fewer sound answers counts for nothing, and is tried again from the same weights"
    )
    clients: Positive | None = Field(None, description="so many are waited for before the first round, for gather_s")
    gather_s: NotNegative = Field(60, description="how long; then min_clients are enough")
    deadline_s: Over = Field(600.0, description="of a round: who has not answered by then is left out of it")
    attempts: Positive = Field(3, description="tries of a round; then the command ends, and goes on when run again")
    share_moments: bool = Field(
        True,
        description="clients send Adam's moments with each update, and all go on from those of one training on all of "
        "their rows: they drift apart less and step as far, for three times the bytes; false: each keeps its own",
    )
    prox: Annotated[float, Field(ge=0)] = Field(
        0.0, description="FedProx: weight of the squared distance from the weights that a round began with"
    )
    outer_momentum: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0,
        description="Nesterov momentum of the rounds' steps; where share_moments is false 0.5 is better, where it is "
        "true it steps too far",
    )
    outer_rate: Over = Field(1.0, description="how much of a round's step is taken; 1 with no momentum is plain FedAvg")
    trim: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.0,
        description="instead of a mean by samples: of each weight, the mean without this share of the lowest and of "
        "the highest, all clients alike",
    )
    max_share: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5, description="of a round's step that one client may make, however many samples it counts"
    )
    max_samples: Positive = Field(1_000_000, description="rows that a client may count; with more it is refused")
    max_norm: Over = Field(1.0, description="length of an update, over that of the weights; a longer one is rejected")
    outlier: Annotated[float, Field(gt=1)] = Field(
        5.0, description="length of an update, over the median of its round; a longer one is rejected (from 3 clients)"
    )
    most_clients: Positive = Field(64, description="that may join")

    @model_validator(mode="after")
    def _makes_sense(self) -> FederatedSlice:
        if not self.min_clients <= (self.clients or self.min_clients) <= self.most_clients:
            raise ValueError(
                f"min_clients={self.min_clients}, clients={self.clients} and most_clients={self.most_clients} must "
                "not fall"
            )
        if self.max_share * self.min_clients < 1 - 1e-9:
            raise ValueError(
                f"max_share={self.max_share} of min_clients={self.min_clients} is no whole step; give at least "
                f"{_share_of(self.min_clients)}"
            )
        if self.trim and not int(self.trim * self.min_clients + 1e-9):
            raise ValueError(
                f"trim={self.trim} of min_clients={self.min_clients} is not one client: nothing would be trimmed; give "
                f"at least {_share_of(self.min_clients)}"
            )
        if self.gather_s > self.deadline_s:
            raise ValueError(f"gather_s={self.gather_s} must be at most deadline_s={self.deadline_s}")
        return self


def _share_of(clients: int) -> float:
    """One client's, rounded up: so that as many of it are one client, or the whole."""
    return math.ceil(1e4 / clients) / 1e4


class OnlineSlice(Slice):
    """Online learning, for language models, embeddings and classifiers: `trireme online` reads it, and `trireme serve`
    and `build` then take the version that was promoted last."""

    feedback: str | None = Field(
        None,
        description="store of feedback: `sqlite:////path/to/feedback.db` or `postgresql://user@host/database`; "
        "default: feedback.db beside the loop's own files in the build folder",
    )
    old_texts: Path | None = Field(
        None,
        description="UTF-8 file of what the first version can do, which is replayed and judged by. Lines of a text "
        "(default: precision.calibration_texts, or what Python says of itself); embedding: of a query, a tab and the "
        "text that belongs to it, a tab and one that does not if you like (default: first lines of Python's docstrings "
        "with their bodies); classification: of a label's number, a tab and a text, without a default",
    )
    when: WhenSlice = WhenSlice()
    learner: LearnerSlice = LearnerSlice()
    gate: GateSlice = GateSlice()
    canary: CanarySlice = CanarySlice()
    federated: FederatedSlice = FederatedSlice()

    def require_task(self, task: str, longest: int) -> None:
        """Raises ValueError for a task that is not learnt, and for keys that say nothing to it."""
        if task not in ("generation", "embedding", "classification"):
            raise ValueError(
                f"online is built for tasks generation, embedding and classification, not for model.task={task}; "
                "remove it"
            )
        learner = self.learner
        unread = {
            "learner.temperature": task != "embedding" and learner.temperature is not None,
            "learner.min_rating": task != "generation" and learner.min_rating != LearnerSlice().min_rating,
            "gate.max_fall": task == "generation" and self.gate.max_fall is not None,
        }
        for key in (key for key, given in unread.items() if given):
            raise ValueError(f"online.{key} says nothing to model.task={task}; remove it")
        if learner.window > longest:
            raise ValueError(f"online.learner.window={learner.window} is over model.max_length={longest}")
        if task == "embedding" and learner.rows < 2:
            raise ValueError("online.learner.rows=1 leaves an embedding nothing to tell a pair from; use 2 or more")
