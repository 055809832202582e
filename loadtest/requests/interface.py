"""What a served model takes and gives, read from its metadata, and whether an answer keeps that promise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loadtest.errors import LoadInputError

TOKEN_COUNT, TRUNCATED = "token_count", "truncated"


class RequestError(Exception):
    """One request without a good answer. `str()` is the kind only, so that Locust's table of errors stays short.

    Kinds are gRPC's status names, `TIMEOUT`, `BAD_OUTPUT`, `CLIENT_ERROR` and `NOT_SENT`: a closed set, one for both
    protocols.
    """

    def __init__(self, kind: str, message: str) -> None:
        self.kind, self.message = kind, " ".join(message.split())
        super().__init__(kind)


@dataclass(frozen=True)
class Answer:
    """A response that was checked. `tokens` and `truncated` are sums over its texts; 0 when the model gives neither."""

    tokens: int
    truncated: int
    bytes: int


@dataclass(frozen=True)
class Interface:
    """BYTES inputs [texts, 1], one FP32 output [texts, width], and optionally token_count and truncated [texts, 1]."""

    inputs: tuple[str, ...]
    output: str
    width: int | None  # None: the model does not say
    counts: tuple[str, ...]  # of TOKEN_COUNT and TRUNCATED, those that the model has

    @property
    def outputs(self) -> tuple[str, ...]:
        """Outputs worth asking for."""
        return (self.output, *self.counts)

    def check(self, texts: int, outputs: Mapping[str, Any]) -> Answer:
        """`outputs` are numpy arrays, None where the response lacks one. Raises RequestError(BAD_OUTPUT)."""
        import numpy as np

        values = outputs[self.output]
        shape = None if values is None else values.shape
        width = self.width or (shape[-1] if shape else 0)
        if shape != (texts, width) or not width:
            expected = f"[{texts}, {self.width or 'width'}]"
            raise RequestError("BAD_OUTPUT", f"output {self.output!r} has shape {_shown(shape)}, not {expected}")
        if not np.isfinite(values).all():
            raise RequestError("BAD_OUTPUT", f"output {self.output!r} holds NaN or infinity")
        for name in self.counts:
            shape = None if outputs[name] is None else outputs[name].shape
            if shape != (texts, 1):
                raise RequestError("BAD_OUTPUT", f"output {name!r} has shape {_shown(shape)}, not [{texts}, 1]")
        sums = {name: int(outputs[name].sum()) for name in self.counts}
        return Answer(sums.get(TOKEN_COUNT, 0), sums.get(TRUNCATED, 0), int(values.nbytes))


def _shown(shape: tuple[int, ...] | None) -> str:
    return "none, it is missing" if shape is None else str(list(shape))


def interface_from_metadata(metadata: Mapping[str, Any]) -> Interface:
    """KServe v2 model metadata (as JSON: sizes may be strings) -> Interface.

    Raises LoadInputError: a model that does not take text and give one FP32 tensor.
    """
    name = metadata["name"]
    inputs = metadata.get("inputs", [])
    for tensor in inputs:
        if tensor["datatype"] != "BYTES" or _sizes(tensor)[-1:] not in ([1], [-1]) or len(_sizes(tensor)) != 2:
            raise LoadInputError(
                f"model {name!r}, input {tensor['name']!r}",
                got=f"{tensor['datatype']} {_sizes(tensor)}",
                expected="BYTES [-1, 1]: one text a row",
                fix="load-test the ensemble that takes text, not one of its parts",
            )
    floats = [tensor for tensor in metadata.get("outputs", []) if tensor["datatype"] == "FP32"]
    if not inputs or len(floats) != 1 or len(_sizes(floats[0])) != 2:
        outputs = ", ".join(f"{t['name']} {t['datatype']} {_sizes(t)}" for t in metadata.get("outputs", []))
        raise LoadInputError(
            f"model {name!r}",
            got=f"{len(inputs)} inputs; outputs {outputs or 'none'}",
            expected="text in, and one FP32 output [-1, width]",
            fix="load-test the ensemble that gives embeddings or logits",
        )
    width = _sizes(floats[0])[-1]
    present = {tensor["name"] for tensor in metadata["outputs"]}
    return Interface(
        inputs=tuple(tensor["name"] for tensor in inputs),
        output=floats[0]["name"],
        width=width if width > 0 else None,
        counts=tuple(count for count in (TOKEN_COUNT, TRUNCATED) if count in present),
    )


def _sizes(tensor: Mapping[str, Any]) -> list[int]:
    return [int(size) for size in tensor.get("shape", [])]
