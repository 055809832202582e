"""The nouns of the pipeline: frozen records of files, digests and facts.

A record holds no tensor and no handle. It is saved as `record.json` beside its files, so that it can be cached,
compared and named in a report. File names are relative to `directory`, so a store can be moved.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import Field

from builders.digests import file_digest as file_digest  # the rest of the house knows these from here
from builders.rounded import RoundingChoice as RoundingChoice
from builders.rounded import WeightRounding as WeightRounding
from builders.spec import CpuPrecision, Flavour, GraphPrecision, Platform, ProfileSlice, Task
from runtime.record import Record


class FileRecord(Record):
    name: str
    bytes: int
    sha256: str

    @staticmethod
    def of(path: Path) -> FileRecord:
        return FileRecord(name=path.name, bytes=path.stat().st_size, sha256=file_digest(path))


class Artifact(Record):
    """What a stage leaves behind. `files` are all the files it vouches for."""

    directory: Path = Field(exclude=True)
    files: tuple[FileRecord, ...]

    @property
    def digest(self) -> str:
        """SHA-256 over the names and digests of the files: the identity of the content."""
        lines = sorted(f"{file.name} {file.sha256}" for file in self.files)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    def path(self, name: str) -> Path:
        return self.directory / name


class Generation(Record):
    """What generation must know of a checkpoint. `head_dim` and `kv_heads` are those of the decoder's own caches.

    `start_id` begins the decoder's side of an encoder-decoder. `max_positions` is None where positions are relative.
    """

    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int
    start_id: int | None
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int | None
    vocabulary: int
    tied: bool


class HeadLayer(Record):
    """What is done to a vector behind the pooling: a product with its activation, a LayerNorm, or the L2 norm.

    `width` is that of its output; `files` are relative to the checkpoint, the weights last.
    """

    kind: Literal["dense", "layernorm", "normalize"]
    width: int
    bias: bool = False
    activation: str = "Identity"  # a class of torch.nn
    files: tuple[str, ...] = ()


class Prompts(Record):
    """What can stand before each text, by name, and what does unless a request names another."""

    texts: dict[str, str]
    default: str | None


class Checkpoint(Artifact):
    """Weights, configuration and tokenizer of one model, in a folder that transformers loads.

    `pooling` and what follows it, `head`, make one vector of token states. `prompts` and `lower_case` are for the text
    before it is tokenised. `adapter` is the folder of a LoRA that belongs on the weights.
    """

    source: str
    architecture: str
    model_type: str
    task: Task
    pooling: str | None
    hidden_size: int
    labels: int
    parameters: int
    max_length: int
    token_type_ids: bool
    generation: Generation | None = None
    head: tuple[HeadLayer, ...] = ()
    prompts: Prompts | None = None
    lower_case: bool = False
    adapter: Path | None = Field(None, exclude=True)  # its files are among `files`

    @property
    def normalize(self) -> bool:
        return bool(self.head) and self.head[-1].kind == "normalize"

    @property
    def width(self) -> int:
        """Of the output of an encoder."""
        if self.task != "embedding":
            return self.labels
        return self.head[-1].width if self.head else self.hidden_size


class TensorSpec(Record):
    """Name, ONNX element type (`int64`, `float32`) and dimensions; a string names a dynamic one."""

    name: str
    dtype: str
    dims: tuple[int | str, ...]


class Quality(Record):
    """A model against the fp32 checkpoint on held-out texts.

    `mean_cosine` and `worst_cosine` compare embeddings text by text. Scores of classifiers and rerankers are compared
    label by label instead: the cosine of the centred scores over all texts, which is Pearson's correlation. That is
    blind to a shift and to a scale, so they have two figures more. `logit_error` is the root mean square difference of
    the worst label, over the spread of the reference's scores; `agreement` the share of texts with the same highest
    label, or, of a single score, of pairs of texts that stand in the same order.
    """

    mean_cosine: float
    worst_cosine: float
    max_abs_difference: float
    texts: int
    executor: str
    logit_error: float | None = None
    agreement: float | None = None

    @property
    def summary(self) -> str:
        scores = ""
        if self.logit_error is not None and self.agreement is not None:
            scores = f", logits within {self.logit_error:.1%} of their spread, {self.agreement:.1%} agree"
        return f"cosine to fp32 mean {self.mean_cosine:.5f}, worst {self.worst_cosine:.5f}{scores} ({self.executor})"


class GenerationQuality(Record):
    """A language model against its fp32 checkpoint on held-out text, token by token through the caches.

    `max_relative_difference` is that of the logits, over the largest of them, along the steps of the parity check; it
    is None where the graph is meant to differ.
    """

    perplexity: float
    reference_perplexity: float
    tokens: int
    executor: str
    max_relative_difference: float | None = None

    @property
    def ratio(self) -> float:
        """1.01: the graph is a hundredth more perplexed than the checkpoint."""
        return self.perplexity / self.reference_perplexity

    @property
    def summary(self) -> str:
        return f"perplexity {self.perplexity:.3f}, {self.ratio:.4f} of the fp32 checkpoint's ({self.executor})"


class OnnxGraph(Artifact):
    """One ONNX file with its weights inside or beside it."""

    file: str
    precision: GraphPrecision
    opset: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    operators: dict[str, int]
    quality: Quality | GenerationQuality
    source_digest: str
    rounding: RoundingChoice | WeightRounding | None = None

    @property
    def judged(self) -> str:
        return ", ".join(each.summary for each in (self.quality, self.rounding) if each is not None)

    @property
    def file_path(self) -> Path:
        return self.path(self.file)


class ServedQuality(Artifact):
    """The model as the CPU service computes it, against fp32. No files: the figures are the result."""

    quality: Quality | GenerationQuality


class ProofFile(Artifact):
    """What a version proves itself with where it serves; see `runtime.proof.record`."""

    file: str

    @property
    def file_path(self) -> Path:
        return self.path(self.file)


class Processor(Record):
    """What the arithmetic of a CPU depends on. `flags`: its vector extensions; `capabilities`: what OpenVINO says of
    it, which may be less."""

    name: str
    cores: int
    flags: tuple[str, ...]
    capabilities: tuple[str, ...]

    @property
    def multiplies_bytes(self) -> bool:
        """Without VNNI, byte products saturate, and take longer than fp32 ones."""
        return any("vnni" in flag for flag in self.flags) or "amx_int8" in self.flags

    @property
    def has_bfloat16(self) -> bool:
        return "BF16" in self.capabilities


class PrecisionCandidate(Record):
    """A precision as the executor that serves computes it on one CPU. `speed`: of fp32, by CPU time in the same run;
    `reason`: why it is served, or why not. What was not tried or not finished has no figures."""

    precision: CpuPrecision
    quality: Quality | GenerationQuality | None = None
    speed: float | None = None
    reason: str = ""


class PrecisionChoice(Artifact):
    """What `precision.cpu` came to, and on which CPU. No files: the figures are the result.

    `asked` is `auto` or a precision; `warning` is set where what was asked for by name does not pay here.
    """

    asked: str
    chosen: CpuPrecision
    executor: str
    processor: Processor
    candidates: tuple[PrecisionCandidate, ...]
    warning: str | None = None


class Engine(Artifact):
    """One TensorRT engine for one target: of a whole graph, or of one rank of a partition.

    `collectives` is the number of DIST_COLLECTIVE layers in the network that was built.
    """

    file: str
    flavour: Flavour
    version: str
    target: str
    precision: GraphPrecision
    profiles: tuple[ProfileSlice, ...]
    layers: int
    stage: int = 0
    rank: int = 0
    collectives: int = 0
    capacity: int | None = None  # tokens of a decoder's cache
    build_seconds: float
    source_digest: str

    @property
    def file_path(self) -> Path:
        return self.path(self.file)


class RepositoryEntry(Record):
    """A published version of an ensemble in a Triton model repository."""

    repository: Path
    ensemble: str
    models: tuple[str, ...]
    version: int
    platform: Platform
    precision: str
    model_digest: str
    spec_digest: str


class RankFiles(Artifact):
    """What the CPU service of a partition runs: the ranks' programs (`ranks.json`), their pieces and their weights."""

    tensor: int
    pipeline: int
    partition_digest: str


