"""Training: one loop for every model, the small language model, and what a person sees of it.

loop        bounds, steps in bf16 where the CPU has it with fp32 master weights, the last good state
optimiser   which optimiser moves which weights, and how fast    muon  the one for matrices
resume      the state in a file, for a process that is killed    arithmetic  bf16 or fp32, and seeds
curve       the loss curve as a page    progress  what a person sees meanwhile
recipe      of the small language model: sizes, schedule and seed, checked, and what training has to tell
text        split by document, BPE tokenizer, windows of tokens    language  the model, trained by the loop
"""
