"""The rollout as a pure state machine: a state and what was counted give the next state.

    starting -> proven -> mirrored -> canary, by growing shares, to all of the traffic -> promoted
        any of them but the last                                                       -> rolled_back

What must hold in the world is a function of the state alone (`wanted`): who takes over after a crash brings it about
again, whatever was done of it.
"""

from __future__ import annotations

import math
from enum import StrEnum

import numpy as np
from pydantic import Field

from online.rollout import evidence
from online.rollout.policy import Metric, RolloutPolicy
from online.rollout.seen import BADNESS, VersionCounters
from runtime.record import Record


class Phase(StrEnum):
    STARTING = "starting"
    PROVEN = "proven"
    MIRRORED = "mirrored"
    CANARY = "canary"
    PROMOTED = "promoted"
    ROLLED_BACK = "rolled_back"


ENDED = (Phase.PROMOTED, Phase.ROLLED_BACK)


class Decision(Record):
    """`figures` are e-values by metric, and requests, at that moment."""

    leaves: Phase
    enters: Phase
    share: float
    reason: str
    figures: dict[str, float]


class BothCounters(Record):
    """Both versions at one moment."""

    champion: VersionCounters = VersionCounters()
    challenger: VersionCounters = VersionCounters()

    def since(self, before: BothCounters) -> BothCounters | None:
        champion = self.champion.since(before.champion)
        challenger = self.challenger.since(before.challenger)
        if champion is None or challenger is None:
            return None
        return BothCounters(champion=champion, challenger=challenger)

    @property
    def requests(self) -> int:
        return self.champion.requests + self.challenger.requests


class RolloutState(Record):
    """Wealth is kept as logarithms by metric and bet. `baseline` is what was counted when the routes of this step were
    in force; without one, the next look only makes it, as earlier requests were dealt out by another share."""

    champion: int
    challenger: int
    phase: Phase = Phase.STARTING
    step: int = 0  # of the policy's, while a canary
    baseline: BothCounters | None = None
    in_step: int = 0  # requests at the challenger
    requests: int = 0  # of both, that were judged
    elapsed_s: float = 0.0
    harm: dict[Metric, tuple[float, ...]] = Field(default={})
    safety: dict[Metric, tuple[float, ...]] = Field(default={})
    soak: dict[Metric, tuple[float, ...]] = Field(default={})
    rates: dict[Metric, tuple[float, float]] = Field(default={})  # of the champion: badness, requests
    decisions: tuple[Decision, ...] = Field(default=(), max_length=64)


class WantedServing(Record):
    """`shares` of the traffic by version; `mirror` gets a copy of each request, whose answer nobody sees."""

    loaded: tuple[int, ...]
    shares: dict[int, float]
    mirror: int | None = None


def wanted(state: RolloutState, policy: RolloutPolicy) -> WantedServing:
    old, new = state.champion, state.challenger
    if state.phase is Phase.PROMOTED:
        return WantedServing(loaded=(new,), shares={new: 1.0})
    if state.phase is Phase.ROLLED_BACK:
        return WantedServing(loaded=(old,), shares={old: 1.0})
    if state.phase is Phase.CANARY:
        share = policy.steps[state.step]
        # All of the traffic, and the old one still loaded: the way back takes no load.
        return WantedServing(loaded=(old, new), shares={new: 1.0} if share == 1 else {old: 1 - share, new: share})
    return WantedServing(loaded=(old, new), shares={old: 1.0}, mirror=new if state.phase is Phase.MIRRORED else None)


def enter(state: RolloutState, policy: RolloutPolicy, phase: Phase, reason: str, step: int = 0) -> RolloutState:
    share = policy.steps[step] if phase is Phase.CANARY else float(phase is Phase.PROMOTED)
    decision = Decision(leaves=state.phase, enters=phase, share=share, reason=reason, figures=figures(state, policy))
    return state.model_copy(
        update={
            "phase": phase,
            "step": step,
            "baseline": None,
            "in_step": 0,
            "decisions": (*state.decisions, decision),
        }
    )


def judge(state: RolloutState, policy: RolloutPolicy, counted: BothCounters, seconds: float) -> RolloutState:
    """The state after a look at the counters, `seconds` after the last one; its own phase is mirrored or canary."""
    new = counted.since(state.baseline) if state.baseline is not None else None
    state = state.model_copy(update={"elapsed_s": state.elapsed_s + seconds, "baseline": counted})
    if new is not None:
        state = _learn(state, policy, new)
    worst, harmful = harm_of(state, policy)
    if harmful >= -math.log(policy.alpha):
        return enter(state, policy, Phase.ROLLED_BACK, f"{worst} are worse than version {state.champion}'s")
    if state.requests >= policy.most_requests or state.elapsed_s >= policy.most_s:
        reason = "no evidence that it is as good, within the time or the requests that it was given"
        return enter(state, policy, Phase.ROLLED_BACK, reason)
    return _onward(state, policy)


