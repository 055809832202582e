"""The GPU proof: one command that measures what is true on a GPU, and what the limit is.

setting    what is measured, and on which device: a GPU, or the CPU for the dry run of the same code
record     the result: sections of rows, as JSON
roofline   bytes and operations counted, and the least time that they take
sections   parts as processes with a time limit each, so that none takes the others down
machine, decoders, step, decoder_engines, encoders, served, several_gpus   the parts
llama      transformers' Llama behind the executor's seam: what is measured where no engine runs
folders    checkpoints, graphs and engines that parts share, built as users build them
page       the result for people, with plots
bundle     everything in a folder that can be carried to a machine without a network
"""
