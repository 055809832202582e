"""Steps on one GPU: what goes in, the engines, what comes back. **Not run on a GPU yet.**

    host, pinned     tokens and places of a call --one copy-->                              --one copy--> top tokens
    device                                       inputs -> engine of the pool -> logits, top

Everything is put on one stream, batch after batch, and waited for once. Device memory of inputs and of the top tokens
is the same for all calls: the stream keeps them apart. Logits of every row have their own place, and stay there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BadEnvironment, ServerFault
from runtime.step import Batch, Copy, Logits, Row, Tokens
from runtime.tensorrt.cuda import Cuda
from runtime.tensorrt.engine import ALIGNMENT, TOP, At, EnginePool, Launcher, Port
from runtime.tensorrt.logits import DeviceLogits
from runtime.tensorrt.source_encoder import SourceEncoder

_INT64 = 8
_STEP_PORTS = (
    Port("write_indices", ("batch",), _INT64),
    Port("last_index", ("batch",), _INT64),
    Port("source_length", ("batch",), _INT64),  # of encoder-decoders
    Port("input_ids", ("batch", "length"), _INT64),  # the last: it alone varies much in size
)
_STAGED_CALLS = 16  # that the host may be ahead of the GPU with their tokens


class DeviceSteps:
    """`engines` by capacity, all of one model or of one rank of it; `rows` sequences have their caches in each pool.

    `received` are inputs that come from other stages, `sent` outputs for them: whoever owns the steps moves them, from
    and to `address(name)`. `encoder` is the engine of an encoder-decoder's other half.

    Raises BadEnvironment for engines of another making, ServerFault where CUDA fails.
    """

    def __init__(
        self,
        trt: Any,
        cuda: Cuda,
        engines: Sequence[Any],
        capacities: Sequence[int],
        rows: int,
        *,
        received: Sequence[Port] = (),
        sent: Sequence[Port] = (),
        communicator: Any = None,
        encoder: Any = None,
    ) -> None:
        self._cuda, self._rows, self.calls = cuda, rows, 0
        longest = max(capacities)
        self._offsets, self._bytes = _offsets(rows, longest)
        inputs = cuda.device(self._bytes)
        self._addresses = {port.name: inputs + self._offsets[port.name] for port in _STEP_PORTS}
        self._addresses[TOP] = cuda.device(rows * 8)
        for port in (*received, *sent):
            sizes = [port.nbytes(At(0, rows, 1), longest), port.nbytes(At(0, 1, longest), longest)]
            self._addresses[port.name] = cuda.device(max(sizes))
        launcher = Launcher(trt, cuda, [*engines, *([] if encoder is None else [encoder])], communicator)
        ports = (*_STEP_PORTS, *received)
        self.pools = [
            EnginePool(engine, capacity, rows, cuda, launcher, ports, self._addresses)
            for engine, capacity in zip(engines, capacities, strict=True)
        ]
        if bool(self.pools[0].cross) != (encoder is not None):
            raise BadEnvironment(f"the decoder's engine {'needs' if encoder is None else 'takes no'} encoder")
        self._encoder = None if encoder is None else SourceEncoder(encoder, longest, cuda, launcher, self.pools[0])
        self._source_lengths = np.ones((len(capacities), rows), np.int64)
        self.vocabulary = self.pools[0].vocabulary
        self._staging = cuda.pinned(_STAGED_CALLS * self._bytes).reshape(_STAGED_CALLS, self._bytes)
        self._staged = 0
        self._top = cuda.pinned(len(capacities) * rows * 8).view(np.float32).reshape(len(capacities), rows, 2)
        self._fetched = cuda.pinned(rows * self.vocabulary * 4)[: rows * self.vocabulary * 4].view(np.float32)
        cuda.wait()

    def address(self, name: str) -> int:
        return self._addresses[name]

    def stage(self, batch: Batch) -> None:
        """The batch's tokens and places, on the way to the device."""
        if self._staged == _STAGED_CALLS:
            self.wait()
        rows, length = batch.input_ids.shape
        block = self._staging[self._staged]
        self._staged += 1
        arrays = {
            "write_indices": batch.write_indices,
            "last_index": np.full(rows, length - 1, np.int64),
            "source_length": self._source_lengths[batch.pool, batch.rows.start : batch.rows.stop],
            "input_ids": batch.input_ids.ravel(),
        }
        for name, array in arrays.items():
            block[self._offsets[name] :][: array.nbytes] = array.view(np.uint8)
        self._cuda.copy_in(self._addresses["write_indices"], block[: self._offsets["input_ids"] + rows * length * 8])

    def compute(self, batch: Batch) -> None:
        self.pools[batch.pool].run(at(batch))

    def bring_top(self, batch: Batch) -> None:
        """For the rank that has the logits: every row's largest logit and its token, on the way to the host."""
        self._cuda.copy_out(self._top[batch.pool, batch.rows.start : batch.rows.stop], self._addresses[TOP])

    def wait(self) -> None:
        self._cuda.wait()
        self._staged = 0

    def top(self, batch: Batch) -> NDArray[np.float32]:
        """[rows, 2], a copy of what `bring_top` brought; after `wait`."""
        return self._top[batch.pool, batch.rows.start : batch.rows.stop].copy()

    def fetch(self, pool: int, first: int, rows: Sequence[int]) -> Logits:
        """[len(rows), vocabulary]: logits of rows `first + row` of the last call that began at row `first`."""
        target = self._fetched.reshape(self._rows, self.vocabulary)[: len(rows)]
        if list(rows) == list(range(rows[0], rows[0] + len(rows))):
            self._cuda.copy_out(target, self.pools[pool].logits(first, rows[0]))
        else:
            for place, row in enumerate(rows):
                self._cuda.copy_out(target[place], self.pools[pool].logits(first, row))
        self.wait()
        return target.copy()

    def run(self, batches: Sequence[Batch]) -> list[DeviceLogits]:
        """All batches of a step, of a model that is on this GPU alone."""
        self.calls += 1
        for batch in batches:
            self.stage(batch)
            self.compute(batch)
            self.bring_top(batch)
        self.wait()
        return [self._logits(batch) for batch in batches]

    def copy(self, copies: Sequence[Copy]) -> None:
        """On the stream of the steps, so it is done before the next one reads: two calls a row, over all layers."""
        for source, target, tokens in copies:
            origin = None if source is None else (self.pools[source.pool], source.place)
            self.pools[target.pool].fill(target.place, origin, tokens)
            self._source_lengths[target] = 1 if source is None else self._source_lengths[source]

    def encode(self, row: Row, source: Tokens) -> None:
        """Raises ServerFault where the model has no encoder."""
        if self._encoder is None:
            raise ServerFault("the model has no encoder")
        self._encoder.run(source, self.pools[row.pool], row.place)
        self._source_lengths[row] = len(source)

    def reset(self) -> None:
        self.calls += 1
        self.wait()
        self._source_lengths[:] = 1
        for pool in self.pools:
            pool.reset()

    def close(self) -> None:
        """Ends contexts and engines. The memory goes with `cuda`."""
        for pool in self.pools:
            pool.close()
        if self._encoder is not None:
            self._encoder.close()

    def _logits(self, batch: Batch) -> DeviceLogits:
        pool, first, call = batch.pool, batch.first, self.calls

        def fetch(rows: Sequence[int]) -> Logits:
            if call != self.calls:
                raise RuntimeError("logits are valid until the next run")
            return self.fetch(pool, first, rows)

        return DeviceLogits(self.top(batch), self.vocabulary, fetch)


def at(batch: Batch) -> At:
    """The rows that a batch computes."""
    return At(batch.first, *batch.input_ids.shape)


def _offsets(rows: int, longest: int) -> tuple[dict[str, int], int]:
    """Where each input of a step lies in the one block that is copied, each aligned; and the size of the block."""
    offsets, end = {}, 0
    for port in _STEP_PORTS:
        offsets[port.name] = end
        size = max(port.nbytes(At(0, rows, 1), 0), port.nbytes(At(0, 1, longest), 0))
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return offsets, end
