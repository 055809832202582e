"""`make demo-generate`: a language model from its first token of training to a stream from Triton.

A small Llama-style model is trained on the text that ships with Python, becomes an ONNX graph in fp32 and with weights
in 8 and in 4 bits, each judged on text that it has not seen and timed on this CPU; the embedded Triton serves the one
that is taken. A second run trains nothing.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from builders import pipeline
from builders.__main__ import run
from builders.commands import show
from builders.judging.perplexity import executor_perplexity
from builders.judging.precision import WIDEST_FIRST
from builders.pipeline import Build
from builders.spec import CpuPrecision, DeploymentSpec
from builders.training.progress import training_progress
from measure.small_model.folder import held_out_rows, train_small_model
from runtime.client import stream
from runtime.generation.executor.openvino import OpenVinoStepExecutor
from runtime.server.supervise import ready_server

PROMPTS = ("Return the number of", "Raised when a", "The with statement")
MAX_TOKENS = 48
CONTEXT = 512


def main() -> None:
    parser = argparse.ArgumentParser(description="train, build, serve and ask a small language model")
    parser.add_argument("--build-dir", type=Path, default=Path("build"))
    arguments = parser.parse_args()
    folder = arguments.build_dir / "small-model"
    print(f"1. train a small language model on Python's own documentation, into {folder}", flush=True)
    if (folder / "config.json").is_file():
        print("   it is there already; remove the folder to train again", flush=True)
    else:
        with training_progress() as progress:
            trained = train_small_model(folder, progress)
        print(f"   {trained.elapsed_s:.0f} s; the loss is drawn in {folder / 'training.html'}", flush=True)
    print("\n2. build: graph with caches, weights in 8 and 4 bits, the fastest within the budget", flush=True)
    with show.build_progress(quiet=False) as report:
        taken = pipeline.build(_spec(folder), "cpu", arguments.build_dir, "repository", report)
    show.print_choice(taken)
    print("\n3. perplexity on text that it has not seen, by the executor that serves", flush=True)
    _judge(taken, arguments.build_dir, folder)
    print(f"\n4. serve it in {taken.spec.precision.cpu} with the embedded Triton, and ask it", flush=True)
    _ask(taken)
    print(f"\nserve it yourself: write a spec with model.source: {folder.resolve()}, then `trireme serve SPEC`")


def _spec(folder: Path) -> DeploymentSpec:
    return DeploymentSpec.model_validate(
        {
            "name": "pydoc",
            "model": {"source": str(folder), "task": "generation", "max_length": CONTEXT},
            # A model of four million weights has little to spare for four bits; the figure is printed.
            "precision": {"cpu": "auto", "max_perplexity_ratio": 1.05},
        }
    )


def _judge(taken: Build, build_dir: Path, folder: Path) -> None:
    rows = held_out_rows(folder)
    first = None
    for name in _within_budget(taken):
        # Every candidate lies in the store.
        graph = pipeline.build(taken.spec.with_cpu_precision(name), "cpu", build_dir, "quantize").served_graph
        executor = OpenVinoStepExecutor(graph.file_path, (CONTEXT,), len(rows), threads=os.cpu_count() or 1)
        perplexity = executor_perplexity(executor, (CONTEXT,), rows)
        first = first or perplexity
        print(
            f"   {name:<5} {perplexity:8.3f}  {perplexity / first:.4f} of fp32  {graph.bytes / 1e6:6.1f} MB", flush=True
        )


def _within_budget(taken: Build) -> list[CpuPrecision]:
    assert taken.choice is not None
    measured = [item.precision for item in taken.choice.candidates if item.speed is not None]
    return sorted(measured, key=WIDEST_FIRST.index)


def _ask(built: Build) -> None:
    assert built.entry is not None
    with ready_server(built.entry.repository) as server:
        print(f"   proven on this machine: {server.proven}", flush=True)
        for prompt in PROMPTS:
            print(f"   {prompt}", end="", flush=True)
            started, count = time.monotonic(), 0
            options = {"max_tokens": MAX_TOKENS, "temperature": 0.7, "top_p": 0.9, "random_seed": 7}
            for chunk in stream(server.grpc_address, built.spec.name, prompt, options):
                print(chunk.text.replace("\n", "\n   "), end="", flush=True)
                count += len(chunk.tokens)
            print(f"\n   ({count} tokens, {count / (time.monotonic() - started):.0f} a second)\n", flush=True)


if __name__ == "__main__":
    run(main)
