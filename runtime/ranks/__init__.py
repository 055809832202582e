"""Ranks of one model as processes on this machine.

program   what one rank runs: pieces of its graph, and the collectives between them
worker    one process: ONNX Runtime for the pieces, gloo between ranks
group     starts, feeds and ends the processes of a group; nothing waits without a limit, nothing outlives it
"""
