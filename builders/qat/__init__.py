"""Quantisation-aware training: the numbers of an INT8 graph, trained towards the model that it was made of.

layer   a linear layer as the graph has it: gradients go straight through its roundings
graph   an INT8 graph's products read, and its numbers replaced: nodes stay as they are
model   the graph's roundings put into a model, and what training made of them taken out
train   the whole of it: in, trained, out, checked
"""
