"""Triton adapter: text -> token ids. Thin on purpose: the work is in `runtime.encoding.tokenizer`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from runtime.encoding.encoder import require_numpy_1
from runtime.encoding.tokenizer import Encoded, Tokenizer, read_prompt_name
from runtime.errors import BadRequest
from runtime.proof.proven import ProvenExporter
from runtime.settings import TokenizerModelSettings


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        require_numpy_1()
        directory = Path(args["model_repository"]) / args["model_version"]
        settings = TokenizerModelSettings.load(directory)
        self.tokenizer = Tokenizer(directory / "tokenizer.json", settings.tokenizer)
        self.inputs = ("text", "text_pair") if settings.tokenizer.pair else ("text",)
        served = settings.served
        self.info = pb_utils.MetricFamily(
            name="trireme_model_info",
            description="What is served: always 1; the labels say it",
            kind=pb_utils.MetricFamily.GAUGE,
        )
        labels = {
            "model": served.ensemble,
            "version": str(served.version),
            "precision": served.precision,
            "digest": served.model_digest,
            "spec_digest": served.spec_digest,
        }
        self.info_metric = self.info.Metric(labels=labels)
        self.info_metric.set(1)
        repository = directory.parent.resolve().parent  # Triton may be shown links
        self.proven = ProvenExporter(pb_utils.MetricFamily, served, repository, os.getppid())

    def execute(self, requests: list[Any]) -> list[Any]:
        """All texts of all requests are encoded in one call; a bad request fails alone."""
        self.proven.look()
        responses: list[Any] = [None] * len(requests)
        texts: list[tuple[str | Encoded, ...]] = []
        prompts: list[str] = []
        spans: dict[int, slice] = {}
        for index, request in enumerate(requests):
            try:
                named = read_prompt_name(request.parameters())
                prompt = self.tokenizer.prompt(named)
                rows = list(zip(*(self._read(request, name) for name in self.inputs), strict=True))
                if named is not None and any(isinstance(row[0], Encoded) for row in rows):
                    raise BadRequest("prompt_name goes before texts, and these are token ids; leave it out")
            except BadRequest as error:
                responses[index] = _error(str(error))
                continue
            spans[index] = slice(len(texts), len(texts) + len(rows))
            texts += rows
            prompts += [prompt] * len(rows)
        if texts:
            encoded = self.tokenizer.encode_rows(texts, prompts)
            for index, span in spans.items():
                responses[index] = self._respond(encoded[span])
        return responses

    def _read(self, request: Any, name: str) -> list[str | Encoded]:
        return self.tokenizer.read(pb_utils.get_input_tensor_by_name(request, name).as_numpy().ravel(), name)

    def _respond(self, encoded: list[Encoded]) -> Any:
        tensors = [pb_utils.Tensor(name, array) for name, array in self.tokenizer.pad(encoded).items()]
        counts = np.array([[len(item.ids)] for item in encoded], np.int32)
        truncated = np.array([[item.truncated] for item in encoded], np.bool_)
        tensors += [pb_utils.Tensor("token_count", counts), pb_utils.Tensor("truncated", truncated)]
        return pb_utils.InferenceResponse(tensors)


def _error(message: str) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG))
