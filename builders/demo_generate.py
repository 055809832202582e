"""`make demo-generate`: a language model from its first token of training to a stream from Triton.

A small Llama-style model is trained on the text that ships with Python, becomes an ONNX graph with weights in 8 and in
4 bits, each judged on text that it has not seen, and is served by the embedded Triton. A second run trains nothing.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from builders import pipeline, present
from builders.__main__ import run
from builders.generate import stream
from builders.perplexity import executor_perplexity
from builders.pipeline import Build
from builders.small_model import held_out_rows, train_small_model, training_progress
from builders.spec import DeploymentSpec
from runtime.generation.executor.openvino import OpenVinoStepExecutor
from runtime.supervisor import ready_server

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
    print("\n2. build: graph with caches, weights in 8 and 4 bits, model repository", flush=True)
    builds = {}
    for precision in ("w8", "w4"):
        with present.build_progress(quiet=False) as report:
            builds[precision] = pipeline.build(
                _spec(folder, precision), "cpu", arguments.build_dir, "repository", report
            )
    print("\n3. perplexity on text that it has not seen, by the executor that serves", flush=True)
    _judge(builds["w8"], builds["w4"], folder)
    print("\n4. serve the 8-bit model with the embedded Triton, and ask it", flush=True)
    _ask(builds["w8"])
    print(f"\nserve it yourself: write a spec with model.source: {folder.resolve()}, then `trireme serve SPEC`")


def _spec(folder: Path, precision: str) -> DeploymentSpec:
    return DeploymentSpec.model_validate(
        {
            "name": f"pydoc-{precision}",
            "model": {"source": str(folder), "task": "generation", "max_length": CONTEXT},
            # A model of four million weights has little to spare for four bits; the figure is printed.
            "precision": {"cpu": precision, "max_perplexity_ratio": 1.05 if precision == "w4" else 1.01},
        }
    )


def _judge(eight: Build, four: Build, folder: Path) -> None:
    rows = held_out_rows(folder)
    first = None
    for name, graph in (("fp32", eight.graph("fp32")), ("w8", eight.graph("w8")), ("w4", four.graph("w4"))):
        executor = OpenVinoStepExecutor(graph.file_path, (CONTEXT,), len(rows), threads=os.cpu_count() or 1)
        perplexity = executor_perplexity(executor, (CONTEXT,), rows)
        first = first or perplexity
        print(
            f"   {name:<5} {perplexity:8.3f}  {perplexity / first:.4f} of fp32  {graph.bytes / 1e6:6.1f} MB", flush=True
        )


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
