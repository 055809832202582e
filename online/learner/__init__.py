"""An update of a version from new rows that keeps what it knew: replay, a pull, and a step part of the way.

recipe   what a user decides    memory  what a version keeps of its past: replayed rows, a hold-out of each domain
batches  new and replayed rows    weights  a model's file, written as the one before    blend  weights between two
importance  how much each weight matters to what was learnt: a guard without old rows
low_rank  matrices beside the model's own    update   a version and new rows -> a candidate folder
"""
