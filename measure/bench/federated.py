"""`make bench-federated`: five clients whose texts are nothing alike, against one training on all of their text.

A small language model that learnt Python's documentation meets five other kinds of text. Pooled: one training on all of
it. Federated: each client has one kind, and the functions of a real round join what they learnt: as many steps one
after the other, and as many tokens in all. The gain is what held-out text of all five loses, in nats a token.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from builders.__main__ import run
from builders.store.processor import this_processor
from builders.training import text
from builders.training.progress import training_progress
from builders.training.recipe import TrainingRecipe
from builders.training.text import TokenIds
from measure.bench.five_texts import five_texts
from measure.small_model.folder import train_small_model
from online.federated import aggregate
from online.federated.local import Lesson, LocalLearner
from online.federated.moments import no_moments
from online.federated.tensors import Floats, parted, put_weights, weights_of
from online.learner.memory import FOLDER, Memory, Reservoir, save_memory
from online.learner.recipe import UpdateRecipe
from online.tasks.language import LanguageTask, load_language_model, row_losses
from runtime.tokenizer_file import open_tokenizer

WINDOW = 128
_BASE = TrainingRecipe(
    vocabulary=1024, hidden=96, layers=3, heads=4, kv_heads=2, ffn=256, context=128, steps=240
)  # fmt: skip
_HELD_OUT = 0.15
_ROWS = 4  # of a client's batch; the pooled one has five times as many
_STEPS = 90
_MAX_SHARE = 0.5


@dataclass(frozen=True)
class FederatedSetting:
    """`kept`: clients keep their optimisers' state from round to round; `shared`: all go on from one state, whose
    second moments are of the mean gradient, or, where they are not `pooled`, the mean of the clients'."""

    name: str
    rounds: int = 18
    kept: bool = True
    momentum: float = 0.0
    rate: float = 1.0
    prox: float = 0.0
    peak: float = 0.003
    shared: bool = False
    pooled: bool = True


SETTINGS = (
    FederatedSetting("FedAvg, optimisers begin anew", kept=False),
    FederatedSetting("FedAvg, optimisers kept"),
    FederatedSetting("outer momentum 0.5, optimisers begin anew", kept=False, momentum=0.5),
    FederatedSetting("outer momentum 0.5, optimisers kept", momentum=0.5),
    FederatedSetting("outer momentum 0.5, kept, 45 rounds of 2", rounds=45, momentum=0.5),
    FederatedSetting("outer momentum 0.5, moments averaged", shared=True, pooled=False, momentum=0.5, peak=0.006),
    FederatedSetting("moments shared", shared=True),
    FederatedSetting("moments shared", shared=True, peak=0.006),
    FederatedSetting("moments shared, outer momentum 0.3", shared=True, momentum=0.3, peak=0.006),
    FederatedSetting("moments shared, 30 rounds of 3", shared=True, rounds=30, peak=0.006),
    FederatedSetting("moments shared, 45 rounds of 2", shared=True, rounds=45, peak=0.006),
)


@dataclass(frozen=True)
class Split:
    """[rows, WINDOW + 1] by client."""

    learnt: Mapping[str, TokenIds]
    held_out: Mapping[str, TokenIds]


def main() -> None:
    parser = argparse.ArgumentParser(description="federated rounds against pooled training, in nats")
    parser.add_argument("--build-dir", type=Path, default=Path("build"))
    parser.add_argument("--only", type=int, nargs="*", help="settings by number, from 0")
    arguments = parser.parse_args()
    folder: Path = arguments.build_dir / "federated-model"
    if not (folder / "config.json").is_file():
        with training_progress() as progress:
            train_small_model(folder, progress, _BASE)
    if not (folder / FOLDER).is_dir():
        save_memory(Memory(Reservoir.empty(WINDOW + 1)), folder)  # nothing is replayed on either side
    split = _split(folder)
    start = weights_of(load_language_model(folder))
    print(f"{sum(value.size for value in start.values()) / 1e6:.2f} M weights, on {this_processor().name}; rows:")
    print("  " + ", ".join(f"{name} {len(rows)} + {len(split.held_out[name])}" for name, rows in split.learnt.items()))
    before = _losses(folder, start, split)
    _print("before", before, before, None, 0.0)
    pooled: dict[str, float] | None = None
    for peak in (0.003, 0.006):
        cpu, weights = time.process_time(), _pooled(folder, start, split, peak)
        after = _losses(folder, weights, split)
        _print(
            f"pooled, {_STEPS} steps of {5 * _ROWS} rows at {peak}", after, before, pooled, time.process_time() - cpu
        )
        pooled = after if pooled is None or after["all"] < pooled["all"] else pooled
    for number, setting in enumerate(SETTINGS):
        if arguments.only is None or number in arguments.only:
            cpu, weights = time.process_time(), _federated(folder, start, split, setting)
            after = _losses(folder, weights, split)
            _print(f"{number} {setting.name} at {setting.peak}", after, before, pooled, time.process_time() - cpu)


