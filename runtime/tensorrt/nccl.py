"""NCCL through ctypes: communicators, and values that pass between ranks on a stream. **Not run on GPUs yet.**

Its own wrapper rather than torch.distributed: TensorRT wants the bare communicator, and a rank needs no torch for it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from ctypes import POINTER, Structure, c_char_p, c_int, c_size_t, c_void_p
from typing import Any, NamedTuple

from runtime.errors import ServerFault
from runtime.tensorrt.cuda import load_shared

_BYTES = 1  # ncclUint8
_CAPSULE = b"ncclComm_t"  # the name that TensorRT's own samples use; it must live as long as the capsules


class UniqueId(Structure):
    """By value in ncclCommInitRank. 128 bytes in every version so far."""

    _fields_ = [("internal", ctypes.c_uint8 * 128)]


SIGNATURES: dict[str, tuple[Any, ...]] = {
    "ncclGetUniqueId": (POINTER(UniqueId),),
    "ncclCommInitRank": (POINTER(c_void_p), c_int, UniqueId, c_int),
    "ncclSend": (c_void_p, c_size_t, c_int, c_int, c_void_p, c_void_p),
    "ncclRecv": (c_void_p, c_size_t, c_int, c_int, c_void_p, c_void_p),
    "ncclGroupStart": (),
    "ncclGroupEnd": (),
}


class Move(NamedTuple):
    """`nbytes` on the device, to or from the rank `peer` of the communicator."""

    address: int
    nbytes: int
    peer: int


def load_nccl() -> Any:
    """libnccl with its signatures. Raises BadEnvironment where there is none.

    TensorRT looks for the same file name, and gets this one because it is loaded already.
    """
    library = load_shared("libnccl.so.2")
    for name, types in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, c_int
    library.ncclGetErrorString.argtypes, library.ncclGetErrorString.restype = (c_int,), c_char_p
    return library


def unique_id(library: Any) -> bytes:
    """Names a communicator to be. The process that made it must live until all ranks have joined."""
    made = UniqueId()
    _check(library, "ncclGetUniqueId", library.ncclGetUniqueId(ctypes.byref(made)))
    return bytes(made.internal)


class Communicator:
    """One rank's end. It ends with the process: ncclCommDestroy would wait for the others."""

    def __init__(self, library: Any, identity: bytes, ranks: int, rank: int) -> None:
        """Returns when all ranks have come. For the GPU that is current."""
        self._library = library
        handle = c_void_p()
        shared = UniqueId.from_buffer_copy(identity)
        _check(library, "ncclCommInitRank", library.ncclCommInitRank(ctypes.byref(handle), ranks, shared, rank))
        self._handle = handle.value or 0

    @property
    def capsule(self) -> Any:
        """As TensorRT's Python API takes it."""
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, (c_void_p, c_char_p, c_void_p)
        return new(self._handle, _CAPSULE, None)

    def send(self, moves: Iterable[Move], stream: int) -> None:
        """All together, so that one that waits for its receiver does not hold up the others."""
        self._move("ncclSend", moves, stream)

    def receive(self, moves: Iterable[Move], stream: int) -> None:
        self._move("ncclRecv", moves, stream)

    def _move(self, name: str, moves: Iterable[Move], stream: int) -> None:
        _check(self._library, "ncclGroupStart", self._library.ncclGroupStart())
        for address, nbytes, peer in moves:
            status = getattr(self._library, name)(address, nbytes, _BYTES, peer, self._handle, stream)
            _check(self._library, name, status)
        _check(self._library, "ncclGroupEnd", self._library.ncclGroupEnd())


def _check(library: Any, name: str, status: int) -> None:
    if status:
        reason = library.ncclGetErrorString(status).decode(errors="replace")
        raise ServerFault(f"{name} failed: NCCL error {status}, {reason}")
