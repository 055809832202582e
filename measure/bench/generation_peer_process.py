"""How others generate, each by its own public interface: the process behind one peer of `make bench-generation`.

    python -m measure.bench.generation_peer_process PEER MODEL_FOLDER WORK_FOLDER '{"batches": [1, 8], …}'

Greedy, and the end of a text is kept away so that every row has all its new tokens. Standard output is JSON: one line
of times for each batch size, and one with the perplexity where rows of real text were given.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from builders.store.atomic import atomic_directory
from measure.bench.random_llama import random_prompts

CONVERSION_S = 600

Tokens = NDArray[np.int64]  # [batch, length]
Generate = Callable[[Tokens, int], Tokens]  # prompts, and how many new tokens -> those
Logits = Callable[[Tokens], NDArray[np.float32]]  # one row of ids [1, length] -> [length, vocabulary]


@dataclass(frozen=True)
class Opened:
    """A peer with its model loaded."""

    generate: Generate
    logits: Logits


@dataclass(frozen=True)
class Workload:
    """What is timed, and what text is judged: a .npy of token ids [rows, length + 1], each row a text of its own."""

    batches: tuple[int, ...] = (1, 8, 32)
    prompt_tokens: int = 64
    new_tokens: int = 64
    rounds: int = 3  # the fastest counts
    judged: str | None = None


@dataclass(frozen=True)
class Timing:
    """One batch from prompts to last token. `first_s`: the same batch asked for a single new token."""

    batch: int
    new_tokens: int
    first_s: float
    total_s: float

    @property
    def tokens_per_s(self) -> float:
        return self.batch * self.new_tokens / self.total_s

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Without the prompt and the token that it gives; None where other load made the one seem longer than both."""
        if self.total_s <= self.first_s:
            return None
        return self.batch * (self.new_tokens - 1) / (self.total_s - self.first_s)


def measure(generate: Generate, workload: Workload, vocabulary: int) -> list[Timing]:
    """The fastest rounds for each batch size, after one that warms up.

    No two rounds have the same prompts, because some peers keep what they have computed for a prompt.
    """
    seeds = itertools.count()

    def best_s(batch: int, new_tokens: int) -> float:
        inputs = [
            random_prompts(batch, workload.prompt_tokens, vocabulary, next(seeds)) for _ in range(workload.rounds + 1)
        ]
        return min([_seconds(generate, prompts, new_tokens) for prompts in inputs][1:])

    return [
        Timing(batch, workload.new_tokens, best_s(batch, 1), best_s(batch, workload.new_tokens))
        for batch in workload.batches
    ]


def _seconds(generate: Generate, prompts: Tokens, new_tokens: int) -> float:
    begun = time.perf_counter()
    tokens = generate(prompts, new_tokens)
    elapsed_s = time.perf_counter() - begun
    if tokens.shape != (len(prompts), new_tokens):
        raise RuntimeError(f"generated {tokens.shape} tokens, not {(len(prompts), new_tokens)}")
    return elapsed_s


def perplexity(logits: Logits, rows: Tokens) -> float:
    """Per token, over all tokens but the first of each row. `rows`: [rows, length + 1]"""
    nats = 0.0
    for row in rows:
        scores = logits(row[None, :-1]).astype(np.float64)  # [length, vocabulary]
        scores -= scores.max(axis=1, keepdims=True)
        chosen = np.take_along_axis(scores, row[1:, None], axis=1)[:, 0]
        nats += float((np.log(np.exp(scores).sum(axis=1)) - chosen).sum())
    return math.exp(nats / (rows.shape[0] * (rows.shape[1] - 1)))


def transformers_fp32(model: Path, work: Path) -> Opened:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(_cores())
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def generate(prompts: Tokens, new_tokens: int) -> Tokens:
        ids = torch.from_numpy(prompts)
        output = network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            pad_token_id=0,
        )
        tokens: Tokens = output[:, prompts.shape[1] :].numpy()
        return tokens

    def logits(ids: Tokens) -> NDArray[np.float32]:
        with torch.no_grad():
            scores: NDArray[np.float32] = network(torch.from_numpy(ids)).logits[0].numpy()
        return scores

    return Opened(generate, logits)


