"""The proof that goes with a version: made once for a graph, a budget and the texts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from builders.artifacts import FileRecord, ProofFile
from builders.judging import corpus, proof, vectors
from builders.pipeline.result import Build, Report, done
from builders.store.store import Store
from runtime.proof.record import PROOF_FILE


def make(built: Build, store: Store, report: Report) -> Build:
    """Raises QualityError when the served graph is within the budget on no sample of the held-out texts."""
    spec, reference, served = built.spec, built.graph("fp32"), built.served_graph

    def run(out: Path) -> ProofFile:
        _, held_out = vectors.calibration_and_held_out(spec.precision)
        found = proof.make_proof(spec, built.platform, built.checkpoint, reference, served, held_out)
        (out / PROOF_FILE).write_text(found.model_dump_json() + "\n")
        return ProofFile(directory=out, files=(FileRecord.of(out / PROOF_FILE),), file=PROOF_FILE)

    report("repository", "proof")
    item, hit = store.get_or_build(
        "proof",
        {
            "reference": reference.digest,
            "served": served.digest,
            "checkpoint": built.checkpoint.digest,
            "task": built.checkpoint.task,
            "max_length": built.checkpoint.max_length,
            "budget": spec.precision.model_dump(mode="json", exclude={"cpu", "gpu", "calibration_texts"}),
            "serving": spec.serving.model_dump(
                mode="json", include={"max_batch_size", "queue_size", "response_cache_bytes"}
            ),
            "cache": spec.cache_lengths_on(built.platform) if spec.generates else (),
            "chunk": spec.generation.chunk_tokens,
            "texts": corpus.corpus_key(spec.precision.calibration_texts),
        },
        ProofFile,
        run,
    )
    report("repository", done(f"proof, {item.bytes / 1e3:.0f} kB", hit))
    return replace(built, proof=item)
