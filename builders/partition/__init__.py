"""OnnxGraph -> Partition: tensor and pipeline parallelism for any standard ONNX transformer.

read        reads a graph: shapes, constants, use-def chains              file -> Source
shapes      sizes that ONNX's own inference leaves open
placement   Replicate | Shard | Partial, and the arithmetic of slices
rules/      one small pure function an operator: how placements pass

cut/
  tables    what the solver looks for: products with weights, the table of words
  solve     seeds a split, lets it spread, keeps what is legal and pays   Source -> Solution
  localise  one rank's graph: local sizes, collectives                    Source, Solution -> LocalGraph
  stages    where stages are cut                                          LocalGraph -> Stages
  passes    both in a row, each held to what it promises
  weights   slices of weights, streamed from file to files
  shard     the whole: partition_graph                                    file -> directory

prove/
  programs          one rank's graph in pieces between collectives
  feeds  edges      inputs for a graph that nobody described; those at the ends of what it takes
  plan_and_weights  a partition's plan and weights against the graph it came from
  structure         a rank's graph against the one that the plan makes, node by node
  verify            runs every rank, compares with the whole: verify_partition   directory, file -> VerifyReport
  rank_files        a partition as the files that the CPU service runs
"""
