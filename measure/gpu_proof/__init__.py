"""The GPU proof: one command that measures what is true on a GPU, and what the limit is.

__main__   the command: sections in their order, the result's folder, exit codes
setting    what is measured, and on which device: a GPU, or the CPU for the dry run of the same code
sections   each section a process with a time limit, so that none takes the others down
timing     a call's time on the device; a case that cannot be measured says why
record     the result, as JSON            page     the result for people, with plots
roofline   bytes and operations counted, and the least time that they take
machine    the machine and its limits; all-reduces over several GPUs
decoders   transformers' Llama in torch   decoder_engines   our step executor over TensorRT's engines
encoders   transformers' BERT in torch, and TensorRT's engines
served     through Triton's port, and on several ranks
folders    checkpoints, engines and repositories, built as users build them
bundle.sh  everything in a folder that can be carried to a machine without a network, and run.sh, which runs it there
"""