def _split(folder: Path) -> Split:
    tokenizer, learnt, held_out = open_tokenizer(folder / "tokenizer.json"), {}, {}
    for kind, documents in five_texts().items():
        parts = text.split(documents, _HELD_OUT)
        learnt[kind], held_out[kind] = (text.windows(text.to_tokens(tokenizer, part), WINDOW) for part in parts)
    return Split(learnt, held_out)


def _task(folder: Path) -> LanguageTask:
    return LanguageTask(WINDOW, _BASE.vocabulary, folder / "tokenizer.json", text.END_OF_TEXT_ID)


def _recipe(rows: int, peak: float) -> UpdateRecipe:
    return UpdateRecipe(steps=_STEPS, rows=rows, replay_share=0.0, learning_rate=peak)


def _pooled(folder: Path, start: dict[str, Floats], split: Split, peak: float) -> dict[str, Floats]:
    rows = np.concatenate(list(split.learnt.values()))
    with TemporaryDirectory() as kept:
        learner = LocalLearner(_task(folder), folder, rows, rows[:0], Path(kept))
        found = learner.learn(Lesson("pooled", 0, 1, _STEPS, _recipe(5 * _ROWS, peak)), start)
    return {name: start[name] + found.update[name] for name in start}


def _federated(folder: Path, start: dict[str, Floats], split: Split, setting: FederatedSetting) -> dict[str, Floats]:
    recipe = _recipe(_ROWS, setting.peak)
    moments = no_moments(load_language_model(folder), recipe) if setting.shared else {}
    weights, momentum = start, None
    share = aggregate.shares({name: len(rows) for name, rows in split.learnt.items()}, _MAX_SHARE)
    with TemporaryDirectory() as kept:
        clients = {}
        for name, rows in split.learnt.items():
            own = Path(kept) / name
            own.mkdir()
            clients[name] = LocalLearner(_task(folder), folder, rows, rows[:0], own)
        for number in range(setting.rounds):
            lesson = Lesson(
                setting.name, number, setting.rounds, _STEPS // setting.rounds, recipe, setting.prox, setting.shared,
            )  # fmt: skip
            updates = {}
            for name, client in clients.items():
                if not setting.kept:
                    client.forget()
                updates[name] = client.learn(lesson, {**weights, **moments}).update
            step = aggregate.weighted_mean(updates, share)
            weights, momentum = aggregate.outer_step(weights, step, momentum, setting.rate, setting.momentum)
            ended = parted(step)[1]
            if setting.pooled:
                ended = aggregate.pooled_moments(moments, ended, share, lesson.local_steps, recipe.optimiser.betas)
            moments = ended
    return weights


def _losses(folder: Path, weights: dict[str, Floats], split: Split) -> dict[str, float]:
    """Nats a token, by client and over all rows."""
    model = load_language_model(folder)
    put_weights(model, weights)
    by_row: dict[str, NDArray[np.float64]] = {name: row_losses(model, rows) for name, rows in split.held_out.items()}
    found = {name: float(losses.mean()) for name, losses in by_row.items()}
    return {**found, "all": float(np.concatenate(list(by_row.values())).mean())}


def _print(
    name: str, after: dict[str, float], before: dict[str, float], pooled: dict[str, float] | None, cpu_s: float
) -> None:
    each = " ".join(f"{kind} {after[kind]:.3f}" for kind in after if kind != "all")
    share = (
        "" if pooled is None else f"  {(before['all'] - after['all']) / (before['all'] - pooled['all']):.1%} of pooled"
    )
    print(f"{name:<52} {after['all']:.4f}{share}  ({each}; {cpu_s:.0f} s of CPU)", flush=True)


if __name__ == "__main__":
    run(main)
