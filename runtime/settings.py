"""What a built model directory tells the runtime: `settings.json` in each version directory.

Typed JSON instead of string parameters in `config.pbtxt`: one reader, unknown keys refused.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field

from runtime.errors import BadEnvironment
from runtime.record import Record

S = TypeVar("S", bound="Settings")
FILE_NAME = "settings.json"
ADMIN_HEADER = "trireme-admin"  # carries the control secret, to the health port and to Triton's gRPC


class Settings(Record):
    @classmethod
    def load(cls: type[S], version_directory: Path) -> S:
        """Raises BadEnvironment when the file is missing or of another release."""
        path = version_directory / FILE_NAME
        try:
            return cls.model_validate_json(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise BadEnvironment(
                f"{path}: missing, or not of this release; run `trireme build` again ({error})"
            ) from error

    def save(self, version_directory: Path) -> None:
        (version_directory / FILE_NAME).write_text(self.model_dump_json(indent=2) + "\n", "utf-8")


class TokenizerSettings(Settings):
    """`length_buckets` empty: pad to the longest text of the request, and leave ragged batches to the encoder.

    `prompts` are texts that can stand before each text, by name; `prompt_name` is the one that does unless a request
    names another. `lower_case`: texts are lower-cased before anything that tokenizer.json does.
    """

    max_length: int
    pad_id: int
    token_type_ids: bool
    pair: bool
    length_buckets: tuple[int, ...] = ()
    prompts: dict[str, str] = Field(default_factory=dict)
    prompt_name: str | None = None
    lower_case: bool = False


class ServedModel(Settings):
    """The identity that the service reports as the metric `trireme_model_info`."""

    ensemble: str
    version: int
    precision: str
    model_digest: str
    spec_digest: str


class TokenizerModelSettings(Settings):
    """`labels`: what each output of a classifier means, in order; `multi_label`: each is true or not by itself."""

    tokenizer: TokenizerSettings
    labels: tuple[str, ...] = ()
    multi_label: bool = False
    served: ServedModel


class ComputeSettings(Settings):
    """What models that compute share, encoders and generators."""

    files: dict[str, str]
    threads: int | None  # none: every core of the machine

    @property
    def cores(self) -> int:
        """Threads on this machine."""
        return self.threads or os.cpu_count() or 1

    def paths(self, version_directory: Path) -> dict[str, Path]:
        return {key: version_directory / name for key, name in self.files.items()}


class EncoderModelSettings(ComputeSettings):
    """`files`: target -> file; the key is "cpu", or an SM such as "sm89"."""

    executor: Literal["openvino", "onnxruntime", "ranks", "tensorrt-rtx"]
    bfloat16: bool
    tokens_per_batch: int
    max_length: int
    warmup_lengths: tuple[int, ...]


class RankCacheSettings(Settings):
    """Of every cache tensor on one rank, and of the whole model's logits: pieces of graphs do not tell."""

    heads: int
    head_dim: int
    dtype: Literal["float32", "float16"]
    vocabulary: int


class ChatSettings(Settings):
    """The checkpoint's own chat template, in Jinja, and the texts of special tokens that it may name."""

    template: str
    special_tokens: dict[str, str] = Field(default_factory=dict)


class GeneratorModelSettings(ComputeSettings):
    """`files`: "decoder" (and "encoder") for graphs, "ranks" for the manifest of rank programs, and for TensorRT one
    engine for each target and capacity ("sm89.512", and "sm89.encoder"), or "engines" for the manifest of ranks.
    `capacities` are those of the cache's pools, in tokens.
    """

    executor: Literal["openvino", "onnxruntime", "ranks", "tensorrt", "tensorrt-rtx"]
    spinning: bool = False  # idle threads take the cores from the server and its clients on the same machine
    capacities: tuple[int, ...]
    slots: int  # sequences that run at once
    kept: int = 8  # rows more in each pool, for prefixes of sequences that have ended
    chunk_tokens: int = 128  # work of a step: what a long prompt may hold up running streams
    queue_size: int = 256
    stream_interval_s: float = 0.0  # between two responses of a stream: each costs as much as a small step
    timeout_s: float | None = None  # of a request as a whole, unless it brings its own
    max_length: int  # prompt and output together
    default_max_tokens: int = 128
    end_ids: tuple[int, ...]
    decoder_start_id: int | None = None  # encoder-decoders
    rank_cache: RankCacheSettings | None = None  # set for ranks
    chat: ChatSettings | None = None  # what the gateway makes of a chat
    served: ServedModel


class ServerSettings(Settings):
    """What the launcher needs to know of a model repository. Lies beside the models, not inside one."""

    ensemble: str
    models: tuple[str, ...]
    version: int
    response_cache_bytes: int
    rate_limited: bool
    content_digest: str
    proof_digest: str | None = None  # of `runtime.proof.record`; None: published by a release that made no proof

    @property
    def load_order(self) -> tuple[str, ...]:
        """The ensemble last: it needs its parts."""
        return (*(name for name in self.models if name != self.ensemble), self.ensemble)
