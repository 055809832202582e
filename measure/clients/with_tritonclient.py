"""Triton's own clients of an older release, HTTP and gRPC, streams too."""

from __future__ import annotations

import queue
from typing import Any

from measure.clients.asking import Asks, ServedPair, near, raised, require, same

CLIENT = "tritonclient"


def asks(served: ServedPair) -> Asks:
    import numpy as np
    from tritonclient import grpc, http
    from tritonclient.utils import InferenceServerException

    bearer = {"authorization": f"Bearer {served.key}"}
    capital = {"Authorization": f"Bearer {served.key}"}
    texts = np.array([[text.encode()] for text, _ in served.embedded], np.object_)

    def over_http() -> None:
        with http.InferenceServerClient(served.vectors.removeprefix("http://")) as client:
            require(client.is_server_ready() and client.is_model_ready("minilm", headers=capital), "not ready")
            for binary in (True, False):
                given = http.InferInput("text", list(texts.shape), "BYTES")
                given.set_data_from_numpy(texts, binary_data=binary)
                wanted = [http.InferRequestedOutput("embedding", binary_data=binary)]
                got = client.infer("minilm", [given], outputs=wanted, headers=dict(capital))  # it adds to them
                got = got.as_numpy("embedding")
                for row, (_, expected) in zip(got, served.embedded, strict=True):
                    near(row.tolist(), expected)
            raised(InferenceServerException, "no such path", lambda: client.unload_model("minilm", headers=capital))
            raised(InferenceServerException, "401", lambda: client.get_model_metadata("minilm"))

    def over_grpc() -> None:
        with grpc.InferenceServerClient(served.vectors_grpc) as client:
            given = grpc.InferInput("text", list(texts.shape), "BYTES")
            given.set_data_from_numpy(texts)
            same(client.get_model_metadata("minilm", headers=bearer).name, "minilm")
            for algorithm in (None, "gzip"):
                got = client.infer("minilm", [given], headers=bearer, compression_algorithm=algorithm)
                for row, (_, expected) in zip(got.as_numpy("embedding"), served.embedded, strict=True):
                    near(row.tolist(), expected)
            raised(InferenceServerException, "UNAUTHENTICATED", lambda: client.infer("minilm", [given]))

    def stream() -> None:
        prompt, expected, count = served.greedy[0]
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        with grpc.InferenceServerClient(served.text_grpc) as client:
            client.start_stream(lambda result, error: answers.put((result, error)), headers=bearer)
            tensors = {
                "text_input": np.array([[prompt.encode()]], np.object_),
                "max_tokens": np.array([[count]], np.int32),
                "stream": np.array([[True]]),
            }
            kinds = {"text_input": "BYTES", "max_tokens": "INT32", "stream": "BOOL"}
            inputs = []
            for name, value in tensors.items():
                inputs.append(grpc.InferInput(name, [1, 1], kinds[name]))
                inputs[-1].set_data_from_numpy(value)
            client.async_stream_infer("talker", inputs)
            found, finished = "", False
            while not finished:
                result, error = answers.get(timeout=60)
                require(error is None, error)
                found += result.as_numpy("text_output").ravel()[0].decode()
                finish = result.as_numpy("finish_reason")
                finished = finish is not None and finish.size > 0
            client.stop_stream()
        same(found, expected)

    return {
        "http: infer, binary and JSON": over_http, "grpc: infer, plain and gzip": over_grpc,
        "grpc: a generator's stream": stream,
    }  # fmt: skip
