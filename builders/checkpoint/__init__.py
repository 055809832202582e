"""A Hugging Face id, a local folder or the packaged MiniLM -> Checkpoint.

Everything is checked from the files alone (JSON and safetensors headers), before any heavy library loads. What changes
a model's outputs is honoured, or refused by name.

load         the whole               source     where the folder is    reading    JSON files and their faults
architecture which models, lengths   weights    the files of weights        adapter    LoRA beside or instead of them
widths       layers that are not all alike                              codebooks  weights stored as indices
sentence     sentence-transformers   tokenizer  ids that the model knows    generation what a language model ends with
"""

from builders.checkpoint.architecture import ENCODERS, position_offset
from builders.checkpoint.load import load_checkpoint, load_config

__all__ = ["ENCODERS", "load_checkpoint", "load_config", "position_offset"]
