"""Commands about ranks: sharing a graph out, and proving the shares."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from builders.commands.options import JsonFlag, status


def shard(
    graph: Annotated[Path, typer.Argument(help="ONNX file of a transformer, from any exporter")],
    output: Annotated[Path, typer.Option("-o", "--output", help="new folder for stage{s}.rank{r}.onnx")],
    tensor_parallel: Annotated[int, typer.Option(min=1, help="ranks that share each layer")] = 1,
    pipeline_parallel: Annotated[int, typer.Option(min=1, help="stages that follow each other")] = 1,
    embeddings: Annotated[
        Literal["auto", "whole", "split"],
        typer.Option(help="the table of words: split costs one all-reduce more; auto: when it is over a tenth"),
    ] = "auto",
    html: Annotated[Path | None, typer.Option(help="HTML file to draw the partition in")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Shares a graph out to ranks. `trireme verify` then proves the ranks equal to the whole."""
    from builders.commands import show
    from builders.partition.cut.shard import partition_graph
    from builders.planning.page import map_of_partition, page

    with status(f"shard {graph} for {tensor_parallel} x {pipeline_parallel} ranks", as_json):
        partition = partition_graph(graph, tensor_parallel, pipeline_parallel, output, embeddings)
    if html is not None:
        html.write_text(page(f"Partition of {graph.name}", (), [map_of_partition(partition)]), encoding="utf-8")
    print(partition.model_dump_json(indent=2) if as_json else show.partition_text(partition))


def verify(
    directory: Annotated[Path, typer.Argument(help="folder that `trireme shard` wrote")],
    against: Annotated[Path, typer.Option(help="the graph that was sharded")],
    as_json: JsonFlag = False,
) -> None:
    """Runs every rank as a process on this CPU and compares with the whole graph. Exit 1 on any doubt."""
    from builders.commands import show
    from builders.partition.prove.verify import verify_partition

    with status(f"run the ranks of {directory}", as_json):
        found = verify_partition(directory, against)
    print(found.model_dump_json(indent=2) if as_json else show.verify_text(found))
