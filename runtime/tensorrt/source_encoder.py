"""The encoder of an encoder-decoder: a source's keys and values for every cross attention. **Not run on a GPU yet.**"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from runtime.errors import BadEnvironment
from runtime.step import Tokens
from runtime.tensorrt.cuda import Box, Cuda
from runtime.tensorrt.engine import ALIGNMENT, CROSS, EnginePool, Launcher, bind_address, require


class SourceEncoder:
    """One source at a time, so it has one context; `pool` is any of the decoder's, whose rows it fills."""

    def __init__(self, engine: Any, longest: int, cuda: Cuda, launcher: Launcher, pool: EnginePool) -> None:
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        if set(names) != {"input_ids", "source_length", *pool.cross}:
            raise BadEnvironment(
                f"the encoder's engine has {', '.join(names)}; the decoder's takes {', '.join(pool.cross)}: "
                "they do not belong together; run `trireme build` again"
            )
        self._names, self._cuda, self._launcher = pool.cross, cuda, launcher
        self._line = pool.line
        # Outputs lie a whole number of lines apart, whatever the length of the source, so that a row is one box; and
        # every address is aligned.
        step = ALIGNMENT // math.gcd(ALIGNMENT, self._line)
        self._heads, self._spaced = pool.heads, -(-pool.heads // step) * step
        self._outputs = cuda.device(len(self._names) * self._spaced * longest * self._line)
        self._ids = ALIGNMENT  # the source's length comes first
        self._inputs = cuda.device(self._ids + longest * 8)
        self._staging = cuda.pinned(self._ids + longest * 8)
        self._context = launcher.context(engine, 0)

    def run(self, source: Tokens, pool: EnginePool, place: int) -> None:
        """Row `place` of the pool gets the keys and values of `source`, [length]. Returns when it has them."""
        length = len(source)
        block = self._staging[: self._ids + length * 8]
        block[:8] = np.array([length], np.int64).view(np.uint8)
        block[self._ids :] = np.ascontiguousarray(source, np.int64).view(np.uint8)
        self._cuda.copy_in(self._inputs, block)
        for name, shape, at in (("input_ids", (1, length), self._ids), ("source_length", (1,), 0)):
            require(self._context.set_input_shape(name, shape), f"a source of {length} tokens")
            bind_address(self._context, name, self._inputs + at)
        for number, name in enumerate(self._names):
            bind_address(self._context, name, self._outputs + number * self._spaced * length * self._line)
        self._launcher.run(self._context)
        made = Box(self._outputs, length * self._line, self._spaced, len(self._names), self._heads)
        self._cuda.copy_box(pool.row(place, of=CROSS), made, length * self._line)
        self._cuda.wait()

    def close(self) -> None:
        self._context = None
