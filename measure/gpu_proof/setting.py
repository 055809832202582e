"""What is measured, and on which device. The dry run is the same script with a CPU, tiny shapes and stand-ins."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from measure.bench.decoder_graph import DecoderShape
from measure.gpu_proof.roofline import DeviceLimits, EncoderShape

FLAVOURS: tuple[Literal["tensorrt", "tensorrt-rtx"], ...] = ("tensorrt", "tensorrt-rtx")
LLAMA_8B = DecoderShape(layers=32, hidden=4096, heads=32, kv_heads=8, ffn=14336, vocabulary=128256)
MINILM = EncoderShape("MiniLM", layers=6, hidden=384, heads=12, ffn=1536)
BERT_BASE = EncoderShape("BERT-base", layers=12, hidden=768, heads=12, ffn=3072)


@dataclass(frozen=True)
class Setting:
    """The sizes are those for a GPU. `target` is what engines are built for."""

    scratch: Path
    target: str
    device: Literal["cuda", "cpu"] = "cuda"
    dtype: Literal["float16", "float32"] = "float16"
    compiler: str = "inductor"  # torch.compile's backend
    decoder_name: str = "Llama-8B shape"
    decoder: DecoderShape = LLAMA_8B
    decode_rows: tuple[int, ...] = (1, 8, 32, 128)
    contexts: tuple[int, ...] = (512, 4096)
    depths: tuple[int, int] = (2, 4)  # layers of decoder engines: see `decoder_engines`
    encoders: tuple[EncoderShape, ...] = (MINILM, BERT_BASE)
    batches: tuple[int, ...] = (1, 8, 32, 128)
    lengths: tuple[int, ...] = (32, 128, 256)
    copy_bytes: int = 4 << 30
    product_size: int = 8192
    steps: int = 64  # of a loop that is timed
    timing_s: float = 0.5  # the least that a call is timed for
    limits: DeviceLimits | None = None  # of the device, once they are measured
    deadline: float = math.inf  # of a section, on the monotonic clock, which all processes of a machine share

    @property
    def dry(self) -> bool:
        return self.device == "cpu"

    @property
    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    @property
    def precision(self) -> Literal["fp16", "fp32"]:
        """Of the exported graphs."""
        return "fp16" if self.dtype == "float16" else "fp32"

    @property
    def value_bytes(self) -> int:
        return 2 if self.dtype == "float16" else 4


def dry(scratch: Path) -> Setting:
    """`sm89`: TensorRT for RTX builds an engine for it here, which nothing here can run."""
    return Setting(
        scratch, "sm89", device="cpu", dtype="float32", decoder_name="tiny Llama", decode_rows=(1, 2), contexts=(32,),
        compiler="eager",  # Dynamo traces as it does for Inductor, whose C++ would take a minute to compile
        decoder=DecoderShape(layers=3, hidden=64, heads=4, kv_heads=2, ffn=96, vocabulary=320), depths=(1, 2),
        encoders=(EncoderShape("tiny BERT", layers=2, hidden=32, heads=4, ffn=64, vocabulary=400),),
        batches=(1, 4), lengths=(16,), copy_bytes=16 << 20, product_size=256, steps=6, timing_s=0.01,
    )  # fmt: skip
