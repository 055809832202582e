"""A small language model of our own, trained on the text that ships with Python.

recipe.py     sizes, schedule and seed, checked, and what training has to tell
text.py       split by document, BPE tokenizer, windows of tokens
training.py   the loop: bf16 arithmetic where the CPU has it, fp32 master weights
judging.py    held-out perplexity and sample completions
folder.py     all of it, to one Hugging Face folder
curve.py      the loss curve as a page
progress.py   what a person sees meanwhile
"""

from builders.small_model.folder import held_out_rows, train_small_model
from builders.small_model.progress import training_progress
from builders.small_model.recipe import Progress, Recipe, TrainingReport

__all__ = ["Progress", "Recipe", "TrainingReport", "held_out_rows", "train_small_model", "training_progress"]
