"""The proof that a published version carries: held-out inputs with the fp32 graph's outputs, and the spec's budget.

A sample is noisier than all held-out texts, on which the graph was judged. So where the weights were compressed, the
sample is one on which the very graph, by ONNX Runtime, is within the budget with room to spare: what is out of budget
on it where it serves is the machine's fault, not the sample's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from builders.artifacts import Checkpoint, OnnxGraph
from builders.errors import InputError, QualityError
from builders.judging.perplexity import ENCODER_FILE, Ids, continuation_losses, encode
from builders.judging.vectors import graph_outputs, neighbours, sample_requests
from builders.spec import DeploymentSpec, Platform
from runtime.generation.opening import TextTokenizer
from runtime.graph import Tensors
from runtime.proof.judging import Figure, figures_text, spent
from runtime.proof.record import EncoderProof, GeneratorProof, Proof, ProofRow

TEXTS = 16
OUTPUT_TOKENS, LONGEST_PROMPT = 24, 256
SAMPLES = 8  # that are tried
ROOM = 0.9  # of the budget that a sample may use up at the build
_ROWS_PER_REQUEST = 4
_CHARACTERS_PER_TOKEN = 16  # a longer text holds more tokens than the model reads

P = TypeVar("P", EncoderProof, GeneratorProof)


def make_proof(
    spec: DeploymentSpec,
    platform: Platform,
    checkpoint: Checkpoint,
    reference: OnnxGraph,
    served: OnnxGraph,
    texts: Sequence[str],
) -> Proof:
    """`reference` is the fp32 graph, `served` the one that the platform runs or builds engines from, `texts` are held
    out. Raises QualityError when the served graph is within the budget on none of the samples.
    """
    compressed = served.precision in ("int8", "dynamic_int8", "fp8", "w8", "w4")
    if spec.generates:
        rows = _Rows.of(spec, platform, checkpoint)
        generator = (_generator_proof(spec, rows, reference, part) for part in _documents(texts))
        return _first_within(generator, (lambda proof: _judge_graph(proof, rows, served)) if compressed else None)
    encoder = (_encoder_proof(spec, checkpoint, reference, part) for part in _mixed(texts))

    def judge(proof: EncoderProof) -> tuple[Figure, ...]:
        return proof.judge(graph_outputs(served.file_path, _requests(checkpoint, proof), checkpoint))

    return _first_within(encoder, judge if compressed else None)


def _first_within(proofs: Iterator[P], judge: Callable[[P], tuple[Figure, ...]] | None) -> P:
    """The first proof that leaves room, else the one that leaves most. Without a judge, the first."""
    best: tuple[float, P, tuple[Figure, ...]] | None = None
    for proof in proofs:
        if judge is None:
            return proof
        figures = judge(proof)
        used = spent(figures)
        if used <= ROOM:
            return proof
        if best is None or used < best[0]:
            best = used, proof, figures
    assert best is not None
    used, proof, figures = best
    if used > 1:
        raise QualityError(
            f"no sample of the held-out texts is within the budget, though all of them together are: "
            f"{figures_text(figures)} on the best. Choose a wider precision, or lower the budget knowingly"
        )
    return proof


def _mixed(texts: Sequence[str]) -> Iterator[list[str]]:
    """Samples of texts from the shortest to the longest, which have no text in common; at last all texts."""
    by_length = sorted(texts, key=len)
    step = max(1, len(by_length) // TEXTS)
    for first in range(step):
        yield by_length[first::step][:TEXTS]
    yield by_length


def _encoder_proof(
    spec: DeploymentSpec, checkpoint: Checkpoint, reference: OnnxGraph, texts: Sequence[str]
) -> EncoderProof:
    longest = checkpoint.max_length * _CHARACTERS_PER_TOKEN
    cut = [text[:longest] for text in texts]
    pairs = neighbours(checkpoint, cut)
    most = spec.serving.max_batch_size - (spec.serving.response_cache_bytes > 0)  # see `runtime.server.model_port`
    proof = EncoderProof(
        inputs=("text",) if pairs is None else ("text", "text_pair"),
        output="embedding" if checkpoint.task == "embedding" else "logits",
        by_label=checkpoint.task != "embedding",
        texts=tuple(zip(cut, *(() if pairs is None else (pairs,)), strict=True)),
        reference=(),
        rows_per_request=max(1, min(_ROWS_PER_REQUEST, most)),
        min_mean_cosine=spec.precision.min_mean_cosine,
        min_worst_cosine=spec.precision.min_worst_cosine,
        max_logit_error=None if checkpoint.task == "embedding" else spec.precision.max_logit_error,
    )
    vectors = graph_outputs(reference.file_path, _requests(checkpoint, proof), checkpoint)
    return proof.model_copy(update={"reference": tuple(map(_rounded, vectors.tolist()))})


def _requests(checkpoint: Checkpoint, proof: EncoderProof) -> list[Tensors]:
    return sample_requests(checkpoint, [text[0] for text in proof.texts])


def _rounded(values: Iterable[float]) -> tuple[float, ...]:
    """Six digits: the last ones of fp32 differ from machine to machine, and a version has another digest with them."""
    return tuple(float(f"{value:.6g}") for value in values)


def _documents(texts: Sequence[str]) -> Iterator[str]:
    """Running text, another stretch of it for each sample."""
    step = max(1, len(texts) // SAMPLES)
    for first in range(0, len(texts), step):
        yield "\n".join([*texts[first:], *texts[:first]])


@dataclass(frozen=True)
class _Rows:
    """Where prompts end, and how many tokens follow. `lengths` are in tokens of the prompt."""

    checkpoint: Checkpoint
    tokenizer: TextTokenizer
    lengths: tuple[int, ...]
    output: int

    @staticmethod
    def of(spec: DeploymentSpec, platform: Platform, checkpoint: Checkpoint) -> _Rows:
        """Two short prompts, one whose output outgrows the first length of the cache, and one that is computed in more
        than one chunk: as far as the model's length allows, and while they are not long."""
        facts, longest = checkpoint.generation, spec.model.max_length
        assert facts is not None
        output = min(OUTPUT_TOKENS, max(1, longest // 4))
        outgrows, chunks = spec.cache_lengths_on(platform)[0] - output // 2, spec.generation.chunk_tokens + output
        wanted = (8, 40, outgrows, chunks)
        lengths = tuple(max(1, min(length, LONGEST_PROMPT, longest - output)) for length in wanted)
        return _Rows(checkpoint, TextTokenizer(checkpoint.path("tokenizer.json"), facts.vocabulary), lengths, output)

    def cut(self, text: str) -> list[tuple[str, tuple[int, ...]]]:
        """Prompts from one stretch of text after the other, and the tokens that follow each in it. No two are followed
        by the same tokens: an answer is known by them."""
        found, fast = dict[tuple[int, ...], str](), self.tokenizer.fast
        for length in self.lengths:
            window = text[: (length + self.output) * _CHARACTERS_PER_TOKEN]
            ends = [end for _, end in fast.encode(window, add_special_tokens=False).offsets]
            if not ends:
                break
            place = min(length, max(1, len(ends) - self.output)) - 1
            while place > 0 and len(fast.encode(window[: ends[place]]).ids) > length:  # special tokens count too
                place -= 1
            prompt, rest = window[: ends[place]], window[ends[place] :]
            following = tuple(fast.encode(rest, add_special_tokens=False).ids[: self.output])
            if len(following) == self.output:
                found.setdefault(following, prompt)
            text = text[len(prompt) :]
        if not found:
            raise InputError(
                "held-out texts", got=f"{len(text)} characters", expected=f"text for {max(self.lengths)} tokens",
                fix="give longer precision.calibration_texts",
            )  # fmt: skip
        return [(prompt, output) for output, prompt in found.items()]

    def logprobs(self, graph: OnnxGraph, rows: Sequence[tuple[str, tuple[int, ...]]]) -> list[list[float]]:
        """Of each row's following tokens, by ONNX Runtime, over the caches."""
        prompts = [np.array(self.tokenizer.fast.encode(prompt).ids, np.int64) for prompt, _ in rows]
        lengths = np.array([len(ids) for ids in prompts])
        padded = np.stack([np.pad(ids, (0, int(lengths.max()) - len(ids))) for ids in prompts])
        outputs: Ids = np.array([output for _, output in rows], np.int64)
        facts = self.checkpoint.generation
        assert facts is not None
        constants = None
        if self.checkpoint.task == "seq2seq":  # the prompt goes to the encoder, and the decoder begins
            constants = encode(graph.path(ENCODER_FILE), padded, lengths)
            padded = np.full((len(rows), 1), facts.pad_id if facts.start_id is None else facts.start_id)
            lengths = np.ones_like(lengths)
        found: list[list[float]] = (-continuation_losses(graph.file_path, padded, lengths, outputs, constants)).tolist()
        return found


def _generator_proof(spec: DeploymentSpec, rows: _Rows, reference: OnnxGraph, text: str) -> GeneratorProof:
    found = rows.cut(text)
    logprobs = rows.logprobs(reference, found)
    return GeneratorProof(
        rows=tuple(
            ProofRow(prompt=prompt, output=output, logprobs=_rounded(values))
            for (prompt, output), values in zip(found, logprobs, strict=True)
        ),
        at_once=min(len(found), spec.serving.queue_size),
        max_perplexity_ratio=spec.precision.max_perplexity_ratio,
    )


def _judge_graph(proof: GeneratorProof, rows: _Rows, served: OnnxGraph) -> tuple[Figure, ...]:
    return proof.judge(rows.logprobs(served, [(row.prompt, row.output) for row in proof.rows]))
