"""TensorRT on one GPU, both flavours. **Not run on a GPU yet**: everything but CUDA and TensorRT is tested.

An engine has a cache of fixed capacity, so there is one for each pool ("sm89.512"). Each has two profiles: decoding, up
to `slots` rows of one token, and prompts, one row of up to `chunk_tokens`. An encoder-decoder has one more engine, its
encoder's ("sm89.encoder").

tensorrt_engine   one engine: contexts, CUDA graphs, caches      tensorrt_steps   a step: copies in, engines, copies out
tensorrt_logits   logits that stay on the GPU                    tensorrt_ranks   the same on several GPUs
tensorrt_encoder  sources of encoder-decoders
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from runtime.errors import BadEnvironment, ServerFault
from runtime.gpu import visible_targets
from runtime.step import Batch, Copy, Logits, Row, Tokens
from runtime.tensorrt.cuda import Cuda, DeviceLost, load_runtime, pin_device
from runtime.tensorrt.steps import DeviceSteps

Flavour = Literal["tensorrt", "tensorrt-rtx"]


class TensorRtStepExecutor:
    """`engines` by target and capacity (`{"sm89.512": path, ...}`), of one flavour. Raises BadEnvironment."""

    stages, every = 1, False

    def __init__(
        self, engines: Mapping[str, Path], capacities: Sequence[int], rows: int, *, flavour: Flavour, device: int
    ) -> None:
        target = dict(enumerate(visible_targets())).get(device)
        wanted = [f"{target}.{capacity}" for capacity in capacities]
        missing = [name for name in wanted if name not in engines]
        if missing:
            raise BadEnvironment(
                f"GPU {device} of this machine: {target or 'none'}; no engine for {', '.join(missing)}, only for "
                f"{', '.join(sorted(engines))}; add the target to engine.targets and build again"
            )
        pin_device(device)  # each instance is a process of its own
        self._cuda = Cuda(load_runtime())
        self._steps: DeviceSteps | None = None
        try:
            encoder = [name for name in (f"{target}.encoder",) if name in engines]
            trt, loaded = load_engines([engines[name] for name in (*wanted, *encoder)], flavour)
            decoders, rest = loaded[: len(wanted)], loaded[len(wanted) :]
            self._steps = DeviceSteps(trt, self._cuda, decoders, capacities, rows, encoder=next(iter(rest), None))
        except BaseException:
            self._cuda.close()
            raise
        self.vocabulary = self._steps.vocabulary
        self.call_cost = engines[wanted[0]].stat().st_size // self._steps.pools[0].position_bytes

    def run(self, batches: Sequence[Batch]) -> list[Logits]:
        # DeviceLogits are arrays in all that samplers do with them.
        return cast("list[Logits]", self._open().run(batches))

    def copy(self, copies: Sequence[Copy]) -> None:
        self._open().copy(copies)

    def encode(self, row: Row, source: Tokens) -> None:
        self._open().encode(row, source)

    def lost(self) -> bool:
        return False  # a fault shows in the call that meets it

    def reset(self) -> None:
        """Raises DeviceLost after an error on the device: it stays for as long as the process lives."""
        if not self._cuda.usable():
            raise DeviceLost("the GPU failed under this process, which can no longer use it; load the model again")
        self._open().reset()

    def close(self) -> None:
        """Gives all memory of the GPU back. May be called twice."""
        if self._steps is not None:
            self._cuda.usable()  # waits: nothing may run while its context goes
            self._steps.close()
            self._steps = None
        self._cuda.close()

    def _open(self) -> DeviceSteps:
        if self._steps is None:
            raise ServerFault("the executor is closed")
        return self._steps


def load_engines(files: Sequence[Path], flavour: Flavour) -> tuple[Any, list[Any]]:
    """TensorRT's module, and the engines on the current GPU. Raises BadEnvironment."""
    try:
        trt = importlib.import_module(flavour.replace("-", "_"))
        os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1" if flavour == "tensorrt-rtx" else "0"
        from polygraphy.backend.trt import engine_from_path
        from polygraphy.exception import PolygraphyException
    except ImportError as error:
        raise BadEnvironment(f"{flavour} is not installed here ({error}); the serving image for GPUs has it") from error
    try:
        return trt, [engine_from_path(str(file)) for file in files]
    except PolygraphyException as error:
        names = ", ".join(file.name for file in files)
        raise BadEnvironment(
            f"{flavour} {trt.__version__} does not load {names}: built by another version, or for another GPU; "
            f"run `trireme build` again ({error})"
        ) from error
