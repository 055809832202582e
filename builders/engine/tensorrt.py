"""One code path through Polygraphy for both flavours of TensorRT.

`tensorrt-rtx` (TensorRT for RTX) builds for any listed target on a machine without a GPU. `tensorrt` builds for the
GPU of the machine it runs on. Engines of one flavour do not load in the other. Both are strongly typed here: the
precision is the graph's own.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from builders.artifacts import Engine, FileRecord, OnnxGraph, Partition, TensorSpec
from builders.engine.fp8 import require_fp8
from builders.engine.top import add_top
from builders.errors import EngineError, MachineError, SpecError
from builders.graph import describe, fix_dimension
from builders.spec import Flavour, GraphPrecision, ProfileSlice, Range
from runtime.gpu import visible_targets
from runtime.tensorrt.engine import LOGITS

_MODULES: dict[Flavour, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_INSTALL: dict[Flavour, str] = {
    "tensorrt": "install NVIDIA's tensorrt package on a machine with the target GPU, "
    "or set engine.flavour: tensorrt-rtx to build here",
    "tensorrt-rtx": "pip install tensorrt-rtx (x86-64 Linux or Windows)",
}


def engine_file(target: str) -> str:
    return f"model.{target}.plan"


def rank_engine_file(stage: int, rank: int, target: str) -> str:
    return f"stage{stage}.rank{rank}.{target}.plan"


def decoder_engine_file(target: str, capacity: int) -> str:
    return f"model.{target}.{capacity}.plan"


def source_engine_file(target: str) -> str:
    return f"model.{target}.encoder.plan"


def decoder_rank_engine_file(stage: int, rank: int, target: str, capacity: int) -> str:
    return f"stage{stage}.rank{rank}.{target}.{capacity}.plan"


@dataclass(frozen=True)
class Compiled:
    """A serialised engine, and the network that it was built from. `collectives` are the rank counts of each."""

    plan: bytes
    layers: int
    collectives: tuple[int, ...]
    version: str
    seconds: float


def require_tensorrt(flavour: Flavour) -> None:
    """Raises MachineError when the package of this flavour is not installed."""
    if importlib.util.find_spec(_MODULES[flavour]) is None:
        raise MachineError(
            f"engine.flavour {flavour}",
            got=f"no module {_MODULES[flavour]}",
            expected="the TensorRT package of that flavour",
            fix=_INSTALL[flavour],
        )


def build_engine(
    graph: OnnxGraph, flavour: Flavour, target: str, profiles: tuple[ProfileSlice, ...], out: Path
) -> Engine:
    """Writes `model.<target>.plan` into `out`.

    Raises MachineError: no TensorRT, or no GPU where the flavour needs one. SpecError: a target that this TensorRT
    does not know. EngineError: the graph does not parse, an input ends up unused, or the build fails.
    """
    compiled = compile_plan(graph.file_path, flavour, target, profiles, graph.inputs)
    return _record(compiled, out / engine_file(target), flavour, target, graph.precision, profiles, graph.digest)


def build_rank_engine(
    partition: Partition,
    stage: int,
    rank: int,
    precision: GraphPrecision,
    flavour: Flavour,
    target: str,
    profiles: tuple[ProfileSlice, ...],
    out: Path,
) -> Engine:
    """Writes `stage{s}.rank{r}.<target>.plan` into `out`.

    Raises as `build_engine` does, and EngineError when the network has other collectives than the partition says.
    """
    compiled = compile_plan(
        partition.path(partition.stages[stage].files[rank]), flavour, target, profiles, partition.stages[stage].inputs
    )
    _require_partition(compiled, partition, stage, rank)
    file = out / rank_engine_file(stage, rank, target)
    engine = _record(compiled, file, flavour, target, precision, profiles, partition.digest)
    return engine.model_copy(update={"stage": stage, "rank": rank})


def _require_partition(compiled: Compiled, partition: Partition, stage: int, rank: int) -> None:
    part = partition.stages[stage]
    if compiled.collectives != (partition.tensor,) * len(part.collectives):
        raise EngineError(
            f"{part.files[rank]}: its network has collectives over {list(compiled.collectives)} ranks, the partition "
            f"{len(part.collectives)} over {partition.tensor}; shard the graph again"
        )


def decoder_profiles(slots: int, chunk: int) -> tuple[ProfileSlice, ...]:
    """Decoding: up to `slots` rows of one token. Prompts: one row of up to `chunk` tokens.

    In this order: the executor takes the first profile that fits, and a single token is decoding.
    """
    one = Range(min=1, opt=1, max=1)
    return (
        ProfileSlice(batch=Range(min=1, opt=slots, max=slots), length=one),
        ProfileSlice(batch=one, length=Range(min=1, opt=chunk, max=chunk)),
    )


def build_decoder_engine(
    graph: OnnxGraph,
    capacity: int,
    flavour: Flavour,
    target: str,
    profiles: tuple[ProfileSlice, ...],
    out: Path,
) -> Engine:
    """Writes `model.<target>.<capacity>.plan` into `out`: TensorRT wants the length of a cache fixed.

    The engine has one output more than the graph, `top` (see `add_top`). Raises as `build_engine` does.
    """
    compiled = _compile_decoder(graph.file_path, capacity, flavour, target, profiles)
    file = out / decoder_engine_file(target, capacity)
    engine = _record(compiled, file, flavour, target, graph.precision, profiles, graph.digest)
    return engine.model_copy(update={"capacity": capacity})


def build_decoder_rank_engine(
    partition: Partition,
    stage: int,
    rank: int,
    capacity: int,
    precision: GraphPrecision,
    flavour: Flavour,
    target: str,
    profiles: tuple[ProfileSlice, ...],
    out: Path,
) -> Engine:
    """Writes `stage{s}.rank{r}.<target>.<capacity>.plan` into `out`; the last stage's engines have `top`.

    Raises as `build_rank_engine` does.
    """
    graph = partition.path(partition.stages[stage].files[rank])
    compiled = _compile_decoder(graph, capacity, flavour, target, profiles)
    _require_partition(compiled, partition, stage, rank)
    file = out / decoder_rank_engine_file(stage, rank, target, capacity)
    engine = _record(compiled, file, flavour, target, precision, profiles, partition.digest)
    return engine.model_copy(update={"stage": stage, "rank": rank, "capacity": capacity})


def _compile_decoder(
    graph: Path, capacity: int, flavour: Flavour, target: str, profiles: tuple[ProfileSlice, ...]
) -> Compiled:
    inputs, outputs, _ = describe(graph)
    with tempfile.TemporaryDirectory() as scratch:
        # A stage of the model's head alone has no cache; an encoder-decoder's sources get as many positions as outputs.
        for name in ("capacity", "source"):
            if any(name in tensor.dims for tensor in inputs):
                graph = fix_dimension(graph, name, capacity, _folder(scratch, name))
        if any(tensor.name == LOGITS for tensor in outputs):
            graph = add_top(graph, _folder(scratch, "top"))
        return compile_plan(graph, flavour, target, profiles, describe(graph)[0], own_memory=True)


def _folder(parent: str, name: str) -> Path:
    folder = Path(parent, name)
    folder.mkdir()
    return folder


def build_source_engine(graph: OnnxGraph, file: str, longest: int, flavour: Flavour, target: str, out: Path) -> Engine:
    """Writes `model.<target>.encoder.plan` into `out`, of the encoder `file` beside an encoder-decoder's graph.

    One source of up to `longest` tokens at a time. Raises as `build_engine` does.
    """
    one = Range(min=1, opt=1, max=1)
    profiles = (ProfileSlice(batch=one, length=Range(min=1, opt=longest, max=longest)),)
    source = graph.path(file)
    compiled = compile_plan(source, flavour, target, profiles, describe(source)[0], own_memory=True)
    return _record(compiled, out / source_engine_file(target), flavour, target, graph.precision, profiles, graph.digest)


def _record(
    compiled: Compiled,
    file: Path,
    flavour: Flavour,
    target: str,
    precision: GraphPrecision,
    profiles: tuple[ProfileSlice, ...],
    source_digest: str,
) -> Engine:
    file.write_bytes(compiled.plan)
    return Engine(
        directory=file.parent,
        files=(FileRecord.of(file),),
        file=file.name,
        flavour=flavour,
        version=compiled.version,
        target=target,
        precision=precision,
        profiles=profiles,
        layers=compiled.layers,
        collectives=len(compiled.collectives),
        build_seconds=round(compiled.seconds, 2),
        source_digest=source_digest,
    )


def compile_plan(
    graph: Path,
    flavour: Flavour,
    target: str,
    profiles: tuple[ProfileSlice, ...],
    inputs: Sequence[TensorSpec],
    *,
    own_memory: bool = False,
) -> Compiled:
    """Parses, checks that nothing was lost on the way, and builds. Raises as `build_engine` does.

    `own_memory`: the engine computes in memory that its user gives it, and takes none by itself while it runs, which
    would keep CUDA graphs from being captured. TensorRT for RTX must be told; TensorRT takes none anyway.
    """
    trt = _tensorrt(flavour)
    require_fp8(graph, target)
    from polygraphy.backend.trt import Profile, engine_bytes_from_network, network_from_onnx_path
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    started = time.perf_counter()
    configuration = _configuration(trt, flavour, target, [_profile(Profile(), item, inputs) for item in profiles])

    def configured(builder: Any, builds: Any) -> Any:
        config = configuration(builder, builds)
        if own_memory and flavour == "tensorrt-rtx":
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        return config

    G_LOGGER.colors, G_LOGGER.module_severity = False, G_LOGGER.CRITICAL  # its errors come back as exceptions
    try:
        builder, network, parser = network_from_onnx_path(
            str(graph), strongly_typed=hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
        )
        _require_inputs(graph, network, inputs)
        collectives = _require_collectives(trt, graph, network)
        _allow_decomposition(trt, network)
        plan = bytes(engine_bytes_from_network((builder, network, parser), config=configured))
    except PolygraphyException as error:
        raise EngineError(
            f"{flavour} {trt.__version__} cannot build {graph.name} for {target}: {error}. "
            "Check that the graph uses operators that TensorRT's ONNX parser knows, and that shapes fit the profiles"
        ) from error
    seconds = time.perf_counter() - started
    return Compiled(plan, int(network.num_layers), collectives, str(trt.__version__), seconds)


def _tensorrt(flavour: Flavour) -> ModuleType:
    """The module of the flavour. Polygraphy binds to one flavour when it is imported."""
    require_tensorrt(flavour)
    wanted = "1" if flavour == "tensorrt-rtx" else "0"
    if "polygraphy" in sys.modules and os.environ.get("POLYGRAPHY_USE_TENSORRT_RTX", "0") != wanted:
        raise EngineError(f"this process has already built with the other flavour; build {flavour} in a new process")
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = wanted
    return importlib.import_module(_MODULES[flavour])


def _configuration(trt: Any, flavour: Flavour, target: str, profiles: list[Any]) -> Any:
    if flavour == "tensorrt-rtx":
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        known = sorted(name.lower() for name in vars(trt.ComputeCapability) if name.startswith("SM"))
        if target not in known:
            raise SpecError(
                "engine.targets",
                got=target,
                expected=f"a target of TensorRT for RTX {trt.__version__}: {', '.join(known)}",
                fix="choose one of these, or engine.flavour: tensorrt on that GPU",
            )
        digits = target.removeprefix("sm")
        return CreateConfigRTX(compute_capabilities=[(int(digits[:-1]), int(digits[-1]))], profiles=profiles)
    from polygraphy.backend.trt import CreateConfig

    present = visible_targets()
    if target not in present:
        raise MachineError(
            f"engine target {target}",
            got=f"GPUs on this machine: {', '.join(present) or 'none'}",
            expected=f"a GPU of {target}, because TensorRT builds for the GPU it runs on",
            fix="build on such a GPU, or set engine.flavour: tensorrt-rtx",
        )
    # TensorRT 10.16 hides collectives behind a switch; 11 has them without.
    switch = getattr(trt.PreviewFeature, "MULTIDEVICE_RUNTIME_10_16", None)
    return CreateConfig(profiles=profiles, preview_features=[switch] if switch is not None else None)


def _profile(profile: Any, item: ProfileSlice, inputs: Sequence[TensorSpec]) -> Any:
    """Shapes of every input. Dynamic dimensions are known by the names that our exports give them."""
    ranges = {"batch": item.batch, "length": item.length, "source": item.length}

    def shape(tensor: TensorSpec, end: str) -> list[int]:
        sizes = []
        for dim in tensor.dims:
            if isinstance(dim, str) and dim not in ranges:
                raise EngineError(
                    f"input {tensor.name} has the dynamic dimension {dim!r}; profiles give batch and length only. "
                    "A decoder's engines, of fixed cache length, come from `trireme build --platform gpu`"
                )
            sizes.append(dim if isinstance(dim, int) else int(getattr(ranges[dim], end)))
        return sizes

    for tensor in inputs:
        profile.add(tensor.name, *(shape(tensor, end) for end in ("min", "opt", "max")))
    return profile


def _require_inputs(graph: Path, network: Any, inputs: Sequence[TensorSpec]) -> None:
    """The parser drops inputs of operators that it half supports; the engine would then ignore them in silence."""
    used = set()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        used |= {tensor.name for i in range(layer.num_inputs) if (tensor := layer.get_input(i)) is not None}
    unused = [tensor.name for tensor in inputs if tensor.name not in used]
    if unused:
        raise EngineError(
            f"{graph.name}: TensorRT's parser leaves the input {', '.join(unused)} unused, so the engine would compute "
            "something else; compute what depends on it with plain operators in the graph"
        )


def _require_collectives(trt: Any, graph: Path, network: Any) -> tuple[int, ...]:
    """Ranks of each collective. One that the parser drops, or takes for one rank, leaves an engine that is wrong."""
    import onnx

    nodes = [
        node for node in onnx.load(str(graph), load_external_data=False).graph.node if node.op_type == "DistCollective"
    ]
    expected = [attribute.i for node in nodes for attribute in node.attribute if attribute.name == "nb_rank"]
    kind = getattr(trt.LayerType, "DIST_COLLECTIVE", None)
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    found = []
    for layer in layers:
        if kind is not None and layer.type == kind:
            layer.__class__ = trt.IDistCollectiveLayer  # the bindings hand it out as its base class
            found.append(int(layer.num_ranks))
    if sorted(found) != sorted(expected):
        raise EngineError(
            f"{graph.name}: the parsed network of TensorRT {trt.__version__} has {len(found)} collectives with ranks "
            f"{sorted(set(found))}, the graph {len(expected)} with {sorted(set(expected))}; "
            "a TensorRT with multi-device support is needed (11 or newer)"
        )
    return tuple(found)


def _allow_decomposition(trt: Any, network: Any) -> None:
    """Attention may fall apart into several kernels where TensorRT has no fused one: fp32, or an unusual head size.

    Without this such a network does not build at all. Where a fused kernel exists it is still taken.
    """
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # the bindings hand it out as its base class
            layer.attention.decomposable = True
