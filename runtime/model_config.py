"""`config.pbtxt`: a message, and its text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CONFIG = "config.pbtxt"
# A parameter of an encoder's ensemble, for the gateway: with a bound of its own, Triton 2.51 lets requests wait half a
# second now and then.
QUEUE_SIZE = "queue_size"


def to_pbtxt(config: Any) -> str:
    """Text format, with a default written out where Triton reads its absence as something else."""
    from google.protobuf import text_format

    text: str = text_format.MessageToString(config)
    return text if "max_batch_size" in text else f"max_batch_size: 0\n{text}"


def parse_pbtxt(text: str) -> Any:
    """The message. Raises text_format.ParseError."""
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    return text_format.Parse(text, model_config_pb2.ModelConfig())


def pin(path: Path, version: int) -> None:
    """From the next load on Triton serves this version alone, whatever lies beside it."""
    config = parse_pbtxt(path.read_text("utf-8"))
    config.version_policy.specific.versions[:] = [version]
    replace_config(path, to_pbtxt(config))


def replace_config(path: Path, text: str) -> None:
    """What is the same stays: Triton loads nothing again of which no file has changed."""
    if path.is_file() and path.read_text("utf-8") == text:
        return
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, "utf-8")
    partial.replace(path)
