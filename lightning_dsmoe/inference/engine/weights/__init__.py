"""Storage of weights for inference and their products with a few tokens.

Here belongs how a weight lies in memory (row-major, tiled, int8), what puts a decoder's weights
into such a layout, and matrix-vector products that compile into loops. What a layer does with the
products belongs in `decode/` and `batched/`.
"""
