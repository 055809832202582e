"""OnnxGraph -> Partition: tensor and pipeline parallelism for any standard ONNX transformer.

source      reads a graph: shapes, constants, use-def chains            file -> Source
shapes      sizes that ONNX's own inference leaves open
placement   Replicate | Shard | Partial, and the arithmetic of slices
rules*      one small pure function an operator: how placements pass
solve       seeds a split, lets it spread, keeps what is legal and pays  Source -> Solution
tensor      one rank's graph: local sizes, collectives                   Source, Solution -> LocalGraph
pipeline    where stages are cut                                         LocalGraph -> Stages
weights     slices of weights, streamed from file to files
shard       the whole: partition_graph                                   file -> directory
segments    one rank's graph in pieces between collectives
feeds       inputs for a graph that nobody described    edges  those at the ends of what it takes
contents    a partition's plan and weights against the graph it came from
structure   a rank's graph against the one that the plan makes, node by node
verify      runs every rank, compares with the whole: verify_partition   directory, file -> VerifyReport
tables      what the solver looks for: products with weights, the table of words
served      a partition as the files that the CPU service runs

model gpus  a transformer by its sizes, GPU types by their peaks
plan        how many GPUs, and how they share a model: arithmetic only   Model, Gpu, Load -> Candidates
report      the same for several GPU types: records, rows, a page
picture     the partition map as SVG    page   plans and partitions as maps, and as HTML
"""
