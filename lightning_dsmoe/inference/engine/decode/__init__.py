"""Decoding: one new token of each of a few sequences, reading the weights of chosen experts only.

Here belongs what runs for a single token per sequence: choosing experts, the layers on them, a
step made of them, compiling it ahead of time and exporting it. Prompts and larger batches belong in
`batched/`, the layout of weights in `weights/`.
"""
