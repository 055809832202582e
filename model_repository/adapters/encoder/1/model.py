"""Triton adapter: token ids -> vectors or scores. Thin on purpose: the work is in `runtime.encoding.encoder`."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from runtime.encoding.encoder import open_encoder, require_numpy_1
from runtime.errors import Unavailable
from runtime.settings import EncoderModelSettings

NICENESS = 10


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        require_numpy_1()
        if args["model_instance_kind"] == "CPU":
            # Compute takes every core. Requests pass through the server and the tokenizer on the same cores in
            # microseconds, if these need not wait for a scheduler slice at each hand-over.
            os.nice(NICENESS)
        directory = Path(args["model_repository"]) / args["model_version"]
        settings = EncoderModelSettings.load(directory)
        config = json.loads(args["model_config"])
        self.inputs = [item["name"] for item in config["input"]]
        self.output = config["output"][0]["name"]
        self.encoder = open_encoder(settings, settings.paths(directory), int(args["model_instance_device_id"]))
        self.encoder.warm_up(self.inputs, settings.warmup_lengths)
        if args["model_instance_kind"] == "CPU":
            instances = sum(group["count"] for group in config["instance_group"])
            shared = instances > 1 and instances * settings.cores > (os.cpu_count() or 1)
            costs = self.encoder.fit(self.inputs, shared=shared)
            print(f"encoder: {costs.summary}", file=sys.stderr, flush=True)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Rows of all requests are sorted by length and run together."""
        feeds = [
            {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs}
            for request in requests
        ]
        try:
            vectors = self.encoder.run(feeds)
        except Unavailable as error:
            return _refusals(str(error), pb_utils.TritonError.UNAVAILABLE, len(requests))
        except Exception:  # noqa: BLE001 - Triton would send the stack, with paths, to the caller
            traceback.print_exc()
            message = "the encoder failed; the server log has the cause"
            return _refusals(message, pb_utils.TritonError.INTERNAL, len(requests))
        return [pb_utils.InferenceResponse([pb_utils.Tensor(self.output, rows)]) for rows in vectors]

    def finalize(self) -> None:
        self.encoder.close()


def _refusals(message: str, code: Any, count: int) -> list[Any]:
    """An error object for each response: Triton 2.51 crashes as a whole when two responses share one."""
    return [pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code)) for _ in range(count)]
