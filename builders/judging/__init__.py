"""What is good enough, and how that is known: texts, figures, budgets, and the proof that a version carries.

corpus      texts: packaged, or the user's; calibration and held-out parts
vectors     encoders: cosines and agreement with the reference    perplexity  language models: the same of tokens
parity      exported against the checkpoint's own module
precision   candidates against budgets: what is taken, and why the others are not    speed  what each takes here
retrieval   what embeddings are for                     labels      classifiers where labels are given
intervals   how far a figure may be trusted
proof       inputs and the reference's outputs, for a version to carry
"""
