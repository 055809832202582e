"""How many GPUs, and how they share a model: arithmetic and its pictures, no graph needed.

transformer  a transformer by its sizes    gpus  GPU types by their peaks
plan         candidates, what fits, what is best and why     Transformer, Gpu, Load -> Candidates
report       the same for several GPU types: records, rows, a page
picture      the partition map as SVG      page  plans and partitions as maps, and as HTML
"""
