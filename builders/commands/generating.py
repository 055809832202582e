"""Commands about running language models."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from builders.commands.options import JsonFlag


def generate(
    text: Annotated[str, typer.Argument(help="the prompt")],
    model: Annotated[str | None, typer.Option(help="default: the one model that the server names")] = None,
    grpc: Annotated[str, typer.Option(help="host:port")] = "127.0.0.1:8001",
    metrics: Annotated[str, typer.Option(help="host:port, to learn the model's name")] = "127.0.0.1:8002",
    max_tokens: Annotated[int | None, typer.Option(help="default: the model's own")] = None,
    temperature: Annotated[float | None, typer.Option(help="0: always the likeliest token")] = None,
    top_k: Annotated[int | None, typer.Option()] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    repetition_penalty: Annotated[float | None, typer.Option()] = None,
    seed: Annotated[int | None, typer.Option(help="the same seed, the same text")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="text that ends the answer; may be given again")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Streams a completion from a running server (`trireme serve`)."""
    from runtime.client import served_model, stream

    given = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "random_seed": seed,
        "stop_words": stop or None,
    }
    options = {name: value for name, value in given.items() if value is not None}
    for chunk in stream(grpc, model or served_model(metrics), text, options):
        print(json.dumps(asdict(chunk)) if as_json else chunk.text, end="\n" if as_json else "", flush=True)
    if not as_json:
        print()
