"""Ranks of one model as processes, on this machine or on several.

program   what one rank runs: pieces of its graph, and the collectives between them
worker    one process: ONNX Runtime for the pieces, gloo between ranks
engine_worker, engines, nccl     the same on a GPU: TensorRT engines, which of them, NCCL between ranks
process   how a rank's process is started and ended
channel   messages between a group's owner and its ranks, each within a limit of time
group     starts, feeds and ends the processes of a group; nothing waits without a limit, nothing outlives it
hosts     a group over several hosts: the leader's meeting point, and the agent on each other host
"""
