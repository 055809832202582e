"""The gRPC port of a served model, as a proof asks it."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.channel import infer_input
from runtime.errors import NotProven
from runtime.proof.record import EncoderProof, ProofRow

_TURN_S = 0.5


@dataclass(frozen=True)
class GrpcPort:
    """`client` is a tritonclient, used by nobody else meanwhile. `request_id`: the probe's, which generators do not
    count. `cached`: answers may come from a response cache."""

    client: Any
    model: str
    version: int
    request_id: str = ""
    cached: bool = False

    def vectors(self, proof: EncoderProof, rows: Sequence[int], timeout_s: float) -> NDArray[np.float32]:
        texts = [proof.texts[row] for row in rows]
        if self.cached:  # with a row that was never sent before, no request is like an earlier one
            texts.append(tuple(secrets.token_hex(8) for _ in proof.inputs))
        inputs = [
            infer_input(name, np.array([[text[place].encode()] for text in texts], np.object_))
            for place, name in enumerate(proof.inputs)
        ]
        result = self.client.infer(self.model, inputs, model_version=str(self.version), client_timeout=timeout_s)
        values = result.as_numpy(proof.output)
        if values is None or len(values) != len(texts):
            raise NotProven(f"{self.model} gave {0 if values is None else len(values)} rows for {len(texts)} texts")
        found: NDArray[np.float32] = values[: len(rows)]
        return found

    def logprobs(self, rows: Sequence[ProofRow], timeout_s: float) -> Iterator[tuple[int, list[float]] | None]:
        """Whose an answer is shows in its tokens, which were forced: a probe's requests share one id."""
        answers: SimpleQueue[tuple[Any, Any]] = SimpleQueue()
        left = {row.output: place for place, row in enumerate(rows)}
        self.client.start_stream(lambda result, error: answers.put((result, error)), stream_timeout=timeout_s)
        try:
            for row in rows:
                inputs = [
                    infer_input("text_input", np.array([[row.prompt.encode()]], np.object_)),
                    infer_input("forced_ids", np.array([row.output], np.int32)),
                    infer_input("return_log_probs", np.array([[True]])),
                ]
                version = str(self.version)
                self.client.async_stream_infer(self.model, inputs, model_version=version, request_id=self.request_id)
            while left:
                try:
                    result, error = answers.get(timeout=_TURN_S)
                except Empty:
                    yield None
                    continue
                if error is not None:
                    raise error
                tokens, values = (result.as_numpy(name) for name in ("output_ids", "output_log_probs"))
                made = () if tokens is None else tuple(map(int, tokens.ravel()))
                if made not in left or values is None:
                    raise NotProven(f"{self.model} gave other tokens than it was told to give ({len(made)} of them)")
                yield left.pop(made), values.ravel().tolist()
        finally:
            # Triton 2.51 can crash on a cancellation that meets the end of its stream.
            self.client.stop_stream(cancel_requests=bool(left))