def _onward(state: RolloutState, policy: RolloutPolicy) -> RolloutState:
    if state.phase is Phase.MIRRORED:
        enough = state.in_step >= policy.mirrored_requests
        return enter(state, policy, Phase.CANARY, "mirrored requests went well") if enough else state
    share = policy.steps[state.step]
    if share == 1:
        done = state.in_step >= policy.soak_requests
        return enter(state, policy, Phase.PROMOTED, "it bore all of the traffic") if done else state
    if state.in_step < policy.step_requests:
        return state
    following = state.step + 1
    if policy.steps[following] < 1:
        return enter(state, policy, Phase.CANARY, "no sign of harm", following)
    if all(value >= -math.log(policy.alpha) for value in safety_of(state, policy).values()):
        return enter(state, policy, Phase.CANARY, "every metric is within its margin", following)
    return state


def _learn(state: RolloutState, policy: RolloutPolicy, new: BothCounters) -> RolloutState:
    share = 0.5 if state.phase is Phase.MIRRORED else policy.steps[state.step]
    harm, safety, soak, rates = dict(state.harm), dict(state.safety), dict(state.soak), dict(state.rates)
    for metric, margin in policy.margins.items():
        badness, old, fresh = BADNESS[metric], new.champion.bins(metric), new.challenger.bins(metric)
        if share == 1:
            soak[metric] = _add(soak.get(metric), evidence.excess(badness, fresh, _bound(rates.get(metric), margin)))
            continue
        if state.phase is Phase.MIRRORED and metric is Metric.QUALITY:
            continue  # nobody saw the answers
        harm[metric] = _add(harm.get(metric), evidence.harm(badness, fresh, old, share))
        if state.phase is Phase.CANARY:
            safety[metric] = _add(safety.get(metric), evidence.safety(badness, fresh, old, share, margin))
            bad, count = rates.get(metric, (0.0, 0.0))
            rates[metric] = (bad + float(old @ badness), count + float(old.sum()))
    return state.model_copy(
        update={
            "harm": harm,
            "safety": safety,
            "soak": soak,
            "rates": rates,
            "in_step": state.in_step + new.challenger.requests,
            "requests": state.requests + new.requests,
        }
    )


def harm_of(state: RolloutState, policy: RolloutPolicy) -> tuple[Metric, float]:
    """The metric that tells most, and the log of the mean wealth of all bets on harm: beside the champion, and alone at
    the end. Bets not yet made have wealth 1, so the mean of all is one e-process from the first request to the last."""
    by_metric = {metric: [_wealth(kept.get(metric)) for kept in (state.harm, state.soak)] for metric in policy.margins}
    worst = max(by_metric, key=lambda metric: max(by_metric[metric]))
    return worst, float(evidence.mixed(np.array([value for values in by_metric.values() for value in values])))


def safety_of(state: RolloutState, policy: RolloutPolicy) -> dict[Metric, float]:
    """Log wealth by metric. Promotion needs every one, so that each may use all of alpha."""
    return {metric: _wealth(state.safety.get(metric)) for metric in policy.margins}


def figures(state: RolloutState, policy: RolloutPolicy) -> dict[str, float]:
    """E-values, and requests."""
    found = {"harm": harm_of(state, policy)[1]}
    found |= {f"safety {metric}": value for metric, value in safety_of(state, policy).items()}
    shown = {name: float(f"{math.exp(min(value, 50.0)):.4g}") for name, value in found.items()}
    return {**shown, "requests": float(state.requests), "in step": float(state.in_step)}


def _wealth(logs: tuple[float, ...] | None) -> float:
    return float(evidence.mixed(np.array(logs))) if logs else 0.0


def _bound(rate: tuple[float, float] | None, margin: float) -> float:
    """What the new version alone may show: the champion's own mean and the margin."""
    bad, count = rate or (0.0, 0.0)
    return min((bad + 1) / (count + 2) + margin, 0.99)


def _add(before: tuple[float, ...] | None, logs: evidence.Floats) -> tuple[float, ...]:
    return tuple((logs if before is None else logs + np.array(before)).tolist())
