"""Training: a recipe, text as windows of tokens, the loop, and what a person sees of it.

recipe    sizes, schedule and seed, checked, and what training has to tell
text      split by document, BPE tokenizer, windows of tokens
loop      bf16 arithmetic where the CPU has it, fp32 master weights    muon  the optimiser of matrices
curve     the loss curve as a page    progress  what a person sees meanwhile
"""
