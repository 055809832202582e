"""TensorRT for RTX inside the Python backend, through Polygraphy's runner.

Triton's own `tensorrt` backend loads engines of full TensorRT only. This executor needs a GPU; see the README for what
was exercised where.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BadEnvironment
from runtime.gpu import visible_targets
from runtime.graph import Tensors
from runtime.tensorrt.cuda import pin_device


class TensorRtRtxExecutor:
    """The engine for the GPU at hand, out of one engine a target (`{"sm89": path, ...}`)."""

    def __init__(self, engines: Mapping[str, Path], device: int) -> None:
        target = dict(enumerate(visible_targets())).get(device)
        if target is None or target not in engines:
            raise BadEnvironment(
                f"GPU {device} of this machine: {target or 'none'}; engines exist for {', '.join(sorted(engines))}; "
                "add the target to engine.targets and build again"
            )
        os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"
        pin_device(device)  # each instance is a process of its own
        import tensorrt_rtx
        from polygraphy.backend.common import bytes_from_path
        from polygraphy.backend.trt import TrtRunner, engine_from_bytes

        self._runner = TrtRunner(engine_from_bytes(bytes_from_path(str(engines[target]))))
        self._runner.activate()
        self._lock = threading.Lock()  # one execution context
        self._description = f"TensorRT for RTX {tensorrt_rtx.__version__} {target}"

    @property
    def description(self) -> str:
        return self._description

    @property
    def lanes(self) -> int:
        return 1

    def run_all(self, batches: Sequence[Tensors], wide: int = 0) -> list[NDArray[np.float32]]:
        with self._lock:
            outputs = [self._runner.infer(dict(batch), check_inputs=False) for batch in batches]
            return [next(iter(output.values())).copy() for output in outputs]
