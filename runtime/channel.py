"""How a client of Triton's gRPC is opened, and how a tensor is put into a request: one way for all who ask."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the load generator's workers open clients, and start in a moment
    from numpy.typing import NDArray


def infer_input(name: str, array: NDArray[Any]) -> Any:
    """A request's tensor, with the shape and the type of the array."""
    from tritonclient.grpc import InferInput
    from tritonclient.utils import np_to_triton_dtype

    item = InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    item.set_data_from_numpy(array)
    return item


def connect(address: str, *options: tuple[str, int]) -> Any:
    """tritonclient's gRPC client with these options of the channel. No proxy stands between us and a server that an
    address names, whatever the environment says."""
    from tritonclient.grpc import InferenceServerClient

    return InferenceServerClient(address, channel_args=[*options, ("grpc.enable_http_proxy", 0)])