def onnxruntime_genai_int4(model: Path, work: Path) -> Opened:
    import onnxruntime_genai as og

    folder = work / "onnxruntime-genai-int4"
    if not folder.is_dir():
        # Run as a script, because it imports a package `builders` of its own, which is not this project's.
        builder = Path(og.__file__).parent / "models" / "builder.py"
        options = ["-p", "int4", "-e", "cpu", "-i", str(model), "-c", str(work / "cache")]
        with atomic_directory(folder) as part:
            command = [sys.executable, str(builder), *options, "-o", str(part)]
            subprocess.run(command, check=True, stdout=sys.stderr, timeout=CONVERSION_S)
    network = og.Model(str(folder))

    def generate(prompts: Tokens, new_tokens: int) -> Tokens:
        batch, length = prompts.shape
        parameters = og.GeneratorParams(network)
        total = length + new_tokens
        parameters.set_search_options(batch_size=batch, max_length=total, min_length=total, do_sample=False)
        generator = og.Generator(network, parameters)
        generator.append_tokens(prompts.astype(np.int32))
        for _ in range(new_tokens):
            generator.generate_next_token()
        return np.stack([np.array(generator.get_sequence(row))[length:] for row in range(batch)])

    def logits(ids: Tokens) -> NDArray[np.float32]:
        parameters = og.GeneratorParams(network)
        parameters.set_search_options(batch_size=1, max_length=ids.shape[1])
        generator = og.Generator(network, parameters)
        generator.append_tokens(ids.astype(np.int32))
        return np.asarray(generator.get_output("logits"), np.float32).reshape(ids.shape[1], -1)

    return Opened(generate, logits)


def ctranslate2_int8(model: Path, work: Path) -> Opened:
    import ctranslate2
    from ctranslate2.converters import TransformersConverter
    from tokenizers import Tokenizer

    folder = work / "ctranslate2-int8"
    if not folder.is_dir():
        with atomic_directory(folder) as part:
            TransformersConverter(str(model)).convert(str(part), quantization="int8", force=True)
    network = ctranslate2.Generator(str(folder), device="cpu", compute_type="int8", intra_threads=_cores())
    names = Tokenizer.from_file(str(model / "tokenizer.json"))

    def generate(prompts: Tokens, new_tokens: int) -> Tokens:
        results = network.generate_batch(
            [[names.id_to_token(int(token)) for token in row] for row in prompts],
            include_prompt_in_result=False,
            max_length=new_tokens,
            min_length=new_tokens,
        )
        return np.array([result.sequences_ids[0] for result in results])

    def logits(ids: Tokens) -> NDArray[np.float32]:
        return np.asarray(network.forward_batch(ids.tolist()), np.float32).reshape(ids.shape[1], -1)

    return Opened(generate, logits)


def _openvino_genai(bits: int) -> Callable[[Path, Path], Opened]:
    def opened(model: Path, work: Path) -> Opened:
        import openvino as ov
        import openvino_genai

        folder = work / f"openvino-int{bits}"
        network = openvino_genai.LLMPipeline(str(folder), "CPU")
        config = openvino_genai.GenerationConfig()
        config.ignore_eos, config.do_sample = True, False

        def generate(prompts: Tokens, new_tokens: int) -> Tokens:
            config.max_new_tokens = new_tokens
            mask = np.ones_like(prompts)
            result = network.generate(openvino_genai.TokenizedInputs(ov.Tensor(prompts), ov.Tensor(mask)), config)
            return np.array(result.tokens)

        def logits(ids: Tokens) -> NDArray[np.float32]:
            return _openvino_logits(folder, ids)

        return Opened(generate, logits)

    return opened


def _openvino_logits(folder: Path, ids: Tokens) -> NDArray[np.float32]:
    """The very graph that the pipeline runs, because the pipeline itself shows no logits."""
    import openvino as ov

    request = _openvino_request(folder)
    request.reset_state()
    feeds = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.arange(ids.shape[1])[None],
        "beam_idx": np.zeros(1, np.int32),
    }
    request.infer({name: ov.Tensor(value) for name, value in feeds.items()})
    return np.array(request.get_tensor("logits").data, np.float32).reshape(ids.shape[1], -1)


@functools.cache
def _openvino_request(folder: Path) -> Any:
    import openvino as ov

    return ov.Core().compile_model(str(folder / "openvino_model.xml"), "CPU").create_infer_request()


def _cores() -> int:
    return os.cpu_count() or 1


PEERS: dict[str, Callable[[Path, Path], Opened]] = {
    "transformers fp32": transformers_fp32,
    "onnxruntime-genai int4": onnxruntime_genai_int4,
    "CTranslate2 int8": ctranslate2_int8,
    "OpenVINO GenAI int8": _openvino_genai(8),
    "OpenVINO GenAI int4": _openvino_genai(4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peer", choices=list(PEERS))
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("workload", type=json.loads)
    arguments = parser.parse_args()
    workload = Workload(**arguments.workload)
    opened = PEERS[arguments.peer](arguments.model, arguments.work)
    vocabulary = json.loads((arguments.model / "config.json").read_text())["vocab_size"]
    for timing in measure(opened.generate, workload, vocabulary):
        print(json.dumps(asdict(timing)), flush=True)
    if workload.judged is not None:
        print(json.dumps({"perplexity": perplexity(opened.logits, np.load(workload.judged))}), flush=True)


if __name__ == "__main__":
    main()
