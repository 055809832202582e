"""Builds an encoder with INT8 and a partition, and prints the digests: one line, the same in every process.

Arguments: a checkpoint's folder, and one to build in.
"""

import sys
from pathlib import Path

from builders import pipeline
from builders.partition.cut.shard import partition_graph
from builders.partition.prove.rank_files import write_rank_files
from builders.pipeline import generator
from builders.store.closure import code_key
from tests.conftest import tiny_spec
from tests.partition import plain_graphs
from tests.partition.plain_graphs import Shape


def main(checkpoint: Path, out: Path) -> None:
    budget = {"cpu": "int8", "calibration_samples": 16, "min_mean_cosine": 0.5, "min_worst_cosine": 0.1}
    built = pipeline.build(tiny_spec(checkpoint, precision=budget), "cpu", out, "quantize")
    shape = Shape(hidden=32, ffn=64, head=True, qkv="slices", gate="split")
    partition = partition_graph(plain_graphs.transformer(shape, out / "plain.onnx"), 2, 2, out / "ranks", "split")
    (out / "files").mkdir()
    ranks = write_rank_files(partition, out / "files")
    print(*(graph.digest for graph in built.graphs), partition.digest, ranks.digest)
    print(*sorted(path.name for path in (out / "store").glob("*/*")), code_key(generator.qualify)["code"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
