"""A language model and an encoder, each by `trireme serve` with a gateway and a key; what they give by themselves."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from builders import pipeline
from builders.judging import corpus
from builders.spec import DeploymentSpec
from measure.bench.peers import reference
from measure.clients.asking import STORY_BEGINS, ServedPair
from measure.clients.model import CONTEXT, make_model
from measure.serving import minilm_in_fp32, start_serving, write_spec

_KEY = "the-key-of-the-clients"
_TOKENS = 12  # of a greedy answer
_TEXTS = 3


@contextmanager
def serving(build_dir: Path) -> Iterator[ServedPair]:
    """Both at once, for as long as it is open."""
    build_dir.mkdir(parents=True, exist_ok=True)
    folder = make_model(build_dir / "talker")
    keys = build_dir / "clients-keys"
    keys.write_text(f"clients:{hashlib.sha256(_KEY.encode()).hexdigest()}\n")
    encoder = minilm_in_fp32()
    with (
        _service(_talker(folder), build_dir, keys) as text,
        _service(encoder, build_dir, keys) as vectors,
    ):
        embedded = _embedded(encoder, build_dir)
        greedy, likelihoods = _by_transformers(folder)
        yield ServedPair(
            text=f"http://{text['gateway']}", text_grpc=text["gateway_grpc"],
            vectors=f"http://{vectors['gateway']}", vectors_grpc=vectors["gateway_grpc"],
            key=_KEY, folder=str(folder), embedded=embedded, likelihoods=likelihoods, greedy=greedy,
        )  # fmt: skip


def _talker(folder: Path) -> DeploymentSpec:
    return DeploymentSpec.model_validate(
        {
            "name": "talker",
            "model": {"source": str(folder), "task": "generation", "max_length": CONTEXT},
            "precision": {"cpu": "fp32"},
            "generation": {"slots": 8, "cache_lengths": [CONTEXT]},
        }
    )


@contextmanager
def _service(spec: DeploymentSpec, build_dir: Path, keys: Path) -> Iterator[dict[str, Any]]:
    """What `trireme serve --json` says of itself."""
    file = write_spec(spec, build_dir / f"clients-{spec.name}.yaml")
    started = start_serving(file, build_dir, f"--api-keys-file={keys}", "--ready-timeout-s=600")
    try:
        yield started.facts
    finally:
        started.end()


def _embedded(spec: DeploymentSpec, build_dir: Path) -> list[tuple[str, list[float]]]:
    texts = corpus.texts(None, _TEXTS)
    vectors = reference(pipeline.build(spec, "cpu", build_dir, "repository"), texts)
    return [(text, vector.tolist()) for text, vector in zip(texts, vectors, strict=True)]


def _by_transformers(folder: Path) -> tuple[list[tuple[str, str, int]], list[tuple[str, str, float, bool]]]:
    """What is generated without chance, and how likely continuations are, by the checkpoint's own eager model."""
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    greedy, likelihoods = [], []
    with torch.no_grad():
        for prompt in (STORY_BEGINS, "Return the"):
            ids = tokenizer.encode(prompt).ids
            made = model.generate(torch.tensor([ids]), max_new_tokens=_TOKENS, do_sample=False)[0, len(ids) :].tolist()
            greedy.append((prompt, tokenizer.decode(made), _TOKENS))
        for context, continuation in (
            (STORY_BEGINS, " every line of it"), (STORY_BEGINS, " nothing at all"), ("Return the", " number of words"),
        ):  # fmt: skip
            first, whole = len(tokenizer.encode(context).ids), tokenizer.encode(context + continuation).ids
            scores = model(torch.tensor([whole])).logits[0].log_softmax(-1)  # [length, vocabulary]
            places = range(first - 1, len(whole) - 1)
            own = sum(float(scores[place, whole[place + 1]]) for place in places)
            best = all(int(scores[place].argmax()) == whole[place + 1] for place in places)
            likelihoods.append((context, continuation, own, best))
    return greedy, likelihoods
