"""Decoding on a GPU: one new token of each of a few sequences, replayed as one CUDA graph.

Every shape is constant and nothing waits for the GPU: which experts run, and how many, stays on the
device. Here belongs what the step on a GPU does otherwise than that of a CPU in `decode/`.
"""
