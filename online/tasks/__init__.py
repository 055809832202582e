"""What can be learnt online: a task says what a row is, its loss, and what is measured of it.

task       the seam: what the memory, the learner, the gate and the loop know of a task
reading    which feedback a task reads, and why not    rates    what the spec leaves open
language   rows of text    encoder   texts side by side in a row, for embeddings and classifiers
embedding  pairs of texts that belong together    classifying  texts and their labels    opening  the task of a spec
"""
