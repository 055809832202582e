"""A small language model of our own, trained on the text that ships with Python.

judging   held-out perplexity and sample completions
folder    text, training and judging, to one Hugging Face folder
"""
