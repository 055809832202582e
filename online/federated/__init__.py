"""Federated rounds: clients learn on text that stays with them, and a coordinator joins what they learnt.

plan       what a coordinator decides of the rounds    errors  what goes wrong on purpose
rounds     the state machine of a round: no clock, no network, no file of its own
checks     what an update must be before it counts    aggregate  updates -> one step: shares, trimmed mean, momentum
moments    Adam's, beside the weights    tensors  both by name, and their files
keeping    the last complete round on disk, and a record of each
wire       messages, and tensors as safetensors in pieces; nothing is pickled    tls  both sides show a certificate
coordinator  the rounds, driven    door  the same over gRPC
local      what a client learns in a round    client  its side of all rounds
"""