class Cut(Record):
    """Dimension `dim` is cut block by block: (size, parts). Rank r of N holds part r * parts // N of each block."""

    dim: int
    blocks: tuple[tuple[int, int], ...]


class PlacedWeight(Record):
    """An initializer of a stage: the tensor of the source graph, how it is cut, and what one rank holds."""

    name: str
    source: str
    dtype: str
    dims: tuple[int, ...]
    cut: Cut | None
    bytes: int


class StagePort(TensorSpec):
    """An input or output of a stage. `dims` are one rank's; `from_stage` is None for inputs of the whole graph."""

    cut: Cut | None
    from_stage: int | None = None


class CollectiveRecord(Record):
    """`bytes_per_token`: what one rank sends in a ring, for one token."""

    operation: str
    value: str
    bytes_per_token: int


class PipelineStage(Record):
    """One stage. `files` are the ranks' graphs in order; the weights of `x.onnx` lie in `x.onnx.data`."""

    files: tuple[str, ...]
    inputs: tuple[StagePort, ...]
    outputs: tuple[StagePort, ...]
    weights: tuple[PlacedWeight, ...]
    collectives: tuple[CollectiveRecord, ...]
    rank_bytes: int


class Partition(Artifact):
    """A graph shared out: `tensor` ranks in each of `pipeline` stages. Saved as `partition.json`.

    `states` are (output, input) pairs: what a step leaves for the next one, such as a key-value cache.
    `kept_whole` names weight products that every rank computes whole, and why.
    """

    tensor: int
    pipeline: int
    opset: int
    source_file: str
    source_digest: str
    source_bytes: int
    stages: tuple[PipelineStage, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    states: tuple[tuple[str, str], ...]
    kept_whole: dict[str, str]

    @property
    def rank_bytes(self) -> int:
        """Weights of the rank that holds most."""
        return max(stage.rank_bytes for stage in self.stages)

    @property
    def ideal_bytes(self) -> int:
        return -(-self.source_bytes // (self.tensor * self.pipeline))

    @property
    def bytes_per_token(self) -> int:
        return sum(item.bytes_per_token for stage in self.stages for item in stage.collectives)
