"""The whole way, as one fold: it reads like the diagram in the README. The only importer of all stages.

result     what a build has come to                            choice     precisions tried on this CPU
compress   steps of the spec                                   judged     what they left, and the step at fault
recipe     each step judged, beside what is free               static     the baseline without layers
compare    two models on the same texts                        differences  figure by figure, with the word allowed
judged_language    figures of language models, by the executor that serves them
recipe_language    their recipes                          opened     a checkpoint as a technique gets it
search     recipes tried and timed                             space      what it may choose: arithmetic
front      what it found, as a page
encoder    steps of embedding, classification and reranking    generator  steps of language models
partition  graphs of ranks, proven together                    engines    TensorRT, for each target and rank
proving    the proof of a version
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from builders.checkpoint import load_checkpoint
from builders.engine import tensorrt
from builders.pipeline import choice, compress, encoder, engines, generator, partition, proving
from builders.pipeline.result import Build, Report, Stage, Step, done
from builders.repository import directories, encoder_config, publish
from builders.spec import DeploymentSpec, Platform
from builders.store.store import Store

CHOICE_FILE = "precision.json"  # in the version directory of the model that computes

__all__ = ["Build", "Report", "Stage", "build", "repository_path"]


def build(
    spec: DeploymentSpec,
    platform: Platform,
    root: Path,
    until: Stage,
    report: Report = lambda stage, message: None,
    *,
    keep: Collection[int] = (),
    least: int = 1,
) -> Build:
    """Checkpoint -> compress -> precision (CPU) -> export -> quantise -> partition (several ranks) -> qualify (CPU) or
    engine (GPU) -> repository.

    Each comes from the store if it is there. `keep` and `least` are versions, as `publish` takes them. Raises the
    errors of `builders.errors`; whatever happens, no stage leaves anything half-written.
    """
    if platform == "gpu":
        if spec.generates:
            directories.require_gpu_executor(spec)
        elif spec.parallel.ranks > 1 and until == "repository":
            encoder_config.require_rank_backend(spec)
        tensorrt.require_tensorrt(spec.engine.flavour)
    store = Store(root / "store")
    result = Build(spec, platform, load_checkpoint(spec.model))
    report("checkpoint", f"{result.checkpoint.architecture}, {result.checkpoint.parameters / 1e6:.1f} M parameters")
    kind = generator if spec.generates else encoder
    steps: dict[Stage, Step] = {
        "compress": compress.compress,
        "precision": choice.choose,
        "export": kind.export,
        "quantize": kind.quantize,
        "partition": partition.partition,
        "qualify": lambda *given: choice.weigh(kind.qualify(*given), *given[1:]),
        "engine": engines.engines,
        "repository": lambda built, store, report: _repository(
            proving.make(built, store, report), root, report, keep, least
        ),
    }
    for stage, step in steps.items():
        if until == "checkpoint":
            break
        result = step(result, store, report)
        if stage == until:
            break
    return result


def _repository(built: Build, root: Path, report: Report, keep: Collection[int], least: int) -> Build:
    manifest = (built.ranks,) if built.ranks is not None else ()
    parts = (*built.engines, *manifest) if built.platform == "gpu" else manifest or (built.served_graph,)
    folder = repository_path(root, built.spec, built.platform)
    report("repository", str(folder))
    assert built.proof is not None
    notes = {} if built.choice is None else {CHOICE_FILE: built.choice.model_dump_json(indent=2) + "\n"}
    what = (built.spec, built.platform, built.checkpoint, parts)
    entry, unchanged = publish.publish(
        *what, folder, built.partition, proof=built.proof, notes=notes, keep=keep, least=least
    )
    report("repository", done(f"{entry.ensemble} version {entry.version}", unchanged))
    return replace(built, entry=entry)


def repository_path(root: Path, spec: DeploymentSpec, platform: Platform) -> Path:
    return root / spec.name / platform / "model_repository"
