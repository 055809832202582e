"""Ranks of one model as processes, on this machine or on several.

program   what one rank runs: pieces of its graph, and the collectives between them
worker    one process: ONNX Runtime for the pieces, gloo between ranks
stored    the programs of a group in a folder
process   how a rank's process is started and ended
wire      messages as bytes that run nothing
channel   messages between a group's owner and its ranks, each within a limit of time
group     starts, feeds and ends the processes of a group; nothing waits without a limit, nothing outlives it
step_group  a group behind a step executor, which is replaced when it fails
hosts     a group over several hosts: who they are, and how they prove it to each other
gathering the leader's meeting point      agent  what runs on each other host

On GPUs the worker is `runtime.tensorrt.rank_worker`.
"""
