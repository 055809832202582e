"""Generation: many streams of tokens from one decoder, batched continuously.

request      what a caller asks for, checked; what comes back
sequence     one request under way: its tokens, its random numbers, its text
cache        which row of which pool holds whose keys and values; plans copies, touches no memory
grouping     which rows run in one call: reading empty positions against reading the weights again
scheduler    who runs next: continuous batching, chunked prefill, fairness; pure, the clock is an argument
sampler      logits to tokens, over all rows at once
detokenizer  tokens to text as they come; whole characters, stop strings held back
metrics      what an operator wants to see, as plain numbers
engine       the loop: receive, plan, run, sample, deliver
recovery     a fresh executor after a fault, and when to give up
executor/    what runs the graph on a CPU: OpenVINO, ONNX Runtime, rank processes
opening      a version directory of a model repository -> a running engine
"""
