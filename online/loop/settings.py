"""The spec's words, as the parts take them."""

from __future__ import annotations

from builders.spec import CanarySlice, DeploymentSpec, FederatedSlice, GateSlice, LearnerSlice, OnlineSlice
from builders.training.optimiser import Optimiser
from online.federated.plan import FederatedPlan
from online.gate.verdict import GateBudget
from online.learner.recipe import UpdateRecipe
from online.rollout.policy import Metric, RolloutPolicy
from online.tasks.reading import WORDS, LearntTask, TaskWords
from runtime.errors import InputError


def online_of(spec: DeploymentSpec) -> OnlineSlice:
    """Raises InputError for a spec that asks for no online learning."""
    if spec.online is None:
        raise InputError(
            f"spec of {spec.name}", got="no section online", expected="one: it says when the service learns, and how",
            fix="add `online: {}` for the defaults; docs/online.md says what they are",
        )  # fmt: skip
    return spec.online


def learnt_task(spec: DeploymentSpec) -> LearntTask:
    """Raises InputError for a task that is not learnt online; with a section online, the spec itself is refused."""
    task = spec.model.task
    if task in ("generation", "embedding", "classification"):
        return task
    raise InputError(
        f"model.task of {spec.name}", got=task, expected=f"one of {', '.join(WORDS)}", fix="leave online learning out"
    )


def words_of(spec: DeploymentSpec) -> TaskWords:
    return WORDS[learnt_task(spec)]


def noun_of(spec: DeploymentSpec) -> str:
    """What a person calls the rows that are learnt."""
    return words_of(spec).rows.format(window=online_of(spec).learner.window)


def recipe_of(spec: DeploymentSpec) -> UpdateRecipe:
    learner = online_of(spec).learner
    return UpdateRecipe(
        steps=learner.steps,
        rows=learner.rows,
        replay_share=learner.replay_share,
        kl=learner.kl,
        ewc=learner.ewc,
        keep_old=learner.keep_old,
        temperature=learner.temperature or UpdateRecipe().temperature,
        learning_rate=learner.learning_rate or words_of(spec).rate,
        clip=learner.clip,
        optimiser=Optimiser(kind=learner.optimiser, weight_decay=learner.weight_decay, momentum=learner.momentum),
        lora_rank=learner.lora_rank,
        seed=learner.seed,
    )


def plan_of(federated: FederatedSlice, learner: LearnerSlice) -> FederatedPlan:
    """Raises InputError for a learner that cannot learn in such rounds."""
    if learner.steps % federated.rounds:
        raise InputError(
            "online.federated.rounds", got=f"{federated.rounds}, which does not divide learner.steps={learner.steps}",
            expected="as many steps in each round", fix="change one of the two",
        )  # fmt: skip
    if learner.kl:
        raise InputError(
            "online.learner.kl", got=learner.kl, expected="0 for federated rounds: a client holds the weights of its "
            "round, not the champion's", fix="leave it out; replay and online.federated.prox are there",
        )  # fmt: skip
    if learner.ewc:
        raise InputError(
            "online.learner.ewc", got=learner.ewc, expected="0 for federated rounds: a client does not know what the "
            "champion's weights matter to", fix="leave it out; replay and online.federated.prox are there",
        )  # fmt: skip
    if learner.lora_rank is not None:
        raise InputError(
            "online.learner.lora_rank", got=learner.lora_rank, expected="none for federated rounds: all weights are "
            "joined", fix="leave it out",
        )  # fmt: skip
    if federated.share_moments and learner.optimiser != "adamw":
        raise InputError(
            "online.federated.share_moments", got=f"true, with learner.optimiser: {learner.optimiser}",
            expected="adamw: its moments have a bound that can be checked", fix="set it to false",
        )  # fmt: skip
    return FederatedPlan(**federated.model_dump(), local_steps=learner.steps // federated.rounds)


def budget_of(gate: GateSlice) -> GateBudget:
    fall = GateBudget().max_fall if gate.max_fall is None else gate.max_fall
    return GateBudget(max_forgetting=gate.max_forgetting, min_gain=gate.min_gain, max_fall=fall)


def policy_of(canary: CanarySlice) -> RolloutPolicy:
    watched = {
        Metric.ERRORS: canary.margin_errors, Metric.SLOW: canary.margin_slow, Metric.QUALITY: canary.margin_quality
    }  # fmt: skip
    return RolloutPolicy(
        alpha=canary.alpha,
        margins={metric: margin for metric, margin in watched.items() if margin is not None},
        shares=canary.shares,
        mirrored_requests=canary.mirrored_requests,
        step_requests=canary.step_requests,
        soak_requests=canary.soak_requests,
        most_requests=canary.most_requests,
        most_s=60 * canary.most_minutes,
    )
