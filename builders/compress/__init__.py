"""Compression: each technique makes a smaller checkpoint of a checkpoint, an ordinary folder for every later stage.

plan        what a step may ask of a model, from widths alone     texts     calibration text as batches of tokens
kept        which heads, neurons and layers stay: arithmetic      saving    a model as a checkpoint's folder
importance  what each of them is worth                            step      one step of the spec, carried out
prune       the same taken out of the matrices
refit       least squares behind what was pruned          judged    how near it still is, text by text
inputs      what matrices read on calibration text        cluster   codebooks of k-means
sparsify    single weights set to zero                    static    the baseline without layers
low_rank    matrices as products of thin ones
distil      trained towards the original                  losses    each as a function of what both computed
teacher     what the original computed, kept on disk      distil_plan   what a distillation may ask for
"""
