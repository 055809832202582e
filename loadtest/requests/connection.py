"""One user's connection to Triton: the same calls over gRPC and over HTTP (KServe v2, binary tensors)."""

from __future__ import annotations

import http.client
from collections.abc import Sequence
from typing import Any, Literal

from loadtest.requests.interface import Answer, Interface, RequestError

Protocol = Literal["grpc", "http"]

_KIND_OF_HTTP = {
    "400": "INVALID_ARGUMENT", "401": "UNAUTHENTICATED", "403": "PERMISSION_DENIED", "404": "NOT_FOUND",
    "408": "TIMEOUT", "413": "INVALID_ARGUMENT", "429": "RESOURCE_EXHAUSTED", "499": "CANCELLED",
    "500": "INTERNAL", "501": "UNIMPLEMENTED", "502": "UNAVAILABLE", "503": "UNAVAILABLE", "504": "TIMEOUT",
}  # fmt: skip


class Connection:
    """A connection of its own, not shared between users. `parallel`: greenlets that may ask at once; `key`: for a
    gateway that asks for one."""

    def __init__(
        self, protocol: Protocol, address: str, timeout_s: float, parallel: int = 1, key: str | None = None
    ) -> None:
        self._protocol, self._timeout_s, self._headers = protocol, timeout_s, bearer(key)
        if protocol == "grpc":
            import tritonclient.grpc as library

            # Without its own pool, gRPC would carry every user of this process over one TCP connection; without the
            # second option it would send loopback traffic to the proxy that the environment names.
            options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
            options.append(("grpc.max_receive_message_length", -1))
            self._client = library.InferenceServerClient(address, channel_args=options)
        else:
            import tritonclient.http as library

            self._client = library.InferenceServerClient(
                address, concurrency=parallel, connection_timeout=timeout_s, network_timeout=timeout_s
            )
        self._library: Any = library

    def close(self) -> None:
        self._client.close()

    def metadata(self, model: str) -> dict[str, Any]:
        """KServe v2, as JSON. Raises RequestError."""
        if self._protocol == "grpc":
            options = {"as_json": True, "client_timeout": self._timeout_s, "headers": self._headers}
            found = self._call(self._client.get_model_metadata, model, **options)
        else:
            found = self._call(self._client.get_model_metadata, model, headers=self._headers)
        return dict(found)

    def ask(self, model: str, interface: Interface, rows: Sequence[Sequence[str]]) -> Answer:
        """`rows[i]` holds one text per input of the model. Raises RequestError."""
        import numpy as np

        inputs = []
        for column, name in enumerate(interface.inputs):
            tensor = self._library.InferInput(name, [len(rows), 1], "BYTES")
            tensor.set_data_from_numpy(np.array([[row[column].encode()] for row in rows], dtype=np.object_))
            inputs.append(tensor)
        outputs = [self._library.InferRequestedOutput(name) for name in interface.outputs]
        if self._protocol == "grpc":
            limits: dict[str, Any] = {"client_timeout": self._timeout_s, "headers": self._headers}
        else:
            # The client library would send no content type, and a form's is what brings Triton's HTTP port down.
            limits = {"headers": {"Content-Type": "application/octet-stream", **self._headers}}

        def infer() -> dict[str, Any]:
            result = self._client.infer(model, inputs, outputs=outputs, **limits)
            return {name: result.as_numpy(name) for name in interface.outputs}

        return interface.check(len(rows), self._call(infer))

    def _call(self, function: Any, *arguments: Any, **options: Any) -> Any:
        """Every way in which a call can fail, as RequestError."""
        import gevent
        from geventhttpclient.response import HTTPParseError
        from tritonclient.utils import InferenceServerException

        try:
            return function(*arguments, **options)
        except InferenceServerException as error:
            raise RequestError(kind_of_status(error.status()), error.message() or "") from error
        except (TimeoutError, gevent.Timeout) as error:
            raise RequestError("TIMEOUT", f"no answer within {self._timeout_s:g} s") from error
        except (OSError, http.client.HTTPException, HTTPParseError) as error:
            raise RequestError("UNAVAILABLE", f"{type(error).__name__}: {error}") from error
        except (ValueError, KeyError) as error:  # JSON or tensors that do not parse
            raise RequestError("BAD_OUTPUT", f"a response that does not parse: {error!r}") from error


def bearer(key: str | None) -> dict[str, str]:
    """Headers, or metadata, with which a gateway is asked."""
    return {} if key is None else {"authorization": f"Bearer {key}"}


def kind_of_status(status: str | None) -> str:
    """`StatusCode.UNAVAILABLE` of gRPC, or `503` of HTTP -> kind of error."""
    if status is None:
        return "CLIENT_ERROR"  # refused by the client library before anything was sent
    if status.isdigit():
        return _KIND_OF_HTTP.get(status, "UNKNOWN")
    name = status.removeprefix("StatusCode.")
    return "TIMEOUT" if name == "DEADLINE_EXCEEDED" else name
