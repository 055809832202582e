"""`make chaos`: an encoder and a language model over two ranks are served, asked without a pause, and struck.

Reported: requests by what became of them, how long each blow was felt, what is held before and after. Exit 1 when an
answer was wrong, a part did not come back, fuzz was answered or ended a process, or something grew.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

from builders.spec import DeploymentSpec
from builders.training.recipe import TrainingRecipe
from measure.bench.random_llama import random_llama
from measure.chaos import blows
from measure.chaos.act import ChaosAct, in_act
from measure.chaos.fuzz import fuzz
from measure.chaos.load import CompletionLoad, EmbeddingLoad
from measure.chaos.page import write_page
from measure.serving import minilm_in_fp32, write_spec

STUB, TRITON, GATEWAY, RANK = "triton_python_backend_stub", "tritonserver", "runtime.gateway", "runtime.ranks.worker"
FULL = {"stub": 20, "Triton": 10, "rank": 10, "gateway": 5}
_PLACES = 32  # in a queue
_SMALL = TrainingRecipe(
    vocabulary=1024, hidden=128, layers=2, heads=4, kv_heads=2, ffn=256, context=256, tokens_per_step=256
)


def _encoder(spec: Path, arguments: argparse.Namespace, rounds: Callable[[str], int]) -> ChaosAct:
    with in_act("encoder", spec, arguments.build_dir, EmbeddingLoad, arguments.users) as (act, service):
        load = act.load
        parts = {"stub": STUB, "Triton": TRITON, "gateway": GATEWAY}
        for name, part in parts.items():
            act.struck(blows.kill(service, load, name, part, rounds(name)))
        for name, part in parts.items():
            act.struck(blows.stop(service, load, name, part))
        texts = ["a text that is longer than most of them " * 8] * 16
        act.struck(blows.crowd(service, load, "/v1/embeddings", {"model": load.model, "input": texts}))
        act.struck(blows.fill_disk(service, load))
        pids = {name: service.pids(part) for name, part in parts.items()}
        began = time.monotonic() - load.began
        act.fuzzed = fuzz(service.port, service.grpc, load.model, arguments.fuzzed, random.Random(7))
        act.fuzz_s = began, time.monotonic() - load.began
        act.faults += act.fuzzed.faults
        act.faults += [f"fuzz ended {name}" for name, part in parts.items() if service.pids(part) != pids[name]]
        print(f"{act.name:<10} fuzz: {act.fuzzed.text}", flush=True)
        print(f"{act.name:<10} slowest refusal: {act.fuzzed.slowest}, {act.fuzzed.slowest_s:.2f} s", flush=True)
    return act


def _streams(spec: Path, arguments: argparse.Namespace, rounds: Callable[[str], int]) -> ChaosAct:
    with in_act("streams", spec, arguments.build_dir, CompletionLoad, arguments.users) as (act, service):
        load = act.load
        for name, part in {"rank": RANK, "stub": STUB, "gateway": GATEWAY}.items():
            times = rounds(name) if name == "rank" else min(3, rounds(name))
            act.struck(blows.kill(service, load, name, part, times))
        act.struck(blows.stop(service, load, "rank", RANK))
        fields = {"model": load.model, "prompt": "Return the", "max_tokens": 16, "temperature": 0}
        act.struck(blows.crowd(service, load, "/v1/completions", fields))
    return act


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build-dir", type=Path, default=Path("build"))
    parser.add_argument("--rounds", type=int, default=3, help="kills of each part")
    parser.add_argument("--full", action="store_true", help=f"as many kills as {FULL}, and 10,000 fuzzed requests")
    parser.add_argument("--users", type=int, default=4)
    parser.add_argument("--fuzzed", type=int, default=1000, help="requests over HTTP, and as many over gRPC")
    parser.add_argument("--page", type=Path, help="where the HTML page goes; default: chaos.html in the build folder")
    arguments = parser.parse_args()
    if arguments.full:
        arguments.fuzzed = 5000
    arguments.build_dir.mkdir(parents=True, exist_ok=True)
    load_average = os.getloadavg()

    def rounds(name: str) -> int:
        return FULL[name] if arguments.full else int(arguments.rounds)

    acts = [
        _encoder(_encoder_spec(arguments.build_dir), arguments, rounds),
        _streams(_generator_spec(arguments.build_dir), arguments, rounds),
    ]
    page = arguments.page or arguments.build_dir / "chaos.html"
    write_page(page, acts, load_average)
    faults = [f"{act.name}: {fault}" for act in acts for fault in act.faults]
    print("\n".join(f"FAULT    {fault}" for fault in faults) or "no fault")
    print(f"page     {page}")
    sys.exit(1 if faults else 0)


def _encoder_spec(folder: Path) -> Path:
    """With few places in its queue."""
    spec = minilm_in_fp32()
    spec = spec.model_copy(update={"serving": spec.serving.model_copy(update={"queue_size": _PLACES})})
    return write_spec(spec, folder / "chaos-encoder.yaml")


def _generator_spec(folder: Path) -> Path:
    """Random weights: what it says does not matter, only that it says it again."""
    source = str(random_llama(folder / "chaos-lm-source", _SMALL))
    data = {
        "name": "chaos-lm",
        "model": {"source": source, "task": "generation", "max_length": 256},
        "precision": {"cpu": "fp32"},
        "generation": {"slots": 4, "cache_lengths": [64, 256]},
        "serving": {"queue_size": _PLACES},
        "parallel": {"tensor": 2},
    }
    return write_spec(DeploymentSpec.model_validate(data), folder / "chaos-lm.yaml")


if __name__ == "__main__":
    main()
